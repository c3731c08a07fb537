from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.methods.gradients.daq import Daq, DaqActivation, DaqWeight
from lowbit.network import insert
from lowbit.qat.prepare import prepare
from lowbit.surrogates import DistanceAwareRounding


def weights(bit_width: int = 2) -> DaqWeight:
    quantizer = DaqWeight(bit_width)
    quantizer.initialize(torch.zeros(3))
    return quantizer


def slope(v: Tensor, gamma: float, sigma: float) -> Tensor:
    """The closed form: ``gamma / (2 sinh gamma) coth(|z - 1/2| + 1 / (2 sigma**2))``."""
    distance = (v - v.floor() - 0.5).abs() + 1 / (2 * sigma**2)
    return gamma / (2 * math.sinh(gamma)) * torch.cosh(distance) / torch.sinh(distance)


def test_weights_lie_on_odd_multiples_of_standardized_values() -> None:
    w = torch.randn(300, generator=torch.Generator().manual_seed(0)) * 0.2 + 3
    normalised = (w - w.mean()) / w.std()
    expected = (((normalised + 3) / 6).clamp(0, 1) * 3).round() * 2 / 3 - 1
    torch.testing.assert_close(weights()(w), expected)
    assert weights()(w).unique().numel() == 4


def test_one_bit_weights_are_the_signs_of_centred_values() -> None:
    w = torch.randn(99, generator=torch.Generator().manual_seed(1)) + 5
    assert torch.equal(weights(1)(w), torch.where(w > w.mean(), 1.0, -1.0))


def test_gradients_of_weights_and_of_both_ends_follow_the_formula() -> None:
    w = (2 * torch.randn(50, generator=torch.Generator().manual_seed(2))).requires_grad_()
    quantizer, lower, upper = DaqWeight(2, gamma=1.5, sigma=0.8), -0.7, 1.1
    quantizer.set_interval(torch.tensor(lower), torch.tensor(upper))
    grad = torch.randn(50, generator=torch.Generator().manual_seed(3))
    quantizer(w).backward(grad)
    normalised = (w.detach() - w.detach().mean()) / w.detach().std()
    v = (normalised - lower) * 3 / (upper - lower)
    inside = (v >= 0) & (v <= 3)
    assert inside.any() and not inside.all()
    g = grad * 2 / 3 * slope(v, 1.5, 0.8) * inside
    torch.testing.assert_close(w.grad, g * 3 / (upper - lower) / w.detach().std())  # mean and deviation are constants
    assert quantizer.lower is not None
    torch.testing.assert_close(quantizer.upper.grad, (-g * (normalised - lower) * 3).sum() / (upper - lower) ** 2)
    torch.testing.assert_close(quantizer.lower.grad, (g * (normalised - upper) * 3).sum() / (upper - lower) ** 2)


def test_gradients_of_activations_and_of_their_end_follow_the_formula() -> None:
    x = torch.linspace(-1, 4, 60).requires_grad_()
    quantizer = DaqActivation(3)
    quantizer.set_interval(torch.zeros(()), torch.tensor(2.5))
    quantizer(x).sum().backward()
    v = x.detach() * 7 / 2.5
    g = slope(v, 2.0, 2.0) / 7 * ((v >= 0) & (v <= 7))
    torch.testing.assert_close(x.grad, g * 7 / 2.5, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(quantizer.upper.grad, (-g * x.detach() * 7 / 2.5**2).sum(), rtol=1e-4, atol=1e-6)
    assert quantizer.lower is None


def test_the_output_does_not_change_under_affine_maps_of_the_weight() -> None:
    w = torch.randn(200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights()(3.0 * w + 7.0), weights()(w))


def test_the_gradient_of_the_weight_falls_with_its_spread() -> None:
    w = torch.randn(200, generator=torch.Generator().manual_seed(1))
    gradients = []
    for factor in (1.0, 4.0):
        x = (factor * w).requires_grad_()
        weights()(x).sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[1], gradients[0] / 4, rtol=1e-4, atol=1e-6)  # type: ignore[operator]


