"""The built-in tasks."""

from __future__ import annotations

from lowbit.qat.task import Criterion, CriterionTask, Task
from lowbit.qat.tasks.classification import Classification
from lowbit.qat.tasks.multi_label import MultiLabel
from lowbit.qat.tasks.regression import Regression
from lowbit.qat.tasks.segmentation import Segmentation
from lowbit.qat.tasks.soft_targets import SoftTargets

__all__ = ["Classification", "MultiLabel", "Regression", "Segmentation", "SoftTargets", "as_task"]


def as_task(task: Task | Criterion | None) -> Task:
    """A task from what users give: a task, a function ``criterion(output, target)``, or nothing for classification."""
    if task is None:
        return Classification()
    return task if isinstance(task, Task) else CriterionTask(task)
