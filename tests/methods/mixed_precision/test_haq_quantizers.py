"""Linear quantizers of HAQ: levels, gradients, calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import CalibrationError, SpecError
from lowbit.methods.mixed_precision.haq_quantizers import HaqActivation, HaqWeight, kl_threshold


def values(count: int = 400, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_the_threshold_is_the_first_least_divergence_of_cumulative_distributions() -> None:
    x = torch.cat([torch.tensor([0.0] * 12), torch.arange(1, 4.01, 0.25), torch.tensor([16.0])])
    magnitudes = sorted(x.tolist())
    bins = math.ceil(16 / (16 / math.sqrt(len(magnitudes))))
    assert bins == 6
    counts = [
        sum(place * 16 / 6 <= value < (place + 1) * 16 / 6 or (place == 5 and value == 16) for value in magnitudes) for place in range(6)
    ]
    cumulative = np.cumsum(counts) / sum(counts)
    found = {}
    for kept in range(3, 7):  # two levels: straight lines from the first bin to the last one that is kept
        line = [cumulative[0] + (1 - cumulative[0]) * place / (kept - 1) for place in range(kept)] + [1.0] * (6 - kept)
        found[(kept + 0.5) * 16 / 6] = sum((c - q) * math.log2(c / q) for c, q in zip(cumulative, line, strict=True))
    assert kl_threshold(x, 2) == pytest.approx(min(found, key=found.__getitem__))


def test_thresholds_clip_long_tails_and_scale_with_the_values() -> None:
    x = values(2000).pow(3)
    threshold = kl_threshold(x, 3)
    assert threshold < 0.7 * x.abs().max().item()
    assert kl_threshold(4 * x, 3) == pytest.approx(4 * threshold, rel=1e-6)
    assert kl_threshold(-x, 3) == threshold


def test_thresholds_of_few_values_zeros_and_gaps() -> None:
    assert kl_threshold(torch.tensor([0.5, -2.0, 1.0]), 4) == 2.0  # fewer bins than levels
    assert kl_threshold(torch.zeros(9), 4) == 0.0
    gap = torch.cat([torch.full((500,), 1.0), torch.linspace(1, 1.5, 500)])  # nothing in the first bins
    assert kl_threshold(gap, 3) == 1.5
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        kl_threshold(torch.tensor([1.0, float("nan")]), 4)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_lie_on_odd_levels_that_codes_decode_to(bits: int) -> None:
    w = torch.cat([values(), torch.zeros(3)])
    quantizer = HaqWeight(bits).eval()
    quantizer.initialize(w)
    quantized = quantizer(w)
    assert len(quantized.unique()) <= 2**bits - 1
    assert torch.equal(quantizer(-w), -quantized)
    assert quantized[-3:].tolist() == [0, 0, 0]
    assert torch.equal(quantizer.encode(w).decode(), quantized)
    assert int(quantizer.encode(w).codes.abs().max()) <= 2 ** (bits - 1) - 1


def test_weights_are_clipped_and_all_get_the_gradient() -> None:
    quantizer = HaqWeight(3, clip=3.0)
    w = torch.tensor([-9.0, -1.5, 0.4, 2.5, 3.1], requires_grad=True)
    quantizer.initialize(w)
    quantized = quantizer(w)
    assert quantized.tolist() == [-3, -2, 0, 2, 3]  # half to even
    quantized.backward(torch.arange(5.0))
    assert w.grad is not None
    assert w.grad.tolist() == pytest.approx([0, 1, 2, 3, 4])


def test_weights_scale_with_their_clip_level() -> None:
    w = values()
    one, two = HaqWeight(4, clip=1.5), HaqWeight(4, clip=3.0)
    one.initialize(w)
    two.initialize(w)
    torch.testing.assert_close(two(2 * w), 2 * one(w))


def test_clip_levels_are_searched_up_to_four_bits() -> None:
    w = values(2000).pow(3)
    for bits in range(2, 9):
        quantizer = HaqWeight(bits)
        quantizer.initialize(w)
        wanted = kl_threshold(w, bits) if bits <= 4 else w.abs().max().item()
        assert quantizer.clip.item() == pytest.approx(wanted)
    quantizer = HaqWeight(4, clip="max")
    quantizer.initialize(w)
    assert quantizer.clip == w.abs().max()
    quantizer.initialize(torch.zeros(4))
    assert quantizer(torch.zeros(4)).tolist() == [0, 0, 0, 0]


def test_each_width_of_a_weight_has_its_own_clip_level() -> None:
    w = values(2000).pow(3)
    quantizer = HaqWeight(8)
    quantizer.initialize(w)
    before = quantizer(w)
    quantizer.set_bit_width(2, w)
    assert quantizer.clip.item() == pytest.approx(kl_threshold(w, 2))
    quantizer.set_bit_width(8)
    assert torch.equal(quantizer(w), before)


def test_squashed_weights_lie_in_minus_one_to_one_and_their_gradient_passes_the_tanh() -> None:
    w = torch.tensor([0.5, -0.2, 0.1], requires_grad=True)
    quantizer = HaqWeight(8, tanh=True)
    quantizer.initialize(w)
    quantized = quantizer(w)
    torch.testing.assert_close(quantized, w.tanh() / math.tanh(0.5), atol=0.5 / 127, rtol=0)
    assert quantized[0] == 1
    assert torch.equal(quantizer.encode(w).decode(), quantized)
    quantized[1].backward()
    assert w.grad is not None
    assert w.grad[1].item() == pytest.approx((1 - math.tanh(0.2) ** 2) / math.tanh(0.5), rel=1e-5)
    assert w.grad[0].item() == pytest.approx(math.tanh(0.2) / math.tanh(0.5) ** 2 * (1 - math.tanh(0.5) ** 2), rel=1e-4)  # by the maximum


def test_one_bit_of_linear_weights_is_an_error() -> None:
    with pytest.raises(SpecError, match="haq: linear weights need 2 to 8 bits, got 1"):
        HaqWeight(1)
    with pytest.raises(SpecError, match="inputs that can be negative need 2 to 8 bits, got 1"):
        HaqActivation(1, is_signed=True)


@pytest.mark.parametrize(("is_signed", "bits", "steps"), [(False, 1, 1), (False, 3, 7), (True, 2, 1), (True, 4, 7), (False, 8, 255)])
def test_inputs_lie_on_steps_up_to_the_clip_level(is_signed: bool, bits: int, steps: int) -> None:
    quantizer = HaqActivation(bits, is_signed=is_signed, initial_clip=1.4).eval()
    x = 2 * values()
    y = quantizer(x)
    codes = y / (1.4 / steps)
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert y.max().item() == pytest.approx(1.4)
    assert y.min().item() == pytest.approx(-1.4 if is_signed else 0)
    assert torch.equal(quantizer.encode(x).decode(), y)
    with torch.no_grad():
        assert torch.equal(quantizer(x), y)


def gradients(quantizer: HaqActivation, x: list[float], grad: list[float]) -> tuple[list[float], float | None]:
    inputs = torch.tensor(x, requires_grad=True)
    quantizer(inputs).backward(torch.tensor(grad))
    assert inputs.grad is not None
    return inputs.grad.tolist(), None if quantizer.clip.grad is None else quantizer.clip.grad.item()


@pytest.mark.parametrize("bits", [2, 8])
def test_gradients_of_inputs_split_at_the_clip_level_whatever_the_bits(bits: int) -> None:
    unsigned = HaqActivation(bits, initial_clip=2.0)
    assert gradients(unsigned, [-1.0, 0.0, 1.1, 2.0, 5.0], [1, 2, 4, 8, 16]) == ([0, 1, 4, 4, 0], 4.0 + 16)
    signed = HaqActivation(bits, is_signed=True, initial_clip=2.0)
    assert gradients(signed, [-3.0, -2.0, 1.1, 2.0, 5.0], [1, 2, 4, 8, 16]) == ([0, 1, 4, 4, 0], -1 - 1 + 4.0 + 16)


def test_a_fixed_clip_level_gets_no_gradient_and_its_ends_get_all() -> None:
    quantizer = HaqActivation(4, initial_clip=2.0, learns_clip=False)
    assert gradients(quantizer, [-1.0, 0.0, 1.1, 2.0, 5.0], [1, 2, 4, 8, 16]) == ([0, 2, 4, 8, 0], None)
    assert not list(quantizer.parameters())


def test_calibration_takes_the_least_of_six_the_maximum_and_the_threshold() -> None:
    x = values(3000).abs().pow(2)
    for bits, is_signed, inner in ((8, False, 8), (5, False, 5), (4, False, 4), (5, True, 4), (2, True, 1)):
        quantizer = HaqActivation(bits, is_signed=is_signed)
        quantizer.initialize(x)
        wanted = min(6.0, x.max().item(), kl_threshold(x, inner) if inner < 5 else 6.0)
        assert quantizer.clip.item() == pytest.approx(wanted)
    quantizer.initialize(x / 100)
    assert quantizer.clip.item() < 0.1
    quantizer.initialize(torch.zeros(5))
    assert quantizer.clip.item() == 6.0


def test_the_clip_level_stays_positive() -> None:
    quantizer = HaqActivation(4)
    with torch.no_grad():
        quantizer.clip.fill_(-1.0)
    quantizer.project()
    assert quantizer.clip.item() > 0
