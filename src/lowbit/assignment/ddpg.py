"""Deep deterministic policy gradient: an agent whose action is one number in [0, 1].

Source: Lillicrap et al. 2016, "Continuous Control with Deep Reinforcement Learning", Algorithm 1; with what Wang et al. 2019, "HAQ",
section 3.6, change: no discount, a moving average of the rewards as baseline, noise from a truncated normal distribution.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from lowbit.errors import SpecError
from lowbit.options import Above, AtLeast, CheckedSettings, Interval


@dataclass
class DdpgSettings(CheckedSettings):
    """Numbers of the agent, with HAQ's defaults.

    Attributes:
        hidden: Width of the two hidden layers of actor and critic.
        actor_learning_rate, critic_learning_rate: Learning rates of Adam.
        tau: Share of the trained networks that goes into the target networks at each update.
        discount: Weight of the value of the next state.
        batch_size: Transitions of an update.
        warmup: The episodes ``0 .. warmup`` take random actions and train nothing.
        noise: Standard deviation of the exploration at episode ``warmup``, before it is truncated.
        noise_decay: Factor of it for each later episode.
        baseline_rate: Share of the mean reward of a batch that enters its moving average.
    """

    hidden: Annotated[tuple[int, int], AtLeast(1)] = (300, 300)
    actor_learning_rate: Annotated[float, Above(0)] = 1e-4
    critic_learning_rate: Annotated[float, Above(0)] = 1e-3
    tau: Annotated[float, Interval(0, 1)] = 0.01
    discount: Annotated[float, Interval(0, 1)] = 1.0
    batch_size: Annotated[int, AtLeast(1)] = 64
    warmup: Annotated[int, AtLeast(0)] = 20
    noise: Annotated[float, Above(0)] = 0.5
    noise_decay: Annotated[float, Interval(0, 1, closed="right")] = 0.99
    baseline_rate: Annotated[float, Interval(0, 1)] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.hidden) != 2:
            raise SpecError(f"hidden must be the widths of two layers, such as (300, 300), got {self.hidden}")


@dataclass(frozen=True)
class Transitions:
    """A batch of steps.

    Attributes:
        state, next_state: ``[n, size]``.
        action, reward: ``[n, 1]``.
        goes_on: ``[n, 1]``, 0 where the step ended its episode, else 1.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    next_state: Tensor
    goes_on: Tensor


class Actor(nn.Module):
    """State to action: two hidden layers with ReLU, a sigmoid behind the third."""

    def __init__(self, state_size: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_size, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], 1)

    def forward(self, state: Tensor) -> Tensor:
        action: Tensor = self.fc3(self.fc2(self.fc1(state).relu()).relu()).sigmoid()
        return action


class Critic(nn.Module):
    """State and action to the value of the action: both enter the first hidden layer, each through a layer of its own."""

    def __init__(self, state_size: int, hidden: tuple[int, int]) -> None:
        super().__init__()
        self.fc11 = nn.Linear(state_size, hidden[0])
        self.fc12 = nn.Linear(1, hidden[0])
        self.fc2 = nn.Linear(hidden[0], hidden[1])
        self.fc3 = nn.Linear(hidden[1], 1)

    def forward(self, state: Tensor, action: Tensor) -> Tensor:
        value: Tensor = self.fc3(self.fc2((self.fc11(state) + self.fc12(action)).relu()).relu())
        return value


_STEP, _LAST_STEP, _LAST_STATE = 0.0, 1.0, 2.0  # kinds of entries


class Memory:
    """The latest entries of all episodes in order: their steps, and behind each episode the state that its last step led to.

    The next state of a step is that of the entry behind it.
    """

    def __init__(self, capacity: int, state_size: int) -> None:
        self.capacity = capacity
        self.entries = torch.empty(0, state_size + 3)  # state, action, reward, kind

    def append_step(self, state: Tensor, action: float, reward: float, *, is_last: bool) -> None:
        """Add a step, and drop the oldest entry where there is no room."""
        self._append(state, action, reward, _LAST_STEP if is_last else _STEP)

    def append_last_state(self, state: Tensor) -> None:
        """Add the state that the last step of an episode led to."""
        self._append(state, 0.0, 0.0, _LAST_STATE)

    def _append(self, state: Tensor, action: float, reward: float, kind: float) -> None:
        entry = torch.cat([state.float(), torch.tensor([action, reward, kind])])
        self.entries = torch.cat([self.entries, entry[None]])[-self.capacity :]

    def sample(self, count: int, generator: torch.Generator) -> Transitions:
        """``count`` steps at random, each at most once where there are that many; never the newest entry, whose next state is not there yet."""
        steps = (self.entries[:-1, -1] != _LAST_STATE).nonzero()[:, 0]
        if len(steps) >= count:
            index = steps[torch.randperm(len(steps), generator=generator)[:count]]
        else:
            index = steps[torch.randint(len(steps), (count,), generator=generator)]
        drawn = self.entries[index]
        action, reward, kind = drawn[:, -3:].unbind(1)
        goes_on = (kind != _LAST_STEP).float()
        return Transitions(drawn[:, :-3], action[:, None], reward[:, None], self.entries[index + 1, :-3], goes_on[:, None])


