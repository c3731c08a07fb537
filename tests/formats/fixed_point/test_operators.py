"""Operators on codes against real numbers, and numbers worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.formats.fixed_point.operators import (
    accumulate_conv,
    accumulate_matmul,
    add_dyadic,
    add_fixed_point,
    average_pool,
    average_pool_truncated,
    concatenate,
    max_pool,
)
from lowbit.formats.fixed_point.requantize import make_requantizer


def codes(*shape: int, lo: int = -128, hi: int = 127, seed: int = 0) -> Tensor:
    return torch.randint(lo, hi + 1, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("shape", "kernel", "where"),
    [
        ((2, 4, 9), (6, 4, 3), {"stride": 2, "padding": 1}),
        ((2, 4, 7, 5), (6, 2, 3, 2), {"padding": (1, 2), "groups": 2, "dilation": 2}),
        ((1, 3, 4, 4, 4), (3, 1, 2, 2, 2), {"groups": 3}),
    ],
)
def test_accumulators_are_the_convolution_of_real_values_in_units_of_the_scales(
    shape: tuple[int, ...], kernel: tuple[int, ...], where: dict[str, object]
) -> None:
    x, w, bias = codes(*shape), codes(*kernel, seed=1), codes(kernel[0], seed=2) * 50
    w_zero = torch.arange(kernel[0]) - 2
    acc = accumulate_conv(x, w, bias, x_zero_point=-7, w_zero_point=w_zero, **where)  # type: ignore[arg-type]
    operator = (functional.conv1d, functional.conv2d, functional.conv3d)[len(kernel) - 3]
    real_w = (w - w_zero.reshape(-1, *[1] * (len(kernel) - 1))) * 0.25
    real = operator((x + 7) * 0.5, real_w, bias * 0.125, **where)  # type: ignore[operator]
    assert acc.dtype == torch.int64 and torch.equal(acc * 0.125, real)


def test_padding_is_the_real_zero_and_not_the_code_zero() -> None:
    x, w = torch.full((1, 1, 1, 1), 5), torch.ones(1, 1, 3, 3, dtype=torch.int8)
    assert accumulate_conv(x, w, x_zero_point=5, padding=1).item() == 0
    assert accumulate_conv(x, w, x_zero_point=3, padding=1).item() == 2


def test_products_of_matrices_take_off_both_zero_points_and_add_the_bias() -> None:
    acc = accumulate_matmul(
        torch.tensor([[3, 4]]), torch.tensor([[1, 5], [2, 6]]), torch.tensor([10, 20]), lhs_zero_point=1, rhs_zero_point=2
    )
    assert acc.tolist() == [[2 * -1 + 3 * 0 + 10, 2 * 3 + 3 * 4 + 20]]


def test_accumulators_beyond_32_bits_are_an_error() -> None:
    lhs, rhs = torch.full((1, 66_600), 127), torch.full((66_600, 1), 255)
    with pytest.raises(SpecError, match="an accumulator of 2156841000 overflows 32 bits"):
        accumulate_matmul(lhs, rhs)
    assert accumulate_matmul(lhs[:, :66_000], rhs[:66_000]).item() == 66_000 * 127 * 255


def test_sums_are_the_real_sums_within_one_code() -> None:
    a, b = codes(2000), codes(2000, seed=1)
    scales, zeros = (0.021, 0.047, 0.06), (-14, -10, -47)
    real = ((a + 14) * scales[0] + (b + 10) * scales[1]) / scales[2] - 47
    y = add_fixed_point(a, b, scales, zeros, -128, 127)
    assert bool(((y - real.clamp(-128, 127)).abs() <= 0.5 + 1e-3).all())


def test_sums_of_equal_scales_are_exact_and_saturate() -> None:
    a, b = torch.tensor([100, -100, 3, -3]), torch.tensor([100, -100, 4, -4])
    assert add_fixed_point(a, b, (0.5, 0.5, 0.5), (0, 0, 0), -128, 127).tolist() == [127, -128, 7, -7]
    assert add_fixed_point(a, b, (0.5, 0.5, 1.0), (0, 0, 0), -128, 127).tolist() == [100, -100, 4, -4]  # ties away from zero


def test_dyadic_sums_round_each_branch_and_do_not_clamp() -> None:
    half, quarter = (make_requantizer("dyadic", 1.0, scale, 1.0, 0, -8, 7) for scale in (0.5, 0.25))
    y = add_dyadic([(torch.tensor([[3, 1000]]), half), (torch.tensor([[2, 1000]]), quarter)])
    assert y.tolist() == [[2, 750]]  # 1.5 to 2, 0.5 to 0


def test_average_pools_round_half_away_or_truncate_as_their_program_does() -> None:
    x = torch.tensor([[[1, 2, -1, -2, 1, 1, -5, -5, -4, -5]]])
    assert average_pool(x, 2).tolist() == [[[2, -2, 1, -5, -5]]]
    assert average_pool_truncated(x, 2).tolist() == [[[1, -1, 1, -4, -4]]]  # -5 + 0.01 toward zero


def test_average_pools_are_exact_means_of_what_is_inside() -> None:
    x = codes(2, 3, 7, 6)
    y = average_pool(x, 3, 2, 1)
    for i, j in ((0, 0), (1, 2), (3, 0)):
        window = x[1, 2, max(2 * i - 1, 0) : 2 * i + 2, max(2 * j - 1, 0) : 2 * j + 2]
        mean = Fraction(int(window.sum()), window.numel())
        assert y[1, 2, i, j].item() == (1 if mean > 0 else -1) * ((abs(mean) * 2 + 1) // 2)
    assert average_pool(torch.full((1, 1, 2, 2), 120), (2, 1), qmin=0, qmax=100).tolist() == [[[[100, 100]]]]


def test_max_pools_take_codes_as_they_are() -> None:
    assert max_pool(torch.tensor([[[[-5, -7], [-9, -128]]]]), 2, 1, 1).tolist() == [[[[-5, -5, -7], [-5, -5, -7], [-9, -9, -128]]]]


def test_concatenations_need_one_scale() -> None:
    a, b = torch.tensor([[1]]), torch.tensor([[2]])
    assert concatenate([a, b], (0.5, 0.5), (3, 3)).tolist() == [[1, 2]]
    for scales, zeros in (((0.5, 0.25), (3, 3)), ((0.5, 0.5), (3, 4))):
        with pytest.raises(SpecError, match="must share scale and zero point"):
            concatenate([a, b], scales, zeros)
