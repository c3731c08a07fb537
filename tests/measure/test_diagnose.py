from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, LayerError
from lowbit.measure.diagnose import diagnose
from lowbit.measure.noise import sqnr_db
from lowbit.network.insert import input_quantizer, set_input_quantizer, set_weight_quantizer, weight_quantizer
from lowbit.network.layers import quantizable_layers
from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.uniform import observing
from lowbit.spec import Granularity


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5)]
    return nn.Sequential(*layers).eval()


def quantized(
    model: nn.Module, x: Tensor, *, weight_bits: int = 8, activation_bits: int = 8, granularity: Granularity | None = None
) -> nn.Module:
    model = copy.deepcopy(model)
    for layer in quantizable_layers(model).values():
        weights = UniformQuantizer(weight_bits, signed=True, symmetric=True, granularity=granularity or Granularity.channel(0))
        weights.initialize(layer.weight.detach())
        set_weight_quantizer(layer, weights)
        activations = UniformQuantizer(activation_bits, signed=False, symmetric=False)
        set_input_quantizer(layer, activations)
    quantizers = [input_quantizer(layer) for layer in quantizable_layers(model).values()]
    with torch.no_grad(), observing({str(place): quantizer for place, quantizer in enumerate(quantizers)}):
        model(x)
    for quantizer in quantizers:
        quantizer.take_observed()
    return model


DATA = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("name", ["0", "2", "4", "7"])
def test_a_weight_broken_on_purpose_ranks_first(name: str) -> None:
    model = network()
    broken = quantized(model, DATA)
    quantizer = weight_quantizer(broken.get_submodule(name))
    quantizer.set_parameters(quantizer.scale * 60)
    found = diagnose(broken, calibration=DATA, reference=model)
    assert (found.suspects[0].name, found.suspects[0].kind) == (name, "weight")
    assert found.suspects[0].share > 0.9
    assert found.suspects[0].only_on_db == min(s.only_on_db for s in found.suspects)
    assert found.suspects[0].only_off_db == max(s.only_off_db for s in found.suspects)
    assert any(line.startswith(f"{name} (weight, 8 bits") for line in found.findings)


def test_an_activation_broken_on_purpose_ranks_first_and_another_range_repairs_it() -> None:
    model = network()
    broken = quantized(model, DATA)
    quantizer = input_quantizer(broken[4])
    quantizer.set_parameters(quantizer.scale / 40, quantizer.zero_point)
    found = diagnose(broken, calibration=DATA, reference=model)
    worst = found.suspects[0]
    assert (worst.name, worst.kind, worst.layers) == ("4.input", "activation", ("4",))
    assert worst.range.clipped > 0.3
    best = max((r for r in found.remedies if r.suspect == "4.input"), key=lambda r: r.gain_db)
    assert best.gain_db == pytest.approx(worst.only_off_db - found.setting("all").sqnr_db, abs=1.0)  # nearly as good as float
    assert any("outside its grid" in line for line in found.findings)


def test_settings_are_those_of_the_network_with_its_quantizers_off() -> None:
    model = network()
    model4 = quantized(model, DATA, weight_bits=4)
    found = diagnose(model4, calibration=DATA, reference=model, remedies=0, evaluate=lambda m: float(m(DATA).sum()))
    with torch.no_grad():
        assert found.setting("all").sqnr_db == pytest.approx(sqnr_db(model(DATA), model4(DATA)), abs=1e-4)
        assert found.setting("all").score == pytest.approx(model4(DATA).sum().item(), rel=1e-4)
        assert found.setting("off").score == pytest.approx(model(DATA).sum().item(), rel=1e-4)
    assert found.setting("off").sqnr_db == math.inf
    assert found.setting("weights").sqnr_db < found.setting("activations").sqnr_db
    assert found.setting("all").sqnr_db <= found.setting("weights").sqnr_db + 1
    assert sum(s.share for s in found.suspects) == pytest.approx(1.0)
    assert found.samples == 16
    assert "conversion is sound" in found.findings[0]
    assert "the weights cost more" in found.findings[1]


