"""Histograms of weights and activations with the grids that they were rounded to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lowbit.measure.agreement import run_output
from lowbit.measure.layer_noise import original_weights
from lowbit.measure.noise import Noise
from lowbit.network.batch import calibration_for
from lowbit.network.insert import activation_quantizers, quantized_weights, sites
from lowbit.network.layers import evaluating
from lowbit.network.record import record_of
from lowbit.quantizers import Quantizer
from lowbit.quantizers.qtensor import AffineDecoder
from lowbit.report.results import ActivationResult

BINS = 96
MOST_LEVELS = 256  # levels kept for drawing
FINE_BITS = 6  # from here on levels lie too close to draw, and errors are more informative
WIDEST_ERROR = 2.0  # steps; larger errors count in the outermost bins
SAMPLE_SIZE = 4096  # values kept of each tensor for its histogram
FAR = 1e6  # and so many times the largest value: beyond every grid


@dataclass(frozen=True)
class WeightHistogram:
    """Float weights of one layer in bins, and its levels.

    Attributes:
        name: The layer.
        bit_width: Bits of its codes.
        unit: What the horizontal axis counts: ``weight``, ``scale`` (steps of each channel's own scale), or ``code`` (the same, where
            channels have zero points of their own).
        low, high: Range of the bins.
        counts: Float weights in each bin.
        levels: Values that quantized weights take, ascending.
        level_counts: How many weights took each level.
        used: The fewest and the most levels that weights of one scale take: of a channel where each has its own, else of the layer.
        per_scale: How many weights share a scale.
        error_counts: Rounding errors in bins from ``-error_span`` to ``error_span``; empty for grids coarse enough to draw.
        error_unit: ``step`` (the distance of two levels), or ``weight`` where levels are not evenly spaced.
    """

    name: str
    bit_width: int
    unit: str
    low: float
    high: float
    counts: tuple[int, ...]
    levels: tuple[float, ...]
    level_counts: tuple[int, ...]
    used: tuple[int, int] = (0, 0)
    per_scale: int = 0
    error_counts: tuple[int, ...] = ()
    error_span: float = 0.0
    error_unit: str = "step"


def weight_histograms(model: nn.Module, reference: nn.Module | None = None) -> list[WeightHistogram]:
    """One histogram for each quantized weight.

    Where scales differ between channels, weights are counted in steps of their own scale, so that all channels share one grid.

    Args:
        model: The quantized network.
        reference: The float network with the original weights; default: the float weights behind the quantizers.
    """
    found, weights = [], quantized_weights(model)
    for name, original in original_weights(model, reference).items():
        quantizer = weights[name].quantizer
        assert quantizer is not None
        codes = quantizer.encode(weights[name].original.detach())
        decoder, view = codes.decoder, codes.decoder.granularity.broadcast
        scale = getattr(decoder, "scale", None)
        values, quantized, unit = original.float(), codes.decode().float(), "weight"
        used, error = _levels_used(quantized, quantizer), quantized - values
        if isinstance(decoder, AffineDecoder):
            error = view(error) / decoder.scale
        if isinstance(scale, Tensor) and scale.numel() > 1:
            values, quantized, unit = view(values) / scale, (view(quantized) / scale).round(decimals=4), "scale"
            if isinstance(decoder, AffineDecoder) and bool(decoder.zero_point.any()):
                values, quantized, unit = values + decoder.zero_point, (quantized + decoder.zero_point).round(decimals=4), "code"
        drawn = _histogram(name, codes.bit_width, unit, values, quantized, error, isinstance(decoder, AffineDecoder))
        found.append(dataclasses.replace(drawn, used=(int(used.min()), int(used.max())), per_scale=original.numel() // len(used)))
    return found


def _levels_used(quantized: Tensor, quantizer: Quantizer) -> Tensor:
    """The number of different values among the weights that share a scale, for each scale."""
    rows = quantizer.granularity.flatten(quantized).sort(dim=1).values
    return 1 + (rows.diff(dim=1) != 0).sum(1)


def _histogram(name: str, bit_width: int, unit: str, values: Tensor, quantized: Tensor, error: Tensor, in_steps: bool) -> WeightHistogram:
    low, high = _span(min(values.amin().item(), quantized.amin().item()), max(values.amax().item(), quantized.amax().item()))
    counts = torch.histc(values.flatten(), BINS, low, high).long().tolist()
    levels, level_counts = quantized.unique(return_counts=True)
    if levels.numel() > MOST_LEVELS:
        picks = torch.linspace(0, levels.numel() - 1, MOST_LEVELS).long()
        levels, level_counts = levels[picks], level_counts[picks]
    error_counts: list[int] = []
    span = 0.0
    if bit_width >= FINE_BITS:
        largest = error.abs().amax().item()
        span = min(max(largest, 0.5), WIDEST_ERROR) if in_steps else largest or 1.0
        error_counts = torch.histc(error.flatten().clamp(-span, span), BINS, -span, span).long().tolist()
    return WeightHistogram(
        name, bit_width, unit, low, high, tuple(counts), tuple(levels.tolist()), tuple(level_counts.tolist()),
        error_counts=tuple(error_counts), error_span=span, error_unit="step" if in_steps else "weight",
    )  # fmt: skip


def _span(low: float, high: float) -> tuple[float, float]:
    return (low, high) if low < high else (low - 0.5, high + 0.5)


@dataclass(frozen=True)
class ActivationHistogram:
    """Values that reach one activation quantizer.

    Attributes:
        result: Its site, its bits and its range.
        low, high: Range of the bins, which hold the clips too.
        counts: Values in each bin, of a sample of them.
    """

    result: ActivationResult
    low: float
    high: float
    counts: tuple[int, ...]


def activation_histograms(model: nn.Module, data: object) -> list[ActivationHistogram]:
    """One histogram for each activation quantizer that ``data`` reaches, in the order in which they are reached.

    Args:
        model: The quantized network.
        data: Batches as for calibration.
    """
    meters = {quantizer: _ActivationMeter(quantizer) for quantizer in activation_quantizers(model).values()}
    reached: dict[Quantizer, None] = {}

    def watch(quantizer: Quantizer) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            reached.setdefault(quantizer)
            meters[quantizer].add(args[0].detach())

        return see

    handles = [quantizer.register_forward_pre_hook(watch(quantizer)) for quantizer in meters]
    try:
        with evaluating(model):
            for inputs in calibration_for(model, data):
                run_output(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    places, roles = {quantizer: site for site, quantizer in activation_quantizers(model).items()}, activation_roles(model)
    return [meters[quantizer].result(places[quantizer], *roles[quantizer]) for quantizer in reached if meters[quantizer].noise.count]


def activation_roles(model: nn.Module) -> dict[Quantizer, tuple[str, tuple[str, ...]]]:
    """The role of each activation quantizer and the layers it serves: their ``input`` or ``output``, or a ``merge``.

    A merge is what meets in a sum or a concatenation, its result, or what is pooled.
    """
    record, placed = record_of(model), sites(model)
    found: dict[Quantizer, tuple[str, tuple[str, ...]]] = dict.fromkeys(placed.values(), ("merge", ()))
    for role, owners in () if record is None else (("output", record.table.outputs), ("input", record.table.inputs)):
        for layer, site in owners.items():
            if site in placed:
                others = found[placed[site]][1] if found[placed[site]][0] == role else ()
                found[placed[site]] = (role, (*others, layer))
    return found


class _ActivationMeter:
    """Range, clipping and noise of the tensors that pass one quantizer."""

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.noise = quantizer, Noise()
        self._low, self._high, self._clip_low, self._clip_high = math.inf, -math.inf, math.inf, -math.inf
        self._clipped = 0
        self._sample: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add one more tensor, unquantized; one with NaN or infinity has no range and is left out."""
        if x.numel() == 0 or not bool(x.isfinite().all()):
            return
        quantized = self.quantizer.encode(x).decode()
        self.noise.add(x, quantized)
        low, high = x.amin().item(), x.amax().item()
        self._low, self._high = min(self._low, low), max(self._high, high)
        first, last = self._clips(x, quantized)
        self._clip_low, self._clip_high = min(self._clip_low, first), max(self._clip_high, last)
        half_step = (last - first) / (2**self.quantizer.bit_width - 1) / 2  # up to it values are rounded, beyond it clipped
        self._clipped += int(((x < first - half_step) | (x > last + half_step)).sum())
        values = x.flatten().float()
        self._sample.append(values[:: max(1, values.numel() // SAMPLE_SIZE)].cpu())

    def _clips(self, x: Tensor, quantized: Tensor) -> tuple[float, float]:
        """The ends of the grid; those of the values that were taken where scales depend on the input or the channel."""
        if not self.quantizer.is_dynamic and not self.quantizer.granularity.axes:
            far = min(FAR * max(x.abs().amax().item(), 1.0), torch.finfo(x.dtype).max / 2)
            quantized = self.quantizer.encode(x.new_tensor([-far, far])).decode()
        return quantized.amin().item(), quantized.amax().item()

    def result(self, site: str, role: str, layers: tuple[str, ...]) -> ActivationHistogram:
        low, high = _span(min(self._low, self._clip_low), max(self._high, self._clip_high))
        counts = torch.histc(torch.cat(self._sample), BINS, low, high).long().tolist()
        found = ActivationResult(
            site, role, layers, self.quantizer.bit_width, self._low, self._high, self._clip_low, self._clip_high,
            self._clipped / self.noise.count, self.noise.sqnr_db,
        )  # fmt: skip
        return ActivationHistogram(found, low, high, tuple(counts))
