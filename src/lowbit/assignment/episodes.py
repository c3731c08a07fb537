"""Episodes: an agent walks through an environment and learns from the reward at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

from lowbit.assignment.ddpg import DdpgAgent
from lowbit.assignment.environment import Environment


def run_episode(environment: Environment, agent: DdpgAgent, episode: int) -> float:
    """Let the agent decide once about everything, and learn from it; the reward at the end."""
    state, reward, done, steps = environment.reset(), 0.0, False, []
    while not done:
        action = agent.act(state, episode)
        steps.append((state, action))
        state, reward, done = environment.step(action)
    agent.learn(steps, state, reward, episode)
    return reward


@dataclass
class EpisodeLog:
    """What the episodes so far gave.

    Attributes:
        rewards: Reward of each.
        bits: Bits of weight and input of each layer in the one with the largest reward, the first of several.
        accuracy: Its accuracy, in percent.
    """

    rewards: list[float] = field(default_factory=list)
    bits: list[tuple[int | None, int | None]] = field(default_factory=list)
    accuracy: float = float("-inf")

    def add(self, reward: float, environment: Environment) -> None:
        """Count the episode that the environment has just seen."""
        if not self.rewards or reward > max(self.rewards):
            self.bits = [(own.weight, own.activation) for own in environment.bits.values()]
            self.accuracy = environment.accuracy
        self.rewards.append(reward)
