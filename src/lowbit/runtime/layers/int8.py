"""Layers whose weights and inputs have 8 bits or fewer on affine grids, by the 8-bit kernels of oneDNN that torch brings along.

Sums of products of codes are exact. Where a processor's 8-bit products saturate, or torch has no such kernels, the codes are multiplied in
float32, which is exact up to rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.formats.onnx.sessions import saturates
from lowbit.runtime.layers.operator import register_operator
from lowbit.runtime.layers.prepared import version_of

Pair = Sequence[int]


@dataclass(frozen=True)
class InputGrid:
    """``code = clamp(round((x - lower) / step) + shift, qmin, qmax)`` stands for ``(code - zero_point) * scale``; codes fit a byte."""

    lower: float
    step: float
    shift: float
    zero_point: float
    scale: float
    qmin: int
    qmax: int

    def encode(self, x: Tensor) -> Tensor:
        """uint8 ``code - qmin``, by the arithmetic of the quantizers."""
        codes = x.sub(self.lower).div_(self.step) if self.lower else x.div(self.step)
        codes.round_()
        if self.shift != self.qmin:  # both are whole numbers, of which float32 holds sums
            codes.add_(self.shift - self.qmin)
        return codes.clamp_(0, self.qmax - self.qmin).to(torch.uint8)

    @property
    def zero_code(self) -> int:
        """The byte that stands for 0."""
        return int(self.zero_point) - self.qmin


def _empty_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Sequence[float],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    *_: object,
) -> Tensor:
    sizes = [
        (x.shape[2 + i] + 2 * padding[i] - dilation[i] * (codes.shape[2 + i] - 1) - 1) // stride[i] + 1 for i in range(2)
    ]  # fmt: skip
    out = codes.shape[0]
    strides = (sizes[0] * sizes[1] * out, 1, sizes[1] * out, out)
    return torch.empty_strided((x.shape[0], out, *sizes), strides, dtype=torch.float32, device=x.device)


@register_operator(_empty_conv2d)
def int8_conv2d(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Sequence[float],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """``y = scale * input_scale * sum((code(x) - zero_point) * codes) + bias``.

    Args:
        x: ``[N, in_channels, H, W]`` float32; channels-last is fastest.
        codes: int8 ``[out, in_channels / groups, kernel height, kernel width]``.
        scale: ``[out]``, of the weight.
        bias: ``[out]``.
        grid: The values of an ``InputGrid``.
        stride, padding, dilation: Each vertical and horizontal; padding counts as 0.
        groups: Of the layer.

    Returns:
        ``[N, out, rows, columns]`` float32, channels-last.
    """
    inputs = input_grid(grid)
    if not has_exact_kernels() or x.device.type != "cpu" or not x.numel():
        return int8_conv2d_reference(x, codes, scale, bias, grid, stride, padding, dilation, groups)
    key = (version_of(codes), tuple(x.shape[1:]))
    known = _prepacked.get(codes)
    if known is None or known[0] != key:
        packed = torch.ops.onednn.qconv_prepack(
            codes, scale, inputs.scale, inputs.zero_code, stride, padding, dilation, groups, list(x.shape)
        )  # fmt: skip
        known = _prepacked[codes] = (key, packed, torch.zeros(len(scale), dtype=torch.int64))
    _, packed, zero_points = known
    encoded = inputs.encode(x.contiguous(memory_format=torch.channels_last))
    y: Tensor = torch.ops.onednn.qconv2d_pointwise(
        encoded, inputs.scale, inputs.zero_code, packed, scale, zero_points, bias, stride, padding, dilation, groups,
        1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y


def int8_conv2d_reference(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    grid: Sequence[float],
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
) -> Tensor:
    """``int8_conv2d`` by the float convolution of the codes."""
    inputs = input_grid(grid)
    centred = inputs.encode(x).float() - inputs.zero_code
    y = functional.conv2d(centred, codes.float(), None, tuple(stride), tuple(padding), tuple(dilation), groups)
    y = y * (scale * inputs.scale).reshape(-1, 1, 1)
    return (y if bias is None else y + bias.reshape(-1, 1, 1)).contiguous(memory_format=torch.channels_last)


def _empty_linear(x: Tensor, codes: Tensor, *_: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], codes.shape[0]), dtype=torch.float32)


@register_operator(_empty_linear)
def int8_linear(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, grid: Sequence[float]) -> Tensor:
    """``int8_conv2d`` for ``x`` ``[..., in_features]`` and ``codes`` ``[out, in_features]``; gives ``[..., out]``."""
    inputs = input_grid(grid)
    if not has_exact_kernels() or x.device.type != "cpu" or not x.numel():
        return int8_linear_reference(x, codes, scale, bias, grid)
    key = version_of(codes), ()
    known = _prepacked.get(codes)
    if known is None or known[0] != key:
        packed = torch.ops.onednn.qlinear_prepack(codes, None)
        known = _prepacked[codes] = (key, packed, torch.zeros(len(scale), dtype=torch.int64))
    _, packed, zero_points = known
    encoded = inputs.encode(x.reshape(-1, x.shape[-1]))
    y: Tensor = torch.ops.onednn.qlinear_pointwise(
        encoded, inputs.scale, inputs.zero_code, packed, scale, zero_points, bias, 1.0, 0, torch.float32, "none", [], "",
    )  # fmt: skip
    return y.reshape(*x.shape[:-1], codes.shape[0])


def int8_linear_reference(x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None, grid: Sequence[float]) -> Tensor:
    """``int8_linear`` by the float product of the codes."""
    inputs = input_grid(grid)
    y = functional.linear(inputs.encode(x).float() - inputs.zero_code, codes.float()) * (scale * inputs.scale)
    return y if bias is None else y + bias


@functools.cache
def has_exact_kernels() -> bool:
    """Whether torch has 8-bit kernels whose sums of products are exact on this processor."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv2d_pointwise") and not saturates()


@functools.lru_cache(256)
def _cached_grid(values: tuple[float, ...]) -> InputGrid:
    lower, step, shift, zero_point, scale, qmin, qmax = values
    return InputGrid(lower, step, shift, zero_point, scale, int(qmin), int(qmax))


def input_grid(values: Sequence[float]) -> InputGrid:
    """The grid whose values an operator was given."""
    return _cached_grid(tuple(values))


_prepacked = WeakTensorKeyDictionary()  # codes -> (their version and the image's shape, oneDNN's form of them, zero points)
