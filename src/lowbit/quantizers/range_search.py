"""Searches for the range that loses least: mean squared error (any power) and relative entropy.

All rows (channels, groups) and a whole tensor are searched by the same vectorised code, in chunks that stay in the cache.
"""
from __future__ import annotations

import torch
from torch import Tensor

CHUNK = 1 << 15  # elements searched together: a few copies of them fit in the second-level cache


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
    scales, zero_points = [], []
    for chunk in torch.split(rows, max(1, CHUNK // max(1, rows.shape[1]))):
        lo, hi = chunk.amin(1, keepdim=True), chunk.amax(1, keepdim=True)
        if contain_zero:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        best = torch.full_like(lo, float("inf"))
        best_scale, best_zero = torch.ones_like(lo), torch.zeros_like(lo)
        buffer = torch.empty_like(chunk)
        for index in range(steps):
            scale, zero_point = _grid(lo * (1 - step * index), hi * (1 - step * index), qmin, qmax, symmetric, contain_zero)
            torch.div(chunk, scale, out=buffer)
            buffer.round_().clamp_(qmin - zero_point, qmax - zero_point).mul_(scale).sub_(chunk)
            error = buffer.square_() if power == 2 else buffer.abs_().pow_(power)
            if weights is not None:
                error.mul_(weights)
            total = error.sum(1, keepdim=True)
            better = total < best
            best = torch.where(better, total, best)
            best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero_point, best_zero)
        scales.append(best_scale)
        zero_points.append(best_zero)
    return torch.cat(scales).flatten(), torch.cat(zero_points).flatten()


def _grid(lo: Tensor, hi: Tensor, qmin: int, qmax: int, symmetric: bool, contain_zero: bool) -> tuple[Tensor, Tensor]:
    scale = torch.maximum(-lo, hi) / max(qmax, 1) if symmetric else (hi - lo) / (qmax - qmin)
    scale = torch.where(scale < 1e-20, torch.ones_like(scale), scale)
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
    beyond = counts.sum() - counts.cumsum(0)
    best, best_width = float("inf"), bins
    for width in range(levels, bins + 1, max(1, bins // 128)):
        p = counts[:width].clone()
        q = p.clone()
        p[-1] += beyond[width - 1]
        group = torch.arange(width) * levels // width
        present = (q > 0).double()
        mass = torch.zeros(levels, dtype=torch.float64).scatter_add_(0, group, q)
        filled = torch.zeros(levels, dtype=torch.float64).scatter_add_(0, group, present)
        q = (mass / filled.clamp(min=1))[group] * present
        if q.sum() == 0 or p.sum() == 0:
            continue
        p, q = p / p.sum(), q / q.sum()
        keep = p > 0
        divergence = float((p[keep] * (p[keep] / q[keep].clamp(min=1e-12)).log()).sum())
        if divergence < best:
            best, best_width = divergence, width
    return best_width
