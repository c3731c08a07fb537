"""What a network is trained for: its loss, and what counts as success."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import DataError

Batch = tuple[Tensor, Tensor]


class Task(ABC):
    """Turns a batch and a network's output into a loss and a metric; the trainer knows nothing else about the data."""

    metric_name: str
    higher_is_better: bool = True

    def predict(self, model: nn.Module, batch: Batch) -> Tensor:
        """The network's output for the inputs of ``batch``."""
        output: Tensor = model(batch[0])
        return output

    @abstractmethod
    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Scalar training loss."""

    @abstractmethod
    def distillation_loss(self, output: Tensor, teacher_output: Tensor) -> Tensor:
        """Scalar loss that draws ``output`` towards a teacher's."""

    @abstractmethod
    def measure(self, output: Tensor, batch: Batch) -> tuple[float, int]:
        """Sum of the metric over the samples of the batch, and their number."""

    def check(self, output: Tensor, batch: Batch) -> None:  # noqa: B027 - most tasks take any target
        """DataError when the targets of ``batch`` cannot be learned by a network that gives outputs like ``output``."""

    def describe(self, value: float) -> str:
        """A value of the metric as people read it."""
        return f"{value:.4g}"


@dataclass(frozen=True)
class Classification(Task):
    """Cross-entropy on labels, and top-1 accuracy.

    Attributes:
        label_smoothing: 0 to below 1.
        temperature: Of the softmax of a teacher's targets; the distillation loss is multiplied by its square.
    """

    label_smoothing: float = 0.0
    temperature: float = 4.0
    metric_name = "accuracy"

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return functional.cross_entropy(output, batch[1], label_smoothing=self.label_smoothing)

    def distillation_loss(self, output: Tensor, teacher_output: Tensor) -> Tensor:
        """``T**2 KL(softmax(teacher / T) || softmax(output / T))``. Source: Hinton et al. 2015, section 2."""
        soft = functional.log_softmax(output / self.temperature, 1)
        target = functional.softmax(teacher_output / self.temperature, 1)
        return functional.kl_div(soft, target, reduction="batchmean") * self.temperature**2

    def measure(self, output: Tensor, batch: Batch) -> tuple[float, int]:
        return float((output.argmax(1) == batch[1]).sum()), len(batch[1])

    def check(self, output: Tensor, batch: Batch) -> None:
        check_labels(batch[1], output.shape[1] if output.dim() > 1 else 1)

    def describe(self, value: float) -> str:
        return f"{value:.2%}"


def check_labels(labels: Tensor, outputs: int) -> None:
    """DataError when a label has no output of its own."""
    if labels.is_floating_point() or labels.is_complex():
        return  # class probabilities
    if labels.numel() and (int(labels.max()) >= outputs or int(labels.min()) < 0):
        wrong = labels[(labels >= outputs) | (labels < 0)]
        raise DataError(
            f"the data has the label {int(wrong[0])}, but the network has {outputs} outputs (labels 0 to {outputs - 1}). "
            "Use a network with as many outputs as there are classes."
        )
