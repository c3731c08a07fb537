"""Searches for the range that loses least, by mean error (of any power) or relative entropy.

All rows (channels, groups) and a whole tensor are searched by the same vectorised code, in chunks that stay in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers.ranges.scale_search import SMALLEST_SCALE

CHUNK = 1 << 15  # elements searched together: a few copies of them fit in the second-level cache
SMALL = 1e-15  # of values whose squares come near the smallest float32
_LOOK_AHEAD = 8  # candidates between two checks whether any later one can still be the best
_FEW_CODES = 16  # of which even the narrowest range may be the best
_SURE = 0.999  # covers rounding in sums
ENTROPY_WIDTHS = 128  # candidates of the entropy search


def shrink_search(
    rows: Tensor,
    qmin: int,
    qmax: int,
    *,
    symmetric: bool,
    power: float = 2.0,
    steps: int = 80,
    step: float = 0.01,
    contain_zero: bool = True,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scale and zero point that minimise ``sum |x - fake_quantize(x)|**power`` over ranges shrunk from min and max.

    Candidate ``i`` of ``0 .. steps - 1`` has the range ``(1 - step * i) * [min, max]``. The smallest error wins, the widest range
    among equals. Affine: ``scale = (max - min) / (qmax - qmin)``, ``zero_point = round(qmin - min / scale)``; symmetric:
    ``scale = max |x| / qmax``, zero point 0.

    Args:
        rows: ``[scales, elements]``.
        qmin, qmax: Integer range of the codes.
        symmetric: Whether the zero point is 0.
        power: Exponent of the error.
        steps, step: Number of candidates and how much each shrinks.
        contain_zero: Widen the range to contain 0 and keep the zero point among the codes; ``False`` as in BRECQ's initialization.
        weights: How often each element counts, ``[elements]`` (a histogram's counts).

    Returns:
        ``(scale, zero_point)``, each ``[scales]``; rows of zeros get scale 1.

    Source: Nagel et al. 2021, section 3.1 (MSE range); Li et al. 2021 (BRECQ), 80 steps of 1 % with power 2.4.
    """
    unit = _unit(rows)
    if unit is not None:
        scale, zero_point = shrink_search(
            rows / unit[:, None],
            qmin,
            qmax,
            symmetric=symmetric,
            power=power,
            steps=steps,
            step=step,
            contain_zero=contain_zero,
            weights=weights,
        )
        return scale * unit, zero_point
    shrink = 1 - step * torch.arange(steps, dtype=torch.float64, device=rows.device)
    found = [
        _search(chunk, shrink, qmin, qmax, symmetric, power, contain_zero, weights)
        for chunk in torch.split(rows, max(1, CHUNK // max(1, rows.shape[1])))
    ]
    return torch.cat([scale for scale, _ in found]), torch.cat([zero_point for _, zero_point in found])


def _unit(rows: Tensor) -> Tensor | None:
    """A power of two for each row that holds values so small that their errors would vanish in float32, 1 for others; ``None`` where none does."""
    largest = torch.maximum(rows.amax(1), -rows.amin(1))
    is_small = (largest > 0) & (largest < SMALL)
    return torch.where(is_small, torch.exp2(largest.log2().floor().clamp(min=-120)), 1.0) if bool(is_small.any()) else None


def _search(
    rows: Tensor, shrink: Tensor, qmin: int, qmax: int, symmetric: bool, power: float, contain_zero: bool, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    lo, hi = rows.amin(1), rows.amax(1)
    if contain_zero:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
    factor = shrink.to(rows.dtype)[:, None]
    scale, zero_point = _grid(lo * factor, hi * factor, qmin, qmax, symmetric, contain_zero)  # [candidates, rows]
    total = torch.full_like(scale, torch.inf)
    together = max(1, CHUNK // max(1, rows.numel()))  # candidates that fit in the chunk when the rows are few and short
    buffer = rows.new_empty(together, *rows.shape)
    is_bounded = contain_zero and qmax - qmin > _FEW_CODES  # ranges lie within one another, and clipping soon costs more than it gains
    for start in range(0, len(shrink), together):
        is_check_due = is_bounded and start % _LOOK_AHEAD < together and start > 0
        if is_check_due and bool(
            (_clipped(rows, scale[start], zero_point[start], qmin, qmax, power, weights) > total[:start].amin(0)).all()
        ):
            break
        s, z = scale[start : start + together, :, None], zero_point[start : start + together, :, None]
        error = torch.div(rows, s, out=buffer[: len(s)]).round_()
        torch.maximum(error, qmin - z, out=error)  # clamp with tensors takes twice as long as both of these
        torch.minimum(error, qmax - z, out=error)
        error.mul_(s).sub_(rows)
        # pow takes twice as long as a logarithm and an exponential
        error = error.square_() if power == 2 else error.abs_().log2_().mul_(power).exp2_()
        total[start : start + together] = (error if weights is None else error.mul_(weights)).sum(2)
    total.nan_to_num_(nan=float("inf"))  # an error that overflows in a bin without weight
    best = total.argmin(0, keepdim=True)  # the first, so the widest, among equals
    return scale.gather(0, best)[0], zero_point.gather(0, best)[0]


def _clipped(rows: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, power: float, weights: Tensor | None) -> Tensor:
    """What clipping alone costs, at least, with this candidate (``[rows]``) and all that shrink further.

    Rounded zero points move the ends of a range by up to half a step.
    """
    lo, hi = ((end - zero_point) * scale for end in (qmin - 1, qmax + 1))
    outside = (torch.maximum(torch.minimum(rows, hi[:, None]), lo[:, None]) - rows).abs_().pow_(power)
    return (outside if weights is None else outside.mul_(weights)).sum(1) * _SURE


def _grid(lo: Tensor, hi: Tensor, qmin: int, qmax: int, symmetric: bool, contain_zero: bool) -> tuple[Tensor, Tensor]:
    scale = torch.maximum(-lo, hi) / max(qmax, 1) if symmetric else (hi - lo) / (qmax - qmin)
    scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    if symmetric:
        return scale, torch.zeros_like(scale)
    zero_point = (qmin - lo / scale).round()
    return scale, zero_point.clamp(qmin, qmax) if contain_zero else zero_point


def entropy_threshold(counts: Tensor, levels: int) -> int:
    """How many leading bins of a histogram of magnitudes to keep so that ``levels`` codes lose least information.

    For each candidate width the reference ``P`` is the histogram cut there, with everything beyond added to its last bin; ``Q``
    is ``P`` without that addition, averaged over ``levels`` equal groups of bins. The width of least ``KL(P || Q)`` wins.

    Args:
        counts: ``[bins]``, magnitudes ascending.
        levels: Number of codes for magnitudes.

    Returns:
        Number of bins, ``levels`` to ``len(counts)``.

    Source: Migacz 2017, "8-bit Inference with TensorRT"; Nagel et al. 2021 list it among the range setters.
    """
    counts = counts.double()
    bins = len(counts)
    if levels >= bins:
        return bins
    widths = torch.arange(levels, bins + 1, max(1, bins // ENTROPY_WIDTHS), device=counts.device)[:, None]
    position = torch.arange(bins, device=counts.device)[None, :]
    q = counts * (position < widths)
    p = q.scatter_add(1, widths - 1, (counts.sum() - counts.cumsum(0))[widths - 1])
    present = (q > 0).double()
    group = (position * levels // widths).clamp_(max=levels - 1)
    mass, filled = (q.new_zeros(len(widths), levels).scatter_add_(1, group, values) for values in (q, present))
    q = (mass / filled.clamp(min=1)).gather(1, group) * present
    is_empty = q.sum(1) == 0
    p, q = p / p.sum(1, keepdim=True), q / q.sum(1, keepdim=True)
    divergence = torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0.0).sum(1).masked_fill(is_empty, float("inf"))
    return bins if bool(is_empty.all()) else int(widths[divergence.argmin()])
