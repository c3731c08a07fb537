"""Packed tensors and their description in a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lowbit.errors import FileFormatError
from lowbit.formats.packed.packing import pack, packed_size, unpack
from lowbit.formats.program.calls import LARGEST_RANK, is_shape
from lowbit.formats.program.structure import Json
from lowbit.quantizers.qtensor import BinaryDecoder, CodebookDecoder, Decoder, QTensor, SumDecoder, code_dtype, decoder_from
from lowbit.spec import Granularity


@dataclass(frozen=True)
class PackedTensor:
    """Codes packed to exactly ``bit_width`` bits each, with their decoder.

    Attributes:
        packed: uint8 vector of the codes minus ``offset``, in row-major order.
        shape: Shape of the codes, with a leading dimension over the parts of a sum.
        bit_width: 1 to 8.
        offset: The smallest possible code: 0, or ``-2**(bit_width - 1)`` for signed codes.
        decoder: Turns codes into floats.
    """

    packed: Tensor
    shape: tuple[int, ...]
    bit_width: int
    offset: int
    decoder: Decoder

    @staticmethod
    def of(q: QTensor) -> PackedTensor:
        """Pack the codes of ``q``."""
        offset = -(2 ** (q.bit_width - 1)) if q.codes.dtype.is_signed and bool((q.codes < 0).any()) else 0
        packed = pack(q.codes.to(torch.int16) - offset, q.bit_width)
        return PackedTensor(packed, tuple(q.codes.shape), q.bit_width, offset, q.decoder)

    def unpack(self) -> QTensor:
        """The codes, one per byte."""
        codes = unpack(self.packed, self.bit_width, math.prod(self.shape)).to(torch.int16) + self.offset
        return QTensor(codes.to(code_dtype(self.offset)).reshape(self.shape), self.decoder, self.bit_width)

    def decode(self) -> Tensor:
        """The float values, bit for bit equal to the quantizer's."""
        return self.unpack().decode()

    @property
    def decoded_shape(self) -> tuple[int, ...]:
        """Shape of the decoded tensor."""
        return self.shape[1:] if isinstance(self.decoder, SumDecoder) else self.shape

    @property
    def code_bytes(self) -> int:
        """Bytes of the packed codes."""
        return self.packed.numel()

    @property
    def table_bytes(self) -> int:
        """Bytes of the stored tables of the decoder."""
        return sum(table.numel() * table.element_size() for table in self.stored_tables().values())

    def stored_tables(self) -> dict[str, Tensor]:
        """The decoder's tables as a file stores them: zero points as integers of one byte, and none if all are 0."""
        tables = {name: _as_bytes(table) if _is_zero_point(name) else table for name, table in self.decoder.tensors().items()}
        return {name: table for name, table in tables.items() if not _is_zero_point(name) or bool(table.any())}

    def describe(self) -> dict[str, Json]:
        """The description that a file stores besides the arrays; ``packed_tensor_from`` reads it."""
        parts = self.decoder.parts if isinstance(self.decoder, SumDecoder) else ()
        granularity = self.decoder.granularity.counted_from_zero(len(self.shape) - bool(parts))
        return {
            "shape": list(self.shape), "bit_width": self.bit_width, "offset": self.offset, "decoder": self.decoder.kind,
            "parts": [part.kind for part in parts], "granularity": str(granularity), "axis": granularity.axis,
        }  # fmt: skip


def packed_tensor_from(name: str, description: object, packed: Tensor | Callable[[], Tensor], tables: Mapping[str, Tensor]) -> PackedTensor:
    """Rebuild a packed tensor from a file, and check that it can be decoded.

    Args:
        name: Name for error messages.
        description: The description from ``describe``.
        packed: The packed codes, or what computes them.
        tables: The stored tables by their names within the decoder.

    Raises:
        FileFormatError: The description, the codes or the tables are invalid.
    """
    try:
        return _packed_tensor(description, packed if isinstance(packed, Tensor) else packed(), tables)
    except (ArithmeticError, IndexError, RuntimeError, TypeError, ValueError) as error:  # also raised for a granularity that does not fit
        raise FileFormatError(f"tensor {name[:80]!r}: {error}") from error


