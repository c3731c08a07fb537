"""Biases of layers that are computed in integers: int32 codes on the grid of the products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats.onnx.integer_grid import IntegerGrid

LARGEST_BIAS = 2**30  # leaves as much room for the sum of products
COARSE = 1 / 8  # largest rounding error of a bias, in steps
_PAIR = 2**14 - 1  # two products of this size fit 16 bits, in which processors without integer dot products add them


@dataclass(frozen=True)
class Steps:
    """The quantizer behind a layer: a code is ``round(x / step) + origin``."""

    step: float
    origin: int

    def code(self, values: Tensor) -> Tensor:
        """Codes before clipping, as floats."""
        return (values / self.step).round() + self.origin


@dataclass(frozen=True)
class PlacedBias:
    """A bias as integers, with the grid of the weights that its integers fit.

    Attributes:
        grid: The weights, on the grid that was chosen for the bias.
        codes: Whole numbers, float64 ``[channels]``.
        scale: float32 ``[channels]``: ``x_scale * grid.scale``.
        is_coarse: Whether rounding the bias moves it by more than ``COARSE`` steps of the codes behind the layer.
    """

    grid: IntegerGrid
    codes: Tensor
    scale: Tensor
    is_coarse: bool


def place_bias(bias: Tensor, grid: IntegerGrid, x_scale: float, highest: int, behind: Steps | None) -> PlacedBias:
    """The codes of a bias on the grid of the products of weights and inputs.

    Rounding a bias shifts a whole channel, which matters where many of its values lie near the boundary of two codes, and always where the
    input is 0, so that only the bias is left. So the codes of the weights are multiplied until the grid of their products is fine enough
    for the biases, and a bias is rounded in the direction that keeps its code.

    A dead channel, with hardly any weights, can have a scale at which its bias exceeds 32 bits. Its weights are moved to the finest grid at
    which the bias fits; that changes the result by less than the bias times ``inputs * 2**-23``.

    Args:
        bias: float64 ``[channels]``.
        grid: The weights.
        x_scale: Scale of the inputs.
        highest: The inputs' highest uint8 code.
        behind: The quantizer that reads the layer's result, if only that does.
    """
    grid = grid.holding(bias, x_scale, min(127, _PAIR // max(highest, 1)))
    magnitudes = bias.abs() if grid.axis is not None else bias.abs().max()
    least = magnitudes / (x_scale * LARGEST_BIAS)
    if bool((grid.scale < least).any()):
        grid = grid.coarsened(least)
    scale = (x_scale * grid.scale.double()).float().expand(bias.shape[0])
    codes = _bias_codes(bias, scale.double(), behind)
    is_coarse = behind is not None and bool((codes * scale.double() - bias).abs().max() > COARSE * behind.step)
    return PlacedBias(grid, codes, scale, is_coarse)


def _bias_codes(bias: Tensor, units: Tensor, behind: Steps | None) -> Tensor:
    """Biases rounded to integers of ``units``: the nearest one, or the next on the other side if only that keeps the code of ``bias``."""
    nearest = (bias / units).round()
    if behind is None:
        return nearest
    other = nearest + torch.where(nearest * units <= bias, 1.0, -1.0)
    wanted = behind.code(bias)
    is_wrong = (behind.code(nearest * units) != wanted) & (behind.code(other * units) == wanted)
    return torch.where(is_wrong, other, nearest)
