"""Regression: the targets are numbers."""

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
class Regression(Supervised):
    """Mean squared error; its root (RMSE), and the share of the targets' variance that is explained (R2).

    Targets have the shape of the outputs; ``[N]`` goes with outputs ``[N, 1]`` and the other way round. R2 is the mean over the columns of
    ``[N, columns]``, and taken over all values together where there are more dimensions.

    Example:
        >>> import torch, lowbit
        >>> predicted, targets = torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [3.0]])
        >>> lowbit.evaluate(torch.nn.Identity(), (predicted, targets), task=lowbit.Regression()).metrics
        {'RMSE': 1.0, 'R2': 0.0}
    """

    metric_name = "RMSE"
    higher_is_better = False
    meanings: ClassVar = {
        "RMSE": "Root of the mean squared error, in the units of the targets.",
        "R2": "Share of the targets' variance that is explained: 1 is perfect, 0 no better than their mean.",
    }

    def loss(self, output: Output, batch: Batch) -> Tensor:
        return functional.mse_loss(*self._pair(output, batch))

    def measure(self, output: Output, batch: Batch) -> Sums:
        """For each column: squared errors, targets, squared targets, and their number."""
        predicted, target = (part.double() if part.dim() == 2 else part.double().reshape(-1, 1) for part in self._pair(output, batch))
        sums = [(predicted - target).square(), target, target.square(), torch.ones_like(target)]
        return {"moments": torch.stack([part.sum(0) for part in sums])}

    def metrics(self, sums: Mapping[str, Tensor]) -> Mapping[str, float]:
        errors, total, squares, count = sums["moments"]
        spread = squares - total.square() / count
        is_constant = spread <= 1e-12 * squares  # what is left of rounding
        explained = torch.where(is_constant, (errors == 0).double(), 1 - errors / spread)
        return {"RMSE": float((errors.sum() / count.sum()).sqrt()), "R2": float(explained.mean())}

    def check(self, output: Output, batch: Batch) -> None:
        target = self._pair(output, batch)[1]
        if target.numel() and not bool(torch.isfinite(target).all()):
            raise DataError("Regression: a target is NaN or infinite. Remove these samples.")

    def _pair(self, output: Output, batch: Batch) -> tuple[Tensor, Tensor]:
        predicted, target = self.output_in(output), self.tensor_target(batch)
        given, wanted = tuple(target.shape[1:]), tuple(predicted.shape[1:])
        if given != wanted and {given, wanted} != {(), (1,)}:  # broadcasting them would compare each sample with all others
            raise DataError(
                f"Regression: a network with outputs of shape {format_shape(predicted)} needs targets of that shape, got {format_shape(target)}. "
                "Reshape one of them."
            )
        return predicted, target.to(predicted).reshape(-1, *wanted)
