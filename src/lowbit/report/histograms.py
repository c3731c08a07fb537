"""Weights and the levels they were rounded to, as numbers to draw."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.measure.sensitivity import original_weights
from lowbit.network.insert import float_weight, weight_quantizer

BINS = 96
MOST_LEVELS = 256  # levels kept for drawing


@dataclass(frozen=True)
class WeightHistogram:
    """Float weights of one layer in bins, and its levels.

    Attributes:
        name: The layer.
        bit_width: Bits of its codes.
        unit: What the horizontal axis counts: ``weight``, or ``scale`` (steps of each channel's own scale).
        low, high: Range of the bins.
        counts: Float weights in each bin.
        levels: Values that weights can have, ascending.
        level_counts: How many weights took each level.
    """

    name: str
    bit_width: int
    unit: str
    low: float
    high: float
    counts: tuple[int, ...]
    levels: tuple[float, ...]
    level_counts: tuple[int, ...]


def weight_histograms(model: nn.Module, reference: nn.Module | None = None) -> list[WeightHistogram]:
    """One histogram for each quantized weight.

    Where scales differ between channels, weights are counted in steps of their own scale, so that all channels share one grid.

    Args:
        model: The quantized network.
        reference: The float network with the original weights; default: the float weights behind the quantizers.
    """
    found = []
    for name, original in original_weights(model, reference).items():
        layer = model.get_submodule(name)
        quantizer = weight_quantizer(layer)
        assert quantizer is not None
        codes = quantizer.encode(float_weight(layer))
        scale = getattr(codes.decoder, "scale", None)
        view = codes.decoder.granularity.broadcast
        values, quantized, unit = original.float(), codes.decode().float(), "weight"
        if isinstance(scale, Tensor) and scale.numel() > 1:
            values, quantized, unit = view(values) / scale, (view(quantized) / scale).round(decimals=4), "scale"
        found.append(_histogram(name, codes.bit_width, unit, values, quantized))
    return found


def _histogram(name: str, bit_width: int, unit: str, values: Tensor, quantized: Tensor) -> WeightHistogram:
    low, high = (min(values.amin().item(), quantized.amin().item()), max(values.amax().item(), quantized.amax().item()))
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values.flatten(), BINS, low, high).long().tolist()
    levels, level_counts = quantized.unique(return_counts=True)
    if levels.numel() > MOST_LEVELS:
        picks = torch.linspace(0, levels.numel() - 1, MOST_LEVELS).long()
        levels, level_counts = levels[picks], level_counts[picks]
    return WeightHistogram(name, bit_width, unit, low, high, tuple(counts), tuple(levels.tolist()), tuple(level_counts.tolist()))
