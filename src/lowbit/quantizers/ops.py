"""Activation quantizers as single operators, so that an exported graph has one node for each.

``torch.export`` sees these; eager code uses the quantizers, whose arithmetic is the same. Both quantize per tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("lowbit::fake_quantize_affine", mutates_args=())
def fake_quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``, rounding half to even."""
    codes = (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)
    return codes.sub_(zero_point).mul_(scale)


@fake_quantize_affine.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lowbit::fake_quantize_grid", mutates_args=())
def fake_quantize_grid(x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round((x - lower) / step), qmin, qmax) - zero_point) * scale``, rounding half to even."""
    codes = ((x - lower) / step).round_().clamp_(qmin, qmax)
    return codes.sub_(zero_point).mul_(scale)


@fake_quantize_grid.register_fake
def _(x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("lowbit::fake_quantize_codebook", mutates_args=())
def fake_quantize_codebook(x: Tensor, boundaries: Tensor, levels: Tensor) -> Tensor:
    """``levels[number of boundaries below x]``, of which NaN has none; ``boundaries`` ascending ``[n - 1]``, ``levels`` ``[n]``."""
    if len(boundaries) == 1:
        return torch.where(x > boundaries, levels[1], levels[0])
    return levels[torch.bucketize(x, boundaries) * (x == x)]


@fake_quantize_codebook.register_fake
def _(x: Tensor, boundaries: Tensor, levels: Tensor) -> Tensor:
    return torch.empty_like(x)
