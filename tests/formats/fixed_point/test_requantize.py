"""Requantizers against exact fractions and numbers worked out by hand."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.formats.fixed_point.requantize import (
    INT32_MAX,
    INT32_MIN,
    FixedPointRequantizer,
    IntegerRequantizer,
    RequantizerKind,
    accumulator_scale,
    dyadic_multiply,
    dyadic_number,
    fixed_point_multiply,
    make_requantizer,
    multiply_by_quantized_multiplier,
    quantize_multiplier,
    quantize_multiplier_below_one,
    right_shift_half_even,
    round_half_away,
    rounding_right_shift,
    simulate_requantize,
)

KINDS: tuple[RequantizerKind, ...] = ("fixed_point", "dyadic", "onnx")


def int32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def away(value: Fraction) -> int:
    """To nearest, ties away from zero."""
    return math.floor(abs(value) + Fraction(1, 2)) * (1 if value >= 0 else -1)


def up(value: Fraction) -> int:
    """To nearest, ties up."""
    return math.floor(value + Fraction(1, 2))


def drawn(count: int = 500, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(INT32_MIN, INT32_MAX + 1, (count,), generator=generator)


def test_half_a_bit_below_a_tie_is_rounded_down_and_ties_go_away_from_zero() -> None:
    below = math.nextafter(0.5, 0)
    values = torch.tensor([0.5, -0.5, 1.5, -2.5, below, -below, 2.0**52 + 1], dtype=torch.float64)
    assert round_half_away(values).tolist() == [1, -1, 2, -3, 0, 0, 2**52 + 1]


def test_high_multiply_rounds_ties_up_and_saturates_where_both_are_the_lowest_number() -> None:
    a = int32(3, -3, 1, -1, INT32_MIN, INT32_MIN, INT32_MAX)
    b = int32(2**30, 2**30, 2**30, 2**30, INT32_MIN, INT32_MAX, INT32_MAX)
    assert fixed_point_multiply(a, b).tolist() == [2, -1, 1, 0, INT32_MAX, -INT32_MAX, INT32_MAX - 1]


def test_high_multiply_is_the_exact_product_to_nearest() -> None:
    a, b = drawn(seed=1), drawn(seed=2)
    expected = [up(Fraction(x * y, 2**31)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert fixed_point_multiply(a, b).tolist() == expected


def test_rounding_shift_rounds_ties_away_from_zero_at_every_distance() -> None:
    x = torch.cat([drawn(), torch.tensor([INT32_MIN, INT32_MAX, 0, 1, -1, 2, -2, 6, -6])])
    for shift in range(32):
        expected = [away(Fraction(value, 2**shift)) for value in x.tolist()]
        assert rounding_right_shift(x, torch.tensor(shift)).tolist() == expected


def test_half_even_shift_is_pythons_rounding_of_the_exact_quotient() -> None:
    x = torch.cat([drawn() * 2**30, torch.arange(-40, 41), torch.tensor([2**62, -(2**62), 3 * 2**60])])
    for shift in (0, 1, 2, 3, 30, 31, 61, 62, 63, 64, 90):
        assert right_shift_half_even(x, torch.tensor(shift)).tolist() == [round(Fraction(value, 2**shift)) for value in x.tolist()]


def test_multipliers_carry_where_the_mantissa_rounds_up_to_one_and_vanish_where_they_are_too_small() -> None:
    values = torch.tensor([1 - 2.0**-40, 2.0**-31, 2.0**-32, 2.0**-33, 0.0, 2.0**31, 3 * 2.0**-3], dtype=torch.float64)
    fixed, shift = quantize_multiplier(values)
    assert fixed.tolist() == [2**30, 2**30, 2**30, 0, 0, 2**30, 3 * 2**29]
    assert shift.tolist() == [1, -30, -31, 0, 0, 32, -1]
    fixed, shift = quantize_multiplier(values, rounding="single")
    assert (fixed[5].item(), shift[5].item()) == (INT32_MAX, 30)


def test_multipliers_that_are_negative_or_not_finite_are_refused() -> None:
    for value in (-0.5, math.nan, math.inf):
        with pytest.raises(SpecError, match="multipliers must be finite and not negative"):
            quantize_multiplier(torch.tensor([0.5, value]))
    for value in (0.0, 1.0):
        with pytest.raises(SpecError, match="must lie between 0 and 1"):
            quantize_multiplier_below_one(torch.tensor(value))
    with pytest.raises(SpecError, match="must be below 2\\*\\*31"):
        dyadic_number(torch.tensor(2.0**31, dtype=torch.float64))


def test_gemmlowps_routine_counts_the_shift_to_the_right() -> None:
    fixed, right_shift = quantize_multiplier_below_one(torch.tensor([0.5, 0.25, 0.75 * 2.0**-9]))
    assert (fixed.tolist(), right_shift.tolist()) == ([2**30, 2**30, 3 * 2**29], [0, 1, 9])


def test_ties_of_power_of_two_ratios_fall_as_each_rounding_says() -> None:
    acc = int32(-6, -5, -2, -1, 1, 2, 5, 6)
    double, single, dyadic, onnx = (
        make_requantizer(kind, 0.5, 0.5, 1.0, 0, -128, 127, rounding=rounding)  # type: ignore[arg-type]
        for kind, rounding in (("fixed_point", "double"), ("fixed_point", "single"), ("dyadic", "double"), ("onnx", "double"))
    )
    assert double(acc).tolist() == [-2, -1, -1, 0, 1, 1, 2, 2]  # half up to halves, then half away: 5 / 2 to 3, 3 / 2 to 2
    assert single(acc).tolist() == [-1, -1, 0, 0, 0, 1, 1, 2]  # up
    assert dyadic(acc).tolist() == onnx(acc).tolist() == [-2, -1, 0, 0, 0, 0, 1, 2]  # to even


def test_two_roundings_can_differ_from_one() -> None:
    acc, fixed, shift = torch.tensor(5), torch.tensor(2**30), torch.tensor(-1)  # a quarter: 1.25
    assert multiply_by_quantized_multiplier(acc, fixed, shift).item() == 2
    assert multiply_by_quantized_multiplier(acc, fixed, shift, rounding="single").item() == 1


def test_a_shift_to_the_left_wraps_around_at_32_bits_before_the_product() -> None:
    fixed, shift = torch.tensor(2**30), torch.tensor(3)  # times 4
    assert multiply_by_quantized_multiplier(int32(5, -7), fixed, shift).tolist() == [20, -28]
    assert multiply_by_quantized_multiplier(int32(2**28), fixed, shift).item() == -(2**30)  # 2**31 wraps to the lowest number
    assert multiply_by_quantized_multiplier(int32(2**28), fixed, shift, rounding="single").item() == 2**30


def test_the_lowest_accumulator_is_rescaled_without_overflow() -> None:
    for kind in KINDS:
        made = make_requantizer(kind, 2.0**-20, 2.0**-8, 1.0, 0, INT32_MIN, INT32_MAX)
        assert made(int32(INT32_MIN, INT32_MAX)).tolist() == [-8, 8]


def test_each_channel_has_its_own_multiplier_and_shift_along_the_axis_asked_for() -> None:
    weight_scale = torch.tensor([0.5, 0.0625, 24.0])
    for kind in KINDS:
        made = make_requantizer(kind, 0.25, weight_scale, 1.0, 0, -1000, 1000)
        acc = torch.full((2, 3, 4), 64)
        assert made(acc)[1, :, 2].tolist() == [8, 1, 384]
        assert torch.equal(made(acc.movedim(1, -1), axis=-1), made(acc).movedim(1, -1))
        if isinstance(made, IntegerRequantizer):
            assert made.multiplier.shape == made.shift.shape == (3,)
            assert made.shift.tolist() == [-2, -5, 3]
        assert torch.allclose(made.factor, 0.25 * weight_scale.double(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rounding", ["double", "single"])
def test_codes_are_the_rounded_product_within_one_and_equal_to_it_away_from_ties(kind: RequantizerKind, rounding: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, w, y = (2.0 ** torch.empty(40).uniform_(-9, -2, generator=generator) for _ in range(3))
    for x_scale, y_scale in zip(x[:5], y[:5], strict=True):
        made = make_requantizer(kind, x_scale, w, y_scale, 0, INT32_MIN, INT32_MAX, rounding=rounding)  # type: ignore[arg-type]
        acc = torch.randint(-(2**20), 2**20, (7, 40), generator=generator)
        exact = acc.double() * (x_scale.double() * w.double() / y_scale.double())
        codes = made(acc).double()
        assert bool(((codes - exact).abs() <= 1).all())
        # a factor in float32 is off by 2**-23 of itself, and each of two roundings moves what is near a tie
        is_far = ((exact - exact.floor() - 0.5).abs() > 1e-6 + exact.abs() * 2.0**-22) & (kind != "fixed_point" or rounding == "single")
        assert bool((codes == exact.round())[is_far].all())


def test_symmetric_requantizers_are_odd_but_for_the_rule_of_ties() -> None:
    acc = torch.arange(-1000, 1001)
    for kind in KINDS:
        made = make_requantizer(kind, 0.3, 0.7, 1.9, 0, -128, 127)
        assert torch.equal(made(acc).clamp(min=-127), -made(-acc).clamp(min=-127))


def test_zero_point_and_clamp_come_after_the_rounding() -> None:
    for kind in KINDS:
        made = make_requantizer(kind, 1.0, 1.0, 4.0, 5, 3, 7)
        assert made(int32(0, 4, 8, 100, -4, -8, -100)).tolist() == [5, 6, 7, 7, 4, 3, 3]
        assert made.rescale(int32(-100, 100)).tolist() == [-25, 25]


def test_fixed_point_multipliers_are_computed_in_float64_and_those_of_onnx_in_float32() -> None:
    x, w, y = torch.tensor(0.1), torch.tensor(0.3), torch.tensor(0.7)
    exact = x.double() * w.double() / y.double()
    fixed, shift = quantize_multiplier(exact)
    made = make_requantizer("fixed_point", x, w, y, 0, -128, 127)
    assert isinstance(made, FixedPointRequantizer)
    assert (made.multiplier.item(), made.shift.item()) == (fixed.item(), shift.item())
    assert make_requantizer("onnx", x, w, y, 0, -128, 127).factor.item() == (x * w / y).item()
    mantissa, exponent = dyadic_number(accumulator_scale(x, w).double() / y.double())
    assert make_requantizer("dyadic", x, w, y, 0, -128, 127).factor.item() == mantissa.item() / 2 ** exponent.item()
    assert make_requantizer("fixed_point", 0.1, 0.3, 0.7, 0, -128, 127).factor.item() == pytest.approx(0.1 * 0.3 / 0.7, rel=2.0**-31)


def test_dyadic_products_round_ties_to_even_at_any_exponent() -> None:
    mantissa, exponent = dyadic_number(torch.tensor([0.5, 2.0**-40, 0.75], dtype=torch.float64))
    assert (mantissa.tolist(), exponent.tolist()) == ([2**30, 2**30, 3 * 2**29], [31, 70, 31])
    assert dyadic_multiply(torch.tensor([[1], [3], [-3], [2**31 - 1]]), mantissa, exponent).tolist() == [
        [0, 0, 1],
        [2, 0, 2],
        [-2, 0, -2],
        [2**30, 0, 1610612735],
    ]


def test_scales_that_are_no_positive_numbers_are_refused_by_name() -> None:
    with pytest.raises(SpecError, match="weight_scale must be positive and finite"):
        make_requantizer("dyadic", 1.0, torch.tensor([1.0, 0.0]), 1.0, 0, -128, 127)
    with pytest.raises(SpecError, match="kind must be one of fixed_point, dyadic, onnx; got 'float'"):
        make_requantizer("float", 1.0, 1.0, 1.0, 0, -128, 127)  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="codes must have a range"):
        make_requantizer("onnx", 1.0, 1.0, 1.0, 0, 5, 4)


def test_the_simulation_gives_the_codes_and_passes_gradients_to_clamped_ones_too() -> None:
    acc_scale, y_scale = torch.tensor([0.5, 0.25]), torch.tensor(2.0)
    made = make_requantizer("dyadic", torch.tensor(0.5), torch.tensor([1.0, 0.5]), y_scale, 0, -8, 7)
    acc = torch.tensor([[10, 100], [-9, -1000]])
    z = (acc * acc_scale).requires_grad_()
    codes = simulate_requantize(z, acc_scale, y_scale, made)
    codes.backward(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert torch.equal(codes.int(), made(acc)) and codes.tolist() == [[2, 7], [-2, -8]]
    assert z.grad is not None and z.grad.tolist() == [[0.5, 1.0], [1.5, 2.0]]
