"""Converts the codes of a quantized weight to integers that ONNX's DequantizeLinear decodes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import AffineDecoder, BinaryDecoder, PowerOfTwoDecoder

SMALLEST_SCALE = 1e-35  # a channel with a smaller scale counts as zero
_EQUALLY_NEAR = 1e-6  # in largest units


@dataclass(frozen=True)
class IntegerGrid:
    """``(codes - zero_point) * scale`` with scale and zero point along ``axis``, or for the whole tensor if that is ``None``.

    Attributes:
        codes: int8, shaped like the weight.
        scale: float32, ``[channels]`` or ``[]``.
        zero_point: int8, shaped like ``scale``.
        axis: The channel axis.
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

    def upright(self) -> IntegerGrid:
        """The same values without negative scales, which training can produce: ``-(codes - zero) = (-1 - codes) - (-1 - zero)``."""
        is_negative = self.scale < 0
        if not bool(is_negative.any()):
            return self
        codes = torch.where(is_negative.reshape(self._shape()), ~self.codes, self.codes)
        return IntegerGrid(codes, self.scale.abs(), torch.where(is_negative, ~self.zero_point, self.zero_point), self.axis)

    def centred(self) -> IntegerGrid:
        """The same values with zero point 0, if the shifted codes fit int8, as they always do with 7 bits or fewer.

        Then kernels need no correction for the weight's zero point, and kernels that do not support one can be used.
        """
        codes = self.codes.short() - self.zero_point.short().reshape(self._shape())
        if codes.numel() and (int(codes.min()) < -128 or int(codes.max()) > 127):
            return self
        return IntegerGrid(codes.to(torch.int8), self.scale, torch.zeros_like(self.zero_point), self.axis)

    def widened(self) -> IntegerGrid:
        """The same values on a finer grid: codes times the largest power of two that keeps them within -64 to 64.

        Biases are rounded to the grid of the products, so coarse codes would round them coarsely. Up to 64, the sum of two products with
        8-bit activations fits 16 bits, in which processors without integer dot products add them.
        """
        largest = max(int(t.abs().max()) for t in (self.codes.short(), self.zero_point.short()))
        factor = 2 ** max(int(math.log2(64 / max(largest, 1))), 0)
        return IntegerGrid(self.codes * factor, self.scale / factor, self.zero_point * factor, self.axis)

    def holding(self, bias: Tensor, x_scale: float, largest: int) -> IntegerGrid:
        """The same values on the grid whose products with inputs of scale ``x_scale`` best represent ``bias``, a number for each channel.

        Low-bit codes leave room in int8. Of all multiples of the codes within ``-largest`` to ``largest``, each scale gets the one with
        which the biases that share it are nearest to integers of the resulting unit; of equally near ones, the finest.
        """
        zeros = self.zero_point.short().reshape(-1)
        rows = torch.cat([self.codes.short().movedim(self.axis or 0, 0).reshape(len(zeros), -1), zeros[:, None]], 1)
        divisors = torch.from_numpy(np.gcd.reduce(rows.numpy(), axis=1)).clamp(min=1)
        most = rows.abs().amax(1)
        room = torch.where(most > largest, divisors, largest * divisors // most.clamp(min=1)).clamp(1, largest)
        factors = torch.arange(1, int(room.max()) + 1)[:, None]
        units = self.scale.double().reshape(-1) * divisors * x_scale / factors  # [factors, scales]
        steps = bias.double() / units
        misses = (steps - steps.round()).abs() * units
        if self.axis is None:
            misses = misses.amax(1, keepdim=True)
        misses = misses.masked_fill(factors > room, math.inf)
        is_nearest = misses <= misses.amin(0) + units[0] * _EQUALLY_NEAR
        chosen = torch.where(is_nearest, factors, 0).amax(0)
        shape = self._shape()
        codes, zero_point = (
            t.short() // divisors.reshape(to) * chosen.short().reshape(to)
            for t, to in ((self.codes, shape), (self.zero_point, self.scale.shape))
        )
        scale = self.scale.double() * (divisors.double() / chosen).reshape(self.scale.shape)
        return IntegerGrid(codes.to(torch.int8), scale.float(), zero_point.to(torch.int8), self.axis)

    def coarsened(self, least_scale: Tensor) -> IntegerGrid:
        """The nearest values on a grid with a scale of at least ``least_scale``, which broadcasts with ``scale``."""
        scale = torch.maximum(self.scale, least_scale.float())
        values = (self.codes.double() - self.zero_point.double().reshape(self._shape())) * (self.scale.double() / scale).reshape(
            self._shape()
        )
        codes = (values.round() + self.zero_point.double().reshape(self._shape())).to(torch.int8)
        return IntegerGrid(codes, scale, self.zero_point, self.axis)

    def rescaled(self, factor: Tensor) -> IntegerGrid | None:
        """The values times ``factor`` ``[channels]``, one for each index of the first axis; ``None`` if the codes do not fit int8.

        A negative factor flips the signs of a channel's codes; a factor of 0 sets them to 0.
        """
        if self.axis not in (None, 0):
            return None
        grid, column = self.centred(), [-1] + [1] * (self.codes.dim() - 1)
        scale = (grid.scale.double() * factor.double().abs()).float().expand(factor.numel())
        is_zero = scale < SMALLEST_SCALE
        sign = torch.where(factor < 0, -1, 1).to(torch.int16)
        zero_point = torch.where(is_zero, 0, sign * grid.zero_point.short())
        codes = torch.where(is_zero.reshape(column), 0, sign.reshape(column) * grid.codes.short())
        if not _fits_int8(codes, zero_point):
            return None
        return IntegerGrid(codes.to(torch.int8), torch.where(is_zero, torch.ones_like(scale), scale), zero_point.to(torch.int8), 0)

    @property
    def fits_int4(self) -> bool:
        """Whether codes and zero points are within -8 to 7."""
        return all(int(t.min()) >= -8 and int(t.max()) <= 7 for t in (self.codes, self.zero_point))

    def _shape(self) -> list[int]:
        """The shape in which scale and zero point broadcast with the codes."""
        return [] if self.axis is None else [-1 if dim == self.axis else 1 for dim in range(self.codes.dim())]


def integer_grid(weight: QTensor) -> IntegerGrid | None:
    """``weight`` on an integer grid that decodes to the same floats bit for bit; ``None`` if there is none.

    Evenly spaced levels have one if 0 is a level, or lies midway between two levels: then codes are doubled, which 8-bit codes are too
    wide for. Two levels always have one; powers of two have one if the largest is at most 64 times the smallest. Groups within a channel
    have none that a convolution kernel supports. ``why_no_integer_grid`` returns the reason.
    """
    decoder = weight.decoder
    axis = decoder.granularity.axis % weight.codes.dim() if decoder.granularity.kind == "per_channel" else None
    if decoder.granularity.kind in ("per_group", "per_axes"):
        return None
    codes = weight.codes.to(torch.int16)
    if isinstance(decoder, AffineDecoder):
        scale, zero_point = decoder.scale, decoder.zero_point
        if not _is_whole(2 * zero_point):
            return None
        if not _is_whole(zero_point):
            broadcast = decoder.granularity.broadcast(2 * codes) - (2 * zero_point).short()
            codes, zero_point, scale = decoder.granularity.restore(broadcast, codes.shape), torch.zeros_like(zero_point), scale / 2
        elif weight.codes.dtype == torch.uint8:  # the lowest code of the container, for any bit-width
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
    if not _fits_int8(codes, zero_point):
        return None
    flat = (scale.numel(),) if axis is not None else ()
    grid = IntegerGrid(codes.to(torch.int8), scale.detach().float().reshape(flat), zero_point.detach().reshape(flat).to(torch.int8), axis)
    return grid.upright() if torch.equal(grid.decode(), weight.decode()) else None


def why_no_integer_grid(weight: QTensor) -> str:
    """The property of a weight without an integer grid that such a grid cannot represent."""
    decoder = weight.decoder
    if decoder.granularity.kind in ("per_group", "per_axes"):
        return "groups within a channel" if decoder.granularity.group_size else "a scale for each combination of several axes"
    if isinstance(decoder, AffineDecoder) and not _is_whole(2 * decoder.zero_point):
        return "levels with a zero point that is no multiple of 1/2"
    if isinstance(decoder, AffineDecoder) and not _is_whole(decoder.zero_point):
        return f"{weight.bit_width}-bit levels with zero midway between two"
    return f"the levels of a {decoder.kind} quantizer"


def _is_whole(values: Tensor) -> bool:
    return bool((values == values.round()).all())


def _fits_int8(*tensors: Tensor) -> bool:
    return all(int(t.min()) >= -128 and int(t.max()) <= 127 for t in tensors if t.numel())
