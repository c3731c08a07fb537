"""What a unit is asked to minimise: normalisation of the losses, Fisher weights, the regularizer's share."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import CalibrationError, SpecError
from lowbit.inputs import Inputs
from lowbit.network.insert import set_input_quantizer, set_weight_quantizer, weight_quantizer
from lowbit.post_training.reconstruction.objective import (  # fmt: skip
    Objective,
    fisher_gradient,
    mean_loss,
    released_weight,
    rounding_loss,
    set_beta,
    unit_loss,
    weighted_penalty,
)
from lowbit.post_training.reconstruction.rounding import AdaptiveRounding, BetaSchedule, reconstruction_loss
from lowbit.post_training.reconstruction.unit_data import CacheSpace, CallCache, TensorCache, UnitData
from lowbit.post_training.reconstruction.units import PlannedUnit
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import Granularity


def in_memory(x: Tensor) -> TensorCache:
    """A cache in memory with one sample for each row of ``x``."""
    cache = TensorCache(x, len(x), len(x), CacheSpace("ram", None))
    cache.write(0, len(x), x)
    return cache


def rounded(layer: nn.Module, bit_width: int = 2) -> UniformQuantizer:
    """The layer, its weight rounded to nearest."""
    quantizer = UniformQuantizer(bit_width, signed=True, symmetric=True, granularity=Granularity.channel())
    quantizer.initialize(layer.weight.detach())
    set_weight_quantizer(layer, quantizer)
    return quantizer


def unit(activation: object = None, channel_axis: int = 1) -> PlannedUnit:
    return PlannedUnit("unit", ("unit",), activation, is_carried=False, channel_axis=channel_axis, cost=1.0)


def data_of(inputs: Tensor, target: Tensor, gradient: Tensor | None = None) -> UnitData:
    return UnitData(CallCache.of(in_memory(inputs)), in_memory(target), None if gradient is None else in_memory(gradient))


@pytest.mark.parametrize(
    ("shape", "axis", "places"), [((2, 3, 4, 5), 1, 40), ((2, 3), 1, 2), ((2, 7, 3), -1, 14), ((2, 3, 7), 1, 14), ((6,), 1, 6)]
)
def test_errors_are_summed_over_channels_and_averaged_over_the_rest(shape: tuple[int, ...], axis: int, places: int) -> None:
    prediction, target = torch.randn(shape), torch.randn(shape)
    difference = (prediction - target).double()
    for power in (2.0, 2.4):
        loss = reconstruction_loss(prediction, target, power=power, channel_axis=axis)
        assert loss.item() == pytest.approx(difference.abs().pow(power).sum().item() / places, rel=1e-5)
    ones = reconstruction_loss(prediction, target, kind="fisher_diag", gradient=torch.ones(shape), channel_axis=axis)
    assert ones.item() == pytest.approx(difference.square().sum().item() / places, rel=1e-5)


def test_losses_by_hand() -> None:
    prediction, target, gradient = (
        torch.tensor([[3.0, 1.0], [0.0, 2.0]]),
        torch.tensor([[1.0, 1.0], [1.0, 0.0]]),
        torch.tensor([[2.0, 5.0], [-3.0, 1.0]]),
    )
    assert reconstruction_loss(prediction, target).item() == (4 + 0 + 1 + 4) / 2
    assert reconstruction_loss(prediction, target, power=3.0).item() == (8 + 0 + 1 + 8) / 2
    assert reconstruction_loss(prediction, target, kind="fisher_diag", gradient=gradient).item() == (16 + 0 + 9 + 4) / 2
    full = reconstruction_loss(prediction, target, kind="fisher_full", gradient=gradient)
    assert full.item() == pytest.approx((4 * 4 + 3 * 5 + 2 * 5) / 4 / 100)


def test_doubling_the_gradient_multiplies_fisher_losses_by_four() -> None:
    prediction, target, gradient = torch.randn(3, 2, 4, 4, 4).unbind()
    for kind in ("fisher_diag", "fisher_full"):
        once = reconstruction_loss(prediction, target, kind=kind, gradient=gradient)
        assert reconstruction_loss(prediction, target, kind=kind, gradient=2 * gradient).item() == pytest.approx(4 * once.item(), rel=1e-5)
        with pytest.raises(SpecError, match=kind):
            reconstruction_loss(prediction, target, kind=kind)


@pytest.mark.parametrize(
    "bad", [{"iterations": -1}, {"learning_rate": 0.0}, {"batch_size": 0}, {"regularization": -0.1}, {"power": 0.5}], ids=str
)
def test_values_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SpecError, match=str(next(iter(bad.values())))):
        Objective(**{"iterations": 10, "learning_rate": 1e-3, **bad})


def test_the_loss_over_all_samples_does_not_depend_on_the_batch_size() -> None:
    layer, inputs = nn.Conv2d(3, 5, 3), torch.randn(11, 3, 6, 6)
    with torch.no_grad():
        target = layer(inputs).relu()
    rounded(layer)
    with torch.no_grad():
        expected = (layer(inputs).relu() - target).double().square().sum(1).mean().item()
    for batch_size in (1, 4, 11, 64):
        loss = mean_loss(unit(torch.relu), layer, data_of(inputs, target), Objective(1, 1e-3, batch_size))
        assert loss == pytest.approx(expected, rel=1e-5)
    assert mean_loss(unit(), layer, data_of(inputs, target), Objective(1, 1e-3)) > 2 * expected  # without the activation function


def test_channels_of_linear_layers_are_last() -> None:
    layer, inputs = nn.Linear(4, 3), torch.randn(5, 7, 4)
    target = torch.zeros(5, 7, 3)
    with torch.no_grad():
        expected = layer(inputs).square().sum(-1).mean().item()
    assert mean_loss(unit(channel_axis=-1), layer, data_of(inputs, target), Objective(1, 1e-3, 2)) == pytest.approx(expected, rel=1e-5)


def test_a_loss_that_is_not_finite_names_the_unit() -> None:
    layer, inputs = nn.Linear(2, 2), torch.full((3, 2), 3e38)
    with pytest.raises(CalibrationError, match=r"unit 'unit'.*overflows"):
        mean_loss(unit(), layer, data_of(inputs, torch.zeros(3, 2)), Objective(1, 1e-3))


def test_the_regularizer_counts_after_the_warm_start_with_its_weight() -> None:
    layer, inputs = nn.Linear(4, 3), torch.randn(6, 4)
    rounding = AdaptiveRounding(rounded(layer))
    rounding.initialize(layer.parametrizations.weight.original)
    set_weight_quantizer(layer, rounding)
    objective = Objective(100, 1e-3, schedule=BetaSchedule("cosine", 100), regularization=0.3)
    arguments = unit(), layer, data_of(inputs, torch.zeros(6, 3)), torch.arange(6), objective
    for iteration, beta in ((0, None), (19, None), (20, 20.0), (60, 11.0)):
        total = rounding_loss(*arguments, [rounding], iteration)
        assert rounding.beta == beta
        penalty = 0.0 if beta is None else (1 - (2 * (rounding.logits.sigmoid() * 1.2 - 0.1).clamp(0, 1) - 1).abs() ** beta).sum().item()
        assert weighted_penalty(objective, [rounding]).item() == pytest.approx(0.3 * penalty, rel=1e-5)
        assert total.item() == pytest.approx(unit_loss(*arguments).item() + 0.3 * penalty, rel=1e-5)
    set_beta(Objective(100, 1e-3), [rounding], 99)
    assert rounding.beta is None


def test_bfloat16_computes_the_unit_only() -> None:
    layer, inputs = nn.Conv2d(3, 8, 3), torch.randn(4, 3, 8, 8)
    target = torch.zeros(4, 8, 6, 6)
    exact = unit_loss(unit(), layer, data_of(inputs, target), torch.arange(4), Objective(1, 1e-3))
    layer.weight.grad = None
    rough = unit_loss(unit(), layer, data_of(inputs, target), torch.arange(4), Objective(1, 1e-3, precision="bf16"))
    rough.backward()
    assert rough.dtype == layer.weight.grad.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=2e-2)
    assert rough.item() != exact.item()


class Chain(nn.Module):
    """Two blocks and a classifier; an in-place ReLU follows the first block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 3, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu_(self.second(F.relu_(self.first(x)))).mean((2, 3)))


