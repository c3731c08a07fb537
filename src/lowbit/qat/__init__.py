"""Training low-bit networks: what a trained method is, what happens in a run, and the trainer that drives it."""

from lowbit.network.slot import Slot
from lowbit.qat.attach.job import QatJob
from lowbit.qat.method import TrainingMethod
from lowbit.qat.networks import Companion, GivenNetworks
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Turn
from lowbit.qat.run import TrainRun
from lowbit.qat.task import Classification, Task

__all__ = [
    "Classification",
    "Companion",
    "GivenNetworks",
    "OptimizerSpec",
    "Phase",
    "QatJob",
    "Recipe",
    "Slot",
    "Task",
    "TrainRun",
    "TrainingMethod",
    "Turn",
]
