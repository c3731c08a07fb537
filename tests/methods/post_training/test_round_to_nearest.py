"""The baseline: observers choose ranges, weights are rounded where they are."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.networks import BranchNet, TinyNet, settled
from torch import nn

from lowbit.errors import CalibrationError, LayerError, SpecError, UnknownNameError
from lowbit.inputs import Inputs
from lowbit.network.graph.dataflow import capture
from lowbit.network.insert import activation_quantizers, bake_weights, float_weight, quantized_layers, weight_quantizer
from lowbit.network.record import record_of
from lowbit.network.surgery.fold import fold_batch_norms
from lowbit.quantizers import UniformQuantizer, fake_quantize
from lowbit.quantizers.ranges.observers import OBSERVERS
from lowbit.workflows.quantize import quantize


def network() -> tuple[nn.Module, torch.Tensor]:
    data = torch.randn(48, 3, 8, 8)
    return settled(TinyNet(), data), data


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "group:9"])
def test_every_observer_keeps_eight_bits_near_float(observer: str, granularity: str) -> None:
    torch.manual_seed(1)
    data = torch.randn(48, 9, 8, 8)
    layers = nn.Conv2d(9, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Conv2d(9, 9, 1), nn.Flatten(), nn.Linear(9 * 36, 5)
    model = settled(nn.Sequential(*layers), data)
    result = quantize(
        model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=data, weight_granularity=granularity,
        weight_observer=observer, activation_observer=observer,
    )  # fmt: skip
    with torch.no_grad():
        expected, got = model(data), result(data)
    assert (got - expected).square().mean() < 0.01 * expected.var()


def test_weights_of_the_folded_network_are_rounded_where_they_are() -> None:
    model, data = network()
    result = quantize(model, method="round_to_nearest", weight_bits=4, activation_bits=None, calibration=data, weight_observer="min_max")
    folded = network_folded(model, data)
    for name, layer in quantized_layers(result).items():
        weight = folded.get_submodule(name).weight
        assert torch.equal(float_weight(layer), weight)
        quantizer = weight_quantizer(layer)
        assert isinstance(quantizer, UniformQuantizer)
        largest = weight.detach().flatten(1).abs().amax(1)
        torch.testing.assert_close(quantizer.scale.flatten(), largest / quantizer.qmax)
        rounded = fake_quantize(weight.detach(), quantizer.scale, quantizer.zero_point, quantizer.qmin, quantizer.qmax)
        torch.testing.assert_close(layer.weight, rounded)


def network_folded(model: nn.Module, data: torch.Tensor) -> nn.Module:
    folded = copy.deepcopy(model)
    fold_batch_norms(folded, capture(folded, Inputs.of(data[:2])))
    return folded


def test_folding_can_be_switched_off() -> None:
    model, data = network()
    result = quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=data, fold_batch_norm=False)
    assert isinstance(result.get_submodule("bn1"), nn.BatchNorm2d)
    assert torch.equal(float_weight(result.get_submodule("conv1")), model.get_submodule("conv1").weight)
    folded = quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=data)
    assert isinstance(folded.get_submodule("bn1"), nn.Identity)


def test_a_network_that_cannot_be_exported_is_quantized_without_folding() -> None:
    model, data = BranchNet().eval(), torch.randn(8, 3, 6, 6).abs()
    result = quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=data)
    assert {"bright.input", "head.input"} <= set(activation_quantizers(result))
    with torch.no_grad():
        assert (result(data) - model(data)).abs().max() < 0.05


def test_activations_after_a_relu_start_at_zero() -> None:
    model, data = network()
    result = quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=4, calibration=data)
    zero_points = {name: q.zero_point.item() for name, q in activation_quantizers(result).items() if isinstance(q, UniformQuantizer)}
    assert zero_points["stem.input"] > 0
    assert sum(z == 0 for z in zero_points.values()) >= 2


def test_one_bit_weights_have_two_levels_for_each_channel() -> None:
    model, data = network()
    result = quantize(model, method="round_to_nearest", weight_bits=1, activation_bits=8, calibration=data)
    codes = bake_weights(result)[1]["conv1.weight"]
    assert codes.bit_width == 1
    assert all(row.unique().numel() == 2 for row in codes.decode().flatten(1))


def test_the_calibration_that_is_not_there_or_not_finite_is_named() -> None:
    model, data = network()
    with pytest.raises(CalibrationError, match="needs calibration data"):
        quantize(model, method="round_to_nearest", sample=data[:1])
    bad = data.clone()
    bad[0, 0, 0, 0] = float("nan")
    with pytest.raises(CalibrationError, match=r"1 of .* values are NaN"):
        quantize(model, method="round_to_nearest", calibration=bad)


def test_unknown_observers_and_group_sizes_that_do_not_fit_are_refused() -> None:
    model, data = network()
    with pytest.raises((UnknownNameError, LayerError), match="min_max"):
        quantize(model, method="round_to_nearest", calibration=data, weight_observer="min_mx")
    with pytest.raises((SpecError, LayerError), match="does not divide"):
        quantize(model, method="round_to_nearest", calibration=data, weight_granularity="group:7")


@pytest.mark.parametrize("has_norm", [True, False])
def test_a_network_that_cannot_be_traced_hears_of_batch_norms_only_if_it_has_some(has_norm: bool) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm: nn.Module = nn.BatchNorm2d(4) if has_norm else nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(self.conv(x))
            return x if x.sum() > 0 else -x

    result = quantize(Branching().eval(), method="round_to_nearest", calibration=torch.randn(4, 3, 8, 8))
    notes = " ".join(record_of(result).table.notes)  # type: ignore[union-attr]
    assert ("batch norms were not folded" in notes) == has_norm
