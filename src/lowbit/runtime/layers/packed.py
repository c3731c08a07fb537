"""Layers whose weights stay packed in 1 to 8 bits while they run.

Linear layers with ``arithmetic="int8"`` round their inputs to 8 bits row by row (``scale = max |x| / 127``), unpack the codes in registers
and multiply the two, so that a call takes as long as reading the packed weight. With ``arithmetic="float"`` a few rows of the weight at a
time are decoded and multiplied in float32, which is exact and needs memory for those rows only. Convolutions use float arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.runtime.arguments import Window
from lowbit.runtime.cpu.target import target_loops
from lowbit.runtime.layers.operator import register_operator
from lowbit.runtime.layers.prepared import share

ROWS_AT_ONCE = 256  # rows of a weight that are decoded together, a multiple of UNIT
UNIT = 16  # rows whose codes are interleaved; the number of rows is padded to a multiple of it

T = TypeVar("T")


@dataclass(frozen=True)
class PackedWeight(Generic[T]):
    """A packed weight ``[out_features, in_features]``.

    Attributes:
        words: uint8 ``[units, groups, 4 * UNIT]``: codes in containers of 1, 2, 4 or 8 bits, see ``pack_linear_weight``.
        table: Level of each code, float32 ``[rows, 2**bit_width]`` with ``rows`` being ``out_features`` or 1. For evenly spaced levels
            ``[rows, 2]``: the lowest level and the step.
        bit_width: Bits of the container.
        out_features, in_features: Size of the weight.
    """

    words: T
    table: T
    bit_width: int
    out_features: int
    in_features: int


def container_bits(bit_width: int) -> int:
    """Bits that a code occupies: 1, 2, 4 or 8."""
    return next(bits for bits in (1, 2, 4, 8) if bit_width <= bits)


def pack_linear_weight(codes: Tensor, table: Tensor, bit_width: int) -> PackedWeight[Tensor]:
    """Pack unsigned codes ``[out, in_features]``.

    Rows are padded with zeros to a multiple of ``UNIT``, and the codes of a row to a multiple of ``32 / b``. Byte ``4 r + i`` of
    ``words[unit, group]`` holds codes of row ``r`` of the unit: its bits ``s b`` to ``s b + b - 1`` are code ``4 s + i`` of the group.

    Args:
        codes: Integers ``0 .. 2**bit_width - 1``.
        table: ``[out, 2**bit_width]`` or ``[1, 2**bit_width]``.
        bit_width: 1 to 8.

    Raises:
        SpecError: Codes or table have an unsupported shape or range.
    """
    if codes.dim() != 2 or codes.is_floating_point() or not 1 <= bit_width <= 8:
        raise SpecError(
            f"packed codes must be integers [out, in_features] of 1 to 8 bits, got {codes.dtype} {tuple(codes.shape)}, {bit_width} bits"
        )
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bit_width):
        raise SpecError(f"{bit_width}-bit codes must lie in 0..{2**bit_width - 1}, got {int(codes.min())}..{int(codes.max())}")
    if table.dim() != 2 or table.shape[0] not in (1, len(codes)) or table.shape[1] != 2**bit_width:
        raise SpecError(f"table must be [{len(codes)} or 1, {2**bit_width}], got {tuple(table.shape)}")
    bits = container_bits(bit_width)
    filled = functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % (32 // bits), 0, -len(codes) % UNIT))
    parts = filled.view(-1, UNIT, filled.shape[1] * bits // 32, 8 // bits, 4).transpose(1, 2)
    words = torch.zeros_like(parts[:, :, :, 0])
    for part in range(8 // bits):
        words |= parts[:, :, :, part] << (part * bits)
    return PackedWeight(words.flatten(2).contiguous(), _compact_table(table.float(), bits), bits, *codes.shape)


def _compact_table(table: Tensor, bit_width: int) -> Tensor:
    """Lowest level and step of an evenly spaced table; any other table with one level for each code of ``bit_width`` bits."""
    lowest, step = table[:, :1], (table[:, -1:] - table[:, :1]) / (table.shape[1] - 1)
    even = lowest + step * torch.arange(table.shape[1])
    is_even = bool(((even - table).abs() <= 1e-6 * table.abs().amax(1, keepdim=True)).all())
    return torch.cat([lowest, step], 1) if is_even else functional.pad(table, (0, 2**bit_width - table.shape[1]))


def unpack_linear_weight(weight: PackedWeight[Tensor]) -> Tensor:
    """The decoded weight, float32 ``[out_features, in_features]``."""
    words, table, bits = weight.words, weight.table, weight.bit_width
    shifts = torch.arange(8 // bits, device=words.device, dtype=torch.uint8) * bits
    parts = (words.unflatten(2, (UNIT, 1, 4)) >> shifts[:, None]) & (2**bits - 1)
    codes = parts.transpose(1, 2).flatten(2).flatten(0, 1)[: weight.out_features, : weight.in_features]
    if table.shape[1] == 2:
        values: Tensor = table[:, :1] + codes * table[:, 1:]
        return values
    return table.expand(weight.out_features, -1).gather(1, codes.long())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of each row and their scales ``[rows, 1]``: ``scale = max |x| / 127``, ``code = round(x / scale)``.

    A row of zeros has scale 1. A row with NaN or infinite values has scale NaN and codes 0.
    """
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (x / scale).round_().clamp_(-127, 127).nan_to_num_().to(torch.int8), scale