def test_training_and_evaluation_are_the_same_function() -> None:
    w = torch.randn(500, generator=torch.Generator().manual_seed(2)).requires_grad_()
    quantizer = weights(3)
    assert torch.equal(quantizer.train()(w), quantizer.eval()(w))


def test_activations_clip_at_zero_and_at_the_learned_end() -> None:
    quantizer = DaqActivation(2)
    quantizer.set_interval(torch.tensor(0.0), torch.tensor(3.0))
    x = torch.tensor([-1.0, 0.4, 1.6, 5.0], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([0, 0, 2 / 3, 1]))
    y.sum().backward()
    assert x.grad is not None and x.grad[0] == 0 and x.grad[3] == 0 and (x.grad[1:3] > 0).all()


def test_signed_activations_are_symmetric() -> None:
    quantizer = DaqActivation(2, is_signed=True)
    quantizer.initialize(torch.randn(100))
    x = torch.linspace(-3, 3, 100)
    torch.testing.assert_close(quantizer(x), -quantizer(x).flip(0), atol=1e-6, rtol=0)
    assert quantizer(x).min() < 0


def test_intervals_start_at_three_standard_deviations() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, 5.0])
    activations = DaqActivation(4)
    activations.initialize(x)
    assert activations.upper.item() == pytest.approx(3 * x.std().item())
    assert weights().lower.item() == -3 and weights().upper.item() == 3  # type: ignore[union-attr]


@pytest.mark.parametrize("values", [torch.zeros(9), torch.full((9,), 0.3), torch.full((9,), -1e30), torch.tensor([2.0])])
def test_values_that_are_all_alike_stay_finite_and_keep_their_sign(values: Tensor) -> None:
    for quantizer in (DaqWeight(2), DaqActivation(2), DaqActivation(2, is_signed=True)):
        x = values.clone().requires_grad_()
        quantizer.initialize(x)
        y = quantizer(x)
        y.sum().backward()
        assert all(bool(torch.isfinite(t).all()) for t in (y, x.grad, quantizer.upper.grad))  # type: ignore[union-attr]
        if quantizer.is_centred and values[0] != 0:
            assert torch.equal(y.sign(), values.sign())


def test_bfloat16_keeps_its_type_and_is_quantized_in_float32() -> None:
    w = torch.randn(64, generator=torch.Generator().manual_seed(5)).bfloat16()
    assert weights(4)(w).dtype == torch.bfloat16
    assert torch.equal(weights(4)(w), weights(4)(w.float()).bfloat16())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(*layers)


def test_a_layer_keeps_its_size_and_scales_its_bias() -> None:
    x, model = torch.rand(16, 3, 8, 8), network()
    qat = prepare(model, method="daq", weight_bits=4, activation_bits=4, sample=x)
    quantizer = insert.weight_quantizer(qat[2])  # type: ignore[index]
    assert isinstance(quantizer, DaqWeight) and quantizer.output_scale is not None
    assert torch.equal(qat[2].bias, model[2].bias * quantizer.output_scale.abs())  # type: ignore[index, operator]
    hidden = qat[1](qat[0](x))  # type: ignore[index]
    torch.testing.assert_close(qat[2](hidden).abs().mean(), model[2](hidden).abs().mean(), rtol=1e-3, atol=0)  # type: ignore[index]


def test_options_reach_the_quantizers() -> None:
    qat = prepare(network(), method="daq", sample=torch.rand(2, 3, 8, 8), gamma=1.0, weight_sigma=0.5, activation_sigma=3.0)
    found = [(m.gamma, m.sigma) for m in qat.modules() if isinstance(m, DistanceAwareRounding)]
    assert found == [(1.0, 0.5), (1.0, 3.0)]


@pytest.mark.parametrize("option", [{"gamma": 0.0}, {"gamma": 1000.0}, {"weight_sigma": 0.0}, {"activation_sigma": -1.0}])
def test_numbers_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=f"daq: {next(iter(option))} must be"):
        Daq(**option)
