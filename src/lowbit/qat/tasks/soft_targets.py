"""Learning from a teacher's outputs alone, where samples have no labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.inputs import tensors_of
from lowbit.qat.task import Batch, Output, Scores, Sums, Task


@dataclass(frozen=True, eq=False)
class SoftTargets(Task):
    """A task whose training batches hold inputs and no target: its loss is the distance to what a teacher says of them.

    ``loss(f(x)) = task.distillation_loss(f(x), teacher(x))``, whatever the network's outputs are made of. Metrics are the task's, on test data
    with targets.

    Attributes:
        task: The task.
        teacher: A float network; in evaluation mode, and never trained.

    Example:
        >>> import lowbit
        >>> teacher = nn.Linear(4, 3)
        >>> task = SoftTargets(lowbit.Classification(), teacher)
        >>> batch = torch.rand(8, 4)
        >>> abs(round(float(task.loss(task.predict(teacher, batch), batch)), 5)), task.metric_name
        (0.0, 'accuracy')
    """

    task: Task
    teacher: nn.Module

    def __post_init__(self) -> None:
        self.teacher.eval().requires_grad_(False)
        facts = ("metric_name", "higher_is_better", "units", "meanings")
        vars(self).update({name: getattr(self.task, name) for name in facts})

    def predict(self, model: nn.Module, batch: Batch) -> Output:
        return self.task.predict(model, batch)

    def loss(self, output: Output, batch: Batch) -> Tensor:
        device = next(tensors_of(output)).device
        with torch.no_grad():
            wanted = self.task.predict(self.teacher.to(device), batch)
        return self.task.distillation_loss(output, wanted)

    def distillation_loss(self, output: Output, teacher_output: Output) -> Tensor:
        return self.task.distillation_loss(output, teacher_output)

    def with_temperature(self, temperature: float) -> Task:
        return replace(self, task=self.task.with_temperature(temperature))

    def measure(self, output: Output, batch: Batch) -> tuple[object, object] | Sums:
        self.task.check(output, batch)
        return self.task.measure(output, batch)

    def metrics(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        return self.task.metrics(sums)

    def doubt(self, scores: Scores, outputs: int) -> str:
        return self.task.doubt(scores, outputs)

    def describe(self, name: str, value: float) -> str:
        return self.task.describe(name, value)

    def facts(self) -> dict[str, object]:
        return {**self.task.facts(), "targets": "the teacher's outputs"}
