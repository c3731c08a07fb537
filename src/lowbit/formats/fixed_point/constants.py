"""The integers that operations multiply with, derived from their scales: what the interpreter and the C file share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from lowbit.errors import LayerError, SpecError
from lowbit.formats.fixed_point.graph import AveragePool, Convolution, Linear, Sum
from lowbit.formats.fixed_point.operators import ADD_SHIFT
from lowbit.formats.fixed_point.requantize import (
    INT32_MAX,
    IntegerRequantizer,
    OnnxRequantizer,
    Requantizer,
    RequantizerKind,
    Rounding,
    dyadic_number,
    make_requantizer,
    quantize_multiplier,
    round_half_away,
)
from lowbit.formats.onnx.grid import Grid

MOST_POOL_SHIFT = 12


@dataclass(frozen=True)
class Arithmetic:
    """How real factors become integers.

    Attributes:
        kind: The requantizer.
        rounding: How often a product in fixed point is rounded.
    """

    kind: RequantizerKind
    rounding: Rounding = "double"

    def __post_init__(self) -> None:
        for name, value, allowed in (("requantizer", self.kind, RequantizerKind), ("rounding", self.rounding, Rounding)):
            if value not in get_args(allowed):
                raise SpecError(f"{name} must be one of {', '.join(get_args(allowed))}; got {value!r}")

    def requantizer(self, x_scale: float, w_scale: Tensor | float, grid: Grid) -> Requantizer:
        """The requantizer of sums of products to the codes of ``grid``."""
        return make_requantizer(
            self.kind,
            torch.tensor(x_scale),
            w_scale,
            torch.tensor(float(grid.step)),
            grid.origin,
            grid.lo,
            grid.hi,
            rounding=self.rounding,
        )


def layer_requantizer(operation: Convolution | Linear, arithmetic: Arithmetic) -> Requantizer:
    """The requantizer of a layer's accumulators.

    Raises:
        LayerError: Where the factor is 1 or more, the shift to the left could overflow 32 bits.
    """
    requantizer = arithmetic.requantizer(float(operation.source.grid.scale), operation.weight.scale, operation.target.grid)
    if isinstance(requantizer, IntegerRequantizer):
        highest = int(requantizer.shift.max())
        if highest > 0 and operation.weight.largest * 2**highest > INT32_MAX:
            raise LayerError(
                f"layer {operation.layer!r}: its output range is so small that sums of products are scaled up by 2**{highest}, which overflows 32 bits. "
                "Calibrate the range of its output again."
            )
    return requantizer


def pool_shift(operation: AveragePool, arithmetic: Arithmetic) -> int:
    """By how many bits a pool's sums are shifted to the left before they are rescaled, so that rounding them twice changes nothing."""
    if arithmetic.kind == "onnx":
        return 0
    largest: int = 2**8 * max(len(row.indices) for row in operation.rows) * max(len(column.indices) for column in operation.columns)
    return max(min(MOST_POOL_SHIFT, 30 - largest.bit_length()), 0)


def pool_requantizers(operation: AveragePool, arithmetic: Arithmetic) -> tuple[Tensor, list[Requantizer]]:
    """The distinct divisors of a pool, ascending, and the requantizer of the sums with each, shifted by ``pool_shift``."""
    divisors = operation.divisors.unique()
    scale, grid = float(operation.source.grid.scale), operation.target.grid
    if arithmetic.kind == "onnx":
        x, y = torch.tensor(scale), torch.tensor(float(grid.step))
        return divisors, [OnnxRequantizer(grid.origin, grid.lo, grid.hi, x / (y * count)) for count in divisors]
    return divisors, [arithmetic.requantizer(scale, 2.0 ** -pool_shift(operation, arithmetic) / int(count), grid) for count in divisors]


def pool_offset(operation: AveragePool, divisor: int, arithmetic: Arithmetic) -> int:
    """What is added to a shifted sum for the shift of the target's grid."""
    return round(-operation.target.grid.shift * divisor / float(operation.source.grid.scale) * (1 << pool_shift(operation, arithmetic)))


@dataclass(frozen=True)
class SumConstants:
    """The integers of a sum.

    Fixed point: ``rescale(rescale(d_i << left, multipliers_i, shifts_i) summed + offset, multiplier, shift)`` of the distances ``d_i`` from
    the zero points, as TensorFlow Lite adds. Dyadic: ``(sum of multipliers_i d_i + offset) / 2**exponent`` to nearest, ties to even, where
    ``shift`` is ``31 - exponent``: all operands share the exponent and are rounded once, so that the code is off by no more than a tie;
    HAWQ-V3 rounds each operand alone.

    Attributes:
        multipliers, shifts: A number for each operand.
        offset: For the shift of the target's grid.
        multiplier, shift: For the sum.
    """

    multipliers: tuple[int, ...]
    shifts: tuple[int, ...]
    offset: int
    multiplier: int
    shift: int
    left: int = ADD_SHIFT


def sum_constants(operation: Sum, arithmetic: Arithmetic) -> SumConstants:
    """The integers of a sum in fixed point or dyadic arithmetic.

    Source: Jacob et al. 2018, appendix A.2; TensorFlow Lite, ``integer_ops/add.h``; Yao et al. 2021, section 3.2.
    """
    grid = operation.target.grid
    scales = torch.tensor([float(operand.grid.scale) for operand in operation.operands], dtype=torch.float64)
    if arithmetic.kind == "dyadic":
        ratios = scales / float(grid.step)
        _, exponent = dyadic_number(ratios.max())
        multipliers = round_half_away(torch.ldexp(ratios, exponent)).long().tolist()
        offset = round(-float(grid.shift) / float(grid.step) * 2 ** int(exponent))
        return SumConstants(tuple(multipliers), (0,) * len(multipliers), offset, 1, 31 - int(exponent))
    total = max(len(scales), 2) * scales.max()
    multiplier, shift = quantize_multiplier(total / (2**ADD_SHIFT * float(grid.step)), rounding=arithmetic.rounding)
    inner, shifts = quantize_multiplier(scales / total, rounding=arithmetic.rounding)
    offset = round(-float(grid.shift) * 2**ADD_SHIFT / float(total))
    return SumConstants(tuple(inner.tolist()), tuple(shifts.tolist()), offset, int(multiplier), int(shift))
