from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.networks import BranchNet, ReusedNet
from torch import Tensor, nn

from lowbit.errors import LayerError
from lowbit.measure import layer_noise, output_noise, sqnr_db, weight_noise
from lowbit.network.insert import set_input_quantizer, set_weight_quantizer, weight_quantizer
from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.base import disabled
from lowbit.spec import Granularity


def quantized_weight(layer: nn.Module, bit_width: int = 4) -> UniformQuantizer:
    quantizer = UniformQuantizer(bit_width, signed=True, symmetric=True, granularity=Granularity.channel(0))
    quantizer.initialize(layer.weight.detach())
    set_weight_quantizer(layer, quantizer)
    return quantizer


def test_weight_noise_is_that_of_the_decoded_codes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    float_model = copy.deepcopy(model)
    quantizer = quantized_weight(model[0])
    expected = sqnr_db(float_model[0].weight, quantizer(float_model[0].weight))
    assert weight_noise(model) == {"0": expected}
    assert weight_noise(model, float_model) == {"0": expected}


def test_weights_that_a_method_rewrote_are_compared_with_the_reference() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    float_model = copy.deepcopy(model)
    quantizer = quantized_weight(model[0])
    with torch.no_grad():
        model[0].parametrizations.weight.original.copy_(quantizer(float_model[0].weight))
    assert weight_noise(model)["0"] == math.inf
    assert weight_noise(model, float_model)["0"] == sqnr_db(float_model[0].weight, quantizer(float_model[0].weight))


def test_a_reference_without_the_layer_is_refused() -> None:
    model = nn.Sequential(nn.Linear(6, 5))
    quantized_weight(model[0])
    with pytest.raises(LayerError, match="no counterpart"):
        weight_noise(model, nn.Sequential(nn.ReLU()))
    with pytest.raises(LayerError, match=r"\(5, 6\)"):
        weight_noise(model, nn.Sequential(nn.Linear(6, 4)))


def test_output_noise_equals_the_difference_of_the_two_networks() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    float_model = copy.deepcopy(model).eval()
    quantized_weight(model[0])
    x = torch.randn(20, 6)
    for reference in (None, float_model):
        noise = output_noise(model, x.split(7), reference=reference)
        with torch.no_grad():
            assert noise["0"].sqnr_db == pytest.approx(sqnr_db(float_model[0](x), model[0](x)), abs=1e-4)
            assert noise["2"].sqnr_db == pytest.approx(sqnr_db(float_model(x), model(x)), abs=1e-4)


def test_all_calls_of_a_reused_layer_count_together() -> None:
    model = ReusedNet().eval()
    quantized_weight(model.block[0], 2)
    x = torch.randn(4, 3, 8, 8)
    outputs: list[Tensor] = []
    model.block[0].register_forward_hook(lambda _m, _a, out: outputs.append(out.detach().clone()))
    with torch.no_grad():
        model(x)
        with disabled([weight_quantizer(model.block[0])]):
            model(x)
    quantized, wanted = (torch.cat([t.flatten() for t in half]) for half in (outputs[:2], outputs[2:]))
    noise = output_noise(model, x)["block.0"]
    assert noise.count == 4 * 4 * (64 + 16)
    assert noise.sqnr_db == pytest.approx(sqnr_db(wanted, quantized), abs=1e-4)


def test_layers_that_the_networks_call_differently_are_left_out() -> None:
    reference = BranchNet().eval()
    model = copy.deepcopy(reference)
    quantizer = UniformQuantizer(8, signed=True, symmetric=True)
    quantizer.set_parameters(torch.tensor(1.0))
    set_input_quantizer(model, quantizer)
    x = torch.full((2, 3, 4, 4), 0.4)  # rounds to 0: the quantized network takes the other branch
    result = layer_noise(model, x, reference=reference)
    assert result["bright"].output_sqnr_db is None and result["dark"].output_sqnr_db is None
    assert result["head"].output_sqnr_db is not None and result["head"].weight_sqnr_db is None


def test_a_quantizer_that_is_switched_off_returns_its_input_and_comes_back() -> None:
    quantizer = UniformQuantizer(2, signed=True, symmetric=True)
    quantizer.set_parameters(torch.tensor(1.0))
    x = torch.tensor([0.4, 0.6])
    with pytest.raises(ZeroDivisionError), disabled([quantizer, quantizer]):
        assert quantizer(x) is x
        raise ZeroDivisionError
    assert quantizer(x).tolist() == [0.0, 1.0]
    assert copy.deepcopy(quantizer)(x).tolist() == [0.0, 1.0]
