"""Activation quantizers and what scales outputs by inputs, as single operators, so that an exported graph has one node for each.

``torch.export`` sees the operators; eager code uses quantizers and functions whose arithmetic is the same. All quantize per tensor. Their
registered names stand in files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


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


def input_scale(
    x: Tensor, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """XNOR-Net's K: the mean of ``|x|`` over the channels of a group and over a window, places beyond the border counting as 0.

    Args:
        x: ``[N, channels, ...]`` with as many further dimensions as ``kernel_size`` has numbers.
        kernel_size, stride, padding, dilation: A number for each dimension of space.
        groups: Number of groups; ``channels`` must be a multiple of it.

    Returns:
        ``[N, groups, ...]``.

    Source: Rastegari et al. 2016, "XNOR-Net", section 3.2, Eq. 11.

        >>> input_scale(torch.tensor([[[1.0, -3.0, 2.0]]]), [3], [1], [1], [1], 1)
        tensor([[[1.3333, 2.0000, 1.6667]]])
    """
    dims = len(kernel_size)
    mean = x.abs().unflatten(-dims - 1, (groups, -1)).mean(-dims - 1)
    kernel = mean.new_full((groups, 1, *kernel_size), 1 / math.prod(kernel_size))
    convolve = (functional.conv1d, functional.conv2d, functional.conv3d)[dims - 1]
    return convolve(mean, kernel, None, tuple(stride), tuple(padding), tuple(dilation), groups)


mark_input_scale = torch.library.custom_op("lowbit::input_scale", input_scale, mutates_args=())
mark_input_scale.register_fake(input_scale)
