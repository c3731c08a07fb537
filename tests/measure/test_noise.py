from __future__ import annotations

import math

import pytest
import torch

from lowbit.measure.noise import Noise, noise_between, sqnr_db


def test_sqnr_is_ten_log_of_variance_over_squared_error() -> None:
    reference = torch.tensor([1.0, -1.0, 1.0, -1.0])  # variance 1
    assert sqnr_db(reference, reference + 0.1) == pytest.approx(20.0, abs=1e-5)
    assert sqnr_db(reference, reference + torch.tensor([1.0, 0, 0, 0])) == pytest.approx(10 * math.log10(4))


def test_a_constant_offset_counts_as_signal_only_in_the_power_form() -> None:
    reference = torch.tensor([9.0, 11.0])  # variance 1, mean square 101
    noise = noise_between(reference, reference + 0.1)
    assert noise.sqnr_db == pytest.approx(20.0, abs=1e-4)
    assert noise.signal_sqnr_db == pytest.approx(20 + 10 * math.log10(101), abs=1e-4)


def test_pieces_give_the_same_as_the_whole() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(100, 7, generator=generator) * torch.linspace(1, 50, 100)[:, None] + 1000
    quantized = reference + torch.randn(100, 7, generator=generator)
    pieces = Noise()
    for start, stop in ((0, 1), (1, 40), (40, 40), (40, 100)):
        pieces.add(reference[start:stop], quantized[start:stop])
    whole = 10 * math.log10(reference.double().var(unbiased=False) / (quantized.double() - reference.double()).square().mean())
    assert pieces.sqnr_db == pytest.approx(whole, abs=1e-9)
    assert pieces.mse == pytest.approx((quantized - reference).double().square().mean().item(), rel=1e-12)
    assert pieces.max_abs_error == (quantized.double() - reference.double()).abs().max().item()


def test_equal_tensors_are_infinitely_good_and_constant_references_infinitely_bad() -> None:
    x = torch.randn(5)
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf


def test_values_that_are_not_finite_give_nan_and_nothing_seen_too() -> None:
    noise = noise_between(torch.tensor([1.0, 2.0]), torch.tensor([1.0, math.nan]))
    assert math.isnan(noise.sqnr_db) and math.isnan(noise.mse) and math.isnan(noise.max_abs_error)
    assert math.isnan(Noise().sqnr_db) and math.isnan(Noise().mse)


def test_half_precision_is_measured_in_double() -> None:
    reference = torch.full((4,), 256.0).bfloat16() * torch.tensor([1, -1, 1, -1]).bfloat16()
    assert noise_between(reference, reference + 2).mse == 4.0
