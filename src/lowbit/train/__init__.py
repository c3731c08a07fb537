"""Training low-bit networks: what a trained method is, what happens in a run, and the trainer that drives it."""

from lowbit.train.job import QatJob, Slot
from lowbit.train.method import TrainingMethod
from lowbit.train.recipe import OptimizerSpec, Phase, Recipe
from lowbit.train.run import TrainRun
from lowbit.train.task import Classification, Task

__all__ = ["Classification", "OptimizerSpec", "Phase", "QatJob", "Recipe", "Slot", "Task", "TrainRun", "TrainingMethod"]
