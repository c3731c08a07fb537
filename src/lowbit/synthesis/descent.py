"""Descent on the inputs of a network: Adam with a learning rate that falls on plateaus, batch by batch; a killed one resumes to the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lowbit.errors import DivergedError
from lowbit.inputs import Inputs
from lowbit.post_training.reconstruction.resume import RunState
from lowbit.progress import Stage
from lowbit.synthesis.problem import SynthesisProblem, Synthesized

SAVE_SECONDS = 10.0
_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_PLATEAU = ("best", "num_bad_epochs")

Loss = Callable[[Inputs, range], Tensor]  # of some samples, with their places among all


@dataclass(frozen=True)
class Schedule:
    """How inputs are optimized.

    Attributes:
        iterations: Steps of each batch.
        learning_rate: Adam's, at the start.
        patience: Steps without progress after which it falls.
        factor: What it is multiplied by then.
        min_learning_rate: Its least value.
        batch_size: Most samples that are optimized together.
    """

    iterations: int
    learning_rate: float
    patience: int
    factor: float
    min_learning_rate: float
    batch_size: int


def descend(problem: SynthesisProblem, start: Inputs, loss: Loss, schedule: Schedule, facts: Mapping[str, object]) -> Synthesized:
    """Inputs near ``start`` that minimize ``loss``, batch by batch, so that memory does not grow with the number of samples.

    ``x <- Adam(x, d loss / d x)`` with default betas; the learning rate is ``ReduceLROnPlateau``'s, on the loss before each step.

    Args:
        problem: The network and its inputs; tensors of the inputs that are not made stay as they are.
        start: The first inputs of all samples.
        loss: Of a batch, the mean over its samples, so that batches can be compared.
        schedule: Steps and learning rates.
        facts: What else the result depends on, for resuming: the method and its hyper-parameters.

    Raises:
        DivergedError: The loss is not finite.
    """
    state = problem.state({**facts, "schedule": vars(schedule)})
    batches = list(problem.batches(start, schedule.batch_size))
    finished: list[_Batch] = []
    done = sum(_steps_done(state, index, schedule) for index in range(len(batches)))
    with problem.progress.stage("synthesis", total=schedule.iterations * len(batches), done=done) as stage:
        for index, (places, inputs) in enumerate(batches):
            batch = _Batch(problem, inputs, schedule)
            batch.resume(state, _name(index))
            batch.run(lambda given, places=places: loss(given, places), state, _name(index), stage)  # type: ignore[misc]
            finished.append(batch.to_cpu())
    samples = _joined(problem, [batch.inputs for batch in finished])
    sizes = [len(places) for places, _ in batches]
    curves = zip(*(batch.losses for batch in finished), strict=True)
    mean = tuple(sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes) for values in curves)
    return Synthesized(problem.cast(samples), mean)


def _joined(problem: SynthesisProblem, parts: Sequence[Inputs]) -> Inputs:
    """The batches as one."""
    dims = [problem.template.batch_dim_of(tensor) for tensor in problem.template.tensors]
    columns = zip(dims, zip(*(part.tensors for part in parts), strict=True), strict=True)
    values = iter([column[0] if dim is None else torch.cat(column, dim) for dim, column in columns])
    return problem.template.map(lambda _: next(values))


def _name(index: int) -> str:
    return f"batch{index}"


def _steps_done(state: RunState, index: int, schedule: Schedule) -> int:
    kept = state.load(_name(index))
    return 0 if kept is None else min(int(kept[1]["iteration"]), schedule.iterations)


class _Batch:
    """Some samples on their way."""

    def __init__(self, problem: SynthesisProblem, start: Inputs, schedule: Schedule) -> None:
        self.losses: list[float] = []
        self._schedule = schedule
        leaves = zip(start.tensors, problem.is_free(start), strict=True)
        values = iter([tensor.detach().clone().requires_grad_() if is_free else tensor for tensor, is_free in leaves])
        self.inputs = start.map(lambda _: next(values))
        self._free = [tensor for tensor in self.inputs.tensors if tensor.requires_grad]
        self._adam = torch.optim.Adam(self._free, schedule.learning_rate)
        self._plateau = ReduceLROnPlateau(self._adam, factor=schedule.factor, patience=schedule.patience, min_lr=schedule.min_learning_rate)

    def run(self, loss: Callable[[Inputs], Tensor], state: RunState, name: str, stage: Stage) -> None:
        """All steps that are left; what a killed run needs is kept in ``state`` from time to time."""
        saved = time.monotonic()
        while len(self.losses) < self._schedule.iterations:
            value = loss(self.inputs)
            for tensor, gradient in zip(self._free, torch.autograd.grad(value, self._free, allow_unused=True), strict=True):
                tensor.grad = gradient
            self.losses.append(float(value.detach()))
            if not torch.isfinite(value):
                raise DivergedError(
                    f"synthesis: the loss is {self.losses[-1]} at iteration {len(self.losses)}. Pass a lower learning_rate than "
                    f"{self._schedule.learning_rate:g}."
                )
            self._adam.step()
            self._plateau.step(self.losses[-1])
            stage.advance(note=f"loss {self.losses[-1]:.4g}")
            if len(self.losses) == self._schedule.iterations or time.monotonic() - saved > SAVE_SECONDS:
                self._save(state, name)
                saved = time.monotonic()

    def _save(self, state: RunState, name: str) -> None:
        tensors = {"losses": torch.tensor(self.losses, dtype=torch.float64)}
        for place, tensor in enumerate(self._free):
            tensors[f"value.{place}"] = tensor
            moments = self._adam.state.get(tensor, {})
            tensors |= {f"{moment}.{place}": moments[moment] for moment in _MOMENTS if moment in moments}
        plateau = {key: float(getattr(self._plateau, key)) for key in _PLATEAU}
        state.save(name, tensors, {"iteration": len(self.losses), "learning_rate": self._adam.param_groups[0]["lr"], **plateau})

    @torch.no_grad()
    def resume(self, state: RunState, name: str) -> None:
        """Go on from what ``state`` holds; from the start where it holds nothing."""
        kept = state.load(name)
        if kept is None:
            return
        tensors, facts = kept
        self.losses = cast("list[float]", tensors["losses"].tolist())
        for place, tensor in enumerate(self._free):
            tensor.copy_(tensors[f"value.{place}"])
            if f"step.{place}" in tensors:
                moments = {moment: torch.empty_like(tensor).copy_(tensors[f"{moment}.{place}"]) for moment in _MOMENTS[1:]}
                self._adam.state[tensor] = {"step": tensors[f"step.{place}"], **moments}
        self._adam.param_groups[0]["lr"] = facts["learning_rate"]
        self._plateau.best, self._plateau.num_bad_epochs = float(facts["best"]), int(facts["num_bad_epochs"])

    def to_cpu(self) -> _Batch:
        """This batch without its optimizer and, where it was elsewhere, on the processor."""
        self.inputs = self.inputs.map(lambda tensor: tensor.detach().cpu())
        del self._adam, self._plateau, self._free
        return self
