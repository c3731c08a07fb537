"""Tasks: the loss of a network, its predictions, and the metrics that measure them."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias, cast

import torch
from torch import Tensor, nn

from lowbit.errors import DataError
from lowbit.inputs import TARGET_NAMES, Inputs, Takes, sample_count, tensors_of
from lowbit.measure.outputs import output_tensor
from lowbit.options import check_settings
from lowbit.qat.recipe import Recipe

Batch: TypeAlias = Any  # whatever the data give: a tensor, a tuple, a dict
Output: TypeAlias = Any  # whatever the network returns
Criterion: TypeAlias = Callable[[Any, Any], Tensor]
Sums: TypeAlias = Mapping[str, Any]  # for each metric its sum and the number of samples, or any tensor of sums


@dataclass(frozen=True)
class Example:
    """A sample with pictures of it, for reports.

    Attributes:
        words: What it is.
        pictures: uint8 ``[3, H, W]`` by what they show.
    """

    words: str
    pictures: Mapping[str, Tensor]


class Task(ABC):
    """Turns batches and a network's outputs into a loss and metrics; nothing else knows what is in the data.

    A custom task needs a loss and a metric, see the example.

    Attributes:
        metric_name: The metric that selects the best network.
        higher_is_better: Whether larger values of it are better.
        units: Unit of each metric; ``%`` for fractions that are shown in percent. Plain numbers where a metric is not in it.
        meanings: A sentence on each metric for reports.
        has_classes: Whether the largest of a sample's outputs is its prediction, so that networks can be compared by how often they agree.
        recipe: How ``lowbit.train`` trains where nothing is said.
        open_dimensions: Dimensions of inputs that files leave open besides the batch, as ``lowbit.export`` takes them.

    Example:
        >>> import torch, lowbit
        >>> class Distance(lowbit.Task):
        ...     metric_name, higher_is_better = "distance", False
        ...     def loss(self, output, batch):
        ...         return (output - batch["points"]).square().mean()
        ...     def measure(self, output, batch):
        ...         distances = (output - batch["points"]).norm(dim=-1)
        ...         return distances.sum(), len(distances)
        >>> batch = {"input": torch.zeros(2, 2), "points": torch.tensor([[3.0, 4.0], [0.0, 0.0]])}
        >>> lowbit.evaluate(torch.nn.Identity(), [batch], task=Distance())["distance"]
        2.5
    """

    metric_name: ClassVar[str]
    higher_is_better: ClassVar[bool] = True
    units: ClassVar[Mapping[str, str]] = MappingProxyType({})
    meanings: ClassVar[Mapping[str, str]] = MappingProxyType({})
    has_classes: ClassVar[bool] = True
    recipe: ClassVar[Recipe] = Recipe()
    open_dimensions: ClassVar[tuple[str, ...]] = ()

    def predict(self, model: nn.Module, batch: Batch) -> Output:
        """The network's output for the inputs of ``batch``: by default for those that its ``forward`` takes, see ``Inputs.of``."""
        inputs = Inputs.of(batch, model)
        return model(*inputs.args, **inputs.kwargs)

    @abstractmethod
    def loss(self, output: Output, batch: Batch) -> Tensor:
        """Scalar training loss."""

    def distillation_loss(self, output: Output, teacher_output: Output) -> Tensor:
        """Scalar loss that draws ``output`` towards a teacher's: by default the mean squared difference of all values."""
        pairs = [(a, b) for a, b in zip(tensors_of(output), tensors_of(teacher_output), strict=True) if a.is_floating_point()]
        squares = torch.stack([(a - b).square().sum() for a, b in pairs]).sum()
        return squares / sum(a.numel() for a, _ in pairs)

    def with_temperature(self, temperature: float) -> Task:
        """This task with another temperature in ``distillation_loss``; itself where that has none."""
        has_one = "temperature" in getattr(self, "__dataclass_fields__", {})
        return cast(Task, dataclasses.replace(cast(Any, self), temperature=temperature)) if has_one else self

    @abstractmethod
    def measure(self, output: Output, batch: Batch) -> tuple[Any, Any] | Sums:
        """What a batch adds to the metrics; it is summed over all batches and processes.

        Either the sum of ``metric_name`` over the samples and their number, or several such pairs by the metric's name. A metric that is no
        mean over samples gives any tensor of sums, such as a confusion matrix, and ``metrics`` computes its value.
        """

    def metrics(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Every metric by name, from what ``measure`` gave in total; by default each sum over its number of samples."""
        return {name: float(total[0] / total[1]) for name, total in sums.items()}

    def check(self, output: Output, batch: Batch) -> None:  # noqa: B027 - most tasks take any target
        """DataError when the targets of ``batch`` cannot be learned by a network that gives outputs like ``output``.

        The output may be of another batch, so that only sizes behind the first dimension can be compared.
        """

    def doubt(self, scores: Scores, outputs: int) -> str:
        """Why the metrics of a network with so many outputs say nothing, in words; empty where they do, or where the task cannot tell."""
        return ""

    def examples(self, batch: Batch, output: Output, float_output: Output | None) -> Sequence[Example]:
        """Pictures of what the quantized and, where there is one, the float network make of a batch, for reports."""
        return ()

    def describe(self, name: str, value: float) -> str:
        """A value of a metric as people read it."""
        return format_metric(value, self.units.get(name, ""))

    def facts(self) -> dict[str, object]:
        """What distinguishes this task from others, for records of a training."""
        fields: dict[str, object] = (
            {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} if dataclasses.is_dataclass(self) else {}
        )
        named = {key: getattr(value, "__qualname__", type(value).__name__) if callable(value) else value for key, value in fields.items()}
        return {"name": type(self).__qualname__, **named}


def format_metric(value: float | None, unit: str = "") -> str:
    """``97.25 %``, ``31.2 dB``, ``0.1235``; a dash for what was not measured.

    >>> format_metric(0.9725, "%"), format_metric(31.24, "dB"), format_metric(0.12346)
    ('97.25 %', '31.24 dB', '0.1235')
    """
    if value is None or math.isnan(value):
        return "\N{EN DASH}"
    return f"{100 * value:.2f} %" if unit == "%" else f"{value:.4g} {unit}".rstrip()


@dataclass(frozen=True, kw_only=True)
class Supervised(Task):
    """A task whose batches hold a target; base of the built-in ones.

    Attributes:
        target: Index or key of the target in a batch. Default: the second member of a tuple, the entry
            ``labels`` or ``target`` of a dict.
        output: Key or index of the entry of the network's output. Default: the first floating-point tensor.
    """

    target: int | str | None = None
    output: int | str | None = None

    def __post_init__(self) -> None:
        check_settings(self)

    def predict(self, model: nn.Module, batch: Batch) -> Output:
        takes = Takes.of(model)
        is_flat = isinstance(batch, (tuple, list)) and bool(batch) and not isinstance(batch[0], (tuple, list, Mapping))
        if is_flat and self.target is None and takes is not None and 1 < len(takes.required) < len(batch):
            raise DataError(
                f"the network takes {len(takes.required)} inputs ({', '.join(takes.required)}), so that the second member of a batch is no target. "
                f"Say which one is, {type(self).__name__}(target={len(takes.required)}), or let batches be ((input, input), target)."
            )
        return super().predict(model, batch)

    def output_in(self, output: Output) -> Tensor:
        """The tensor of the network's output that is compared with the target."""
        return output if isinstance(output, Tensor) else output_tensor(output, self.output)

    def target_in(self, batch: Batch) -> Any:
        """The target in ``batch``, numpy arrays as tensors.

        Raises:
            DataError: There is none.
        """
        found = _target(batch, self.target)
        return torch.as_tensor(found) if type(found).__module__ == "numpy" else found

    def tensor_target(self, batch: Batch) -> Tensor:
        """The target in ``batch``; DataError when it is no tensor."""
        found = self.target_in(batch)
        if not isinstance(found, Tensor):
            kind = f"a list of {type(found[0]).__name__}" if isinstance(found, (list, tuple)) and found else type(found).__name__
            raise DataError(f"{type(self).__name__}: targets must be tensors, got {kind}. Write a Task that reads them.")
        return found


def format_shape(tensor: Tensor, without: int | None = None) -> str:
    """``[N, 4, 8]``: the shape of a batch in words, ``without`` one of its dimensions."""
    sizes = ["N", *(str(size) for dim, size in enumerate(tensor.shape[1:], 1) if dim != without)]
    return f"[{', '.join(sizes)}]" if tensor.dim() else "[]"


def _target(batch: Batch, key: int | str | None) -> Any:
    if isinstance(batch, Mapping):
        names = TARGET_NAMES if key is None else (key,)
        for name in names:
            if name in batch:
                return batch[name]
        held = ", ".join(map(str, batch))
        raise DataError(
            f"a batch holds {held}, but no {' or '.join(map(str, names))}. Say which entry is the target: target={next(iter(batch))!r}"
        )
    if isinstance(batch, Sequence) and not isinstance(batch, str):
        index = 1 if key is None else key
        if isinstance(index, int) and -len(batch) <= index < len(batch):
            return batch[index]
        raise DataError(
            f"a batch has {len(batch)} members, but the target should be {index!r}. Batches must be (inputs, targets) or a dict."
        )
    raise DataError(
        f"a batch is a {type(batch).__name__} without a target. Batches must be (inputs, targets), or a dict with the entry 'labels'."
    )


@dataclass(frozen=True)
class CriterionTask(Supervised):
    """A task that consists of a loss only.

    Attributes:
        criterion: ``criterion(output, target)``, a scalar mean over samples; it is the metric as well.

    Example:
        >>> import torch, lowbit
        >>> task = lowbit.CriterionTask(torch.nn.functional.l1_loss)
        >>> lowbit.evaluate(torch.nn.Identity(), (torch.zeros(2, 3), torch.ones(2, 3)), task=task)["loss"]
        1.0
    """

    criterion: Criterion
    metric_name = "loss"
    higher_is_better = False

    def loss(self, output: Output, batch: Batch) -> Tensor:
        return self.criterion(output if self.output is None else self.output_in(output), self.target_in(batch))

    def measure(self, output: Output, batch: Batch) -> tuple[float, int]:
        count = sample_count(batch)
        return float(self.loss(output, batch)) * count, count


@dataclass(frozen=True)
class Scores:
    """Metrics of a network.

    Attributes:
        metrics: Every metric of the task by name.
        metric_name: Name of the metric that selects the best network.
        samples: Number of samples measured.

    Example:
        >>> import lowbit
        >>> scores = lowbit.Scores({"accuracy": 0.75, "top-5 accuracy": 1.0}, metric_name="accuracy", samples=4)
        >>> scores.value, scores["top-5 accuracy"]
        (0.75, 1.0)
    """

    metrics: Mapping[str, float]
    metric_name: str
    samples: int

    def __getitem__(self, name: str) -> float:
        return self.metrics[name]

    @property
    def value(self) -> float:
        """The metric that selects."""
        return self.metrics[self.metric_name]


class Meter:
    """Adds up a task's metrics over batches."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.sums: dict[str, Tensor] = {}
        self.samples = 0

    def add(self, output: Output, batch: Batch) -> None:
        """Count the outputs of one batch.

        Raises:
            DataError: Targets that do not fit the network.
        """
        self.task.check(output, batch)
        measured = self.task.measure(output, batch)
        if not isinstance(measured, Mapping):
            measured = {self.task.metric_name: measured}
        self.merge({name: _total(part) for name, part in measured.items()}, sample_count(batch))

    def merge(self, sums: Mapping[str, Tensor], samples: int) -> None:
        """Count what another meter has added up."""
        self.sums = {**self.sums, **{name: total + self.sums[name] if name in self.sums else total for name, total in sums.items()}}
        self.samples += samples

    def scores(self) -> Scores:
        """The metrics over everything added so far.

        Raises:
            DataError: There was no sample.
        """
        if self.samples == 0 or not self.sums:
            raise DataError("the test data hold no sample. Leave them out, or pass a loader with at least one batch.")
        metrics = dict(self.task.metrics(self.sums))
        name = self.task.metric_name
        if name not in metrics:
            raise DataError(f"{type(self.task).__name__} selects by {name!r}, but it measures {', '.join(metrics) or 'nothing'}")
        return Scores(metrics, name, self.samples)


def _total(part: object) -> Tensor:
    """Sums in float64 on the processor, so that many batches add up exactly enough."""
    if isinstance(part, Tensor):
        return part.detach().to("cpu", torch.float64)
    return torch.tensor([float(value) for value in cast(Sequence[Any], part)], dtype=torch.float64)
