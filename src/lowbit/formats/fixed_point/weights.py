"""Weights and biases of layers as integers, with a check that their sums fit 32 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LayerError
from lowbit.formats.fixed_point.graph import Buffer, Weight
from lowbit.formats.fixed_point.values import Doubles
from lowbit.formats.onnx.bias import Steps, place_bias
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.onnx.integer_grid import SMALLEST_SCALE, IntegerGrid, integer_grid, why_no_integer_grid
from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import AffineDecoder

LARGEST_SUM = 2**31 - 1
FINE = 2**-7  # largest rounding error of a bias, in steps of the codes behind the layer, where the unit can be chosen
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
) -> Weight:
    """The integers of a layer whose result is ``factor * (weight x + bias) + shift``, rounded to the codes of ``target``.

    They are those of the ONNX file. Where that computes the layer in float, because int8 cannot hold the weight's levels, or because they are too
    coarse for the bias, codes get a ninth bit, and the unit of the accumulator is made finer.

    Raises:
        LayerError: The weight has no integer grid, or sums may need more than 32 bits; names the layer.
    """
    channels = int(weight.codes.shape[0])
    if factor is not None and shift is not None:
        factor = np.broadcast_to(factor, (channels,)).copy()
        values = np.zeros(channels) if bias is None else bias
        bias = (values * factor + shift).astype(np.float32).astype(np.float64)
    exact = None if bias is None else torch.from_numpy(bias)
    grid = integer_grid(weight)
    if grid is not None and factor is not None:
        grid = grid.rescaled(torch.from_numpy(factor))
    if grid is None:
        codes, scale = _doubled(layer, weight, factor)
        made = _with_bias(parameter, codes, scale, exact, source, target)
    else:
        grid, bias_codes = grid.centred().widened(), torch.zeros(channels, dtype=torch.float64)
        is_coarse = False
        if exact is not None:
            steps = Steps(float(target.step), target.origin + _CONTAINER)
            placed = place_bias(exact, grid, float(source.grid.scale), source.grid.hi + _CONTAINER, steps)
            grid, bias_codes, is_coarse = placed.grid, placed.codes, placed.is_coarse
        codes, scale = _centred(grid)
        made = (
            _with_bias(parameter, codes, scale, exact, source, target)
            if is_coarse
            else _split(parameter, codes, scale, bias_codes, torch.ones_like(scale))
        )
    return _checked(layer, made, source)


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
    twice = decoder.granularity.broadcast(2 * weight.codes.short()) - (2 * decoder.zero_point.detach()).short()
    codes = decoder.granularity.restore(twice, weight.codes.shape)
    scale = decoder.scale.detach().double().reshape(-1).expand(channels) / 2
    if factor is not None:
        scale = scale * torch.from_numpy(factor)
    is_zero = scale.abs() < SMALLEST_SCALE
    codes = codes * torch.where(is_zero, 0, scale.sign()).short().reshape(_column(codes))
    return codes, torch.where(is_zero, 1.0, scale.abs()).float().double()


def _with_bias(parameter: str, codes: Tensor, scale: Tensor, bias: Tensor | None, source: Buffer, target: Grid) -> Weight:
    """The weight with an accumulator whose unit is so fine that rounding the bias moves it by no more than ``FINE`` steps."""
    if bias is None:
        return _split(parameter, codes, scale, torch.zeros_like(scale), torch.ones_like(scale))
    units = float(source.grid.scale) * scale
    finer = torch.exp2((units / (2 * FINE * float(target.step))).log2().ceil().clamp(min=0))
    return _split(parameter, codes, scale / finer, (bias / (units / finer)).round(), finer)


def _split(parameter: str, codes: Tensor, scale: Tensor, bias: Tensor, finer: Tensor) -> Weight:
    """The codes without the common divisor of each row, which becomes the row's factor."""
    divisor = torch.from_numpy(np.gcd.reduce(codes.reshape(len(codes), -1).numpy(), axis=1)).clamp(min=1)
    reduced = codes // divisor.reshape(_column(codes))
    return Weight(parameter, reduced, divisor.long() * finer.long(), bias.long(), scale.float(), stored_bits(reduced), 0)


def _column(codes: Tensor) -> list[int]:
    """The shape in which a number for each row broadcasts with the codes."""
    return [-1] + [1] * (codes.dim() - 1)


def stored_bits(codes: Tensor) -> int:
    """Bits of codes that are counted from the lowest one of the tensor, in units of ``code_step``."""
    span = (int(codes.max()) - int(codes.min())) // code_step(codes) if codes.numel() else 0
    return max(span.bit_length(), 1)


def code_step(codes: Tensor) -> int:
    """The largest common divisor of the codes' distances from the lowest: 2 for codes -1 and 1."""
    return max(int(np.gcd.reduce((codes - codes.min()).reshape(-1).numpy())), 1) if codes.numel() else 1


def _checked(layer: str, weight: Weight, source: Buffer) -> Weight:
    grid = source.grid
    farthest = max(abs(grid.lo - grid.zero_point), abs(grid.hi - grid.zero_point))
    rows = weight.codes.long().abs().reshape(len(weight.codes), -1).sum(1)
    largest = int((weight.factor * rows * farthest + weight.bias.abs()).max())
    if largest > LARGEST_SUM:
        raise LayerError(
            f"layer {layer!r}: a sum of its products can reach {largest:,}, more than 32 bits hold ({LARGEST_SUM:,}). "
            "Use fewer bits for its weights or inputs."
        )
    return replace(weight, largest=largest)