def test_the_network_is_as_before_afterwards() -> None:
    model = quantized(network(), DATA, weight_bits=3).train()
    before, state = model(DATA), copy.deepcopy(model.state_dict())
    diagnose(model, calibration=DATA)
    assert torch.equal(model(DATA), before)
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_uneven_channels_are_found_and_a_scale_per_channel_helps() -> None:
    model = network()
    with torch.no_grad():
        model[2].weight[0] *= 30
        model[4].weight[:, 0] /= 30
    found = diagnose(quantized(model, DATA, weight_bits=4, granularity=Granularity.tensor()), calibration=DATA, reference=model)
    uneven = next(s for s in found.suspects if s.name == "2" and s.kind == "weight")
    ranges = model[2].weight.detach().flatten(1).abs().amax(1)
    assert uneven.range.channel_ratio == pytest.approx((ranges.max() / ranges.median()).item())
    assert uneven in found.suspects[:3]
    per_channel = next(r for r in found.remedies if r.suspect == "2" and "per output channel" in r.action)
    assert per_channel.gain_db > 0.5
    assert any(f"{uneven.range.channel_ratio:.1f} times the median" in line and "dfq" in line for line in found.findings)


def test_more_bits_come_with_the_policy_rule_that_asks_for_them() -> None:
    found = diagnose(quantized(network(), DATA, weight_bits=2), calibration=DATA, remedies=1)
    worst = found.suspects[0]
    remedy = next(r for r in found.remedies if r.action == "8 bits")
    assert remedy.rule == {"match": worst.name, "weight": 8}
    assert remedy.gain_db > 0
    assert any(f"{{match: {worst.name}, weight: 8}}" in line for line in found.findings)


def test_outliers_of_an_activation_are_measured() -> None:
    data = DATA.clone()
    data[0, 0, 0, 0] = 100.0
    found = diagnose(quantized(network(), data, activation_bits=4), calibration=data, remedies=8)
    inputs = next(s for s in found.suspects if s.name == "0.input")
    assert inputs.range.high == 100.0
    assert inputs.range.outlier_ratio == pytest.approx(
        100 / data.abs().flatten().kthvalue(int(data.numel() * 0.999)).values.item(), rel=0.05
    )


def test_a_conversion_that_changed_the_network_is_said_first() -> None:
    model = network()
    changed = quantized(model, DATA)
    with torch.no_grad():
        changed[0].bias += 0.5
    found = diagnose(changed, calibration=DATA, reference=model, remedies=0)
    assert found.setting("off").sqnr_db < 60
    assert "above 60 dB was expected" in found.findings[0]


def test_alternatives_are_measured_against_the_network_as_it_is() -> None:
    model = network()
    poor = quantized(model, DATA, weight_bits=3)
    found = diagnose(poor, calibration=DATA, reference=model, remedies=0, alternatives={"more": lambda: quantized(model, DATA)})
    (tried,) = found.remedies
    with torch.no_grad():
        gain = sqnr_db(model(DATA), quantized(model, DATA)(DATA)) - sqnr_db(model(DATA), poor(DATA))
    assert tried.gain_db == pytest.approx(gain, abs=1e-3)
    assert "quantize the network with more" in found.findings[-1]


def test_a_float_network_and_empty_data_are_refused() -> None:
    with pytest.raises(LayerError, match="Quantize it first"):
        diagnose(network(), calibration=DATA)
    with pytest.raises(CalibrationError):
        diagnose(quantized(network(), DATA), calibration=[])


def test_only_the_asked_samples_are_used_and_the_figures_are_plain_values() -> None:
    import json

    found = diagnose(quantized(network(), DATA), calibration=DATA.split(5), samples=7, remedies=1)
    assert found.samples == 7
    data = json.loads(json.dumps(found.to_dict()))
    assert [s["name"] for s in data["settings"]] == ["off", "weights", "activations", "all"]
    assert set(data["output_db"]) == {"0", "2", "4", "7"}
