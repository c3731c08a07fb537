"""Networks with one quantized layer, against the same computed by hand or by another network."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import DataError, LayerError, UnknownNameError
from lowbit.measure.sensitivity import (
    LossIncrease,
    QuantizedLayer,
    SensitivityMeter,
    input_quantizers,
    layer_sensitivity,
    quantized_in,
    softmax_divergence,
    squared_error,
)
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import LayerBits

TWO, FOUR = LayerBits(2, None), LayerBits(4, None)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 3)).eval()


def batches() -> list[Tensor]:
    return list(torch.randn(10, 3, generator=torch.Generator().manual_seed(1)).split(4))  # the last one has 2 samples


def test_divergence_is_that_of_the_float_network_from_the_quantized_one() -> None:
    reference, output = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)  # not 0.5 ln(0.5 / 0.75) + 0.5 ln(0.5 / 0.25)
    assert softmax_divergence(reference, output, None) == pytest.approx(expected, rel=1e-6)
    assert softmax_divergence(reference, reference, None) == 0.0


def test_divergence_needs_classes() -> None:
    with pytest.raises(DataError, match=r"shape \(2, 1\) are no logits"):
        softmax_divergence(torch.zeros(2, 1), torch.zeros(2, 1), None)


def test_a_layer_alone_is_quantized_and_samples_count_equally() -> None:
    model, data = network(), batches()
    weights = {TWO: model[2].weight.detach().round(), FOUR: (model[2].weight.detach() * 8).round() / 8}
    found = layer_sensitivity(model, {"2": {bits: QuantizedLayer(weight) for bits, weight in weights.items()}}, data, squared_error)
    whole = torch.cat(data)
    for bits, weight in weights.items():
        expected = nn.functional.linear(model[0](whole).relu(), weight - model[2].weight.detach())
        assert found["2"][bits] == pytest.approx(float(expected.detach().square().mean()), rel=1e-5)
    assert found["2"][FOUR] < found["2"][TWO]


def test_loss_increase_is_the_difference_of_the_losses() -> None:
    model = nn.Sequential(nn.Linear(1, 1, bias=False))
    nn.init.ones_(model[0].weight)
    batch = (torch.tensor([[2.0]]), torch.tensor([[3.0]]))
    distance = LossIncrease(lambda output, batch: (output - batch[1]).square().mean())
    found = layer_sensitivity(
        model, {"0": {TWO: QuantizedLayer(torch.tensor([[1.5]])), FOUR: QuantizedLayer(torch.tensor([[0.5]]))}}, [batch], distance
    )
    assert found == {"0": {TWO: -1.0, FOUR: 3.0}}  # (3 - 3)^2 and (1 - 3)^2 less (2 - 3)^2


def test_several_layers_at_once_and_what_they_read() -> None:
    model, data = network(), batches()
    quantizers = input_quantizers(model, ["2"], data)
    quantizers["2"].set_bit_width(2)
    weight = model[0].weight.detach().round()
    found = SensitivityMeter(model, data, squared_error).of({"0": QuantizedLayer(weight), "2": QuantizedLayer(activation=quantizers["2"])})
    other, whole = copy.deepcopy(model), torch.cat(data)
    other[0].weight.data = weight
    levels = model[0](whole).relu().max() / 3  # 2 bits from 0 to the largest value that the float network has there
    read = (other[0](whole).relu() / levels).round().clamp(0, 3) * levels
    expected = (model[2](read) - model(whole)).square().mean()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_input_ranges_hold_all_batches_and_zero() -> None:
    model = nn.Sequential(nn.Linear(1, 2))
    (quantizer,) = input_quantizers(model, ["0"], [torch.tensor([[2.0]]), torch.tensor([[5.1], [3.0]])]).values()
    assert isinstance(quantizer, UniformQuantizer)
    assert quantizer.scale.item() == pytest.approx(5.1 / 255) and quantizer.zero_point.item() == 0.0
    quantizer.set_bit_width(4)
    assert quantizer.scale.item() == pytest.approx(5.1 / 15)


def test_layers_that_no_sample_reaches_have_no_input_quantizer() -> None:
    model = network()
    model.append(nn.Identity())
    model[3].unused = nn.Linear(2, 2)
    assert list(input_quantizers(model, ["0", "3.unused"], batches())) == ["0"]


def test_the_network_is_the_same_afterwards_even_where_it_fails() -> None:
    model = network()
    before = {name: (id(parameter), parameter.detach().clone()) for name, parameter in model.named_parameters()}
    with (
        pytest.raises(ZeroDivisionError),
        quantized_in(model, {"0": QuantizedLayer(torch.zeros(4, 3), UniformQuantizer(2, signed=False, symmetric=False))}),
    ):
        assert float(model[0].weight.abs().sum()) == 0.0
        raise ZeroDivisionError
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == {name: key for name, (key, _) in before.items()}
    assert all(torch.equal(parameter, before[name][1]) for name, parameter in model.named_parameters())
    assert not model[0]._forward_pre_hooks


def test_recurrent_layers_compute_with_the_quantized_weight() -> None:
    torch.manual_seed(0)
    model, x = nn.LSTM(2, 3, batch_first=True), torch.randn(4, 5, 2)
    weight = model.weight_hh_l0.detach().round()
    other = copy.deepcopy(model)
    other.weight_hh_l0.data.copy_(weight)
    expected = (other(x)[0] - model(x)[0]).square().mean()
    meter = SensitivityMeter(model, [x], squared_error)
    assert meter.of({"weight_hh_l0": QuantizedLayer(weight)}) == pytest.approx(expected.item(), rel=1e-5)
    assert meter.of({}) == 0.0


def test_one_of_two_layers_with_the_same_tensor_is_quantized_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    nn.init.eye_(model[0].weight)
    meter = SensitivityMeter(model, [torch.ones(1, 2)], squared_error)
    assert meter.of({"0": QuantizedLayer(3 * torch.eye(2))}) == 4.0  # 3 instead of 1, not 9
    assert model[0].weight is model[1].weight


def test_errors_name_the_layer() -> None:
    model = network()
    meter = SensitivityMeter(model, batches(), squared_error)
    with pytest.raises(UnknownNameError, match="unknown layer 'head'"):
        meter.of({"head": QuantizedLayer(torch.zeros(4, 3))})
    with pytest.raises(LayerError, match=r"layer '0': its weight has the shape \(4, 3\), got \(3, 4\)"):
        meter.of({"0": QuantizedLayer(torch.zeros(3, 4))})
    with pytest.raises(LayerError, match="layer '0': quantized alone it makes the network's outputs overflow"):
        meter.of({"0": QuantizedLayer(torch.full((4, 3), float("inf")))})
    with pytest.raises(DataError, match="there is no batch"):
        SensitivityMeter(model, [], squared_error)
