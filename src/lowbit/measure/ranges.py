"""Inputs of quantizers: ranges, outliers and uneven channels of weights and activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.measure.noise import Noise
from lowbit.quantizers import Quantizer, UniformQuantizer

SAMPLE_SIZE = 4096  # values kept of each tensor for its quantiles
BULK = 0.999  # the share of values that outliers are compared with


@dataclass(frozen=True)
class Range:
    """Values that one quantizer saw, and their quantized counterparts.

    Attributes:
        low, high: Smallest and largest value.
        grid_low, grid_high: Smallest and largest quantized value.
        clipped: Fraction of values outside what the grid can represent.
        outlier_ratio: Largest magnitude over the magnitude that 99.9 % of the values stay below; near 1 without outliers.
        channel_ratio: Largest over median range of the output channels of a weight; ``None`` for activations.
        sqnr_db: SQNR of the quantized tensor alone.
    """

    low: float
    high: float
    grid_low: float
    grid_high: float
    clipped: float
    outlier_ratio: float
    channel_ratio: float | None
    sqnr_db: float


class RangeMeter:
    """Collects a ``Range`` over several tensors that pass one quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer = quantizer
        self._noise = Noise()
        self._low, self._high = float("inf"), float("-inf")
        self._grid_low, self._grid_high = float("inf"), float("-inf")
        self._clipped = 0
        self._sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add one more tensor, unquantized."""
        x = x.detach()
        if x.numel() == 0:
            return
        quantized = self.quantizer.encode(x).decode()
        low, high = quantized.amin().item(), quantized.amax().item()
        self._noise.add(x, quantized)
        self._low, self._high = min(self._low, x.amin().item()), max(self._high, x.amax().item())
        self._grid_low, self._grid_high = min(self._grid_low, low), max(self._grid_high, high)
        self._clipped += _count_clipped(x, quantized, self.quantizer)
        magnitudes = x.abs().flatten().float()
        self._sample.append(magnitudes[:: max(1, magnitudes.numel() // SAMPLE_SIZE)].cpu())

    def result(self, channel_ratio: float | None = None) -> Range | None:
        """The range over everything added so far; ``None`` when nothing was."""
        if self._noise.count == 0:
            return None
        values = torch.cat(self._sample)
        bulk = values.kthvalue(max(1, int(values.numel() * BULK))).values.item()
        largest = max(abs(self._low), abs(self._high))
        return Range(
            self._low,
            self._high,
            self._grid_low,
            self._grid_high,
            self._clipped / self._noise.count,
            largest / bulk if bulk > 0 else 1.0,
            channel_ratio,
            self._noise.sqnr_db,
        )


def _count_clipped(x: Tensor, quantized: Tensor, quantizer: Quantizer) -> int:
    """Values further from the nearest level than half a step of their own scale; other grids than uniform ones are not counted."""
    if not isinstance(quantizer, UniformQuantizer):
        return 0
    error = quantizer.granularity.broadcast((x - quantized).abs().float())
    return int((error > 0.5001 * quantizer.scale).sum())  # a little above a half: rounding of the error itself


def channel_ratio(weight: Tensor, axis: int) -> float:
    """Largest over median of the channels' largest magnitudes: 1 for even channels; dead channels are left out."""
    ranges = torch.amax(weight.detach().movedim(axis, 0).flatten(1).abs(), dim=1)
    alive = ranges[ranges > 0]
    return (alive.max() / alive.median()).item() if alive.numel() else 1.0


def range_of_weight(weight: Tensor, quantizer: Quantizer, axis: int) -> Range | None:
    """The ``Range`` of one weight."""
    meter = RangeMeter(quantizer)
    meter.add(weight)
    return meter.result(channel_ratio(weight, axis))
