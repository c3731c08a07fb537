"""Layers whose weights stay packed in 1 to 8 bits while they run.

Linear layers, ``arithmetic="int8"``: inputs are rounded to 8 bits for each row (``scale = max |x| / 127``), and codes are unpacked in registers and multiplied
by them: the time is that of reading the packed weight. ``arithmetic="float"``: a few rows of the weight at a time are decoded and multiplied
in float32: exact, and no more memory than those rows. Convolutions are of the second kind.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.runtime.cpu.target import active_target
from lowbit.runtime.layers.operator import register_operator
from lowbit.runtime.layers.prepared import share

ROWS_AT_ONCE = 256  # of a weight, decoded together
GROUP = 64  # bytes whose parts are neighbouring codes; a row is filled up to whole groups


@dataclass(frozen=True)
class PackedWeight:
    """A weight ``[out, in_features]`` in its packed form.

    Attributes:
        words: uint8 ``[rows, bytes]``: codes in containers of 1, 2, 4 or 8 bits; rows filled up to a multiple of 4.
        table: float32 ``[rows, 2**bit_width]``, ``rows`` being ``out`` or 1: what each code stands for. Where that is evenly spaced ``[rows, 2]``:
            the lowest level and the step.
        bit_width: Of the container.
    """

    words: Tensor
    table: Tensor
    bit_width: int


def container_bits(bit_width: int) -> int:
    """1, 2, 4 or 8: the bits that a code takes."""
    return next(bits for bits in (1, 2, 4, 8) if bit_width <= bits)


def pack_linear_weight(codes: Tensor, table: Tensor, bit_width: int) -> PackedWeight:
    """Pack unsigned codes ``[out, in_features]``.

    In each ``GROUP`` bytes, part ``s`` (bits ``s b`` to ``s b + b - 1``) of byte ``i`` is code ``s * GROUP + i``.

    Args:
        codes: Integers ``0 .. 2**bit_width - 1``.
        table: ``[out, 2**bit_width]`` or ``[1, 2**bit_width]``.
        bit_width: 1 to 8.

    Raises:
        SpecError: Codes or a table of another shape or range.
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
    filled = functional.pad(codes.to(torch.uint8), (0, -codes.shape[1] % (GROUP * 8 // bits), 0, -len(codes) % 4))
    parts = filled.unflatten(1, (-1, 8 // bits, GROUP))
    words = torch.zeros_like(parts[:, :, 0])
    for part in range(8 // bits):
        words |= parts[:, :, part] << (part * bits)
    return PackedWeight(words.flatten(1).contiguous(), _shortened(table.float(), bits), bits)


def _shortened(table: Tensor, bit_width: int) -> Tensor:
    """Lowest level and step of an evenly spaced table, else a level for each code of ``bit_width`` bits."""
    lowest, step = table[:, :1], (table[:, -1:] - table[:, :1]) / (table.shape[1] - 1)
    even = lowest + step * torch.arange(table.shape[1])
    is_even = bool(((even - table).abs() <= 1e-6 * table.abs().amax(1, keepdim=True)).all())
    return torch.cat([lowest, step], 1) if is_even else functional.pad(table, (0, 2**bit_width - table.shape[1]))


def unpack_linear_weight(words: Tensor, table: Tensor, bit_width: int, out_features: int, in_features: int) -> Tensor:
    """float32 ``[out_features, in_features]``."""
    shifts = torch.arange(8 // bit_width, device=words.device, dtype=torch.uint8) * bit_width
    parts = words.unflatten(1, (-1, 1, GROUP)) >> shifts[:, None]
    codes = (parts & (2**bit_width - 1)).flatten(1)[:out_features, :in_features]
    if table.shape[1] == 2:
        values: Tensor = table[:, :1] + codes * table[:, 1:]
        return values
    return table.expand(out_features, -1).gather(1, codes.long())


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes of each row and their scales ``[rows, 1]``: ``scale = max |x| / 127``, ``code = round(x / scale)``.

    The scale is 1 where a row is 0, and NaN where it holds NaN or infinite values; its codes are 0 then.
    """
    largest = x.abs().amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
    scale = torch.where(largest.isfinite(), scale, torch.nan)
    return (x / scale).round_().clamp_(-127, 127).nan_to_num_().to(torch.int8), scale


def packed_linear_reference(
    x: Tensor,
    words: Tensor,
    table: Tensor,
    bias: Tensor | None,
    bit_width: int,
    in_features: int,
    out_features: int,
    arithmetic: str = "float",
) -> Tensor:
    """``packed_linear`` by the float product with the decoded weight, some rows of it at a time."""
    rows = x.reshape(-1, in_features)
    scale = None
    if arithmetic == "int8":
        codes, scale = quantize_rows(rows)
        rows = codes.float()
    pieces = []
    for start in range(0, out_features, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, out_features)
        part = table if len(table) == 1 else table[start:stop]
        pieces.append(rows @ unpack_linear_weight(words[start:stop], part, bit_width, stop - start, in_features).t())
    y = torch.cat(pieces, 1) if pieces else rows.new_empty(len(rows), 0)
    y = y if scale is None else y * scale
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], out_features)


def _empty(
    x: Tensor, words: Tensor, table: Tensor, bias: Tensor | None, bit_width: int, in_features: int, out_features: int, *_: object
) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=torch.float32)


@register_operator(_empty)
def packed_linear(
    x: Tensor,
    words: Tensor,
    table: Tensor,
    bias: Tensor | None,
    bit_width: int,
    in_features: int,
    out_features: int,
    arithmetic: str = "float",
) -> Tensor:
    """``y = x W^T + bias`` with ``W[r, k] = table[r, code[r, k]]`` read from packed codes.

    With ``arithmetic="int8"``, ``x`` is rounded to 8 bits row by row; rows that are not finite give NaN. Where a table is evenly spaced the
    sums of products of codes are exact integers; other tables are computed by the reference.

    Args:
        x: float32 ``[..., in_features]``.
        words, table, bit_width: Of a ``PackedWeight``.
        bias: ``[out_features]``.
        in_features, out_features: Of the layer.
        arithmetic: ``float`` or ``int8``.

    Returns:
        float32 ``[..., out_features]``.

    Raises:
        SpecError: An argument of another type or shape.
    """
    _check(x, words, table, bias, bit_width, in_features, out_features, arithmetic)
    loops = packed_loops() if arithmetic == "int8" and x.device.type == "cpu" and x.numel() and out_features else None
    if loops is None or table.shape[1] > 2:
        return packed_linear_reference(x, words, table, bias, bit_width, in_features, out_features, arithmetic)
    rows = x.detach().reshape(-1, in_features).contiguous()
    codes = torch.empty(len(rows), words.shape[1] * (8 // bit_width), dtype=torch.int8)
    scales, sums = torch.empty(len(rows), 1), torch.empty(len(rows), 1)
    found, y = torch.empty(len(rows), len(words), dtype=torch.int32), torch.empty(len(rows), out_features)
    loops.quantize(rows.numpy(), codes.numpy(), scales.numpy(), sums.numpy())
    arrays = words.detach().numpy(), codes.numpy(), found.numpy()
    units = len(words) // loops.ROWS
    share(lambda first, last: loops.multiply(*arrays, bit_width, first, last), units, words.numel() * len(rows) * 8)
    added = y.new_empty(1, 0) if bias is None else bias.detach()[None]
    loops.finish(found.numpy(), table.detach().numpy(), scales.numpy(), sums.numpy(), added.numpy(), y.numpy())
    return y.reshape(*x.shape[:-1], out_features)


def _empty_conv2d(
    x: Tensor,
    words: Tensor,
    table: Tensor,
    bias: Tensor | None,
    bit_width: int,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    weight = x.new_empty(list(shape))
    return functional.conv2d(x, weight, None, tuple(stride), tuple(padding), tuple(dilation), groups).contiguous(
        memory_format=torch.channels_last
    )


@register_operator(_empty_conv2d)
def packed_conv2d(
    x: Tensor,
    words: Tensor,
    table: Tensor,
    bias: Tensor | None,
    bit_width: int,
    shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The convolution of ``x`` with a weight that is decoded from packed codes for this call, ``ROWS_AT_ONCE`` output channels at a time.

    Args:
        x: float32 ``[N, in_channels, H, W]``.
        words, table, bit_width: Of a ``PackedWeight`` whose rows are the output channels.
        bias: ``[out_channels]``.
        shape: Of the weight, ``[out_channels, in_channels / groups, kernel height, kernel width]``.
        stride, padding, dilation: Each vertical and horizontal.
        groups: Of the layer.

    Returns:
        float32 ``[N, out_channels, rows, columns]``, channels-last.

    Raises:
        SpecError: An argument of another type or shape.
    """
    outputs, per_group = shape[0], math.prod(shape[1:])
    if x.dtype != torch.float32 or x.dim() != 4 or x.shape[1] != shape[1] * groups:
        raise SpecError(f"packed_conv2d takes float32 [N, {shape[1] * groups}, H, W], got {x.dtype} {tuple(x.shape)}")
    _check_weight(words, table, bias, bit_width, per_group, outputs)
    size = ROWS_AT_ONCE if groups == 1 else outputs
    pieces = []
    for start in range(0, outputs, size):
        stop = min(start + size, outputs)
        part = table if len(table) == 1 else table[start:stop]
        weight = unpack_linear_weight(words[start:stop], part, bit_width, stop - start, per_group).view(-1, *shape[1:])
        added = None if bias is None else bias[start:stop]
        pieces.append(functional.conv2d(x, weight, added, tuple(stride), tuple(padding), tuple(dilation), groups))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)).contiguous(memory_format=torch.channels_last)


@functools.cache
def packed_loops() -> ModuleType | None:
    """The compiled loops; ``None`` where the reference is used."""
    if not active_target()[0].lanes:
        return None
    try:
        return importlib.import_module("lowbit.runtime.cpu.packed_loops")
    except ImportError:
        return None


def _check(
    x: Tensor, words: Tensor, table: Tensor, bias: Tensor | None, bit_width: int, in_features: int, out_features: int, arithmetic: str
) -> None:
    if x.dtype != torch.float32 or not x.dim() or x.shape[-1] != in_features:
        raise SpecError(f"packed_linear takes float32 [..., {in_features}], got {x.dtype} {tuple(x.shape)}")
    if arithmetic not in ("float", "int8"):
        raise SpecError(f"arithmetic must be 'float' or 'int8', got {arithmetic!r}")
    _check_weight(words, table, bias, bit_width, in_features, out_features)


def _check_weight(words: Tensor, table: Tensor, bias: Tensor | None, bit_width: int, in_features: int, out_features: int) -> None:
    if bit_width not in (1, 2, 4, 8):
        raise SpecError(f"codes lie in containers of 1, 2, 4 or 8 bits, got {bit_width}")
    expected = (out_features + -out_features % 4, -(-in_features * bit_width // (8 * GROUP)) * GROUP)
    if words.dtype != torch.uint8 or tuple(words.shape) != expected:
        raise SpecError(f"packed weights must be uint8 {expected}, got {words.dtype} {tuple(words.shape)}")
    if table.dim() != 2 or table.shape[0] not in (1, out_features) or table.shape[1] not in (2, 2**bit_width):
        raise SpecError(f"table must be [{out_features} or 1, 2 or {2**bit_width}], got {tuple(table.shape)}")
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise SpecError(f"bias must be [{out_features}], got {tuple(bias.shape)}")
