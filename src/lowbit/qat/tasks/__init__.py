"""The built-in tasks."""

from __future__ import annotations

from lowbit.errors import unknown_name
from lowbit.qat.task import Criterion, CriterionTask, Task
from lowbit.qat.tasks.classification import Classification
from lowbit.qat.tasks.multi_label import MultiLabel
from lowbit.qat.tasks.regression import Regression
from lowbit.qat.tasks.segmentation import Segmentation
from lowbit.qat.tasks.super_resolution import SuperResolution

__all__ = ["TASKS", "Classification", "MultiLabel", "Regression", "Segmentation", "SuperResolution", "as_task"]

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multi-label": MultiLabel,
    "regression": Regression,
    "segmentation": Segmentation,
    "super-resolution": SuperResolution,
}


def as_task(task: Task | Criterion | str | None) -> Task:
    """A task from what users give: a task, its name, a function ``criterion(output, target)``, or nothing for classification.

    Raises:
        UnknownNameError: There is no task of that name.
    """
    if task is None:
        return Classification()
    if isinstance(task, str):
        if task not in TASKS:
            raise unknown_name("task", task, TASKS)
        return TASKS[task]()
    return task if isinstance(task, Task) else CriterionTask(task)
