"""Observers see values, keep statistics, and choose scale and zero point.

Per tensor, per channel and per group are one code path: ``Granularity.flatten`` gives one row for each scale. A single tensor
(a weight) is kept as it is and searched exactly; a stream of activations goes into a histogram of constant size, filled from
an even sample of each batch, while minimum and maximum stay exact.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1 (range setting).
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, SpecError, unknown_name
from lowbit.quantizers.range_search import entropy_threshold, shrink_search
from lowbit.quantizers.scale_search import mmse_scale
from lowbit.spec import Granularity

BINS = 2048
SAMPLES_PER_BATCH = 1 << 15  # elements of each batch that enter a histogram


def range_from_statistics(
    mean: Tensor, std: Tensor, *, n_sigma: float = 6.0, after_relu: bool = False, upper: float | None = None
) -> tuple[Tensor, Tensor]:
    """Range of a tensor whose channels are normal with ``mean`` and ``std``, without data.

    ``lo = min_i(mean_i - n std_i)``, at least 0 after a ReLU; ``hi = max_i(mean_i + n std_i)``, at most ``upper`` (6 after a ReLU6).

    Source: Nagel et al. 2019 (DFQ), section 5.
    """
    lo, hi = (mean - n_sigma * std).min(), (mean + n_sigma * std).max()
    if after_relu:
        lo, hi = lo.clamp(min=0), hi.clamp(min=0)
    return lo, hi if upper is None else hi.clamp(max=upper)


class Observer(nn.Module, ABC):
    """Sees tensors with ``observe`` and answers with ``parameters``."""

    def __init__(self, granularity: Granularity | None = None) -> None:
        super().__init__()
        self.granularity = granularity or Granularity.tensor()
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Take in the values of ``x``; CalibrationError when one is NaN or infinite."""
        if x.numel() == 0:
            return
        x = x.detach()
        rows = _in_memory_order(x).unsqueeze(0) if self.granularity.kind == "per_tensor" else self.granularity.flatten(x)
        lo, hi = rows.amin(1), rows.amax(1)  # aminmax along a dimension is not vectorised: 20 times slower
        if not bool(torch.isfinite(lo).all() & torch.isfinite(hi).all()):
            raise CalibrationError(f"{int((~torch.isfinite(rows)).sum())} of {rows.numel()} values are NaN or infinite")
        self._see(rows, lo.float(), hi.float())

    def _see(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        """Take in ``[scales, elements]`` whose rows span ``lo`` to ``hi``."""
        self.lo = lo if self.lo is None else torch.minimum(self.lo, lo)
        self.hi = hi if self.hi is None else torch.maximum(self.hi, hi)

    def parameters(self, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``(scale, zero_point)``, each ``[scales]``; CalibrationError when nothing was seen."""
        from lowbit.quantizers.uniform import affine_parameters

        if self.lo is None or self.hi is None:
            raise CalibrationError("no value was seen; the calibration data never reaches this place")
        lo, hi = self.range(qmin, qmax)
        return affine_parameters(lo, hi, qmin, qmax, symmetric=symmetric)

    @abstractmethod
    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """``(lo, hi)``, each ``[scales]``, for that many codes."""


class MinMaxObserver(Observer):
    """The smallest and largest value seen: clips nothing, and is stretched by outliers."""

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        assert self.lo is not None and self.hi is not None
        return self.lo, self.hi


class MovingAverageObserver(MinMaxObserver):
    """Exponential moving average of each batch's smallest and largest value: ``m * old + (1 - m) * new``.

    Source: Jacob et al. 2018, section 3.1.
    """

    momentum = 0.9

    def _see(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        keep = self.momentum
        self.lo = lo if self.lo is None else keep * self.lo + (1 - keep) * lo
        self.hi = hi if self.hi is None else keep * self.hi + (1 - keep) * hi


class HistogramObserver(Observer):
    """Keeps one tensor as it is, several as a histogram of ``BINS`` bins (per tensor) or side by side (per channel)."""

    def reset(self) -> None:
        super().reset()
        self.rows: Tensor | None = None
        self.counts: Tensor | None = None
        self.span = (0.0, 0.0)

    def _see(self, rows: Tensor, lo: Tensor, hi: Tensor) -> None:
        is_first = self.lo is None
        super()._see(rows, lo, hi)
        if is_first:
            self.rows = rows
            return
        if self.granularity.kind != "per_tensor":
            assert self.rows is not None
            self.rows = torch.cat([self.rows, rows], dim=1)
            return
        if self.rows is not None:
            self._count(self.rows)
            self.rows = None
        self._count(rows)

    def _count(self, rows: Tensor) -> None:
        """Add an even sample of ``rows`` to the histogram, which first grows to the range seen so far."""
        assert self.lo is not None and self.hi is not None
        lo, hi = self.lo.item(), self.hi.item()
        if hi <= lo:
            hi = lo + 1.0
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.float64)
        elif (lo, hi) != self.span:
            centers, counts = self._bins()
            index = ((centers - lo) / (hi - lo) * BINS).long().clamp(0, BINS - 1)
            self.counts = torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, counts)
        self.span = (lo, hi)
        stride = max(1, rows.numel() // SAMPLES_PER_BATCH) | 1  # odd, so that it meets every channel
        sample = rows.flatten()[::stride].float().cpu()
        self.counts += torch.histc(sample, BINS, lo, hi).double() * (rows.numel() / sample.numel())

    def _bins(self) -> tuple[Tensor, Tensor]:
        """Centres and counts of the histogram."""
        assert self.counts is not None
        lo, hi = self.span
        return lo + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((hi - lo) / BINS), self.counts

    def histogram(self, row: int = 0) -> tuple[Tensor, Tensor]:
        """Centres and counts of one row, whichever way it is kept."""
        if self.rows is None:
            return self._bins()
        values = self.rows[row].float().cpu()
        lo, hi = values.min().item(), values.max().item()
        hi = hi if hi > lo else lo + 1.0
        return lo + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((hi - lo) / BINS), torch.histc(values, BINS, lo, hi).double()

    def data(self) -> tuple[Tensor, Tensor | None]:
        """``[scales, elements]`` and how often each counts: the tensor itself, or the centres of the filled bins with their counts."""
        if self.rows is not None:
            return self.rows.float(), None
        assert self.lo is not None and self.hi is not None
        centers, counts = self._bins()
        filled = counts > 0
        ends = torch.stack([self.lo[0].cpu(), self.hi[0].cpu()]).double()  # the exact ends of the range, with no weight
        values = torch.cat([centers[filled], ends]).float()
        return values[None], torch.cat([counts[filled], torch.zeros(2)]).float()

    @property
    def scales(self) -> int:
        """Number of rows."""
        assert self.lo is not None
        return len(self.lo)


class PercentileObserver(HistogramObserver):
    """The range that holds all but a fraction of the values: ``1 - percentile / 100``, half of it at either end."""

    percentile = 99.99

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        assert self.lo is not None and self.hi is not None
        tail = (1 - self.percentile / 100) / 2
        lo, hi = [], []
        for row in range(self.scales):
            centers, counts = self.histogram(row)
            share = counts.cumsum(0) / counts.sum()
            lo.append(float(centers[min(int(torch.searchsorted(share, tail)), BINS - 1)]))
            hi.append(float(centers[min(int(torch.searchsorted(share, 1 - tail)), BINS - 1)]))
        found_lo, found_hi = (torch.tensor(ends, device=self.lo.device, dtype=self.lo.dtype) for ends in (lo, hi))
        return torch.maximum(found_lo, self.lo), torch.minimum(found_hi, self.hi)


class MseObserver(HistogramObserver):
    """The range whose quantization error, ``|x - q(x)|**power``, is smallest (see ``shrink_search``)."""

    power = 2.0
    steps = 80

    def parameters(self, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.lo is None:
            raise CalibrationError("no value was seen; the calibration data never reaches this place")
        rows, weights = self.data()
        scale, zero_point = shrink_search(rows, qmin, qmax, symmetric=symmetric, power=self.power, steps=self.steps, weights=weights)
        return scale.to(self.lo.device), zero_point.to(self.lo.device)

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.parameters(qmin, qmax, symmetric=False)
        return (qmin - zero_point) * scale, (qmax - zero_point) * scale


class MseAffineGrid90Observer(MseObserver):
    """``MseObserver`` with 90 steps: the coarse search that Lin et al. 2022 (FQ-ViT) and its followers run under the name OMSE."""

    steps = 90


class OmseObserver(HistogramObserver):
    """The scale of least squared error on a grid without a free zero point (see ``mmse_scale``).

    On an affine grid the zero point is fixed: the lowest code for values that are never negative, else the middle of the codes.

    Source: Choukroun et al. 2019, section 3.
    """

    def parameters(self, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        if self.lo is None:
            raise CalibrationError("no value was seen; the calibration data never reaches this place")
        rows, weights = self.data()
        middle = 0 if symmetric else qmin + (qmax - qmin + 1) // 2 if bool((self.lo < 0).any()) else qmin
        scale, _ = mmse_scale(rows, qmin - middle, qmax - middle, weights=weights)
        return scale.to(self.lo.device), torch.full_like(self.lo, middle)

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.parameters(qmin, qmax, symmetric=False)
        return (qmin - zero_point) * scale, (qmax - zero_point) * scale


class EntropyObserver(HistogramObserver):
    """The range whose codes keep most of the information in the histogram (see ``entropy_threshold``)."""

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        assert self.lo is not None and self.hi is not None
        limits = []
        for row in range(self.scales):
            centers, counts = self.histogram(row)
            largest = float(max(-self.lo[row], self.hi[row]))
            index = (centers.abs() / max(largest, 1e-30) * BINS).long().clamp(0, BINS - 1)
            magnitudes = torch.zeros(BINS, dtype=torch.float64).index_add_(0, index, counts)
            magnitudes[0] = 0  # zero is always a level, and after a ReLU its bin would outweigh all others
            is_two_sided = bool(self.lo[row] < 0)
            levels = (qmax - qmin + 1) // 2 if is_two_sided else qmax - qmin + 1
            limits.append(largest * entropy_threshold(magnitudes, max(levels, 1)) / BINS)
        limit = torch.tensor(limits, device=self.lo.device, dtype=self.lo.dtype)
        return torch.maximum(self.lo, -limit), torch.minimum(self.hi, limit)


OBSERVERS: dict[str, Callable[[Granularity], Observer]] = {
    "min_max": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "percentile": PercentileObserver,
    "mse": MseObserver,
    "mse_affine_grid_90": MseAffineGrid90Observer,
    "omse": OmseObserver,
    "entropy": EntropyObserver,
}


def make_observer(name: str, granularity: Granularity | None = None, **options: float) -> Observer:
    """The observer called ``name``, with its settings (``percentile``, ``power``, ``steps``, ``momentum``) changed by ``options``.

    Raises UnknownNameError with the nearest name, SpecError on a setting that this observer does not have.
    """
    if name not in OBSERVERS:
        raise unknown_name("observer", name, OBSERVERS)
    observer = OBSERVERS[name](granularity or Granularity.tensor())
    for option, value in options.items():
        if not isinstance(getattr(type(observer), option, None), (int, float)):
            raise SpecError(f"observer {name!r} has no setting {option!r}")
        setattr(observer, option, value)
    return observer


def _in_memory_order(x: Tensor) -> Tensor:
    """All values of a dense tensor as a vector without copying, also for channels-last layouts."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return x.reshape(-1)
