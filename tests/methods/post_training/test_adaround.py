"""AdaRound: better than rounding to nearest on what it sees, every code up or down by one, any layer, any bits."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.networks import DictOutputNet, LoopNet, TwoInputNet, settled
from torch import Tensor, nn

from lowbit.errors import CalibrationError, SpecError
from lowbit.methods.post_training.adaround import Adaround
from lowbit.models.resnet import resnet8
from lowbit.network.insert import bake_weights, float_weight, quantized_layers, weight_quantizer
from lowbit.network.layers import output_channel_axis
from lowbit.network.record import record_of
from lowbit.spec import BitPolicy
from lowbit.workflows.quantize import quantize, run_job

QUICK = {"iterations": 300, "learning_rate": 0.02, "batch_size": 16}


def correlated(*shape: int) -> Tensor:
    """Samples that share most of their values: the case where roundings must compensate each other."""
    return 0.3 * torch.randn(shape) + torch.randn(shape[0], *[1] * (len(shape) - 1)) + 0.5


def error(layer: nn.Module, reference: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        return (layer(data) - reference(data)).square().mean().item()


LAYERS = {
    "conv": (nn.Conv2d, (8, 6, 3), {}, (24, 8, 6, 6)),
    "grouped": (nn.Conv2d, (8, 4, 3), {"groups": 2}, (24, 8, 6, 6)),
    "depthwise": (nn.Conv2d, (8, 8, 3), {"groups": 8, "padding": 1}, (24, 8, 6, 6)),
    "multiplier": (nn.Conv2d, (4, 8, 3), {"groups": 4, "bias": False}, (24, 4, 6, 6)),
    "dilated": (nn.Conv2d, (8, 5, 3), {"dilation": 2}, (24, 8, 8, 8)),
    "transposed": (nn.ConvTranspose2d, (8, 6, 3), {"stride": 2}, (24, 8, 4, 4)),
    "transposed_grouped": (nn.ConvTranspose2d, (8, 6, 2), {"groups": 2}, (24, 8, 4, 4)),
    "conv1d": (nn.Conv1d, (8, 6, 3), {}, (24, 8, 10)),
    "conv3d": (nn.Conv3d, (4, 6, 2), {}, (24, 4, 3, 3, 3)),
    "linear": (nn.Linear, (12, 7), {}, (24, 12)),
    "linear_on_sequences": (nn.Linear, (12, 7), {}, (24, 5, 12)),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_every_kind_of_layer_gets_codes_one_step_from_its_weight_and_a_smaller_error(kind: str, granularity: str) -> None:
    make, sizes, options, shape = LAYERS[kind]
    layer = make(*sizes, **options)
    data = correlated(*shape)
    arguments = {"weight_bits": 3, "activation_bits": None, "policy": BitPolicy.uniform(3, None, first_last=None), "calibration": data}
    model = nn.Sequential(layer)
    nearest = quantize(model, method="round_to_nearest", weight_granularity=granularity, **arguments)
    learned = quantize(model, method="adaround", weight_granularity=granularity, **QUICK, **arguments)
    assert error(learned, model, data) < 0.8 * error(nearest, model, data)

    quantizer = weight_quantizer(learned[0])
    assert torch.equal(quantizer.scale, weight_quantizer(nearest[0]).scale)
    assert quantizer.granularity.axis == (output_channel_axis(layer) if granularity == "per_channel" else 0)
    codes, position = quantizer.encode(float_weight(learned[0])).codes.float(), layer.weight.detach() / quantizer.scale
    inside = (position >= -4) & (position <= 3)
    assert ((codes == position.floor()) | (codes == position.floor() + 1))[inside].all()
    assert torch.equal(codes[~inside], position.clamp(-4, 3)[~inside].round())
    assert not torch.equal(codes, weight_quantizer(nearest[0]).encode(layer.weight.detach()).codes.float())


def test_a_tiny_layer_ends_near_the_best_of_all_roundings() -> None:
    layer = nn.Linear(9, 1, bias=False)
    data = correlated(64, 9)
    arguments = {"weight_bits": 3, "activation_bits": None, "policy": BitPolicy.uniform(3, None, first_last=None), "calibration": data}
    model = nn.Sequential(layer)
    learned = quantize(model, method="adaround", iterations=1500, learning_rate=0.02, **arguments)
    scale = weight_quantizer(learned[0]).scale.flatten()
    floor = (layer.weight.detach()[0] / scale).floor()
    choices = (floor + torch.tensor(list(itertools.product([0.0, 1.0], repeat=9)))).clamp(-4, 3) * scale
    errors = ((choices - layer.weight.detach()) @ data.T).square().mean(1).sort().values
    nearest = error(quantize(model, method="round_to_nearest", **arguments), model, data)
    got = error(learned, model, data)
    assert got <= errors[5] * 1.0001  # among the best 6 of 512
    assert got < 0.2 * nearest


def test_with_white_inputs_rounding_to_nearest_is_the_best_and_is_found() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    data = torch.eye(16) * 4  # the error at the output is that of the weights themselves
    arguments = {"weight_bits": 4, "activation_bits": None, "policy": BitPolicy.uniform(4, None, first_last=None), "calibration": data}
    nearest = quantize(model, method="round_to_nearest", **arguments)
    learned = quantize(model, method="adaround", iterations=1000, learning_rate=0.02, **arguments)
    assert torch.equal(learned[0].weight, nearest[0].weight)


def residual(width: int = 8) -> tuple[nn.Module, Tensor]:
    data = torch.randn(48, 3, 8, 8) + torch.randn(48, 3, 1, 1)
    return settled(resnet8(num_classes=6, width=width), data), data


def test_each_layer_gets_the_bits_of_its_policy() -> None:
    model, data = residual()
    policy = (
        BitPolicy.uniform(4, 8)
        .with_rule(match="layer1.*", weight=2)
        .with_rule(match="layer2.0.conv1", weight=6, activation=5)
        .keep_float("layer3.*")
    )
    result = quantize(model, method="adaround", policy=policy, calibration=data, **{**QUICK, "iterations": 20})
    bits = {name: weight_quantizer(layer).bit_width for name, layer in quantized_layers(result).items()}
    assert bits == {
        "conv": 8, "layer1.0.conv1": 2, "layer1.0.conv2": 2, "layer2.0.conv1": 6, "layer2.0.conv2": 4, "layer2.0.downsample.0": 4, "fc": 8,
    }  # fmt: skip
    for name, code in bake_weights(result)[1].items():
        width = bits[name.removesuffix(".weight")]
        assert -(2 ** (width - 1)) <= code.codes.min() < code.codes.max() <= 2 ** (width - 1) - 1


def test_the_whole_network_is_nearer_to_float_than_by_rounding_to_nearest() -> None:
    model, data = residual()
    arguments = {"weight_bits": 3, "activation_bits": 8, "calibration": data[:32]}
    nearest = quantize(model, method="round_to_nearest", **arguments)
    learned = quantize(model, method="adaround", **QUICK, **arguments)
    assert error(learned, model, data[:32]) < 0.6 * error(nearest, model, data[:32])
    assert error(learned, model, data[32:]) < 0.8 * error(nearest, model, data[32:])


def test_asymmetric_learning_makes_up_for_the_errors_of_earlier_layers() -> None:
    torch.manual_seed(4)
    layers = [layer for _ in range(4) for layer in (nn.Linear(10, 10), nn.ReLU())]
    model, data = nn.Sequential(*layers), correlated(64, 10)
    arguments = {"weight_bits": 2, "activation_bits": None, "policy": BitPolicy.uniform(2, None, first_last=None), "calibration": data}
    asymmetric, symmetric = (quantize(model, method="adaround", asymmetric=flag, **QUICK, **arguments) for flag in (True, False))
    assert error(asymmetric, model, data) < 0.8 * error(symmetric, model, data)
    assert torch.equal(asymmetric[0].weight, symmetric[0].weight)  # the first layer has no earlier one


def test_one_sample_is_enough_to_run_and_to_gain_on_it() -> None:
    model, data = residual()
    arguments = {"weight_bits": 3, "activation_bits": None, "calibration": data[:1]}
    nearest, learned = (
        quantize(model, method=name, **options, **arguments) for name, options in (("round_to_nearest", {}), ("adaround", QUICK))
    )
    assert error(learned, model, data[:1]) < 0.5 * error(nearest, model, data[:1])


def test_bfloat16_ends_near_float32() -> None:
    model, data = residual()
    arguments = {"weight_bits": 3, "activation_bits": None, "calibration": data}
    exact, rough = (quantize(model, method="adaround", precision=precision, **QUICK, **arguments) for precision in ("fp32", "bf16"))
    nearest = quantize(model, method="round_to_nearest", **arguments)
    assert error(rough, model, data) < 0.7 * error(nearest, model, data)
    assert error(rough, model, data) < 1.5 * error(exact, model, data)
    assert float_weight(rough.conv).dtype == torch.float32


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_data_that_is_not_finite_is_refused(value: float) -> None:
    model, data = residual()
    data[40, 1, 2, 3] = value
    with pytest.raises(CalibrationError, match=r"calibration batch 1, input 0 .*1 of \d+ values are NaN or infinite"):
        quantize(model, method="adaround", weight_bits=3, calibration=data, **QUICK)


def test_calibration_data_is_needed() -> None:
    model, data = residual()
    with pytest.raises(CalibrationError, match="'adaround' needs calibration data"):
        quantize(model, method="adaround", weight_bits=3, sample=data[:1])


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_without_a_uniform_grid_are_refused(bits: int) -> None:
    model, data = residual()
    with pytest.raises(SpecError, match="bit"):
        quantize(model, method="adaround", weight_bits=bits, calibration=data)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("iterations", -1),
        ("batch_size", 0),
        ("learning_rate", 0.0),
        ("regularization", -1.0),
        ("schedule", "steps"),
        ("cache", "tape"),
        ("save_every", 0),
    ],
)
def test_options_out_of_range_are_refused(option: str, value: object) -> None:
    model, data = residual()
    with pytest.raises(SpecError, match=f"{option}.*{value}"):
        quantize(model, method="adaround", weight_bits=3, calibration=data[:4], **{"iterations": 1, option: value})


def test_awkward_networks_are_reconstructed_where_they_can_be() -> None:
    vectors = torch.randn(20, 6)
    job = run_job(LoopNet(), Adaround(**QUICK), BitPolicy.uniform(4, 8), vectors)
    assert any("'layers.2' is rounded to nearest" in note for note in job.table.notes)
    images, pair = torch.randn(20, 3, 4, 4), torch.randn(20, 5)
    for model, data in ((TwoInputNet(), [(images, pair)]), (DictOutputNet(), images)):
        result = quantize(model.eval(), method="adaround", weight_bits=3, activation_bits=None, calibration=data, **QUICK)
        plain = quantize(model.eval(), method="round_to_nearest", weight_bits=3, activation_bits=None, calibration=data)
        changed = [
            name for name, layer in quantized_layers(result).items() if not torch.equal(layer.weight, quantized_layers(plain)[name].weight)
        ]
        assert changed
        assert [note for note in record_of(result).table.notes if "nearest" in note] == []
