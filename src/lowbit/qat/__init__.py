"""Training low-bit networks: what a trained method is, what happens in a run, and the trainer that drives it."""

from lowbit.network.slot import Slot
from lowbit.qat.attach.job import QatJob
from lowbit.qat.method import TrainingMethod
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe
from lowbit.qat.run import TrainRun
from lowbit.qat.task import Classification, Task

__all__ = ["Classification", "OptimizerSpec", "Phase", "QatJob", "Recipe", "Slot", "Task", "TrainRun", "TrainingMethod"]
