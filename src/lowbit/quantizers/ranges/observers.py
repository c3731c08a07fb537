"""Observers see values, keep statistics, and choose scale and zero point.

Per tensor, per channel and per group are one code path: ``Granularity.flatten`` gives one row for each scale. A complete tensor
(a weight) is kept and searched exactly; a stream of activations is summarized in a histogram of constant size, filled from an even
sample of each batch, while minimum and maximum stay exact.

Source: Nagel et al. 2021, "A White Paper on Neural Network Quantization", section 3.1 (range setting).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, SpecError, unknown_name
from lowbit.quantizers.ranges.range_search import entropy_threshold, shrink_search
from lowbit.quantizers.ranges.scale_search import SMALLEST_SCALE, mmse_scale
from lowbit.spec import Granularity

BINS = 2048
DENSE, SPARSE = 1 << 15, 1 << 11  # elements of each sample of a batch that enter a histogram, at first and later
ENOUGH = 1 << 19  # elements after which a sparse sample does: rarer values than 1 in 500 000 are not missed often
WAITING = 1 << 16  # elements that are counted together: single small counts take mostly overhead
HEADROOM = 0.125  # a histogram grows by this share more than it must, so that it seldom has to grow again


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
    """Collects statistics with ``observe`` and returns the grid with ``parameters``."""

    def __init__(self, granularity: Granularity | None = None) -> None:
        super().__init__()
        self.granularity = granularity or Granularity.tensor()
        self.reset()

    def reset(self) -> None:
        """Forget everything seen."""
        self.lo: Tensor | None = None
        self.hi: Tensor | None = None

    def observe(self, x: Tensor, *, is_all: bool = False) -> None:
        """Add the values of ``x`` to the statistics; CalibrationError when one is NaN or infinite.

        ``is_all`` means that nothing else will follow: the range is then found from every value instead of a histogram.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        rows = _in_memory_order(x).unsqueeze(0) if self.granularity.kind == "per_tensor" else self.granularity.flatten(x)
        lo, hi = rows.amin(1), rows.amax(1)  # aminmax along a dimension is not vectorised: 20 times slower
        if not all(map(math.isfinite, torch.cat([lo, hi]).tolist())):
            raise CalibrationError(f"{int((~torch.isfinite(rows)).sum())} of {rows.numel()} values are NaN or infinite")
        self._see_range(lo.float(), hi.float())
        self._see_values(rows, len(x) if x.dim() else 1, is_all)

    def _see_range(self, lo: Tensor, hi: Tensor) -> None:
        """Add the smallest and largest value of each row."""
        if self.lo is None or self.hi is None:
            self.lo, self.hi = lo.clone(), hi.clone()
        else:
            self.lo.clamp_(max=lo)
            self.hi.clamp_(min=hi)

    def _see_values(self, rows: Tensor, batch_size: int, is_all: bool) -> None:
        """Add the values ``[scales, elements]``; does nothing where the range is enough."""

    def parameters(self, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """``(scale, zero_point)``, each ``[scales]``; CalibrationError when nothing was seen."""
        from lowbit.quantizers.affine import affine_parameters

        lo, hi = self.range(qmin, qmax)
        return affine_parameters(lo, hi, qmin, qmax, symmetric=symmetric)

    @abstractmethod
    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        """``(lo, hi)``, each ``[scales]``, for that many codes; CalibrationError when nothing was seen."""

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The smallest and largest value of each row; CalibrationError when nothing was seen."""
        if self.lo is None or self.hi is None:
            raise CalibrationError("no value was seen; the calibration data never reaches this place")
        return self.lo, self.hi


class MinMaxObserver(Observer):
    """The smallest and largest value seen: nothing is clipped, but outliers stretch the range."""

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        return self.extremes()


class MovingAverageObserver(MinMaxObserver):
    """Exponential moving average of each batch's smallest and largest value: ``m * old + (1 - m) * new``.

    Source: Jacob et al. 2018, section 3.1.
    """

    momentum = 0.9

    def _see_range(self, lo: Tensor, hi: Tensor) -> None:
        keep = self.momentum
        self.lo = lo if self.lo is None else keep * self.lo + (1 - keep) * lo
        self.hi = hi if self.hi is None else keep * self.hi + (1 - keep) * hi


class HistogramObserver(Observer):
    """Keeps a complete tensor unchanged, and a stream as a histogram of ``BINS`` bins (per tensor) or as all its values (per channel)."""

    def reset(self) -> None:
        super().reset()
        self.rows: Tensor | None = None
        self.counts: Tensor | None = None
        self.span = (0.0, 0.0)
        self.sampled = 0
        self._waiting: list[Tensor] = []
        self._waiting_count = 0  # elements; adding up their lengths for each batch took as long as counting them
        self._weight = 1.0  # of each waiting element

    def _see_values(self, rows: Tensor, batch_size: int, is_all: bool) -> None:
        if is_all:
            self.rows = rows
        elif self.granularity.kind != "per_tensor":
            self.rows = rows if self.rows is None else torch.cat([self.rows, rows], dim=1)
        else:
            self._count(rows[0], batch_size)

    def _count(self, values: Tensor, batch_size: int) -> None:
        """Let an even sample of ``values`` wait for being counted."""
        quota = batch_size * (DENSE if self.sampled < ENOUGH else SPARSE)
        stride = max(1, len(values) // quota) | 1  # odd, so that it meets every channel
        sample = values[::stride].to(torch.float32, copy=True)
        weight = len(values) / len(sample)
        if weight != self._weight or self._waiting_count >= WAITING:
            self._count_waiting()
            self._weight = weight
        self._waiting.append(sample)
        self._waiting_count += len(sample)
        self.sampled += len(sample)

    def _count_waiting(self) -> None:
        """Add what waits to the histogram, which first grows to the range seen so far."""
        if not self._waiting:
            return
        lo, hi = (ends.item() for ends in self.extremes())
        if self.counts is None:
            self.counts, self.span = torch.zeros(BINS, dtype=torch.float64), (lo, hi if hi > lo else lo + max(1.0, abs(lo)))
        elif lo < self.span[0] or hi > self.span[1]:
            self._grow(lo, hi)
        start, end = self.span
        bins = torch.cat(self._waiting).sub_(start).mul_(BINS / (end - start)).int().clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins, minlength=BINS).cpu() * self._weight
        self._waiting.clear()
        self._waiting_count = 0

    def _grow(self, lo: float, hi: float) -> None:
        """Widen the bins so that they hold ``lo`` to ``hi`` and some more; each old bin goes whole into the new one of its centre."""
        assert self.counts is not None
        centers, counts = self._centers(), self.counts
        start, end = self.span
        room = HEADROOM * (max(hi, end) - min(lo, start))
        start, end = (lo - room if lo < start else start), (hi + room if hi > end else end)
        bins = ((centers - start) * (BINS / (end - start))).long().clamp(0, BINS - 1)
        self.counts, self.span = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, counts), (start, end)

    def histogram(self, row: int = 0) -> tuple[Tensor, Tensor]:
        """Centres and counts of one row, whichever way it is kept; CalibrationError when nothing was seen."""
        lo, hi = self.extremes()
        if self.rows is None:
            self._count_waiting()
            assert self.counts is not None
            return self._centers(), self.counts
        start, end = lo[row].item(), hi[row].item()
        end = end if end > start else start + max(1.0, abs(start))
        bins = ((self.rows[row].double() - start) * (BINS / (end - start))).int().clamp_(0, BINS - 1)
        counts = torch.bincount(bins, minlength=BINS).cpu().double()
        return start + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((end - start) / BINS), counts

    def _centers(self) -> Tensor:
        start, end = self.span
        return start + (torch.arange(BINS, dtype=torch.float64) + 0.5) * ((end - start) / BINS)

    def data(self) -> tuple[Tensor, Tensor | None]:
        """``[scales, elements]`` and how often each counts: the tensor itself, or the centres of the filled bins with their counts."""
        lo, hi = self.extremes()
        if self.rows is not None:
            return self.rows.float(), None
        centers, counts = self.histogram()
        filled = counts > 0
        ends = torch.stack([lo[0].cpu(), hi[0].cpu()]).double()  # the exact ends of the range, with no weight
        values = torch.cat([centers[filled].clamp(ends[0], ends[1]), ends]).float()
        return values[None], torch.cat([counts[filled], torch.zeros(2)]).float()


class PercentileObserver(HistogramObserver):
    """The range that holds all but a fraction of the values: ``1 - percentile / 100``, half of it at either end."""

    percentile = 99.99

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        lo, hi = self.extremes()
        tail = (1 - self.percentile / 100) / 2
        found = []
        for row in range(len(lo)):
            centers, counts = self.histogram(row)
            share = (counts.cumsum(0) / counts.sum()).contiguous()
            places = torch.searchsorted(share, torch.tensor([tail, 1 - tail], dtype=torch.float64)).clamp(max=BINS - 1)
            found.append(centers[places])
        ends = torch.stack(found).to(lo)
        return torch.maximum(ends[:, 0], lo), torch.minimum(ends[:, 1], hi)


class MseObserver(HistogramObserver):
    """The range whose quantization error, ``|x - q(x)|**power``, is smallest (see ``shrink_search``).

    With ``contain_zero`` off an affine range need not contain 0, and the zero point may lie outside the codes.
    """

    power = 2.0
    steps = 80
    contain_zero = True

    def parameters(self, qmin: int, qmax: int, *, symmetric: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        lo, _ = self.extremes()
        rows, weights = self.data()
        scale, zero_point = shrink_search(
            rows, qmin, qmax, symmetric=symmetric, power=self.power, steps=self.steps, contain_zero=self.contain_zero, weights=weights
        )
        return scale.to(lo.device), zero_point.to(lo.device)

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
        lo, _ = self.extremes()
        rows, weights = self.data()
        middle = 0 if symmetric else qmin + (qmax - qmin + 1) // 2 if bool((lo < 0).any()) else qmin
        scale, _ = mmse_scale(rows, qmin - middle, qmax - middle, weights=weights)
        return scale.to(lo.device), torch.full_like(lo, middle)

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        scale, zero_point = self.parameters(qmin, qmax, symmetric=False)
        return (qmin - zero_point) * scale, (qmax - zero_point) * scale


class EntropyObserver(HistogramObserver):
    """The range whose codes keep most of the information in the histogram (see ``entropy_threshold``).

    Rows with fewer values than the histogram has bins keep their whole range: so few values say nothing about a distribution.
    """

    def range(self, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
        lo, hi = self.extremes()
        limits = []
        for row in range(len(lo)):
            centers, counts = self.histogram(row)
            largest = max(-lo[row].item(), hi[row].item(), SMALLEST_SCALE)
            bins = (centers.abs() * (BINS / largest)).long().clamp(0, BINS - 1)
            magnitudes = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, counts)
            magnitudes[0] = 0  # zero is always a level, and after a ReLU its bin would outweigh all others
            levels = (qmax - qmin + 1) // 2 if lo[row] < 0 else qmax - qmin + 1
            kept = entropy_threshold(magnitudes, max(levels, 1)) if counts.sum() >= BINS else BINS
            limits.append(largest * kept / BINS)
        limit = torch.tensor(limits).to(lo)
        return torch.maximum(lo, -limit), torch.minimum(hi, limit)


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
    """The observer called ``name``; ``options`` override its settings (``percentile``, ``power``, ``steps``, ``contain_zero``, ``momentum``).

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


def least_error_clip(x: Tensor, qmax: int) -> Tensor:
    """The clip of ``|x|`` at which rounding to ``qmax`` steps from 0 has the least squared error; shape ``()``, positive."""
    observer = make_observer("mse")
    observer.observe(x.detach().float().abs(), is_all=True)
    scale, _ = observer.parameters(0, qmax, symmetric=True)
    return (scale * qmax).reshape(())
