"""Adam on random mini-batches that stops anywhere and goes on to the same bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.post_training.reconstruction.resume import RunState


def weights() -> dict[str, nn.Parameter]:
    """One parameter in each layout."""
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(5, 3, 3, 3, generator=generator).contiguous(memory_format=torch.channels_last)
    return {
        "conv": nn.Parameter(image),
        "linear": nn.Parameter(torch.randn(4, 6, generator=generator)),
        "idle": nn.Parameter(torch.ones(2)),
    }


DATA = torch.randn(20, 5, 3, 3, 3, generator=torch.Generator().manual_seed(8))


class Task:
    """A quadratic problem that depends on which samples are drawn; keeps what was drawn."""

    def __init__(self, *, seed: int = 3, iterations: int = 12, batch_size: int = 4, samples: int = 20, is_annealed: bool = False) -> None:
        self.parameters = weights()
        self.drawn: list[list[int]] = []
        self.adam = ResumableAdam(
            self.parameters,
            learning_rate=0.05,
            iterations=iterations,
            samples=samples,
            batch_size=batch_size,
            seed=seed,
            is_annealed=is_annealed,
        )

    def loss(self, index: Tensor) -> Tensor:
        self.drawn.append(index.tolist())
        linear = self.parameters["linear"]
        return (self.parameters["conv"] - DATA[index]).square().mean() + (linear * index.float().mean()).sin().sum()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.adam.step(self.loss)

    def values(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.parameters.items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_the_same_seed_takes_the_same_steps_and_another_seed_others() -> None:
    first, second, third = Task(), Task(), Task(seed=4)
    for task in (first, second, third):
        torch.manual_seed(len(task.drawn))  # the global generator plays no part
        task.run(12)
    assert first.drawn == second.drawn
    assert same_bits(first.values(), second.values())
    assert first.drawn != third.drawn
    assert not torch.equal(first.values()["conv"], third.values()["conv"])


def test_batches_are_drawn_without_replacement() -> None:
    task = Task(iterations=200)
    task.run(200)
    assert all(len(set(index)) == 4 for index in task.drawn)
    counts = torch.bincount(torch.tensor(task.drawn).flatten(), minlength=20)
    assert counts.sum() == 800
    assert counts.min() > 20  # 40 expected
    assert counts.max() < 60


def test_fewer_samples_than_the_batch_size_are_all_drawn() -> None:
    task = Task(samples=3, batch_size=32)
    task.run(4)
    assert [sorted(index) for index in task.drawn] == [[0, 1, 2]] * 4


def test_the_first_steps_are_those_of_adam() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    adam = ResumableAdam({"p": parameter}, learning_rate=0.1, iterations=2, samples=1, batch_size=1, seed=0)
    adam.step(lambda _: (parameter * torch.tensor([3.0, -0.5])).sum())
    assert parameter.tolist() == pytest.approx([0.9, -1.9], abs=1e-6)  # lr * sign(gradient)
    assert not adam.is_finished
    adam.step(lambda _: (parameter * torch.tensor([-3.0, -0.5])).sum())
    mean, square = (0.9 * 0.1 * 3 - 0.1 * 3) / (1 - 0.9**2), (0.999 * 0.001 * 9 + 0.001 * 9) / (1 - 0.999**2)
    assert parameter.tolist() == pytest.approx([0.9 - 0.1 * mean / math.sqrt(square), -1.8], abs=1e-6)
    assert adam.is_finished


def test_annealing_takes_the_learning_rate_to_zero_along_a_cosine() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    adam = ResumableAdam({"p": parameter}, learning_rate=0.1, iterations=8, samples=1, batch_size=1, seed=0, is_annealed=True)
    steps = []
    for _ in range(8):
        before = parameter.item()
        adam.step(lambda _: parameter.sum())  # a constant gradient: each step is the learning rate
        steps.append(before - parameter.item())
    assert steps == pytest.approx([0.05 * (1 + math.cos(math.pi * t / 8)) for t in range(8)], rel=1e-4)


@pytest.mark.parametrize("is_annealed", [False, True])
@pytest.mark.parametrize("stop", [0, 1, 5, 11])
def test_going_on_from_a_saved_state_ends_with_the_same_bits(stop: int, is_annealed: bool, tmp_path: Path) -> None:
    whole = Task(is_annealed=is_annealed)
    whole.run(12)
    killed = Task(is_annealed=is_annealed)
    killed.run(stop)
    RunState(tmp_path, "run").save("part", killed.adam.state(), {"iteration": killed.adam.iteration})
    killed.run(1)  # what came after the save is lost

    resumed = Task(is_annealed=is_annealed, seed=99)  # the generator's state is part of what is saved
    tensors, facts = RunState(tmp_path, "run").load("part")
    resumed.adam.load(tensors, int(facts["iteration"]))
    assert resumed.adam.iteration == stop
    resumed.run(12 - stop)
    assert resumed.adam.is_finished
    assert resumed.drawn == whole.drawn[stop:]
    assert same_bits(resumed.values(), whole.values())
    assert torch.equal(resumed.values()["idle"], torch.ones(2))
    assert resumed.parameters["conv"].is_contiguous(memory_format=torch.channels_last)


def test_no_iterations_are_finished_at_once() -> None:
    assert Task(iterations=0).adam.is_finished
