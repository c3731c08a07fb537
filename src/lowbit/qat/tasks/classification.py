"""Classification: one class for each sample or each position."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor
from torch.nn import functional

from lowbit.errors import DataError
from lowbit.measure.chance import guessing_bound
from lowbit.measure.outputs import class_dimension
from lowbit.options import Above, Interval
from lowbit.qat.task import Batch, Output, Scores, Sums, Supervised, format_shape

TOP = 5  # classes among which the label may be


@dataclass(frozen=True)
class Classification(Supervised):
    """Cross-entropy and accuracy.

    Targets are class numbers of any integer type, ``[N]`` or ``[N, 1]``; or one-hot vectors or probabilities ``[N, classes]``, whose
    largest entry is the label that accuracy counts. Outputs with positions, ``[N, classes, ...]`` or ``[N, ..., classes]``, take a label for each.

    Attributes:
        label_smoothing: Share of the label that is spread over all classes.
        temperature: Temperature of the softmax of a teacher's targets; the distillation loss is multiplied by its square.
        ignored_label: Class number of samples that count neither in the loss nor in the metrics.

    Example:
        >>> import torch, lowbit
        >>> task = lowbit.Classification(label_smoothing=0.1)
        >>> logits, labels = torch.tensor([[2.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1])
        >>> lowbit.evaluate(torch.nn.Identity(), (logits, labels), task=task).metrics
        {'accuracy': 0.5}
    """

    label_smoothing: Annotated[float, Interval(0, 1, closed="left")] = 0.0
    temperature: Annotated[float, Above(0)] = 4.0
    ignored_label: int = -100

    metric_name = "accuracy"
    units: ClassVar = {"accuracy": "%", f"top-{TOP} accuracy": "%"}
    meanings: ClassVar = {
        "accuracy": "How often the first prediction is right.",
        f"top-{TOP} accuracy": f"How often the label is among the first {TOP} predictions.",
    }

    def loss(self, output: Output, batch: Batch) -> Tensor:
        logits, target = self._pair(output, batch)
        if not target.is_floating_point() and target.numel() and bool((target == self.ignored_label).all()):
            return logits.sum() * 0  # a mean over no sample would be NaN
        return functional.cross_entropy(logits, target, label_smoothing=self.label_smoothing, ignore_index=self.ignored_label)

    def distillation_loss(self, output: Output, teacher_output: Output) -> Tensor:
        """``T**2 KL(softmax(teacher / T) || softmax(output / T))``. Source: Hinton et al. 2015, section 2."""
        logits, wanted = self.output_in(output), self.output_in(teacher_output)
        if logits.shape != wanted.shape:
            raise DataError(
                f"the teacher gives outputs of shape {format_shape(wanted)}, the network {format_shape(logits)}: they must tell the same classes "
                "apart. Use a teacher for the network's classes; its layers may be wider."
            )
        dim = class_dimension(logits)
        soft = functional.log_softmax(logits / self.temperature, dim)
        target = functional.softmax(wanted / self.temperature, dim)
        positions = logits.numel() / max(len(logits) * logits.shape[dim], 1)
        return functional.kl_div(soft, target, reduction="batchmean") / positions * self.temperature**2

    def measure(self, output: Output, batch: Batch) -> Sums:
        """Right predictions and their number; also among the first five where there are more classes. Ties go to the lower class."""
        logits, labels = self._labels(output, batch)
        right, count = logits.argmax(1) == labels, len(labels)
        found = {"accuracy": (right.sum(), count)}
        if logits.shape[1] > TOP:
            found[f"top-{TOP} accuracy"] = ((logits.topk(TOP, 1).indices == labels[:, None]).sum(), count)
        return found

    def doubt(self, scores: Scores, outputs: int) -> str:
        """An accuracy that guessing among the classes could give as well."""
        accuracy = scores.metrics.get("accuracy")
        bound = guessing_bound(scores.samples, outputs) if outputs > 1 else 0
        if accuracy is None or accuracy >= bound:
            return ""
        reach = "always can" if bound == math.inf else f"reaches {bound:.2%} once in a thousand times"
        return (
            f"an accuracy of {accuracy:.2%} on {scores.samples} samples cannot be told from guessing among {outputs} classes, which {reach}. "
            "Check the weights, the preprocessing, and the order of the classes."
        )

    def check(self, output: Output, batch: Batch) -> None:
        logits, target = self._pair(output, batch)
        if not target.is_floating_point():
            check_labels(target[target != self.ignored_label], logits.shape[1])

    def _labels(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[positions, classes]`` and labels ``[positions]`` of all that counts."""
        logits, target = self._pair(output, batch)
        labels = (target.argmax(1) if target.is_floating_point() else target).reshape(-1)
        counts = labels != self.ignored_label
        return logits.movedim(1, -1).reshape(-1, logits.shape[1])[counts], labels[counts]

    def _pair(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits ``[N, classes, ...]``, and labels ``[N, ...]`` or probabilities of the logits' shape.

        Raises:
            DataError: Targets of another shape.
        """
        logits = self.output_in(output)
        target = self.tensor_target(batch).to(logits.device)
        given = tuple(target.shape[1:])
        for dim in (1, logits.dim() - 1) if logits.dim() > 1 else ():
            aligned = logits.movedim(dim, 1)
            positions = aligned.shape[2:]
            if given == tuple(logits.shape[1:]) and (target.is_floating_point() or (logits.shape[dim] > 1 and _is_one_hot(target, dim))):
                return aligned, target.movedim(dim, 1).to(logits.dtype)
            if not target.is_floating_point():
                if given == tuple(positions):
                    return aligned, target.long()
                if target.dim() == logits.dim() and target.shape[dim] == 1 and tuple(target.movedim(dim, 1).shape[2:]) == tuple(positions):
                    return aligned, target.squeeze(dim).long()
        raise DataError(
            f"{type(self).__name__}: a network with outputs of shape {format_shape(logits)} needs labels of shape "
            f"{format_shape(logits, 1)} (integers) or probabilities of shape {format_shape(logits)}; got {_type(target)} of shape {format_shape(target)}. "
            "Change the data, or give the task that fits them."
        )


def check_labels(labels: Tensor, classes: int) -> None:
    """DataError when a label has no output of its own."""
    if labels.numel() and (int(labels.max()) >= classes or int(labels.min()) < 0):
        wrong = labels[(labels >= classes) | (labels < 0)]
        raise DataError(
            f"the data has the label {int(wrong[0])}, but the network has {classes} outputs (labels 0 to {classes - 1}). "
            "Use a network with as many outputs as there are classes."
        )


def _is_one_hot(target: Tensor, dim: int) -> bool:
    return bool(((target == 0) | (target == 1)).all()) and bool((target.sum(dim) == 1).all())


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
