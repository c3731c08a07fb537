"""Runs the operations of an integer graph on torch's integers: the reference for the C file."""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.formats.fixed_point.constants import Arithmetic, layer_requantizer, pool_offset, pool_requantizers, pool_shift, sum_constants
from lowbit.formats.fixed_point.graph import AveragePool, Buffer, Convolution, Copy, Linear, MaxPool, Operation, Span, Sum, Weight
from lowbit.formats.fixed_point.operators import accumulate_conv, accumulate_matmul
from lowbit.formats.fixed_point.requantize import multiply_by_quantized_multiplier, right_shift_half_even

_UNSIGNED = 128  # from int8 codes to the uint8 codes that ONNX Runtime adds


class Memory:
    """The codes of all buffers: int32 ``[samples, size]`` by storage."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def read(self, buffer: Buffer, shape: tuple[int, ...] | None = None) -> Tensor:
        """The codes of a buffer, with another shape of as many elements if one is given."""
        codes = self._held[buffer.storage]
        return codes.reshape(len(codes), *(buffer.shape if shape is None else shape))

    def write(self, buffer: Buffer, codes: Tensor) -> None:
        """Set the codes of a buffer."""
        self._held[buffer.storage] = codes.reshape(len(codes), buffer.size).int()

    def opened(self, buffer: Buffer, samples: int, fill: int | None) -> Tensor:
        """The flat codes of a buffer that is written in parts, which start as ``fill``."""
        if buffer.storage not in self._held:
            self._held[buffer.storage] = torch.zeros(samples, buffer.size, dtype=torch.int32)
        flat = self._held[buffer.storage]
        return flat if fill is None else flat.fill_(fill)


@singledispatch
def run(operation: Operation, memory: Memory, arithmetic: Arithmetic) -> None:
    """Compute the codes of the operation's target."""
    raise NotImplementedError(type(operation).__name__)


@run.register
def _(operation: Convolution, memory: Memory, arithmetic: Arithmetic) -> None:
    window, dims = operation.window, 2 if operation.source_shape[1] == 1 and operation.window.is_flat else 3  # planes alone are faster
    x = _spread(_distances(memory, operation.source, operation.source_shape), window.spread)
    axes = zip(operation.target_shape[1:], window.stride, window.dilation, window.kernel, x.shape[2:], window.padding, strict=True)
    margins = [
        (before, max((outputs - 1) * stride + dilation * (kernel - 1) + 1 - size - before, 0))
        for outputs, stride, dilation, kernel, size, before in axes
    ]
    x = functional.pad(x, [margin for pair in reversed(margins) for margin in pair])
    codes = operation.weight.codes
    x, kernel = x.reshape(*x.shape[:2], *x.shape[-dims:]), codes.reshape(*codes.shape[:2], *window.kernel[-dims:])
    acc = accumulate_conv(x, kernel, stride=window.stride[-dims:], dilation=window.dilation[-dims:], groups=window.groups)
    acc = acc.reshape(*acc.shape[:2], *(1,) * (3 - dims), *acc.shape[2:])
    depth, height, width = operation.target_shape[1:]
    acc = _with_bias(acc[:, :, :depth, :height, :width], operation.weight, (-1, 1, 1, 1))
    memory.write(operation.target, layer_requantizer(operation, arithmetic)(acc, axis=1))


@run.register
def _(operation: Linear, memory: Memory, arithmetic: Arithmetic) -> None:
    acc = accumulate_matmul(_distances(memory, operation.source), operation.weight.codes.t())
    acc = _with_bias(acc, operation.weight, (-1,))
    memory.write(operation.target, layer_requantizer(operation, arithmetic)(acc, axis=-1))


@run.register
def _(operation: Sum, memory: Memory, arithmetic: Arithmetic) -> None:
    grid = operation.target.grid
    if arithmetic.kind == "onnx":
        codes = _onnx_sum(operation, memory)
    else:
        constants = sum_constants(operation, arithmetic)
        distances = [sign * _distances(memory, operand) for operand, sign in zip(operation.operands, operation.signs, strict=True)]
        if arithmetic.kind == "dyadic":
            total = sum((d * m for d, m in zip(distances, constants.multipliers, strict=True)), torch.tensor(constants.offset))
            codes = right_shift_half_even(total, torch.tensor(31 - constants.shift))
        else:
            total = torch.tensor(constants.offset)
            for distance, multiplier, shift in zip(distances, constants.multipliers, constants.shifts, strict=True):
                total = total + _in_fixed_point(distance << constants.left, multiplier, shift, arithmetic)
            codes = _in_fixed_point(total, constants.multiplier, constants.shift, arithmetic)
        codes = codes + grid.origin
    memory.write(operation.target, codes.clamp(grid.lo, grid.hi))


