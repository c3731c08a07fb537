"""Activation quantizers as single operators, so that an exported graph has one node for each.

``torch.export`` sees these marks; eager code uses the quantizers, whose arithmetic is the same. Both quantize per tensor. Their
registered names stand in files.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lowbit::fake_quantize_affine", mutates_args=())
def mark_affine(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``, rounding half to even."""
    codes = (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)
    return codes.sub_(zero_point).mul_(scale)


@mark_affine.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lowbit::fake_quantize_grid", mutates_args=())
def mark_grid(x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round((x - lower) / step), qmin, qmax) - zero_point) * scale``, rounding half to even."""
    codes = ((x - lower) / step).round_().clamp_(qmin, qmax)
    return codes.sub_(zero_point).mul_(scale)


@mark_grid.register_fake
def _(x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


def count_below(x: Tensor, boundaries: Tensor) -> Tensor:
    """How many boundaries lie below each value, none below NaN: int64, shaped like ``x``.

    Args:
        x: Any shape, or ``[rows, n]``.
        boundaries: Ascending, ``[k]``, or ``[rows, k]`` for each row.
    """
    return torch.searchsorted(boundaries.contiguous(), x.contiguous()) * (x == x)


@torch.library.custom_op("lowbit::fake_quantize_codebook", mutates_args=())
def mark_codebook(x: Tensor, boundaries: Tensor, levels: Tensor) -> Tensor:
    """``levels[number of boundaries below x]``, of which NaN has none; ``boundaries`` ascending ``[n - 1]``, ``levels`` ``[n]``."""
    return levels[count_below(x, boundaries)]


@mark_codebook.register_fake
def _(x: Tensor, boundaries: Tensor, levels: Tensor) -> Tensor:
    return torch.empty_like(x)
