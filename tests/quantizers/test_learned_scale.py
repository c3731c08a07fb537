from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.spec import Granularity


def at(quantizer: LearnedScaleQuantizer, scale: float) -> LearnedScaleQuantizer:
    quantizer.scale = nn.Parameter(torch.tensor(scale))
    return quantizer


def test_the_gradient_of_the_scale_is_the_rounding_error_inside_and_the_clipped_code_outside() -> None:
    quantizer = at(LearnedScaleQuantizer(2, signed=False, scale_gradient=False), 0.5)
    x = torch.tensor([-1.0, 0.2, 0.6, 1.4, 9.0], requires_grad=True)
    y = quantizer(x)
    assert y.tolist() == [0.0, 0.0, 0.5, 1.5, 1.5]
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    assert quantizer.scale.grad is not None
    # -v/s + round(v/s) inside: -0.4, -0.2, 0.2; the clipped code outside: 0 and 3
    assert quantizer.scale.grad.item() == pytest.approx(0 - 0.4 - 0.2 + 0.2 + 3, abs=1e-6)


def test_the_gradient_scale_counts_the_elements_of_one_sample() -> None:
    found = []
    for is_batched in (False, True):
        quantizer = at(LearnedScaleQuantizer(3, signed=False, is_batched=is_batched), 0.5)
        quantizer(torch.full((4, 8), 9.0, requires_grad=True)).sum().backward()
        assert quantizer.scale.grad is not None
        found.append(quantizer.scale.grad.item())
    assert found == pytest.approx([32 * 7 / math.sqrt(32 * 7), 32 * 7 / math.sqrt(8 * 7)])


def test_the_first_scale_is_twice_the_mean_over_the_root_of_qmax() -> None:
    quantizer = LearnedScaleQuantizer(4, signed=True, granularity=Granularity.channel())
    weight = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    quantizer.initialize(weight)
    assert quantizer.scale.flatten().tolist() == pytest.approx([2 * 2 / math.sqrt(7), 1.0])
    assert quantizer(weight)[1].tolist() == [0, 0]


def test_one_signed_bit_has_two_levels_around_zero() -> None:
    quantizer = LearnedScaleQuantizer(1, signed=True)
    quantizer.initialize(torch.tensor([1.0, -3.0]))
    assert quantizer(torch.tensor([-5.0, -0.1, 0.1, 5.0])).tolist() == [-2, -2, 2, 2]
    assert quantizer.encode(torch.tensor([-0.1, 0.1])).codes.tolist() == [0, 1]


def test_a_learned_offset_keeps_zero_a_level() -> None:
    quantizer = LearnedScaleQuantizer(3, signed=False, learn_offset=True)
    x = torch.linspace(-1.03, 2.2, 50)
    quantizer.initialize(x)
    assert quantizer(torch.zeros(1)).item() == 0
    y = quantizer(x.requires_grad_())
    assert (y - x).abs().max() < 0.51 * (2.2 + 1.03) / 7 + 0.04
    y.square().sum().backward()
    assert quantizer.offset.grad is not None and torch.isfinite(quantizer.offset.grad)


def test_projection_keeps_the_scale_positive() -> None:
    quantizer = at(LearnedScaleQuantizer(4, signed=True), -0.3)
    quantizer.project()
    assert quantizer.scale.item() > 0


def test_a_state_dict_fits_a_fresh_quantizer() -> None:
    quantizer = LearnedScaleQuantizer(4, signed=True, granularity=Granularity.channel())
    weight = torch.randn(5, 3, 3, 3)
    quantizer.initialize(weight)
    other = LearnedScaleQuantizer(4, signed=True, granularity=Granularity.channel())
    other.load_state_dict(quantizer.state_dict())
    assert torch.equal(other(weight), quantizer(weight))


def test_bfloat16_is_quantized_in_float32() -> None:
    quantizer = at(LearnedScaleQuantizer(4, signed=True), 0.25)
    x = torch.tensor([0.3, -1.1], dtype=torch.bfloat16)
    assert quantizer(x).dtype == torch.bfloat16
    assert quantizer(x).float().tolist() == [0.25, -1.0]
