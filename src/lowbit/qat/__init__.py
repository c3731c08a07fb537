"""Training low-bit networks: what a trained method is, what happens in a run, and the trainer that drives it."""

from lowbit.qat.attach.job import QatJob, Slot
from lowbit.qat.method import TrainingMethod
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe
from lowbit.qat.run import TrainRun
from lowbit.qat.task import CriterionTask, Scores, Supervised, Task
from lowbit.qat.tasks import Classification, MultiLabel, Regression, Segmentation

__all__ = [
    "Classification", "CriterionTask", "MultiLabel", "OptimizerSpec", "Phase", "QatJob", "Recipe", "Regression", "Scores", "Segmentation", "Slot",
    "Supervised", "Task", "TrainRun", "TrainingMethod",
]  # fmt: skip
