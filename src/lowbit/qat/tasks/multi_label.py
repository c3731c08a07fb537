"""Multi-label classification: any number of labels for each sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import DataError
from lowbit.qat.task import Batch, Output, Sums, Supervised, format_shape


@dataclass(frozen=True)
class MultiLabel(Supervised):
    """Binary cross-entropy of every label; F1, and the share of labels that are right.

    Outputs are logits, positive where a label is predicted; targets have their shape, with 1 where a label holds and 0 where not (probabilities in
    between are labels from 0.5 on).

    Example:
        >>> import torch, lowbit
        >>> logits, targets = torch.tensor([[2.0, -1.0], [1.0, 3.0]]), torch.tensor([[1, 0], [0, 1]])
        >>> lowbit.evaluate(torch.nn.Identity(), (logits, targets), task=lowbit.MultiLabel()).metrics
        {'F1': 0.8, 'label accuracy': 0.75}
    """

    metric_name = "F1"
    units: ClassVar = {"label accuracy": "%"}
    meanings: ClassVar = {
        "F1": "Harmonic mean of precision and recall, counted over all labels together.",
        "label accuracy": "How many labels are rightly predicted to hold or not.",
    }

    def loss(self, output: Output, batch: Batch) -> Tensor:
        logits, target = self._pair(output, batch)
        return functional.binary_cross_entropy_with_logits(logits, target)

    def distillation_loss(self, output: Output, teacher_output: Output) -> Tensor:
        """Binary cross-entropy with the teacher's probabilities as targets."""
        return functional.binary_cross_entropy_with_logits(self.output_in(output), self.output_in(teacher_output).sigmoid())

    def measure(self, output: Output, batch: Batch) -> Sums:
        """Labels by what is true and what is predicted: both, predicted only, true only, neither."""
        logits, target = self._pair(output, batch)
        predicted, true = logits > 0, target >= 0.5
        counts = [predicted & true, predicted & ~true, ~predicted & true, ~predicted & ~true]
        return {"counts": torch.stack([count.sum() for count in counts])}

    def metrics(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        both, only_predicted, only_true, neither = sums["counts"].tolist()
        wrong = only_predicted + only_true
        f1 = 2 * both / (2 * both + wrong) if both + wrong else 1.0  # nothing to find, and nothing found
        return {"F1": f1, "label accuracy": (both + neither) / (both + neither + wrong)}

    def check(self, output: Output, batch: Batch) -> None:
        _, target = self._pair(output, batch)
        if target.numel() and not (float(target.min()) >= 0 and float(target.max()) <= 1):
            raise DataError(
                f"MultiLabel: targets must be 0 or 1 for each label, or probabilities; got values from {float(target.min()):g} to {float(target.max()):g}"
            )

    def _pair(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, target = self.output_in(output), self.tensor_target(batch)
        if target.shape[1:] != logits.shape[1:]:
            raise DataError(
                f"MultiLabel: a network with outputs of shape {format_shape(logits)} needs targets of that shape, 0 or 1 for each label; "
                f"got {format_shape(target)}. If each sample has one label, the task is Classification."
            )
        return logits, target.to(logits)
