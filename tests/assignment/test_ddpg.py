"""The agent: its memory, its exploration, one update by hand, and its state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.assignment.ddpg import DdpgAgent, DdpgSettings, Memory, Transitions, truncated_normal
from lowbit.errors import SpecError

SMALL = DdpgSettings(hidden=(8, 6), batch_size=4, warmup=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def episodes(agent: DdpgAgent, first: int, last: int) -> list[float]:
    """Actions of some episodes of three steps whose reward is the mean action."""
    taken = []
    for episode in range(first, last):
        states = [torch.tensor([float(place), 1.0]) for place in range(4)]
        actions = [agent.act(state, episode) for state in states[:3]]
        agent.learn(zip(states[:3], actions, strict=True), states[3], sum(actions) / 3, episode)
        taken += actions
    return taken


def test_the_memory_gives_steps_with_the_state_behind_them_and_never_the_end_of_an_episode() -> None:
    memory = Memory(100, 1)
    for episode in range(3):
        for place in range(2):
            memory.append_step(torch.tensor([10.0 * episode + place]), 0.1 * place, float(episode), is_last=place == 1)
        memory.append_last_state(torch.tensor([10.0 * episode + 2]))
    batch = memory.sample(6, seeded())
    order = batch.state[:, 0].argsort()
    assert batch.state[order, 0].tolist() == [0, 1, 10, 11, 20, 21]  # without replacement, as there are enough
    assert batch.next_state[order, 0].tolist() == [1, 2, 11, 12, 21, 22]
    assert batch.goes_on[order, 0].tolist() == [1, 0, 1, 0, 1, 0]
    assert batch.reward[order, 0].tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.action[order, 0].tolist() == pytest.approx([0, 0.1, 0, 0.1, 0, 0.1])
    assert len(memory.sample(50, seeded()).state) == 50


def test_the_newest_step_is_not_drawn_before_its_next_state_is_there() -> None:
    memory = Memory(100, 1)
    memory.append_step(torch.tensor([0.0]), 0.0, 0.0, is_last=False)
    memory.append_step(torch.tensor([1.0]), 0.0, 0.0, is_last=True)
    assert memory.sample(20, seeded()).state.unique().tolist() == [0.0]


def test_the_memory_drops_the_oldest_entries() -> None:
    memory = Memory(3, 1)
    for value in range(5):
        memory.append_step(torch.tensor([float(value)]), 0.0, 0.0, is_last=False)
    assert memory.entries[:, 0].tolist() == [2.0, 3.0, 4.0]


def test_actions_are_uniform_at_first_and_then_around_the_actor() -> None:
    agent = DdpgAgent(2, SMALL, seeded())
    state = torch.tensor([0.5, 0.5])
    first = torch.tensor([agent.act(state, 0) for _ in range(2000)])
    assert first.mean().item() == pytest.approx(0.5, abs=0.03)
    assert first.std().item() == pytest.approx(12**-0.5, abs=0.02)
    late = torch.tensor([agent.act(state, 602) for _ in range(500)])
    assert agent.noise(602) == pytest.approx(0.5 * 0.99**600)
    assert late.mean().item() == pytest.approx(agent.actor(state[None]).item(), abs=3e-4)
    assert late.std().item() == pytest.approx(agent.noise(602), rel=0.15)


def test_the_truncated_normal_has_the_moments_of_its_density() -> None:
    for mean, deviation in ((0.5, 0.5), (0.1, 0.3), (0.97, 0.05)):
        u = (torch.arange(4000) + 0.5) / 4000
        drawn = torch.tensor([truncated_normal(mean, deviation, float(place)) for place in u])
        x = torch.linspace(0, 1, 20001, dtype=torch.float64)
        density = (-((x - mean) / deviation).square() / 2).exp()
        wanted = (x * density).sum() / density.sum()
        assert drawn.min() >= 0
        assert drawn.max() <= 1
        assert drawn.mean().item() == pytest.approx(float(wanted), abs=1e-3)


def test_one_update_follows_the_equations() -> None:
    agent = DdpgAgent(2, DdpgSettings(hidden=(4, 3), discount=0.9, tau=0.25), seeded())
    generator = seeded(1)
    state, action, reward, following = (torch.rand(5, size, generator=generator) for size in (2, 1, 1, 2))
    goes_on = torch.tensor([[1.0], [0.0], [1.0], [1.0], [0.0]])
    before = {name: value.clone() for name, value in agent.state().items()}
    with torch.no_grad():
        target = reward - reward.mean() + 0.9 * goes_on * agent.critic(following, agent.actor(following))
        wanted = (agent.critic(state, action) - target).square().mean()
    critic_loss, _ = agent.update(Transitions(state, action, reward, following, goes_on))
    assert critic_loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert agent.baseline == pytest.approx(reward.mean().item())
    for name, value in agent.state().items():
        network, _, parameter = name.partition(".")
        if network in ("actor", "critic"):
            step = (value - before[name]).abs()  # Adam's first step is the learning rate wherever there is a gradient
            rate = 1e-4 if network == "actor" else 1e-3
            assert bool(((step - rate).abs() < 0.05 * rate).logical_or(step == 0).all()), name
            drawn = 0.75 * before[name] + 0.25 * value
            torch.testing.assert_close(agent.state()[f"{network}_target.{parameter}"], drawn)
    agent.update(Transitions(state, action, reward + 1, following, goes_on))
    assert agent.baseline == pytest.approx(reward.mean().item() + 0.5)


def test_nothing_is_trained_before_the_warm_up_is_over() -> None:
    agent = DdpgAgent(2, SMALL, seeded())
    before = {name: value.clone() for name, value in agent.actor.state_dict().items()}
    episodes(agent, 0, 3)  # 0 .. warmup
    assert all(torch.equal(value, before[name]) for name, value in agent.actor.state_dict().items())
    assert len(agent.memory.entries) == 3 * 4
    episodes(agent, 3, 4)
    assert not all(torch.equal(value, before[name]) for name, value in agent.actor.state_dict().items())


def test_an_agent_goes_on_from_a_saved_state_to_the_same_numbers() -> None:
    straight = DdpgAgent(2, SMALL, seeded())
    wanted = episodes(straight, 0, 12)
    for stop in (0, 2, 7):
        first = DdpgAgent(2, SMALL, seeded())
        actions = episodes(first, 0, stop)
        saved: dict[str, Tensor] = {name: value.clone() for name, value in first.state().items()}
        second = DdpgAgent(2, SMALL, seeded(99))
        second.load_state(saved)
        assert actions + episodes(second, stop, 12) == wanted
        assert straight.state().keys() == second.state().keys()
        assert all(torch.equal(value, second.state()[name]) for name, value in straight.state().items())


def test_making_an_agent_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(1)
    torch.manual_seed(5)
    DdpgAgent(2, SMALL, seeded())
    assert torch.equal(torch.rand(1), wanted)


def test_numbers_out_of_range_are_errors() -> None:
    with pytest.raises(SpecError, match="tau must be from 0 to 1, got 2"):
        DdpgSettings(tau=2)
    with pytest.raises(SpecError, match=r"hidden must be the widths of two layers, such as \(300, 300\), got \(300,\)"):
        DdpgSettings(hidden=(300,))  # type: ignore[arg-type]
