"""From int32 accumulators to codes: the real factor ``M = S_x S_w / S_y`` applied in integers, in three ways that differ in rounding.

Sources:
- fixed point: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
  section 2.2; gemmlowp and TensorFlow Lite, whose integers are met bit for bit;
- dyadic: Yao et al. 2021, "HAWQ-V3: Dyadic Neural Network Quantization", section 3.2;
- onnx: the operator QLinearConv as ONNX Runtime computes it.
All work on int64 tensors that hold int32 values; what overflows 32 bits there wraps around as it does there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lowbit.errors import SpecError

RequantizerKind = Literal["fixed_point", "dyadic", "onnx"]
Rounding = Literal["double", "single"]
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1
FRACTION_BITS = 31  # of every fixed-point multiplier
MOST_SHIFT = 30  # to the left, of multipliers for a single rounding
INT64_SHIFT = 63  # to the right: leaves a sign


def wrap_int32(x: Tensor) -> Tensor:
    """``x`` modulo ``2**32`` as a signed 32-bit number, int64."""
    return x.to(torch.int32).long()


def round_half_away(x: Tensor) -> Tensor:
    """The nearest whole numbers, ties away from zero, as C's ``round``.

    >>> round_half_away(torch.tensor([-2.5, -0.5, 0.49999997, 0.5, 1.5]))
    tensor([-3., -1., 0., 1., 2.])
    """
    whole = x.trunc()
    return whole + (x - whole).mul(2).trunc()  # the fraction is exact, so that 0.5 less one bit stays below a tie


def fixed_point_multiply(a: Tensor, b: Tensor) -> Tensor:
    """Saturating rounding doubling high multiply: ``a b / 2**31`` to nearest, ties up; INT32_MAX where both are INT32_MIN.

    Args:
        a, b: int32 values that broadcast, any integer type.

    Returns:
        int64.

    Source: gemmlowp, ``SaturatingRoundingDoublingHighMul``; Jacob et al. 2018, appendix B.

    >>> fixed_point_multiply(torch.tensor([3, -3, -(2**31)]), torch.tensor([2**30, 2**30, -(2**31)]))
    tensor([ 2, -1, 2147483647])
    """
    # its division truncates (a b + 2**30), or (a b + 1 - 2**30) where negative: for all int32 that is this shift
    return ((a.long() * b.long() + 2**30) >> FRACTION_BITS).clamp(max=INT32_MAX)


def rounding_right_shift(x: Tensor, shift: Tensor) -> Tensor:
    """``x / 2**shift`` to nearest, ties away from zero.

    Args:
        x: int32 values, any integer type.
        shift: 0 to 31, broadcasts with ``x``.

    Returns:
        int64.

    Source: gemmlowp, ``RoundingDivideByPOT``.

    >>> rounding_right_shift(torch.tensor([5, -5, 6, -6]), torch.tensor(2))
    tensor([ 1, -1,  2, -2])
    """
    x, shift = x.long(), shift.long()
    mask = (1 << shift) - 1
    return (x >> shift) + ((x & mask) > (mask >> 1) + (x < 0).long()).long()


def right_shift_half_even(x: Tensor, shift: Tensor) -> Tensor:
    """``x / 2**shift`` to nearest, ties to even.

    Args:
        x: Values within ``+-2**62``, int64.
        shift: 0 or more, broadcasts with ``x``.

    >>> right_shift_half_even(torch.tensor([2, 6, -2, -6, 7]), torch.tensor(2))
    tensor([ 0,  2,  0, -2,  2])
    """
    shift = shift.long().clamp(max=INT64_SHIFT)  # beyond, nothing is left but zeros, as at 63
    down = x >> shift
    half = x.new_ones(()) << shift.sub(1).clamp(min=0)  # 1 where nothing is shifted, which no remainder reaches
    above = x - (down << shift) - half
    return down + torch.where(above == 0, down & 1, (above > 0).long())


def quantize_multiplier(multiplier: Tensor, *, rounding: Rounding = "double") -> tuple[Tensor, Tensor]:
    """A real multiplier as ``fixed * 2**(shift - 31)`` with ``fixed`` in ``[2**30, 2**31)``; positive shifts go to the left.

    Multipliers below ``2**-32`` become 0. With a ``single`` rounding those of ``2**30`` or more become the largest one.

    Args:
        multiplier: Not negative, any shape; computed in float64.
        rounding: The build of the kernels that will use it.

    Returns:
        ``(fixed, shift)``, int64, shaped like ``multiplier``.

    Source: TensorFlow Lite, ``QuantizeMultiplier``.

    >>> quantize_multiplier(torch.tensor([0.75, 0.1875, 3.0]))
    (tensor([1610612736, 1610612736, 1610612736]), tensor([ 0, -2,  2]))
    """
    _check_multipliers(multiplier)
    fixed, shift = _mantissa_and_exponent(multiplier)
    is_carried = fixed == 2**FRACTION_BITS
    fixed, shift = torch.where(is_carried, 2 ** (FRACTION_BITS - 1), fixed), shift + is_carried
    is_nothing = shift < -FRACTION_BITS
    fixed, shift = fixed.masked_fill(is_nothing, 0), shift.masked_fill(is_nothing, 0)
    if rounding == "single":
        is_more = shift > MOST_SHIFT
        fixed, shift = fixed.masked_fill(is_more, INT32_MAX), shift.clamp(max=MOST_SHIFT)
    return fixed, shift


def quantize_multiplier_below_one(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 multiplier in (0, 1) as ``fixed * 2**(-31 - right_shift)``.

    Returns:
        ``(fixed, right_shift)``, int64, shaped like ``multiplier``.

    Source: gemmlowp, ``QuantizeMultiplierSmallerThanOne`` of its example of quantization.

    >>> quantize_multiplier_below_one(torch.tensor([0.75, 0.1875]))
    (tensor([1610612736, 1610612736]), tensor([0, 2]))
    """
    if not bool(((multiplier > 0) & (multiplier < 1)).all()):
        raise SpecError(
            f"multipliers must lie between 0 and 1, got {multiplier.min().item():g} to {multiplier.max().item():g}. "
            "quantize_multiplier takes larger ones."
        )
    fixed, exponent = _mantissa_and_exponent(multiplier.float())  # 24 bits: never carried to 2**31
    return fixed, -exponent