def test_the_fisher_gradient_is_that_of_the_network_quantized_up_to_the_unit() -> None:
    reference = Chain().eval()
    model, images = copy.deepcopy(reference), torch.randn(6, 2, 4, 4)
    for layer in (model.first, model.second, model.head):
        rounded(layer)
    blocked = UniformQuantizer(2, signed=False, symmetric=False)
    blocked.initialize(torch.linspace(0, 1, 5))
    set_input_quantizer(model.second, blocked)
    got = fisher_gradient(model, reference, "first", [model.first], Inputs.of(images))

    with torch.no_grad():
        output = model.first(images)  # quantized
        expected = F.softmax(reference(images), 1)
    output.requires_grad_()
    logits = reference.head(reference.second(output.relu()).relu().mean((2, 3)))  # float behind the unit
    loss = (expected * (expected.log() - F.log_softmax(logits, 1))).sum() / 6
    torch.testing.assert_close(got, torch.autograd.grad(loss, output)[0])
    assert got.shape == output.shape
    assert got.abs().max() > 0
    assert weight_quantizer(model.head) is not None
    assert model.head.weight.unique().numel() <= 4 * 4  # quantization is on again
    assert all(parameter.grad is None for parameter in model.parameters())


def test_released_weights_are_almost_one() -> None:
    assert released_weight(torch.tensor([-0.25, 0.0, 2.0])).tolist() == [1.25, 1.0, 3.0]