@run.register
def _(operation: AveragePool, memory: Memory, arithmetic: Arithmetic) -> None:
    x = _distances(memory, operation.source, operation.source_shape)
    sums = _over_windows(x, operation.rows, operation.columns, lambda part: part.sum((-2, -1)))
    codes, divisors = torch.zeros_like(sums), operation.divisors
    for divisor, requantizer in zip(*pool_requantizers(operation, arithmetic), strict=True):
        here = requantizer((sums << pool_shift(operation, arithmetic)) + pool_offset(operation, int(divisor), arithmetic)).long()
        codes = torch.where(divisors == divisor, here, codes)
    memory.write(operation.target, codes)


@run.register
def _(operation: MaxPool, memory: Memory, arithmetic: Arithmetic) -> None:
    x = memory.read(operation.source, operation.source_shape)
    memory.write(operation.target, _over_windows(x, operation.rows, operation.columns, lambda part: part.amax((-2, -1))))


@run.register
def _(operation: Copy, memory: Memory, arithmetic: Arithmetic) -> None:
    x = memory.read(operation.source, (operation.source.size,)).contiguous()
    target = memory.opened(operation.target, len(x), operation.fill)
    to = target.as_strided((len(x), *operation.shape), (target.stride(0), *operation.target_strides), operation.target_offset)
    to.copy_(x.as_strided((len(x), *operation.shape), (x.stride(0), *operation.strides), operation.offset))


def _distances(memory: Memory, buffer: Buffer, shape: tuple[int, ...] | None = None) -> Tensor:
    """Codes less their zero point, int64."""
    return memory.read(buffer, shape).long() - buffer.grid.zero_point


def _spread(x: Tensor, spread: tuple[int, ...]) -> Tensor:
    """``x [N, C, D, H, W]`` with ``spread - 1`` zeros between neighbours."""
    if set(spread) == {1}:
        return x
    sizes = [(size - 1) * step + 1 for size, step in zip(x.shape[2:], spread, strict=True)]
    spaced = x.new_zeros(*x.shape[:2], *sizes)
    spaced[:, :, :: spread[0], :: spread[1], :: spread[2]] = x
    return spaced


def _with_bias(acc: Tensor, weight: Weight, column: tuple[int, ...]) -> Tensor:
    return acc * weight.factor.reshape(column) + weight.bias.reshape(column)


def _in_fixed_point(x: Tensor, multiplier: int, shift: int, arithmetic: Arithmetic) -> Tensor:
    return multiply_by_quantized_multiplier(x, torch.tensor(multiplier), torch.tensor(shift), rounding=arithmetic.rounding)


def _over_windows(x: Tensor, rows: tuple[Span, ...], columns: tuple[Span, ...], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """A number for each window of a picture."""
    results = [
        reduce(x[..., row.start : row.stop : row.step, column.start : column.stop : column.step]) for row in rows for column in columns
    ]
    return torch.stack(results, -1).reshape(*x.shape[:2], len(rows), len(columns))


def _onnx_sum(operation: Sum, memory: Memory) -> Tensor:
    """A sum in float32 as ONNX Runtime computes it: two operands in one kernel, anything else one operator after the other."""
    grid, operands = operation.target.grid, operation.operands
    if operation.signs == (1, 1) and grid.is_plain:
        return _kernel_sum(operation, memory)
    total = torch.zeros(())
    for operand, sign in zip(operands, operation.signs, strict=True):
        total = total + sign * (_distances(memory, operand).float() * torch.tensor(operand.grid.scale))
    return ((total - torch.tensor(np.float32(grid.shift))) / torch.tensor(grid.step)).round().long() + grid.origin


def _kernel_sum(operation: Sum, memory: Memory) -> Tensor:
    """QLinearAdd with AVX2: uint8 codes times the ratios of scales, fused with the sum, the second operand first; one constant for all zero points."""
    grid, (a, b) = operation.target.grid, operation.operands
    ratios = [np.float32(operand.grid.scale) / np.float32(grid.scale) for operand in (a, b)]
    zeros = [np.float32(buffer.zero_point + _UNSIGNED) for buffer in (a.grid, b.grid, grid)]
    # products are not rounded before they are added, which float64 has room for
    zero = np.float32(np.float64(ratios[0]) * np.float64(zeros[0]) + np.float64(ratios[1] * zeros[1]))
    total = torch.tensor(float(zeros[2] - zero), dtype=torch.float64)
    for operand, ratio in zip((b, a), reversed(ratios), strict=True):
        total = (total + (memory.read(operand) + _UNSIGNED).double() * float(ratio)).float().double()
    return total.round().long() - _UNSIGNED