def multiply_by_quantized_multiplier(x: Tensor, fixed: Tensor, shift: Tensor, *, rounding: Rounding = "double") -> Tensor:
    """``x * fixed * 2**(shift - 31)`` in integers.

    Double rounding: ``rounding_right_shift(fixed_point_multiply(x 2**max(shift, 0), fixed), max(-shift, 0))``, of which the shift to the
    left wraps around at 32 bits. Single rounding: ``(x fixed + 2**(30 - shift)) >> (31 - shift)``, ties up.

    Args:
        x: int32 values, any integer type.
        fixed, shift: As ``quantize_multiplier`` returns them; broadcast with ``x``.
        rounding: ``double`` (the paper, gemmlowp, TensorFlow Lite) or ``single`` (its builds with TFLITE_SINGLE_ROUNDING).

    Returns:
        int64.

    Source: Jacob et al. 2018, section 2.2 and appendix B; TensorFlow Lite, ``MultiplyByQuantizedMultiplier``.

    >>> acc, fixed, shift = torch.tensor([-6, 6]), torch.tensor(2**30), torch.tensor(-1)
    >>> multiply_by_quantized_multiplier(acc, fixed, shift), multiply_by_quantized_multiplier(acc, fixed, shift, rounding="single")
    (tensor([-2,  2]), tensor([-1,  2]))
    """
    x, fixed, shift = x.long(), fixed.long(), shift.long()
    if rounding == "single":
        right = FRACTION_BITS - shift
        return wrap_int32((x * fixed + (torch.ones_like(right) << (right - 1))) >> right)
    shifted = wrap_int32(x << shift.clamp(min=0))
    return rounding_right_shift(fixed_point_multiply(shifted, fixed), (-shift).clamp(min=0))


def dyadic_number(ratio: Tensor) -> tuple[Tensor, Tensor]:
    """``ratio`` as ``mantissa / 2**exponent`` with 31 bits: ``mantissa = round_half_up(f 2**31)`` for ``ratio = f 2**(31 - exponent)``.

    Args:
        ratio: Not negative and below ``2**31``, any shape; float64.

    Returns:
        ``(mantissa, exponent)``, int64, shaped like ``ratio``; 0.5 <= f < 1.

    Source: Yao et al. 2021, section 3.2; ``batch_frexp`` of its code.

    >>> dyadic_number(torch.tensor([0.75, 0.1875]))
    (tensor([1610612736, 1610612736]), tensor([31, 33]))
    """
    _check_multipliers(ratio)
    mantissa, exponent = _mantissa_and_exponent(ratio)
    if bool((exponent > FRACTION_BITS).any()):
        raise SpecError(f"the ratio of scales must be below 2**31, got {ratio.max().item():g}. Check the scale of the output.")
    return mantissa, FRACTION_BITS - exponent


