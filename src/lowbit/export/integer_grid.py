"""Codes of a quantized weight as the integers that ONNX's DequantizeLinear decodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import AffineDecoder, BinaryDecoder, PowerOfTwoDecoder


@dataclass(frozen=True)
class IntegerGrid:
    """``(codes - zero_point) * scale``, scale and zero point along ``axis``, or for the whole tensor where that is ``None``.

    Attributes:
        codes: int8, the shape of the weight.
        scale: float32, ``[channels]`` or ``[]``.
        zero_point: int8, shaped like ``scale``.
        axis: The axis that counts channels.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    axis: int | None

    def decode(self) -> Tensor:
        """The float weight."""
        shape = self._shape()
        return (self.codes.float() - self.zero_point.float().reshape(shape)) * self.scale.reshape(shape)

    def permute(self, order: tuple[int, ...]) -> IntegerGrid:
        """The grid of the transposed weight."""
        axis = None if self.axis is None else order.index(self.axis)
        return IntegerGrid(self.codes.permute(order).contiguous(), self.scale, self.zero_point, axis)

    def centred(self) -> IntegerGrid:
        """The same values with the zero point 0, where the shifted codes fit int8: always with 7 bits or fewer.

        Kernels need no correction for the weight's zero point then, and those that allow none can be used.
        """
        codes = self.codes.short() - self.zero_point.short().reshape(self._shape())
        if codes.numel() and (int(codes.min()) < -128 or int(codes.max()) > 127):
            return self
        return IntegerGrid(codes.to(torch.int8), self.scale, torch.zeros_like(self.zero_point), self.axis)

    def widened(self) -> IntegerGrid:
        """The same values on a finer grid: codes times a power of two, as far as they stay within -64 to 64.

        Biases are rounded to the grid of the products, so coarse codes would round them coarsely; and up to 64 two products with
        8-bit activations fit 16 bits, in which processors without integer dot products add them.
        """
        largest = max(int(t.abs().max()) for t in (self.codes.short(), self.zero_point.short()))
        factor = 2 ** max(int(math.log2(64 / max(largest, 1))), 0)
        return IntegerGrid(self.codes * factor, self.scale / factor, self.zero_point * factor, self.axis)

    def coarsened(self, least_scale: Tensor) -> IntegerGrid:
        """The nearest values on a grid whose scale is at least ``least_scale``, which broadcasts with ``scale``."""
        scale = torch.maximum(self.scale, least_scale.float())
        values = (self.codes.double() - self.zero_point.double().reshape(self._shape())) * (self.scale.double() / scale).reshape(
            self._shape()
        )
        codes = (values.round() + self.zero_point.double().reshape(self._shape())).to(torch.int8)
        return IntegerGrid(codes, scale, self.zero_point, self.axis)

    @property
    def fits_int4(self) -> bool:
        """Whether codes and zero points are -8 to 7."""
        return all(int(t.min()) >= -8 and int(t.max()) <= 7 for t in (self.codes, self.zero_point))

    def _shape(self) -> list[int]:
        """Shape in which scale and zero point broadcast with the codes."""
        return [] if self.axis is None else [-1 if dim == self.axis else 1 for dim in range(self.codes.dim())]


def integer_grid(weight: QTensor) -> IntegerGrid | None:
    """``weight`` on an integer grid that decodes to the same floats bit for bit; ``None`` if there is none.

    Evenly spaced levels have one, two levels too, and powers of two where the largest is at most 64 times the smallest. Groups
    within a channel have none that a convolution kernel takes.
    """
    decoder = weight.decoder
    axis = decoder.granularity.axis % weight.codes.dim() if decoder.granularity.kind == "per_channel" else None
    if decoder.granularity.kind == "per_group":
        return None
    codes = weight.codes.to(torch.int16)
    if isinstance(decoder, AffineDecoder):
        scale, zero_point = decoder.scale, decoder.zero_point
        if not bool((zero_point == zero_point.round()).all()):
            return None
        if weight.codes.dtype == torch.uint8:  # the lowest code of the container, whatever the bit-width
            shift = 2 ** (weight.bit_width - 1)
            codes, zero_point = codes - shift, zero_point - shift
    elif isinstance(decoder, BinaryDecoder):
        scale, codes = decoder.scale, 2 * codes - 1
        zero_point = torch.zeros_like(scale)
    elif isinstance(decoder, PowerOfTwoDecoder):
        smallest = max(int(codes.abs().max()), 1)
        if smallest > 7:
            return None
        codes = torch.sign(codes) * 2 ** (smallest - codes.abs()) * (codes != 0)
        scale = decoder.scale * 2.0 ** (1 - smallest)
        zero_point = torch.zeros_like(scale)
    else:
        return None
    if any(int(t.min()) < -128 or int(t.max()) > 127 for t in (codes, zero_point)):
        return None
    flat = (scale.numel(),) if axis is not None else ()
    grid = IntegerGrid(codes.to(torch.int8), scale.detach().float().reshape(flat), zero_point.detach().reshape(flat).to(torch.int8), axis)
    return grid if torch.equal(grid.decode(), weight.decode()) else None
