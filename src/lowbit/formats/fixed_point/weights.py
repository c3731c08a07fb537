"""Weights and biases of layers as integers, with a check that their sums fit 32 bits."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import LayerError
from lowbit.formats.fixed_point.graph import Buffer, Weight
from lowbit.formats.fixed_point.values import Doubles
from lowbit.formats.onnx.bias import COARSE, Steps, place_bias
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.onnx.integer_grid import IntegerGrid, integer_grid, why_no_integer_grid
from lowbit.quantizers import QTensor

LARGEST_SUM = 2**31 - 1
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

    They are those of the ONNX file. Where these are too coarse for the bias, so that the file computes the layer in float, the unit of the
    accumulator is made finer.

    Raises:
        LayerError: The weight has no integer grid, or sums may need more than 32 bits; names the layer.
    """
    grid = integer_grid(weight)
    if grid is None:
        raise LayerError(
            f"layer {layer!r}: integers cannot hold {why_no_integer_grid(weight)}, which its weight has. Use a method with evenly spaced levels."
        )
    channels = int(grid.codes.shape[0])
    if factor is not None and shift is not None:
        rescaled = grid.rescaled(torch.from_numpy(np.broadcast_to(factor, (channels,)).copy()))
        if rescaled is None:
            raise LayerError(
                f"layer {layer!r}: the batch norm behind it turns the code -128 into 128, which int8 cannot hold. Fold the norm first."
            )
        grid = rescaled
        values = np.zeros(channels) if bias is None else bias
        bias = (values * factor + shift).astype(np.float32).astype(np.float64)
    grid, codes = grid.centred().widened(), torch.zeros(channels, dtype=torch.float64)
    finer = 1
    if bias is not None:
        exact, x_scale = torch.from_numpy(bias), float(source.grid.scale)
        placed = place_bias(exact, grid, x_scale, source.grid.hi + _CONTAINER, Steps(float(target.step), target.origin + _CONTAINER))
        grid, codes = placed.grid, placed.codes
        if placed.is_coarse:
            unit = float(placed.scale.double().max())
            finer = 2 ** int(np.ceil(np.log2(unit / (COARSE * float(target.step)))))
            codes = (exact / (placed.scale.double() / finer)).round()
    return _checked(layer, _split(parameter, grid, codes, finer), source)


def _split(parameter: str, grid: IntegerGrid, bias: Tensor, finer: int) -> Weight:
    """The codes without the common divisor of each row, which becomes the row's factor."""
    channels = grid.codes.shape[0]
    column = [-1] + [1] * (grid.codes.dim() - 1)
    zero_point = (
        grid.zero_point.short().expand(channels).reshape(column)
        if grid.zero_point.numel() == 1
        else grid.zero_point.short().reshape(column)
    )
    values = grid.codes.short() - zero_point
    divisor = torch.from_numpy(np.gcd.reduce(values.reshape(channels, -1).numpy(), axis=1)).clamp(min=1)
    codes = values // divisor.reshape(column)
    scale = grid.scale.double().expand(channels) / finer
    return Weight(parameter, codes, divisor.long() * finer, bias.long(), scale.float(), stored_bits(codes), 0)


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
