"""Training low-bit networks: what a trained method is, what happens in a run, and the trainer that drives it."""

from typing import TYPE_CHECKING

from lowbit.lazy import lazy_imports

if TYPE_CHECKING:  # imported when they are first used: settings of training are read without torch
    from lowbit.network.slot import Slot
    from lowbit.qat.adaptive import AdaptiveMethod
    from lowbit.qat.attach.job import QatJob
    from lowbit.qat.method import TrainingMethod
    from lowbit.qat.networks import Companion, GivenNetworks
    from lowbit.qat.procedure import Procedure
    from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Turn
    from lowbit.qat.run import TrainRun
    from lowbit.qat.task import CriterionTask, Scores, Supervised, Task
    from lowbit.qat.tasks import Classification, MultiLabel, Regression, Segmentation, SuperResolution

__all__ = [
    "AdaptiveMethod", "Classification", "Companion", "CriterionTask", "GivenNetworks", "MultiLabel", "OptimizerSpec", "Phase",
    "Procedure", "QatJob", "Recipe", "Regression", "Scores", "Segmentation", "Slot", "SuperResolution", "Supervised", "Task", "TrainRun", "TrainingMethod",
    "Turn",
]  # fmt: skip

__getattr__, __dir__ = lazy_imports(__name__)
