"""What the callbacks for other trainers share: how a run is made once the trainer knows how long it will train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import nn

from lowbit.errors import LoopError, SpecError
from lowbit.qat.loops.manual import ManualLoop, training
from lowbit.qat.recipe import Recipe
from lowbit.qat.task import Batch, Criterion, Task


class Planned:
    """The arguments of ``lowbit.training`` given by the user, and the run that is created from them when training starts.

    Args:
        task: For ``run.loss``: a ``Task`` or a function ``criterion(output, target)``. Default: classification.
        recipe: Recipe with the weight of distillation and the seed.
        teacher: Network that gives soft targets in ``run.loss``.
        float_network: The network given to ``lowbit.prepare``, for methods that train a float twin too.
        batches: Training batches for methods that look at data between epochs.
    """

    def __init__(
        self,
        *,
        task: Task | Criterion | str | None = None,
        recipe: Recipe | None = None,
        teacher: nn.Module | None = None,
        float_network: nn.Module | None = None,
        batches: Callable[[int], Iterable[Batch]] | Iterable[Batch] | None = None,
    ) -> None:
        super().__init__()
        self.task, self.recipe, self.batches = task, recipe, batches
        self.teacher, self.float_network = teacher, float_network
        self._run: ManualLoop | None = None

    @property
    def run(self) -> ManualLoop:
        """The run; LoopError before training has started."""
        if self._run is None:
            raise LoopError("the run is made when training starts: use it in the training step, not before")
        return self._run

    def start(self, model: nn.Module, steps: float, epochs: int) -> ManualLoop:
        """Make the run for ``steps`` optimizer steps in ``epochs``."""
        if not math.isfinite(steps) or steps < 1 or epochs < 1:
            raise SpecError(
                f"schedules of quantizers need the length of training, got {steps} steps in {epochs} epochs. "
                "Give the trainer a number of epochs or of steps."
            )
        self._run = training(
            model,
            steps_per_epoch=math.ceil(steps / epochs),
            epochs=epochs,
            task=self.task,
            recipe=self.recipe,
            teacher=self.teacher,
            float_network=self.float_network,
            batches=self.batches,
        )
        in_turns = next((phase for phase in self._run.phases if len(phase.turns) > 1), None)
        if in_turns is not None:
            raise LoopError(
                f"{self._run.method.info.name!r} takes {len(in_turns.turns)} turns with an optimizer step each in every step of its phase "
                f"{in_turns.name!r}; this trainer makes one. Train with lowbit.train, or in a loop of your own with lowbit.training."
            )
        return self._run
