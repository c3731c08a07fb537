"""Integer codes and how to decode them: the form in which every quantized tensor is stored and shipped.

Each decoder is the one place that turns codes into floats, and quantizers use it in their forward pass, so
``quantizer.encode(x).decode()`` equals ``quantizer(x)`` bit for bit.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.errors import FileFormatError
from lowbit.spec import Granularity


class Decoder(ABC):
    """Turns integer codes into floats; a frozen dataclass whose tensors are its tables."""

    kind: ClassVar[str]
    granularity: Granularity

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """Float values of ``codes``, the shape of ``codes``."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tables this decoder needs, by name."""


@dataclass(frozen=True)
class AffineDecoder(Decoder):
    """``(code - zero_point) * scale``; both shaped to broadcast by ``granularity``."""

    kind: ClassVar[str] = "affine"
    scale: Tensor
    zero_point: Tensor
    granularity: Granularity

    def decode(self, codes: Tensor) -> Tensor:
        view = self.granularity.broadcast(codes).to(self.scale.dtype)
        return self.granularity.restore((view - self.zero_point) * self.scale, codes.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale, "zero_point": self.zero_point}


@dataclass(frozen=True)
class BinaryDecoder(Decoder):
    """``(2 * code - 1) * scale`` for codes 0 and 1."""

    kind: ClassVar[str] = "binary"
    scale: Tensor
    granularity: Granularity

    def decode(self, codes: Tensor) -> Tensor:
        view = self.granularity.broadcast(codes).to(self.scale.dtype)
        return self.granularity.restore((2 * view - 1) * self.scale, codes.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}


@dataclass(frozen=True)
class CodebookDecoder(Decoder):
    """``levels[row, code]``: one row of ``2**bit_width`` ascending levels for each scale of the granularity."""

    kind: ClassVar[str] = "codebook"
    levels: Tensor  # [rows, 2**bit_width]
    granularity: Granularity

    def decode(self, codes: Tensor) -> Tensor:
        rows = self.granularity.flatten(codes).long()
        return self.granularity.unflatten(self.levels.gather(1, rows), codes.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"levels": self.levels}


@dataclass(frozen=True)
class PowerOfTwoDecoder(Decoder):
    """``sign * scale * 2**-shift`` or zero.

    Codes are signed: 0 is zero, ``+-k`` is ``+-scale * 2**(1 - k)``, so ``k = 1`` is the largest magnitude.
    """

    kind: ClassVar[str] = "power_of_two"
    scale: Tensor
    granularity: Granularity

    def decode(self, codes: Tensor) -> Tensor:
        view = self.granularity.broadcast(codes).to(self.scale.dtype)
        values = torch.sign(view) * torch.exp2(1 - view.abs()) * self.scale
        return self.granularity.restore(values, codes.shape)

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale}


@dataclass(frozen=True)
class SumDecoder(Decoder):
    """The sum of several low-bit tensors, each with its own decoder; codes are stacked along a new first dimension."""

    kind: ClassVar[str] = "sum"
    parts: tuple[Decoder, ...]
    granularity: Granularity

    def decode(self, codes: Tensor) -> Tensor:
        total = self.parts[0].decode(codes[0])
        for part, part_codes in zip(self.parts[1:], codes[1:], strict=True):
            total = total + part.decode(part_codes)
        return total

    def tensors(self) -> dict[str, Tensor]:
        return {f"{index}.{name}": tensor for index, part in enumerate(self.parts) for name, tensor in part.tensors().items()}


@dataclass(frozen=True)
class QTensor:
    """Integer ``codes`` of ``bit_width`` bits (int8 when signed, else uint8) with their ``decoder``.

    ``codes`` has the shape of the tensor, with a leading dimension over the parts where the decoder is a ``SumDecoder``.
    """

    codes: Tensor
    decoder: Decoder
    bit_width: int

    def decode(self) -> Tensor:
        """The float values, bit for bit those of the quantizer's forward pass."""
        return self.decoder.decode(self.codes)

    @property
    def shape(self) -> torch.Size:
        """Shape of the decoded tensor."""
        return self.codes.shape[1:] if isinstance(self.decoder, SumDecoder) else self.codes.shape

    @property
    def code_bits(self) -> int:
        """Bits that all codes take when packed densely."""
        return self.codes.numel() * self.bit_width


def code_dtype(qmin: int) -> torch.dtype:
    """int8 where codes can be negative, else uint8."""
    return torch.int8 if qmin < 0 else torch.uint8


def decoder_from(kind: str, tensors: Mapping[str, Tensor], granularity: Granularity, part_kinds: tuple[str, ...] = ()) -> Decoder:
    """Rebuild a decoder from what a file stores; FileFormatError when the kind or its tables do not fit."""
    try:
        if kind == "affine":
            return AffineDecoder(tensors["scale"], tensors["zero_point"], granularity)
        if kind == "binary":
            return BinaryDecoder(tensors["scale"], granularity)
        if kind == "codebook":
            return CodebookDecoder(tensors["levels"], granularity)
        if kind == "power_of_two":
            return PowerOfTwoDecoder(tensors["scale"], granularity)
        if kind == "sum" and part_kinds and "sum" not in part_kinds:
            by_part = [
                {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{index}.")}
                for index in range(len(part_kinds))
            ]
            return SumDecoder(
                tuple(decoder_from(part, tables, granularity) for part, tables in zip(part_kinds, by_part, strict=True)), granularity
            )
    except KeyError as error:
        raise FileFormatError(f"decoder {kind!r}: table {error} is missing; the file has {sorted(tensors)}") from error
    raise FileFormatError(f"unknown decoder {kind!r}. Known: affine, binary, codebook, power_of_two, sum.")
