"""Scales, zero points and codes, as gemmlowp and TensorFlow Lite find them."""

from __future__ import annotations

import pytest
import torch

from lowbit.errors import SpecError
from lowbit.formats.fixed_point.parameters import (
    activation_codes,
    choose_qparams,
    choose_qparams_gemmlowp,
    nudged_range,
    quantize_bias,
    quantize_half_away,
    unsigned_scale,
    widened,
)


def test_a_symmetric_range_has_the_zero_point_of_each_program() -> None:
    lo, hi = torch.tensor(-1.0), torch.tensor(1.0)
    assert choose_qparams(lo, hi, 0, 255)[1].item() == 128  # 127.5, away from zero
    assert choose_qparams(lo, hi, -128, 127)[1].item() == -1  # -0.5, away from zero
    assert choose_qparams(lo, hi, -127, 127)[1].item() == 0
    assert choose_qparams_gemmlowp(lo, hi)[1].item() == 127  # a float32 scale that is a little too large


def test_zero_points_stay_within_the_codes_and_ranges_of_no_width_have_none() -> None:
    lo, hi = torch.tensor([0.0, -6.0, 0.0]), torch.tensor([6.0, 0.0, 0.0])
    for qmin, qmax in ((0, 255), (-128, 127), (-127, 127)):
        scale, zero_point = choose_qparams(lo, hi, qmin, qmax)
        assert zero_point.tolist() == [qmin, qmax, 0]
        assert scale.tolist() == [6 / (qmax - qmin), 6 / (qmax - qmin), 0]
    scale, zero_point = choose_qparams_gemmlowp(torch.tensor([1.0, -3.0, 0.0]), torch.tensor([6.0, -1.0, 0.0]))
    assert zero_point.tolist() == [0, 255, 0] and scale[2].item() == 0


def test_ranges_without_zero_are_widened_or_refused() -> None:
    lo, hi = torch.tensor([0.5, -2.0, -1.0]), torch.tensor([2.0, -0.5, 1.0])
    assert [end.tolist() for end in widened(lo, hi)] == [[0.0, -2.0, -1.0], [2.0, 0.0, 1.0]]
    with pytest.raises(SpecError, match="ranges must contain 0"):
        choose_qparams(lo, hi, 0, 255)


def test_codes_are_right_within_half_a_step_and_zero_is_exact() -> None:
    x = torch.linspace(-1.3, 2.7, 4001)
    for qmin, qmax in ((0, 255), (-128, 127), (-127, 127), (0, 15)):
        scale, zero_point = choose_qparams(x.min(), x.max(), qmin, qmax)
        codes = quantize_half_away(x, scale, zero_point, qmin, qmax)
        values = (codes - zero_point) * scale
        inside = (codes > qmin) & (codes < qmax)  # rounding the zero point moves the ends of the range
        assert (values - x).abs()[inside].max().item() <= scale.item() * (0.5 + 1e-4)
        assert quantize_half_away(torch.zeros(1), scale, zero_point, qmin, qmax).item() == zero_point.item()
        assert torch.equal(quantize_half_away(values, scale, zero_point, qmin, qmax), codes)


def test_ties_go_away_from_zero_before_the_zero_point_is_added_and_far_values_saturate() -> None:
    x = torch.tensor([-0.375, -0.125, 0.125, 0.375, -1e30, 1e30, float("inf")])
    assert quantize_half_away(x, 0.25, -3, -128, 127).tolist() == [-5, -4, -2, -1, -128, 127, 127]
    assert quantize_half_away(x, 0.25, 17, 0, 255).tolist() == [15, 16, 18, 19, 0, 255, 255]


def test_the_nudged_range_has_zero_among_its_codes() -> None:
    lo, hi = torch.tensor([-1.0, 0.0, -2.0, 0.0]), torch.tensor([2.0, 3.0, 0.0, 0.0])
    low, high, scale, zero_point = nudged_range(lo, hi, 1, 255)
    assert zero_point.tolist() == [86.0, 1.0, 255.0, 1.0]  # 1 + 254 / 3 = 85.67
    assert scale.tolist() == pytest.approx([3 / 254, 3 / 254, 2 / 254, 1.0])
    assert torch.equal(low, (1 - zero_point) * scale) and torch.equal(high, (255 - zero_point) * scale)
    assert bool(((high - low - (hi - lo)).abs() < 1e-6)[:3].all())


def test_fused_activations_narrow_the_codes() -> None:
    assert activation_codes(0.05, -28, -128, 127) == (-128, 127)
    assert activation_codes(0.05, -28, -128, 127, lower=0.0) == (-28, 127)
    assert activation_codes(0.05, -28, -128, 127, lower=0.0, upper=6.0) == (-28, 92)
    assert activation_codes(0.01, 0, 0, 255, lower=0.0, upper=6.0) == (0, 255)  # 600 is beyond the codes


def test_biases_are_rounded_on_the_grid_of_the_accumulator() -> None:
    assert quantize_bias(torch.tensor([0.5, -0.5, 1e12]), torch.tensor([1.0, 0.2, 1e-6])).tolist() == [1, -2, 2**31 - 1]


def test_scales_without_a_zero_point_span_the_range() -> None:
    assert unsigned_scale(torch.tensor([0.5, 2.0, 3.5]), 4).item() == pytest.approx(0.2)
    assert unsigned_scale(torch.full((3,), 2.0), 4).item() == 1.0
