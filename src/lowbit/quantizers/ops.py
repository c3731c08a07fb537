"""Activation quantizers and what scales outputs by inputs, as single operators, so that an exported graph has one node for each.

``torch.export`` sees the operators; eager code uses quantizers and functions whose arithmetic is the same. All quantize per tensor. Their
registered names stand in files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def define_operator(name: str, function: Callable[..., Tensor], fake: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """``function`` as torch's operator ``lowbit::name``, whose output looks like ``fake``'s; returns the operator.

    ``torch.library.custom_op`` does the same, but imports 800 modules when an operator is called for the first time, and adds checks
    that take longer than a small layer.
    """
    qualified = f"lowbit::{name}"
    torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
    torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    torch.library.register_fake(qualified, fake)
    defined: Callable[..., Tensor] = getattr(torch.ops.lowbit, name).default
    return defined


def _like_first(x: Tensor, *_others: Any, **_named: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_quantize_affine(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``, rounding half to even."""
    codes = (x / scale).round_().add_(zero_point).clamp_(qmin, qmax)
    return codes.sub_(zero_point).mul_(scale)


mark_affine = define_operator("fake_quantize_affine", _fake_quantize_affine, _like_first)


def _fake_quantize_grid(x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round((x - lower) / step), qmin, qmax) - zero_point) * scale``, rounding half to even."""
    codes = ((x - lower) / step).round_().clamp_(qmin, qmax)
    return codes.sub_(zero_point).mul_(scale)


mark_grid = define_operator("fake_quantize_grid", _fake_quantize_grid, _like_first)


def count_below(x: Tensor, boundaries: Tensor) -> Tensor:
    """How many boundaries lie below each value, none below NaN: int64, shaped like ``x``.

    Args:
        x: Any shape, or ``[rows, n]``.
        boundaries: Ascending, ``[k]``, or ``[rows, k]`` for each row.
    """
    return torch.searchsorted(boundaries.contiguous(), x.contiguous()) * (x == x)


def _fake_quantize_codebook(x: Tensor, boundaries: Tensor, levels: Tensor) -> Tensor:
    """``levels[number of boundaries below x]``, of which NaN has none; ``boundaries`` ascending ``[n - 1]``, ``levels`` ``[n]``."""
    return levels[count_below(x, boundaries)]


mark_codebook = define_operator("fake_quantize_codebook", _fake_quantize_codebook, _like_first)


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


mark_input_scale = define_operator("input_scale", input_scale, input_scale)