def dyadic_multiply(x: Tensor, mantissa: Tensor, exponent: Tensor) -> Tensor:
    """``x * mantissa / 2**exponent`` to nearest, ties to even; int64.

    Source: Yao et al. 2021, section 3.2.

    >>> dyadic_multiply(torch.tensor([1, 3, -3]), torch.tensor(2**30), torch.tensor(31))
    tensor([ 0,  2, -2])
    """
    return right_shift_half_even(x.long() * mantissa.long(), exponent)


def accumulator_scale(input_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """Scale of the accumulator and of the bias, ``S_x S_w``: multiplied in float64, rounded to float32."""
    return (input_scale.double() * weight_scale.double()).float()


@dataclass(frozen=True)
class Requantizer(ABC):
    """Maps int32 accumulators to codes: ``clamp(acc * M + zero_point, qmin, qmax)``, ``M`` rounded as the kind says.

    Attributes:
        zero_point: Zero point of the output.
        qmin, qmax: Range of the output's codes; a fused activation narrows it (``parameters.activation_codes``).
    """

    kind: ClassVar[RequantizerKind]

    zero_point: int
    qmin: int
    qmax: int

    def __post_init__(self) -> None:
        if self.qmin > self.qmax:
            raise SpecError(f"codes must have a range, got {self.qmin} to {self.qmax}")

    def __call__(self, acc: Tensor, axis: int = 1) -> Tensor:
        """The codes of the accumulators ``acc``, int32; constants of one number for each channel lie along ``axis``."""
        return (self.rescale(acc, axis) + self.zero_point).clamp(self.qmin, self.qmax).int()

    @abstractmethod
    def rescale(self, acc: Tensor, axis: int = 1) -> Tensor:
        """``acc * M`` rounded, int64, without zero point and clamp: what is added up where several branches meet."""

    @property
    @abstractmethod
    def factor(self) -> Tensor:
        """The real number ``M`` that the constants stand for, float64, ``()`` or ``[channels]``."""


@dataclass(frozen=True)
class IntegerRequantizer(Requantizer):
    """A requantizer of integer constants alone: ``M = multiplier * 2**(shift - 31)``.

    Attributes:
        multiplier: int64, ``()`` or ``[channels]``.
        shift: int64, of the same shape; positive shifts go to the left.
    """

    multiplier: Tensor
    shift: Tensor

    @property
    def factor(self) -> Tensor:
        return torch.ldexp(self.multiplier.double(), self.shift - FRACTION_BITS)


@dataclass(frozen=True)
class FixedPointRequantizer(IntegerRequantizer):
    """Jacob et al., gemmlowp and TensorFlow Lite: see ``multiply_by_quantized_multiplier``."""

    kind = "fixed_point"

    rounding: Rounding = "double"

    def rescale(self, acc: Tensor, axis: int = 1) -> Tensor:
        multiplier, shift = (along(t, acc, axis) for t in (self.multiplier, self.shift))
        return multiply_by_quantized_multiplier(acc, multiplier, shift, rounding=self.rounding)


@dataclass(frozen=True)
class DyadicRequantizer(IntegerRequantizer):
    """HAWQ-V3: see ``dyadic_multiply``. The paper has no zero point; here one is added after the rounding."""

    kind = "dyadic"

    @property
    def exponent(self) -> Tensor:
        """The shift to the right, as the paper counts it: ``31 - shift``."""
        return FRACTION_BITS - self.shift

    def rescale(self, acc: Tensor, axis: int = 1) -> Tensor:
        return dyadic_multiply(acc, along(self.multiplier, acc, axis), along(self.exponent, acc, axis))


@dataclass(frozen=True)
class OnnxRequantizer(Requantizer):
    """ONNX Runtime: ``round_half_even(float32(acc) * scale)`` in float32.

    Attributes:
        scale: float32, ``()`` or ``[channels]``.
    """

    kind = "onnx"

    scale: Tensor

    @property
    def factor(self) -> Tensor:
        return self.scale.double()

    def rescale(self, acc: Tensor, axis: int = 1) -> Tensor:
        return (acc.float() * along(self.scale, acc, axis)).round().long()


def make_requantizer(
    kind: RequantizerKind,
    input_scale: Tensor | float,
    weight_scale: Tensor | float,
    output_scale: Tensor | float,
    zero_point: int,
    qmin: int,
    qmax: int,
    *,
    rounding: Rounding = "double",
) -> Requantizer:
    """The requantizer of a layer with these scales.

    ``M`` is computed as the kind's programs do: ``S_x S_w / S_y`` in float64 (``fixed_point``), ``float32(S_x S_w) / S_y`` in float64
    (``dyadic``), in float32 (``onnx``).

    Args:
        kind: ``fixed_point``, ``dyadic`` or ``onnx``.
        input_scale, output_scale: Positive numbers; plain ones count in float64, tensors as they are.
        weight_scale: A positive number, or one for each channel, ``[channels]``.
        zero_point: Zero point of the output, within its codes.
        qmin, qmax: Range of the output's codes.
        rounding: How often ``fixed_point`` rounds.

    Raises:
        SpecError: Scales that are not positive and finite, or values that are not allowed.

    >>> requantizer = make_requantizer("fixed_point", 0.5, torch.tensor([0.25, 0.125]), 0.5, 3, -128, 127)
    >>> requantizer(torch.tensor([[10, 100], [-2, -1000]]))
    tensor([[   6,   16],
            [   2, -122]], dtype=torch.int32)
    """
    scales = [
        scale.detach() if isinstance(scale, Tensor) else torch.tensor(scale, dtype=torch.float64)
        for scale in (input_scale, weight_scale, output_scale)
    ]
    for name, scale in zip(("input_scale", "weight_scale", "output_scale"), scales, strict=True):
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            raise SpecError(f"{name} must be positive and finite, got values from {scale.min().item():g} to {scale.max().item():g}")
    x, w, y = (scale.double() for scale in scales)
    match kind:
        case "fixed_point":
            fixed, shift = quantize_multiplier(x * w / y, rounding=rounding)
            return FixedPointRequantizer(zero_point, qmin, qmax, fixed, shift, rounding)
        case "dyadic":
            mantissa, exponent = dyadic_number(accumulator_scale(x, w).double() / y)
            return DyadicRequantizer(zero_point, qmin, qmax, mantissa, FRACTION_BITS - exponent)
        case "onnx":
            return OnnxRequantizer(zero_point, qmin, qmax, x.float() * w.float() / y.float())
    raise SpecError(f"kind must be one of {', '.join(get_args(RequantizerKind))}; got {kind!r}")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, acc_scale: Tensor, output_scale: Tensor, requantizer: Requantizer, axis: int) -> Tensor:
        ctx.output_scale = output_scale
        return requantizer((z / along(acc_scale, z, axis)).round().long(), axis).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        return grad / ctx.output_scale, None, None, None, None


