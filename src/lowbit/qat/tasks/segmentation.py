"""Segmentation: a class for each pixel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.qat.task import Batch, Output, Sums
from lowbit.qat.tasks.classification import Classification


@dataclass(frozen=True)
class Segmentation(Classification):
    """Cross-entropy on masks; mean intersection over union, and the share of right pixels.

    Outputs are ``[N, classes, H, W]``, targets masks ``[N, H, W]`` or ``[N, 1, H, W]`` of class numbers.

    Attributes:
        ignored_label: Class number of pixels that count neither in the loss nor in the metrics.

    Example:
        >>> import torch, lowbit
        >>> masks = torch.tensor([[[0, 1], [1, 255]]])
        >>> logits = torch.stack([masks == 0, masks == 1], dim=1).float()
        >>> lowbit.evaluate(torch.nn.Identity(), (logits, masks), task=lowbit.Segmentation()).metrics
        {'mean IoU': 1.0, 'pixel accuracy': 1.0}
    """

    ignored_label: int = 255

    metric_name = "mean IoU"
    units: ClassVar = {"mean IoU": "%", "pixel accuracy": "%"}
    meanings: ClassVar = {
        "mean IoU": "Intersection over union of predicted and true pixels, averaged over the classes that occur.",
        "pixel accuracy": "How many pixels are given their class.",
    }

    def measure(self, output: Output, batch: Batch) -> Sums:
        """The confusion matrix: pixels by true class (rows) and predicted class (columns)."""
        logits, labels = self._labels(output, batch)
        classes = logits.shape[1]
        return {"confusion": torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view(classes, classes)}

    def metrics(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        confusion = sums["confusion"]
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        return {"mean IoU": float((right / union)[union > 0].mean()), "pixel accuracy": float(right.sum() / confusion.sum())}