def packed_linear_reference(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, arithmetic: str = "float") -> Tensor:
    """``packed_linear`` computed as a float product with the decoded weight, a few rows at a time."""
    rows = x.reshape(-1, weight.in_features)
    scale = None
    if arithmetic == "int8":
        codes, scale = quantize_rows(rows)
        rows = codes.float()
    pieces = [rows @ part.t() for _, part in _decoded_rows(weight, ROWS_AT_ONCE)]
    y = torch.cat(pieces, 1) if pieces else rows.new_empty(len(rows), 0)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], weight.out_features)


def _decoded_rows(weight: PackedWeight[Tensor], size: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of ``size`` outputs, each with the decoded rows of its weight."""
    for start in range(0, weight.out_features, size):
        part = slice(start, min(start + size, weight.out_features))
        table = weight.table if len(weight.table) == 1 else weight.table[part]
        yield (
            part,
            unpack_linear_weight(
                replace(weight, words=weight.words[start // UNIT : -(-part.stop // UNIT)], table=table, out_features=part.stop - part.start)
            ),
        )


def _empty_linear(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, arithmetic: str = "float") -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.out_features), dtype=torch.float32)


@register_operator(_empty_linear)
def packed_linear(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, arithmetic: str = "float") -> Tensor:
    """``y = x W^T + bias`` with ``W[r, k] = table[r, code[r, k]]`` read from packed codes.

    With ``arithmetic="int8"``, ``x`` is rounded to 8 bits row by row; rows that are not finite give NaN. For evenly spaced levels the sums
    of products of codes are exact integers. The reference computes other tables, and rows so long that a sum could exceed 32 bits.

    Args:
        x: float32 ``[..., in_features]``.
        weight: From ``pack_linear_weight``.
        bias: ``[out_features]``.
        arithmetic: ``float`` or ``int8``.

    Returns:
        float32 ``[..., out_features]``.

    Raises:
        SpecError: An argument has the wrong type or shape.

        >>> weight = pack_linear_weight(torch.tensor([[0, 1, 3]]), torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), 2)
        >>> packed_linear(torch.tensor([[1.0, 5.0, 10.0]]), weight, None)
        tensor([[19.]])
    """
    _check(x, weight, bias, arithmetic)
    words, table, outputs = weight.words, weight.table, weight.out_features
    loops = packed_loops() if arithmetic == "int8" and x.device.type == "cpu" and x.numel() and outputs else None
    if loops is None or table.shape[1] > 2 or weight.in_features * (2**weight.bit_width - 1) * 127 >= 2**31:
        return packed_linear_reference(x, weight, bias, arithmetic)
    rows = x.detach().reshape(-1, weight.in_features).contiguous()
    codes = torch.empty(len(rows) + -len(rows) % loops.ROWS, words.shape[1] * 32 // weight.bit_width, dtype=torch.int8)
    scales, sums, y = torch.empty(len(rows), 1), torch.empty(len(rows), 1), torch.empty(len(rows), outputs)
    loops.quantize(rows.numpy(), codes.numpy(), scales.numpy(), sums.numpy())
    added = y.new_empty(1, 0) if bias is None else bias.detach()[None]
    arrays = [tensor.numpy() for tensor in (words.detach(), codes, table.detach(), scales, sums, added, y)]
    share(
        lambda first, last: loops.multiply(*arrays, weight.bit_width, first, last),
        -(-outputs // loops.OUTPUTS),
        words.numel() * len(rows) * 8,
    )
    return y.reshape(*x.shape[:-1], outputs)


def _empty_conv2d(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, window: Window) -> Tensor:
    rows, columns = window.output_size(x.shape[2:])
    y = x.new_empty((x.shape[0], weight.out_features, rows, columns))
    return y.contiguous(memory_format=torch.channels_last)


@register_operator(_empty_conv2d)
def packed_conv2d(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, window: Window) -> Tensor:
    """Convolve ``x`` with a packed weight, decoding ``ROWS_AT_ONCE`` output channels at a time.

    Args:
        x: float32 ``[N, in_channels, H, W]``.
        weight: From ``pack_linear_weight``: a row for each output channel, with its ``in_channels / groups`` kernels one after the other.
        bias: ``[out_channels]``.
        window: Geometry of the convolution; its ``pad_value`` is 0.

    Returns:
        float32 ``[N, out_channels, rows, columns]``, channels-last.

    Raises:
        SpecError: An argument has the wrong type or shape.

        >>> weight = pack_linear_weight(torch.tensor([[1, 0]]), torch.tensor([[-1.0, 1.0]]), 1)
        >>> packed_conv2d(torch.tensor([[[[5.0, 2.0, 1.0]]]]), weight, None, Window((1, 2)))
        tensor([[[[3., 1.]]]])
    """
    window.check_zero_padding()
    kernel = math.prod(window.kernel_size)
    if weight.in_features % kernel or window.groups < 1:
        raise SpecError(f"rows of {weight.in_features} weights do not fit a window of {list(window.kernel_size)} in {window.groups} groups")
    per_group = weight.in_features // kernel
    if x.dtype != torch.float32 or x.dim() != 4 or x.shape[1] != per_group * window.groups:
        raise SpecError(f"packed_conv2d takes float32 [N, {per_group * window.groups}, H, W], got {x.dtype} {tuple(x.shape)}")
    _check_weight(weight, bias)
    settings = tuple(window.stride), tuple(window.padding), tuple(window.dilation), window.groups
    pieces = []
    for part, rows in _decoded_rows(weight, ROWS_AT_ONCE if window.groups == 1 else weight.out_features):
        added = None if bias is None else bias[part]
        pieces.append(functional.conv2d(x, rows.view(-1, per_group, *window.kernel_size), added, *settings))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).contiguous(memory_format=torch.channels_last)


def packed_loops() -> ModuleType | None:
    """The compiled loops; ``None`` where the reference is used."""
    return target_loops("packed_loops")


def _check(x: Tensor, weight: PackedWeight[Tensor], bias: Tensor | None, arithmetic: str) -> None:
    if x.dtype != torch.float32 or not x.dim() or x.shape[-1] != weight.in_features:
        raise SpecError(f"packed_linear takes float32 [..., {weight.in_features}], got {x.dtype} {tuple(x.shape)}")
    if arithmetic not in ("float", "int8"):
        raise SpecError(f"arithmetic must be 'float' or 'int8', got {arithmetic!r}")
    _check_weight(weight, bias)


def _check_weight(weight: PackedWeight[Tensor], bias: Tensor | None) -> None:
    words, table, bits, out = weight.words, weight.table, weight.bit_width, weight.out_features
    if bits not in (1, 2, 4, 8):
        raise SpecError(f"codes lie in containers of 1, 2, 4 or 8 bits, got {bits}")
    expected = (-(-out // UNIT), -(-weight.in_features * bits // 32), 4 * UNIT)
    if words.dtype != torch.uint8 or tuple(words.shape) != expected:
        raise SpecError(f"packed weights must be uint8 {expected}, got {words.dtype} {tuple(words.shape)}")
    if table.dim() != 2 or table.shape[0] not in (1, out) or table.shape[1] not in (2, 2**bits):
        raise SpecError(f"table must be [{out} or 1, 2 or {2**bits}], got {tuple(table.shape)}")
    if bias is not None and tuple(bias.shape) != (out,):
        raise SpecError(f"bias must be [{out}], got {tuple(bias.shape)}")