class DdpgAgent:
    """Chooses actions and learns from the steps of past episodes.

    Everything random comes from one generator, and ``state`` is all that a later agent needs to go on as this one would.

    Args:
        state_size: Length of an observation.
        settings: Numbers of the agent.
        generator: Random numbers, on the CPU; the networks start from it too.
        capacity: Entries of the memory, 3 or more; the oldest are dropped.

    Attributes:
        actor, critic, actor_target, critic_target: The networks.
        memory: Past steps.
        baseline: Moving average of the mean rewards of batches; ``None`` before the first update.
    """

    def __init__(self, state_size: int, settings: DdpgSettings, generator: torch.Generator, capacity: int = 128) -> None:
        self.settings, self.generator = settings, generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            self.actor, self.critic = Actor(state_size, settings.hidden), Critic(state_size, settings.hidden)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), settings.actor_learning_rate)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), settings.critic_learning_rate)
        self.memory = Memory(capacity, state_size)
        self.baseline: float | None = None
        self.reset_targets()

    def reset_targets(self) -> None:
        """Let the target networks be copies of the trained ones."""
        self.actor_target, self.critic_target = copy.deepcopy(self.actor), copy.deepcopy(self.critic)

    def noise(self, episode: int) -> float:
        """Standard deviation of the exploration: ``noise * noise_decay ** (episode - warmup)``."""
        return self.settings.noise * self.settings.noise_decay ** (episode - self.settings.warmup)

    @torch.no_grad()
    def act(self, state: Tensor, episode: int) -> float:
        """Uniform in [0, 1] up to ``warmup``, then normal around what the actor says, truncated to [0, 1]."""
        drawn = torch.rand((), generator=self.generator, dtype=torch.float64)
        if episode <= self.settings.warmup:
            return float(drawn)
        return truncated_normal(float(self.actor(state[None])), self.noise(episode), float(drawn))

    def learn(self, steps: Iterable[tuple[Tensor, float]], last_state: Tensor, reward: float, episode: int) -> None:
        """Remember an episode and train, once for each of its steps, unless it is one of the first.

        Args:
            steps: State and action of each step.
            last_state: The state after the last step.
            reward: The final reward, which every step gets.
            episode: Number of the episode, from 0 on.
        """
        taken = list(steps)
        for index, (state, action) in enumerate(taken, 1):
            self.memory.append_step(state, action, reward, is_last=index == len(taken))
            if episode > self.settings.warmup:
                self.update(self.memory.sample(self.settings.batch_size, self.generator))
        self.memory.append_last_state(last_state)

    def update(self, batch: Transitions) -> tuple[Tensor, Tensor]:
        """Train critic and actor on a batch, then draw the target networks a little towards them.

        With ``m`` the moving average of the batches' mean rewards, this batch included: the critic descends on the squared distance to
        ``reward - m + discount * goes_on * critic_target(next_state, actor_target(next_state))``, the actor on
        ``-critic(state, actor(state))``.

        Returns:
            The losses of critic and actor.
        """
        mean = float(batch.reward.double().mean())
        self.baseline = mean if self.baseline is None else self.baseline + self.settings.baseline_rate * (mean - self.baseline)
        with torch.no_grad():
            following = self.critic_target(batch.next_state, self.actor_target(batch.next_state))
            target = batch.reward - self.baseline + self.settings.discount * batch.goes_on * following
        critic_loss = mse_loss(self.critic(batch.state, batch.action), target)
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()
        actor_loss = -self.critic(batch.state, self.actor(batch.state)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self._follow(self.actor_target, self.actor)
        self._follow(self.critic_target, self.critic)
        return critic_loss.detach(), actor_loss.detach()

    @torch.no_grad()
    def _follow(self, target: nn.Module, trained: nn.Module) -> None:
        for old, new in zip(target.parameters(), trained.parameters(), strict=True):
            old.mul_(1 - self.settings.tau).add_(new, alpha=self.settings.tau)

    def state(self) -> dict[str, Tensor]:
        """Networks, optimizers, memory, moving average and generator as tensors by name."""
        found = {f"{name}.{key}": value for name, network in self._networks().items() for key, value in network.state_dict().items()}
        for name, optimizer in self._optimizers().items():
            for index, moments in optimizer.state_dict()["state"].items():
                found |= {f"{name}.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
        baseline = torch.tensor(math.nan if self.baseline is None else self.baseline, dtype=torch.float64)
        return {**found, "memory": self.memory.entries, "baseline": baseline, "generator": self.generator.get_state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave."""
        for name, network in self._networks().items():
            network.load_state_dict({key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")})
        for name, optimizer in self._optimizers().items():
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in state.items():
                owner, _, rest = key.partition(".")
                if owner == name:
                    index, _, moment = rest.partition(".")
                    moments.setdefault(int(index), {})[moment] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self.memory.entries = state["memory"].clone()
        baseline = float(state["baseline"])
        self.baseline = None if math.isnan(baseline) else baseline
        self.generator.set_state(state["generator"])

    def _networks(self) -> dict[str, nn.Module]:
        return {
            "actor": self.actor, "critic": self.critic, "actor_target": self.actor_target, "critic_target": self.critic_target,
        }  # fmt: skip

    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"actor_optimizer": self.actor_optimizer, "critic_optimizer": self.critic_optimizer}


def truncated_normal(mean: float, deviation: float, u: float) -> float:
    """The quantile ``u`` of the normal distribution that is truncated to [0, 1].

    Args:
        mean: Mean before truncation, in [0, 1].
        deviation: Standard deviation before truncation, above 0.
        u: A number in [0, 1], uniformly drawn for a draw from the distribution.

    >>> truncated_normal(0.5, 0.2, 0.5), truncated_normal(0.0, 0.1, 0.0), truncated_normal(1.0, 1e-6, 1.0)
    (0.5, 0.0, 1.0)
    """
    ends = (torch.tensor([0.0, 1.0], dtype=torch.float64) - mean) / deviation
    below, above = torch.special.ndtr(ends).tolist()
    place = torch.special.ndtri(torch.tensor(below + u * (above - below), dtype=torch.float64))
    return min(max(mean + deviation * float(place), 0.0), 1.0)
