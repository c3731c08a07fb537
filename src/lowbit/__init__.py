"""lowbit: quantize any PyTorch network to 1-8 bits with the methods of the classic reading list."""

from importlib.metadata import PackageNotFoundError, version

from lowbit import errors
from lowbit.measure.diagnose import diagnose
from lowbit.qat import Classification, CriterionTask, MultiLabel, OptimizerSpec, Recipe, Regression, Scores, Segmentation, Task
from lowbit.qat.loops.manual import parameter_groups, training
from lowbit.qat.prepare import prepare
from lowbit.qat.run import penalty
from lowbit.registry import MethodInfo, get_method, list_methods
from lowbit.report.summary import summary
from lowbit.runtime.compile import compile_runtime
from lowbit.spec import BitPolicy, Budget, Granularity
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.export import ExportReport, export
from lowbit.workflows.load import load
from lowbit.workflows.quantize import quantize
from lowbit.workflows.train import train

try:
    __version__ = version("lowbit")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0.0.0"

__all__ = [
    "quantize", "train", "prepare", "penalty", "training", "parameter_groups", "export", "load", "compile_runtime", "summary", "diagnose",
    "evaluate", "list_methods", "get_method", "BitPolicy", "Budget", "Granularity", "ExportReport", "MethodInfo", "Recipe", "OptimizerSpec", "Task",
    "Classification", "Segmentation", "MultiLabel", "Regression", "CriterionTask", "Scores", "errors",
]  # fmt: skip
