"""Weights and biases of layers as integers, with a check that their sums fit 32 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LayerError
from lowbit.formats.fixed_point.graph import Buffer, Weight
from lowbit.formats.fixed_point.values import Doubles
from lowbit.formats.onnx.bias import LARGEST_BIAS, Steps, place_bias
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.onnx.integer_grid import SMALLEST_SCALE, IntegerGrid, integer_grid, why_no_integer_grid
from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import AffineDecoder
from lowbit.spec import Granularity

LARGEST_SUM = 2**31 - 1
LARGEST_CODE = 2**15 - 1  # of a weight
FINE = 2**-14  # largest rounding error of a bias, in steps of the codes behind the layer
_CONTAINER = 128  # between the uint8 codes that biases are placed for and int8


def layer_weight(
    layer: str,
    parameter: str,
    weight: QTensor,
    bias: Doubles | None,
    factor: Doubles | None,
    shift: Doubles | None,
    source: Buffer,
    target: Grid,
    *,
    as_onnx: bool,
) -> Weight:
    """The integers of a layer whose result is ``factor * (weight x + bias) + shift``, rounded to the codes of ``target``.

    Args:
        layer, parameter: Names of the layer and of its weight.
        weight: The codes of the weight.
        bias: ``[out]``.
        factor, shift: What follows the layer, ``[out]`` or one number.
        source: The inputs.
        target: Codes of the result.
        as_onnx: Whether the accumulators are those of the ONNX file, whose int8 weights can be too coarse for a bias; else, and where the file
            computes the layer in float, their unit is made as fine as ``FINE`` says.

    Raises:
        LayerError: The weight has no integer grid, or sums may need more than 32 bits; names the layer.
    """
    channels = int(weight.codes.shape[0])
    if factor is not None and shift is not None:
        factor = np.broadcast_to(factor, (channels,)).copy()
        bias = ((np.zeros(channels) if bias is None else bias) * factor + shift).astype(np.float32).astype(np.float64)
    exact = torch.zeros(channels, dtype=torch.float64) if bias is None else torch.from_numpy(bias)
    grid = integer_grid(weight)
    if grid is not None and factor is not None:
        grid = grid.rescaled(torch.from_numpy(factor))
    if grid is not None and as_onnx:
        grid, codes = grid.centred().widened(), exact
        is_coarse = False
        if bias is not None:
            steps = Steps(float(target.step), target.origin + _CONTAINER)
            placed = place_bias(exact, grid, float(source.grid.scale), source.grid.hi + _CONTAINER, steps)
            grid, codes, is_coarse = placed.grid, placed.codes, placed.is_coarse
        if not is_coarse:
            values, scale = _centred(grid)
            reduced, divisor = _reduced(values)
            return _checked(layer, Weight(parameter, reduced, divisor, codes.long(), scale.float(), stored_bits(reduced), 0), source)
    values, scale = _doubled(layer, weight, factor) if grid is None else _centred(grid)
    return _checked(layer, _with_fine_unit(parameter, values, scale, exact, source, target), source)


def turned(layer: str, weight: QTensor, groups: int) -> QTensor:
    """The weight ``[in, out / groups, ...]`` of a transposed convolution as that of a convolution, ``[out, in / groups, ...]``, its kernels turned around.

    Raises:
        LayerError: Its scales belong neither to the whole weight nor to output channels.
    """
    codes, decoder = weight.codes, weight.decoder
    inputs, outputs, *kernel = codes.shape
    by_group = codes.reshape(groups, inputs // groups, outputs, *kernel).transpose(1, 2)
    new = by_group.reshape(groups * outputs, inputs // groups, *kernel).flip(tuple(range(2, codes.dim()))).contiguous()
    granularity: Granularity = decoder.granularity
    if granularity.kind == "per_channel" and granularity.axes[0] % codes.dim() == 1:
        column = (-1, *[1] * (codes.dim() - 1))
        tables = {name: table.reshape(-1).repeat(groups).reshape(column) for name, table in decoder.tensors().items()}
        decoder = replace(decoder, **tables, granularity=Granularity.channel(0))  # type: ignore[type-var]
    elif granularity.kind != "per_tensor":
        raise LayerError(
            f"layer {layer!r}: the scales of its weight are those of {granularity}; an integer network takes per_channel or per_tensor"
        )
    return replace(weight, codes=new, decoder=decoder)


def _centred(grid: IntegerGrid) -> tuple[Tensor, Tensor]:
    """Codes less their zero points, int16, and a scale for each channel, float64."""
    channels = grid.codes.shape[0]
    zero_point = grid.zero_point.short().expand(channels).reshape(_column(grid.codes))
    return grid.codes.short() - zero_point, grid.scale.double().expand(channels)


def _doubled(layer: str, weight: QTensor, factor: Doubles | None) -> tuple[Tensor, Tensor]:
    """Twice the codes less their zero points, which can lie midway between two codes, and half the scale, times ``factor``.

    int8 cannot hold them where codes have 8 bits; stored from the lowest one, they take 8 bits all the same.
    """
    decoder, channels = weight.decoder, weight.codes.shape[0]
    kind = decoder.granularity.kind
    is_by_channel = kind == "per_channel" and decoder.granularity.axis % weight.codes.dim() == 0
    is_doubled = isinstance(decoder, AffineDecoder) and (kind == "per_tensor" or is_by_channel)
    if (
        not isinstance(decoder, AffineDecoder)
        or not is_doubled
        or not torch.equal((2 * decoder.zero_point).round(), 2 * decoder.zero_point)
    ):
        raise LayerError(f"layer {layer!r}: integers cannot hold {why_no_integer_grid(weight)}, which its weight has. Use another method.")
    twice = decoder.granularity.broadcast(2 * weight.codes.double()) - 2 * decoder.zero_point.detach().double()
    if twice.numel() and float(twice.abs().max()) > LARGEST_CODE:
        raise LayerError(
            f"layer {layer!r}: a level of its weight lies {float(twice.abs().max()) / 2:,.0f} steps from zero, farther than an integer network "
            f"holds ({LARGEST_CODE // 2:,}). Use a method whose weights have a zero point among their codes."
        )
    codes = decoder.granularity.restore(twice.short(), weight.codes.shape)
    scale = decoder.scale.detach().double().reshape(-1).expand(channels) / 2
    if factor is not None:
        scale = scale * torch.from_numpy(factor)
    is_zero = scale.abs() < SMALLEST_SCALE
    codes = codes * torch.where(is_zero, 0, scale.sign()).short().reshape(_column(codes))
    return codes, torch.where(is_zero, 1.0, scale.abs()).float().double()


def _with_fine_unit(parameter: str, codes: Tensor, scale: Tensor, bias: Tensor, source: Buffer, target: Grid) -> Weight:
    """The weight with accumulators in units of at most ``2 * FINE`` steps of the target, where 32 bits have room for them.

    A dead channel, with hardly any weights, can have a scale at which its bias exceeds 32 bits. Its weights are moved to the finest grid at
    which the bias fits.
    """
    reduced, divisor = _reduced(codes)
    scale, x_scale = scale * divisor, float(source.grid.scale)
    least = bias.abs() / (x_scale * LARGEST_BIAS)
    is_dead = scale < least
    moved = (reduced.double() * (scale / torch.where(is_dead, least, 1.0)).reshape(_column(codes))).round().short()
    reduced, scale = torch.where(is_dead.reshape(_column(codes)), moved, reduced), torch.maximum(scale, least)
    units = x_scale * scale
    largest = reduced.long().abs().reshape(len(reduced), -1).sum(1) * _farthest(source.grid) + bias.abs() / units
    wanted, room = (_power_of_two(t) for t in (units / (2 * FINE * float(target.step)), LARGEST_BIAS / largest.clamp(min=1)))
    wanted = 2 * wanted  # rounded up
    finer = wanted.amax().expand_as(room) if bool(wanted.amax() <= room.amin()) else torch.minimum(wanted, room)
    stored = (scale / finer).float()
    codes_of_bias = (bias / (x_scale * stored.double())).round().long()
    return Weight(parameter, reduced, finer.long(), codes_of_bias, stored, stored_bits(reduced), 0)


def _power_of_two(values: Tensor) -> Tensor:
    """The largest power of two that is not above each value, at least 1."""
    return torch.exp2(values.log2().floor()).clamp(min=1)


def _reduced(codes: Tensor) -> tuple[Tensor, Tensor]:
    """The codes without the common divisor of each row, and the divisors, int64."""
    divisor = torch.from_numpy(np.gcd.reduce(codes.reshape(len(codes), -1).numpy(), axis=1)).long().clamp(min=1)
    return codes // divisor.short().reshape(_column(codes)), divisor


def _farthest(grid: Grid) -> int:
    """The largest distance of a code from the zero point."""
    return max(abs(grid.lo - grid.zero_point), abs(grid.hi - grid.zero_point))


def _column(codes: Tensor) -> list[int]:
    """The shape in which a number for each row broadcasts with the codes."""
    return [-1] + [1] * (codes.dim() - 1)


def stored_bits(codes: Tensor) -> int:
    """Bits of codes that are counted from the lowest one of the tensor, in units of ``code_step``."""
    span = (int(codes.max()) - int(codes.min())) // code_step(codes) if codes.numel() else 0
    return max(span.bit_length(), 1)


def code_step(codes: Tensor) -> int:
    """The largest common divisor of the codes' distances from the lowest: 2 for codes -1 and 1."""
    return max(int(np.gcd.reduce((codes.long() - codes.min()).reshape(-1).numpy())), 1) if codes.numel() else 1


def _checked(layer: str, weight: Weight, source: Buffer) -> Weight:
    rows = weight.codes.long().abs().reshape(len(weight.codes), -1).sum(1)
    largest = int((weight.factor * rows * _farthest(source.grid) + weight.bias.abs()).max())
    if largest > LARGEST_SUM:
        raise LayerError(
            f"layer {layer!r}: a sum of its products can reach {largest:,}, more than 32 bits hold ({LARGEST_SUM:,}). "
            "Use fewer bits for its weights or inputs."
        )
    return replace(weight, largest=largest)