def _packed_tensor(description: object, packed: Tensor, tables: Mapping[str, Tensor]) -> PackedTensor:
    if not isinstance(description, dict):
        raise FileFormatError(f"its description must be a dict, got {type(description).__name__}")
    shape, bit_width, offset = (description.get(key) for key in ("shape", "bit_width", "offset"))
    if not (isinstance(shape, list) and is_shape(shape)):
        raise FileFormatError(f"its shape must be a list of up to {LARGEST_RANK} sizes, got {str(shape)[:80]}")
    if isinstance(bit_width, bool) or not (isinstance(bit_width, int) and 1 <= bit_width <= 8):
        raise FileFormatError(f"its bit_width must be from 1 to 8, got {str(bit_width)[:80]}")
    if offset not in (0, -(2 ** (bit_width - 1))):
        raise FileFormatError(f"its offset must be 0 or {-(2 ** (bit_width - 1))}, got {str(offset)[:80]}")
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != packed_size(math.prod(shape), bit_width):
        raise FileFormatError(
            f"{math.prod(shape)} codes of {bit_width} bits need {packed_size(math.prod(shape), bit_width)} bytes, "
            f"the file contains {packed.dtype} of shape {tuple(packed.shape)}"
        )
    tensor = PackedTensor(packed, tuple(shape), bit_width, cast(int, offset), _decoder(description, tables))
    _check_tables(tensor)
    return tensor


def _decoder(description: Mapping[str, object], tables: Mapping[str, Tensor]) -> Decoder:
    kind, granularity, axis, parts = (description.get(key) for key in ("decoder", "granularity", "axis", "parts"))
    if not (isinstance(kind, str) and isinstance(granularity, str) and isinstance(axis, int) and isinstance(parts, list)):
        raise FileFormatError(f"cannot understand its decoder {str(description)[:200]}")
    if len(parts) > 64 or not all(isinstance(part, str) for part in parts):
        raise FileFormatError(f"the parts of its decoder must be up to 64 names, got {str(parts)[:80]}")
    kinds = {str(index): part for index, part in enumerate(parts)} if kind == "sum" else {"": kind}
    full = {}
    for prefix, part in kinds.items():
        names = [f"{prefix}.{table}" if prefix else table for table in ("scale", "zero_point")]
        if part == "affine" and names[0] in tables and names[1] not in tables:
            full[names[1]] = torch.zeros_like(tables[names[0]])
    for table_name, table in tables.items():
        full[table_name] = table.float() if _is_zero_point(table_name) else table
    decoder = decoder_from(kind, full, Granularity.parse(granularity, axis), tuple(cast(list[str], parts)))
    if unread := sorted(set(full) - set(decoder.tensors())):
        raise FileFormatError(f"its decoder {kind!r} has no table {unread[0][:80]!r}")
    return decoder


def _check_tables(tensor: PackedTensor) -> None:
    """Check that every table is finite and broadcasts with the codes, and that the decoder has all codes."""
    codes = tensor.unpack().codes
    pairs = [(tensor.decoder, codes)]
    if isinstance(tensor.decoder, SumDecoder):
        if not codes.dim() or codes.shape[0] != len(tensor.decoder.parts):
            raise FileFormatError(f"{len(tensor.decoder.parts)} parts need codes with that first size, got shape {tensor.shape}")
        pairs = list(zip(tensor.decoder.parts, codes, strict=True))
    for decoder, part in pairs:
        for axis in decoder.granularity.axes:
            if not 0 <= axis < part.dim():
                raise FileFormatError(f"axis {axis} does not exist in shape {tuple(part.shape)}")
        if isinstance(decoder, BinaryDecoder) and (tensor.bit_width, tensor.offset) != (1, 0):
            raise FileFormatError(f"a binary decoder has the codes 0 and 1, not {tensor.bit_width} bits from {tensor.offset}")
        scale_shape = decoder.granularity.scale_shape(part)
        for name, table in decoder.tensors().items():
            if not table.is_floating_point():
                raise FileFormatError(f"table {name!r} must be floating point, got {table.dtype}")
            if not bool(torch.isfinite(table).all()):
                raise FileFormatError(f"table {name!r} contains values that are not finite")
            if isinstance(decoder, CodebookDecoder):
                _check_codebook(table, part, math.prod(scale_shape))
            elif tuple(table.shape) not in ((), scale_shape):
                raise FileFormatError(f"table {name!r} must have the shape {scale_shape}, got {tuple(table.shape)}")


def _check_codebook(levels: Tensor, codes: Tensor, rows: int) -> None:
    if levels.dim() != 2 or levels.shape[0] != rows:
        raise FileFormatError(f"it needs a codebook of {rows} rows, got shape {tuple(levels.shape)}")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= levels.shape[1]):
        span = f"{int(codes.min())}..{int(codes.max())}"
        raise FileFormatError(f"codes {span} lie outside its codebook of {levels.shape[1]} levels")


def _is_zero_point(name: str) -> bool:
    return name.rpartition(".")[2] == "zero_point"


def _as_bytes(zero_point: Tensor) -> Tensor:
    """Zero points as integers of one byte if that is exact."""
    for dtype in (torch.uint8, torch.int8):
        if bool((zero_point.to(dtype).to(zero_point.dtype) == zero_point).all()):
            return zero_point.to(dtype)
    return zero_point