def simulate_requantize(z: Tensor, acc_scale: Tensor, output_scale: Tensor, requantizer: Requantizer, axis: int = 1) -> Tensor:
    """Codes of ``z``, the values that accumulators stand for, as the integer network computes them, with a gradient.

    Forward: ``requantizer(round(z / acc_scale))``. Backward: ``g / output_scale``, also where codes are clamped.

    Args:
        z: Values, float.
        acc_scale: ``accumulator_scale``, ``()`` or ``[channels]``.
        output_scale: Scale of the codes, ``()``.
        requantizer: Made of the same scales.
        axis: The axis of channels.

    Source: Yao et al. 2021, the gradient of ``fixedpoint_fn`` in its code.
    """
    codes: Tensor = _StraightThrough.apply(z, acc_scale, output_scale, requantizer, axis)
    return codes


def along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """``values`` (``()`` or ``[channels]``) in the shape that broadcasts with ``x`` along its ``axis``."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.dim()
    shape[axis] = -1
    return values.reshape(shape)


def _mantissa_and_exponent(multiplier: Tensor) -> tuple[Tensor, Tensor]:
    """``(round(f 2**31), e)`` of ``f 2**e``, ties away from zero, int64."""
    mantissa, exponent = torch.frexp(multiplier.double())
    return round_half_away(mantissa * 2**FRACTION_BITS).long(), exponent.long()


def _check_multipliers(values: Tensor) -> None:
    if not bool((torch.isfinite(values) & (values >= 0)).all()):
        raise SpecError(f"multipliers must be finite and not negative, got values from {values.min().item():g} to {values.max().item():g}")
