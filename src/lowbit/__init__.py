"""lowbit: quantize any PyTorch network to 1-8 bits with the methods of the classic reading list."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from lowbit import errors
from lowbit.lazy import lazy_imports

if TYPE_CHECKING:  # imported when they are first used
    from lowbit.assignment.budget import Budget
    from lowbit.assignment.problem import SearchMethod, SearchProblem
    from lowbit.assignment.result import SearchResult
    from lowbit.formats.fixed_point.network import IntegerNetwork, compile_integer
    from lowbit.measure.diagnose import diagnose
    from lowbit.measure.latency_table import LatencyTable
    from lowbit.measure.selection import select_bits
    from lowbit.network.bits import get_bits, set_bits
    from lowbit.network.slot import Slot
    from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
    from lowbit.provenance import Provenance
    from lowbit.qat.attach.job import QatJob
    from lowbit.qat.engine.trainer import Trainer
    from lowbit.qat.loops.manual import parameter_groups, training
    from lowbit.qat.method import TrainingMethod
    from lowbit.qat.prepare import prepare
    from lowbit.qat.procedure import Procedure
    from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe
    from lowbit.qat.run import TrainRun, penalty
    from lowbit.qat.task import CriterionTask, Scores, Task
    from lowbit.qat.tasks import Classification, MultiLabel, Regression, Segmentation, SuperResolution
    from lowbit.quantizers.base import Quantizer
    from lowbit.registry import MethodInfo, get_method, list_methods, register
    from lowbit.report.summary import summary
    from lowbit.runtime.compile import compile_runtime
    from lowbit.spec import BitPolicy, Granularity, LayerBits
    from lowbit.workflows.compare import Comparison, compare
    from lowbit.workflows.deliver import Delivery, deliver
    from lowbit.workflows.evaluate import evaluate
    from lowbit.workflows.export import ExportReport, export
    from lowbit.workflows.latency_table import latency_table
    from lowbit.workflows.load import load
    from lowbit.workflows.quantize import quantize, quantize_and_deliver
    from lowbit.workflows.requests import QuantizeRequest, SearchRequest, TrainRequest
    from lowbit.workflows.search import search, search_and_write
    from lowbit.workflows.subjects import Subject
    from lowbit.workflows.suite import Suite
    from lowbit.workflows.train import train, train_and_deliver

try:
    __version__ = version("lowbit")
except PackageNotFoundError:  # run from a source tree that was not installed
    __version__ = "0.0.0"

__all__ = [
    "quantize", "train", "prepare", "penalty", "training", "parameter_groups", "export", "load", "compile_runtime", "summary", "diagnose",
    "set_bits", "get_bits", "select_bits", "latency_table", "LatencyTable",
    "compile_integer", "deliver", "Delivery", "QuantizeRequest", "TrainRequest", "quantize_and_deliver", "train_and_deliver",
    "search", "search_and_write", "SearchRequest", "SearchResult", "SearchMethod", "SearchProblem",
    "compare", "Suite", "Subject", "Comparison",
    "evaluate", "list_methods", "get_method", "BitPolicy", "Budget", "Granularity", "LayerBits", "ExportReport", "MethodInfo", "errors",
    "register", "TrainingMethod", "Procedure", "PostTrainingMethod", "Quantizer", "Slot", "QatJob", "PtqJob", "TrainRun",
    "IntegerNetwork", "Recipe", "OptimizerSpec", "Phase", "Trainer", "Provenance",
    "Task", "Classification", "Segmentation", "SuperResolution", "MultiLabel", "Regression", "CriterionTask", "Scores",
]  # fmt: skip

__getattr__, __dir__ = lazy_imports(__name__)
