"""The walk over layers: what the agent sees, what its actions mean, budgets, rewards; and an agent that learns an oracle."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.assignment.costs import Assignment, Cost
from lowbit.assignment.ddpg import DdpgAgent, DdpgSettings
from lowbit.assignment.environment import Environment, LayerFacts, action_to_bits, code_cost, embedding, facts_of, share
from lowbit.assignment.episodes import EpisodeLog, run_episode
from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.network.insert import weight_sites
from lowbit.spec import LayerBits

FACTS = {name: LayerFacts(place == 1, 4 * place + 3, 8, 1, 3, 100 * (place + 1), 64) for place, name in enumerate("abc")}
COUNTS = {name: facts.weights for name, facts in FACTS.items()}
WEIGHTS = dict.fromkeys(FACTS, tuple(LayerBits(bits, None) for bits in range(1, 9)))
PAIRS = dict.fromkeys(FACTS, tuple(LayerBits(w, a) for w in range(2, 9) for a in range(2, 9)))


def products(choices: dict[str, tuple[LayerBits, ...]]) -> Cost:
    """Weights times weight bits times input bits."""
    table = {n: {bits: float(COUNTS[n] * (bits.weight or 32) * (bits.activation or 8)) for bits in own} for n, own in choices.items()}
    return Cost("latency", "cycles", table, reference=64.0 * sum(COUNTS.values()))


def environment(choices: dict[str, tuple[LayerBits, ...]], budget: float, cost: Cost | None = None, **given: object) -> Environment:
    cost = cost or (code_cost(COUNTS, choices) if choices is WEIGHTS else products(choices))
    settings = {"measure": lambda bits: 60.0, "original": 65.0, **given}
    return Environment(FACTS, choices, [(cost, budget * cost.reference)], **settings)  # type: ignore[arg-type]


def walk(env: Environment, actions: list[float]) -> list[tuple[torch.Tensor, float, bool]]:
    env.reset()
    return [env.step(action) for action in actions]


@pytest.mark.parametrize(("lowest", "highest"), [(1, 8), (2, 8), (2, 4), (3, 7)])
def test_actions_reach_every_width_in_bins_of_equal_length(lowest: int, highest: int) -> None:
    count = highest - lowest + 1
    bits = [action_to_bits((place + 0.5) / (100 * count), lowest, highest) for place in range(100 * count)]
    assert bits == sorted(bits)
    assert [bits.count(width) for width in range(lowest, highest + 1)] == [100] * count
    assert action_to_bits(0.0, lowest, highest) == lowest
    assert action_to_bits(1.0, lowest, highest) == highest


def test_columns_are_scaled_to_0_and_1_unless_all_layers_are_equal() -> None:
    found = embedding(list(FACTS.values()), 1.0, 1.0)
    assert found[:, 0].tolist() == [0, 1, 0]
    assert found[:, 1].tolist() == [0, 0.5, 1]
    assert found[:, 2].tolist() == [8, 8, 8]
    assert found[:, 7].tolist() == [0, 0.5, 1]
    assert found[:, 8:].tolist() == [[1, 1]] * 3


def test_facts_are_those_of_the_layers() -> None:
    layers = [nn.Conv2d(4, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 5, groups=8), nn.Flatten(), nn.Linear(32, 3)]
    model = nn.Sequential(*layers)
    found = facts_of(model, Inputs.of(torch.zeros(1, 4, 12, 12), model), weight_sites(model))
    assert found == {
        "0": LayerFacts(False, 4, 8, 2, 3, 288, 144),
        "1": LayerFacts(True, 8, 8, 1, 5, 200, 36),
        "3": LayerFacts(False, 32, 3, 0, 1, 96, 32),
    }


def test_observations_hold_the_last_action_and_which_decision_comes() -> None:
    env = environment(PAIRS, 1.0)
    assert env.reset()[8:].tolist() == [1.0, 1.0]
    seen = walk(env, [0.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    assert [step[0][8:].tolist() for step in seen[:4]] == [[0.25, 0.0], [1.0, 1.0], [0.625, 0.0], [0.25, 1.0]]
    assert [step[0][7].item() for step in seen] == [0, 0.5, 0.5, 1, 1, 1]
    assert [step[2] for step in seen] == [False] * 5 + [True]
    assert torch.equal(seen[-1][0], seen[-2][0])
    assert env.reset()[8:].tolist() == [1.0, 1.0]
    assert env.chosen["a"] == LayerBits(8, 8)


def test_the_authors_flag_is_about_the_decision_before_and_a_walk_remembers_the_last_one() -> None:
    env = environment(PAIRS, 1.0, flag="previous", forgets=False)
    seen = walk(env, [0.0, 1.0, 0.5, 0.0, 0.0, 0.0])
    assert [step[0][8:].tolist() for step in seen[:4]] == [[0.25, 1.0], [1.0, 0.0], [0.625, 1.0], [0.25, 0.0]]
    assert env.reset()[8:].tolist() == [0.25, 1.0]


def test_with_weights_alone_there_is_one_decision_for_each_layer_and_no_flag() -> None:
    env = environment(WEIGHTS, 1.0, first_action=4.0, actions="bits")
    assert env.state_size == 9
    assert env.reset()[8].item() == 4.0
    assert [step[0][8].item() for step in walk(env, [1.0, 0.3, 0.0])] == [8.0, 3.0, 3.0]


def test_widths_may_have_gaps() -> None:
    choices = dict.fromkeys(FACTS, tuple(LayerBits(bits, None) for bits in (8, 4, 2)))
    env = environment(choices, 1.0, code_cost(COUNTS, choices))
    walk(env, [0.32, 0.34, 0.67])
    assert [bits.weight for bits in env.bits.values()] == [2, 4, 8]


def test_a_layer_without_a_choice_is_no_decision() -> None:
    choices = {**PAIRS, "b": (LayerBits(4, 8),), "c": tuple(LayerBits(4, a) for a in range(2, 9))}
    env = environment(choices, 1.0)
    assert env.decisions == [("a", "weight"), ("a", "activation"), ("c", "activation")]
    walk(env, [0.0, 0.0, 0.0])
    assert env.bits == {"a": LayerBits(2, 2), "b": LayerBits(4, 8), "c": LayerBits(4, 2)}
    with pytest.raises(SpecError, match="nothing to decide"):
        environment(dict.fromkeys(FACTS, (LayerBits(4, 8),)), 1.0)


def test_the_last_layers_are_lowered_first_the_input_before_the_weight() -> None:
    full = {name: LayerBits(8, 8) for name in FACTS}
    cost = products(PAIRS)
    after = []
    for place in (1, 2, 3):  # budgets that one, two and three steps down just meet
        steps = [("c", LayerBits(8, 7)), ("c", LayerBits(7, 7)), ("b", LayerBits(8, 7))][:place]
        env = environment(PAIRS, cost.of({**full, **dict(steps)}) / cost.reference)
        after.append(env.within_budgets(full))
    assert after[0] == {**full, "c": LayerBits(8, 7)}
    assert after[1] == {**full, "c": LayerBits(7, 7)}
    assert after[2] == {**full, "c": LayerBits(7, 7), "b": LayerBits(8, 7)}


def test_budgets_hold_after_every_walk_and_bits_are_never_raised() -> None:
    env = environment(PAIRS, 0.2)
    cost, limit = env.budgets[0]
    for seed in range(20):
        walk(env, torch.rand(6, generator=torch.Generator().manual_seed(seed)).tolist())
        assert cost.of(env.bits) <= limit
        for name, bits in env.bits.items():
            assert 2 <= (bits.weight or 0) <= (env.chosen[name].weight or 0)
            assert 2 <= (bits.activation or 0) <= (env.chosen[name].activation or 0)
        if cost.of(env.chosen) <= limit:
            assert env.bits == env.chosen


def test_several_budgets_hold_together() -> None:
    choices = dict(PAIRS)
    size, time = code_cost(COUNTS, choices), products(choices)
    env = Environment(FACTS, choices, [(size, 0.15 * size.reference), (time, 0.1 * time.reference)], measure=lambda bits: 0.0, original=0.0)
    walk(env, [1.0] * 6)
    assert share(size, env.bits) <= 0.15
    assert share(time, env.bits) <= 0.1


def pinned_choices() -> dict[str, tuple[LayerBits, ...]]:
    return {name: (*widths, LayerBits(8, None)) if name == "a" else widths for name, widths in PAIRS.items()}


@pytest.mark.parametrize("pins", ["always", "over budget"])
def test_pinned_layers_keep_their_bits(pins: str) -> None:
    pinned = {"a": LayerBits(8, None), "c": LayerBits(8, 8)}
    choices, cost = PAIRS, products(pinned_choices())
    low = environment(choices, 0.9, cost, pinned=pinned, pins=pins)
    walk(low, [0.0] * 6)  # within the budget as it is
    assert low.bits == ({**pinned, "b": LayerBits(2, 2)} if pins == "always" else dict.fromkeys(FACTS, LayerBits(2, 2)))
    high = environment(choices, 0.8, cost, pinned=pinned, pins=pins)
    walk(high, [1.0] * 6)
    assert {name: high.bits[name] for name in pinned} == pinned
    assert high.bits["b"] == LayerBits(5, 5)  # 200 * b <= 0.8 * 38400 - 400 * 64


def test_a_budget_that_cannot_be_met_names_the_least_possible_cost() -> None:
    with pytest.raises(SpecError, match="599 bits cannot be met; at the lowest bits of all layers, the network costs 600 bits"):
        environment(WEIGHTS, 599 / 19200)
    environment(WEIGHTS, 600 / 19200)


def test_pins_above_the_budget_are_an_error_and_no_endless_loop() -> None:
    pinned = {"a": LayerBits(8, None), "c": LayerBits(8, 8)}
    cost = products(pinned_choices())
    with pytest.raises(SpecError, match="a, c keeping their bits, the network costs 26400 cycles"):
        environment(PAIRS, 0.5, cost, pinned=pinned)
    env = environment(PAIRS, 0.5, cost, pinned=pinned, pins="over budget")  # possible only without pins
    with pytest.raises(SpecError, match="the network costs 26400 cycles"):
        walk(env, [1.0] * 6)


def test_the_reward_is_a_tenth_of_the_change_of_accuracy_and_comes_at_the_end() -> None:
    rewards = []
    for accuracy in (60.0, 61.0, 70.0):
        seen = walk(environment(WEIGHTS, 1.0, measure=lambda bits, accuracy=accuracy: accuracy), [0.5, 0.5, 0.5])
        assert [step[1] for step in seen[:2]] == [0.0, 0.0]
        rewards.append(seen[-1][1])
    assert rewards == pytest.approx([-0.5, -0.4, 0.5])


def test_an_agent_learns_what_an_oracle_knows() -> None:
    facts = {str(i): LayerFacts(i % 3 == 1, 8 * i + 8, 16 * i + 16, 1 + i % 2, 3, 100 * (i + 1) * (i % 4 + 1), 1024 >> i) for i in range(6)}
    choices = dict.fromkeys(facts, tuple(LayerBits(bits, None) for bits in range(1, 9)))
    cost = code_cost({name: own.weights for name, own in facts.items()}, choices)
    importance = {name: 12.0 * (1 + (i * 7) % 5) for i, name in enumerate(facts)}

    def oracle(bits: Assignment) -> float:
        return 100 - math.fsum(importance[name] * 4.0 ** (1 - (own.weight or 32)) for name, own in bits.items())

    def rewards(warmup: int) -> list[float]:
        env = Environment(facts, choices, [(cost, 0.125 * cost.reference)], measure=oracle, original=100.0)
        settings = DdpgSettings(hidden=(64, 64), warmup=warmup)
        agent, log = DdpgAgent(env.state_size, settings, torch.Generator().manual_seed(0), 128 * 6), EpisodeLog()
        for episode in range(150):
            log.add(run_episode(env, agent, episode), env)
        assert oracle({name: LayerBits(*own) for name, own in zip(facts, log.bits, strict=True)}) == log.accuracy
        return log.rewards

    random, learned = rewards(150), rewards(15)
    assert max(learned) > sum(random) / len(random) + 3
    assert sum(learned[-50:]) / 50 > sum(random) / len(random) + 2  # and so do its policies on average
