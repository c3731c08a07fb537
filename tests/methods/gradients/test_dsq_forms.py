"""DSQ's bounds: per channel, blended, and the affine form that follows the data."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.methods.gradients.dsq import Dsq, DsqQuantizer, ObservedDsqQuantizer, spread_range
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.spec import Granularity
from lowbit.surrogates import SoftTanh

W = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def test_gradients_are_those_of_the_paper() -> None:
    lower, upper, alpha, x = -1.0, 2.0, 0.2, 0.3  # 2 bits: step 1, interval 1, level 1
    quantizer = DsqQuantizer(2, alpha=alpha)
    quantizer.set_bounds(torch.tensor(lower), torch.tensor(upper))
    value = torch.tensor([x], requires_grad=True)
    quantizer(value).sum().backward()
    c, s, v, level = math.log(2 / alpha - 1), 1 / (1 - alpha), x - lower, 1
    t = math.tanh(c * (v - 1.5))
    slope = 0.5 * s * c * (1 - t * t)
    by_alpha = 0.5 * (s * s * t - s * (1 - t * t) * (v - 1.5) * 2 / (alpha * (2 - alpha)))
    assert isinstance(quantizer.surrogate, SoftTanh)
    found = [g.item() for g in (value.grad, quantizer.upper.grad, quantizer.lower.grad, quantizer.surrogate.alpha.grad) if g is not None]
    expected = [slope, level / 3 - slope * v / 3, 1 - level / 3 + slope * (v / 3 - 1), by_alpha]
    assert found == pytest.approx(expected, rel=1e-4)


def test_scaling_values_and_bounds_scales_the_output() -> None:
    one, ten = DsqQuantizer(3), DsqQuantizer(3)
    one.set_bounds(torch.tensor(-1.0), torch.tensor(1.5))
    ten.set_bounds(torch.tensor(-8.0), torch.tensor(12.0))
    torch.testing.assert_close(ten(8 * W), 8 * one(W))


def test_weight_bounds_start_around_the_mean_and_that_of_an_element_alone_has_no_width() -> None:
    quantizer = DsqQuantizer(2, spread=2.6)
    quantizer.initialize(W)
    torch.testing.assert_close(quantizer.upper.detach(), W.mean() + 2.6 * W.std())
    torch.testing.assert_close(quantizer.lower.detach(), W.mean() - 2.6 * W.std())
    lower, upper = spread_range(torch.tensor([[0.5], [0.0]]), 2.0)
    assert lower.tolist() == upper.tolist() == [0.5, 0.0]


@pytest.mark.parametrize("granularity", [Granularity.channel(1), Granularity.group(9)], ids=str)
def test_each_channel_or_group_has_bounds_of_its_own(granularity: Granularity) -> None:
    quantizer = DsqQuantizer(2, spread=1.5, granularity=granularity)
    quantizer.initialize(W)
    alone = []
    for row in granularity.flatten(W):
        one = DsqQuantizer(2, spread=1.5)
        one.initialize(row)
        alone.append(one(row))
    torch.testing.assert_close(granularity.flatten(quantizer(W)), torch.stack(alone))
    quantizer(W).sum().backward()
    assert quantizer.upper.grad is not None and quantizer.upper.grad.shape == granularity.scale_shape(W)
    fresh = DsqQuantizer(2, spread=1.5, granularity=granularity)
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(W), quantizer(W)) and isinstance(fresh.upper, nn.Parameter)


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), 0.25), torch.tensor([[3.0]])], ids=["zero", "constant", "one"])
@pytest.mark.parametrize("bit_width", [1, 2, 8])
def test_weights_without_spread_are_kept_by_every_form(weight: Tensor, bit_width: int) -> None:
    quantizers = [DsqQuantizer(bit_width, spread=2.6), DsqQuantizer(bit_width, granularity=Granularity.channel())]
    if bit_width > 1:
        quantizers.append(ObservedDsqQuantizer(bit_width, is_weight=True))  # type: ignore[arg-type]
    for quantizer in quantizers:
        quantizer.initialize(weight)
        y = quantizer.eval()(weight)
        assert torch.isfinite(y).all() and torch.equal(quantizer.encode(weight).decode(), y)
        torch.testing.assert_close(y, weight, rtol=1e-5, atol=1e-6)


def test_bounds_that_cross_are_parted_channel_by_channel() -> None:
    quantizer = DsqQuantizer(2, granularity=Granularity.channel())
    quantizer.set_bounds(torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [2.0]]))
    quantizer.upper.data[1] = -5.0
    quantizer.project()
    assert quantizer.upper[0] == 1.0 and 1.0 < float(quantizer.upper[1]) < 1.01


def test_an_observed_weight_grid_is_the_spread_around_the_mean_and_follows_the_weight_in_training_only() -> None:
    quantizer = ObservedDsqQuantizer(4, is_weight=True)
    quantizer.initialize(W)
    expected = (2.6 * W.std() * 2) / 15
    torch.testing.assert_close(quantizer.scale, expected)
    quantizer.train()(3 * W)
    torch.testing.assert_close(quantizer.scale, 3 * expected)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(9 * W)
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_observed_activation_ranges_average_the_samples_and_then_the_batches() -> None:
    quantizer = ObservedDsqQuantizer(2, is_weight=False)
    quantizer.initialize(torch.tensor([[0.0, 4.0], [-2.0, 2.0]]))  # means of the ends: -1 and 3
    assert (float(quantizer.running_lower), float(quantizer.running_upper)) == (-1.0, 3.0)
    assert float(quantizer.scale) == pytest.approx(4 / 3) and float(quantizer.zero_point) == 1
    quantizer.train()(torch.tensor([[-11.0, 13.0]]))
    assert float(quantizer.running_lower) == pytest.approx(-2.0) and float(quantizer.running_upper) == pytest.approx(4.0)
    assert float(quantizer.scale) == pytest.approx(2.0)


def test_the_observed_form_has_the_soft_gradient_of_a_fixed_sharpness_and_nothing_else_to_learn() -> None:
    quantizer = ObservedDsqQuantizer(4, is_weight=False, alpha=0.4)
    quantizer.initialize(torch.linspace(0, 15, 40).reshape(1, -1))  # scale 1, zero point 0
    assert not list(quantizer.parameters())
    x = torch.tensor([[0.0, 15.0, 6.5, 7.0]], requires_grad=True)
    for _ in range(2):  # the tables change between two passes whose graphs are alive
        y = quantizer.train()(x)
    y.sum().backward()
    c, s = math.log(4), 1 / 0.6
    edge = 0.5 * s * c / math.cosh(c / 2) ** 2
    assert x.grad is not None and x.grad[0].tolist() == pytest.approx([edge, edge, 0.5 * s * c, edge], rel=1e-3)
    assert 0.5 * s * c == pytest.approx(1.155, abs=1e-3)


def test_two_passes_before_one_backward_pass_are_allowed() -> None:
    quantizer = ObservedDsqQuantizer(2, is_weight=False)
    quantizer.initialize(torch.randn(4, 3))
    x = torch.randn(4, 3, requires_grad=True)
    (quantizer.train()(x) + quantizer(2 * x)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_one_bit_has_no_observed_form() -> None:
    with pytest.raises(LayerError, match=r"layer 'conv1'.*at least 2 bits.*bounds=learned"):
        lowbit.prepare(TinyNet(), method="dsq", bounds="observed", weight_bits=1, activation_bits=1, sample=torch.randn(2, 3, 8, 8))


def test_the_sharpness_starts_where_the_form_of_the_bounds_wants_it() -> None:
    slot = Slot("conv", nn.Conv2d(3, 4, 3), 2, True, "inner")
    starts = {"learned": 0.2, "blended": 0.2, "observed": 0.4}
    for bounds, expected in starts.items():
        for chosen, alpha in ((None, expected), (0.3, 0.3)):
            quantizer = Dsq(bounds=bounds, alpha=chosen).weight_quantizer(slot)  # type: ignore[arg-type]
            assert isinstance(quantizer.surrogate, SoftTanh)
            assert float(quantizer.surrogate.alpha) == pytest.approx(alpha)
            assert isinstance(quantizer.surrogate.alpha, nn.Parameter) == (bounds != "observed")


def test_channels_are_counted_along_the_layers_own_axis() -> None:
    layer = nn.ConvTranspose2d(3, 5, 2)
    quantizer = Dsq(weight_granularity="per_channel").weight_quantizer(Slot("up", layer, 2, True, "inner"))
    quantizer.initialize(layer.weight.detach())
    assert isinstance(quantizer, DsqQuantizer) and quantizer.upper.shape == (1, 5, 1, 1)
    with pytest.raises(SpecError, match="granularity"):
        Dsq(weight_granularity="per_layer")


def test_bfloat16_values_are_computed_in_float32() -> None:
    for quantizer in (DsqQuantizer(3, spread=2.6), ObservedDsqQuantizer(3, is_weight=True)):
        quantizer.initialize(W)
        y = quantizer.eval()(W.bfloat16())
        assert y.dtype == torch.bfloat16 and torch.equal(y, quantizer(W.bfloat16().float()).bfloat16())


def test_the_norm_of_alpha_enters_the_loss_of_a_prepared_network() -> None:
    model = lowbit.prepare(TinyNet(), method="dsq", alpha=0.3, alpha_decay=2.0, sample=torch.randn(2, 3, 8, 8))
    count = sum(isinstance(module, DsqQuantizer) for module in model.modules())
    assert count == 4  # two inner layers, weights and inputs
    assert lowbit.penalty(model).item() == pytest.approx(count * 2 * 0.09)
    assert isinstance(insert.weight_quantizer(model.conv1), DsqQuantizer)  # type: ignore[arg-type]
