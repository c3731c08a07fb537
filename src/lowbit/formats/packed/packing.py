"""Dense packing of 1- to 8-bit codes.

Codes form one little-endian stream of bits: code ``i`` occupies bits ``i * b`` to ``i * b + b - 1``, so 8 codes fill ``b`` bytes
for any ``b``, and the result does not depend on the machine's byte order.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.spec import check_bit_width


def packed_size(count: int, bit_width: int) -> int:
    """Number of bytes that ``count`` packed codes need."""
    return (count * bit_width + 7) // 8


def pack(codes: Tensor, bit_width: int) -> Tensor:
    """Pack unsigned codes densely.

    Args:
        codes: Integers ``0 .. 2**bit_width - 1``, any shape; flattened in row-major order.
        bit_width: 1 to 8.

    Returns:
        uint8 vector of ``ceil(count * bit_width / 8)`` bytes; unused bits of the last byte are 0.

    Raises:
        SpecError: ``bit_width`` out of range, codes that are not integers or do not fit.
    """
    check_bit_width(bit_width, "pack")
    if codes.is_floating_point() or codes.is_complex():
        raise SpecError(f"pack: codes must be integers, got {codes.dtype}")
    flat = codes.reshape(-1)
    if flat.numel() and (int(flat.min()) < 0 or int(flat.max()) >= 2**bit_width):
        raise SpecError(f"pack: {bit_width}-bit codes must lie in 0..{2**bit_width - 1}, got {int(flat.min())}..{int(flat.max())}")
    groups = flat.new_zeros((flat.numel() + 7) // 8 * 8, dtype=torch.uint8)
    groups[: flat.numel()] = flat
    groups = groups.view(-1, 8)
    packed = groups.new_zeros(groups.shape[0], bit_width)
    for code, byte, shift in _overlaps(bit_width):
        packed[:, byte] |= _shifted(groups[:, code], shift)
    return packed.view(-1)[: packed_size(flat.numel(), bit_width)].clone()


def unpack(packed: Tensor, bit_width: int, count: int) -> Tensor:
    """The inverse of ``pack``: a uint8 vector of ``count`` codes; SpecError if ``packed`` has the wrong size or type."""
    check_bit_width(bit_width, "unpack")
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_size(count, bit_width):
        raise SpecError(
            f"unpack: {count} codes of {bit_width} bits need a uint8 vector of {packed_size(count, bit_width)} bytes, "
            f"got {packed.dtype} of shape {tuple(packed.shape)}"
        )
    groups = packed.new_zeros((count + 7) // 8 * bit_width)
    groups[: packed.numel()] = packed
    groups = groups.view(-1, bit_width)
    codes = groups.new_zeros(groups.shape[0], 8)
    for code, byte, shift in _overlaps(bit_width):
        codes[:, code] |= _shifted(groups[:, byte], -shift)
    return codes.bitwise_and_(2**bit_width - 1).view(-1)[:count].clone()


def _overlaps(bit_width: int) -> Iterator[tuple[int, int, int]]:
    """``(code, byte, shift)`` for each of the 8 codes of a group and each byte that contains some of its bits."""
    for code in range(8):
        first, last = code * bit_width, (code + 1) * bit_width - 1
        for byte in range(first // 8, last // 8 + 1):
            yield code, byte, first - 8 * byte


def _shifted(x: Tensor, shift: int) -> Tensor:
    """``x`` shifted left by ``shift`` bits, right if negative; bits that leave the byte are dropped."""
    return x << shift if shift >= 0 else x >> -shift
