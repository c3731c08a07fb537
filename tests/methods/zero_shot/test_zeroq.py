"""Distances and the start by hand; quantization behind ReLUs, on samples of its own or given ones."""

from __future__ import annotations

import pytest
import torch
from tests.networks import BranchNet
from tests.synthesis.networks import small
from torch import nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.methods.zero_shot.zeroq import Zeroq, ZeroqSamples, small_uniform, statistic_distance
from lowbit.models import load_default
from lowbit.network.insert import activation_quantizers
from lowbit.quantizers.running_range import MinMaxWeightQuantizer, RunningRangeQuantizer
from lowbit.synthesis.problem import make_problem, normal

SAMPLE = torch.zeros(2, 1, 8, 8)


def test_distances_are_summed_over_channels_and_averaged_over_samples() -> None:
    statistic = torch.tensor([[1.0, 2.0], [3.0, -2.0]], requires_grad=True)
    loss = statistic_distance(torch.tensor([1.0, 0.0]), statistic)
    loss.backward()
    assert float(loss.detach()) == (0 + 4 + 4 + 4) / 2
    assert statistic.grad is not None and statistic.grad.tolist() == [[0.0, 2.0], [2.0, -2.0]]


def test_the_released_start_is_a_grid_near_zero() -> None:
    start = small_uniform((400, 50), torch.Generator().manual_seed(0))
    codes = start * 5418.75 + 127.5
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert (round(float(codes.min())), round(float(codes.max()))) == (0, 254)
    assert float(start.abs().max()) == pytest.approx(127.5 / 5418.75)


def test_inputs_are_held_to_mean_zero_and_deviation_one_or_to_what_the_user_says() -> None:
    problem = make_problem(small(), Inputs((torch.zeros(1, 2, 6, 6),)), count=3)
    x = problem.draw(normal)
    mean, std = x.args[0].mean((2, 3)), (x.args[0].var((2, 3)) + 1e-6).sqrt()
    first, second = ZeroqSamples().input_terms(problem, x)
    torch.testing.assert_close(first, mean.square().sum() / 3)
    torch.testing.assert_close(second, (std - 1).square().sum() / 3)
    first, second = ZeroqSamples(input_mean=2.0, input_std=0.5, input_weight=3.0).input_terms(problem, x)
    torch.testing.assert_close(first, 3 * (mean - 2).square().sum() / 3)
    torch.testing.assert_close(second, 3 * (std - 0.5).square().sum() / 3)


def test_the_loss_adds_all_norms_and_the_inputs() -> None:
    problem = make_problem(small(), Inputs((torch.zeros(1, 2, 6, 6),)), count=3)
    method, x = ZeroqSamples(), problem.draw(normal)
    terms = [*method.norm_terms(problem, x, range(3)), *method.input_terms(problem, x)]
    assert len(terms) == 2 * 2 + 2
    torch.testing.assert_close(method.loss(problem, x, range(3)), torch.stack(terms).sum())


def test_samples_come_nearer_to_the_norms_than_noise_and_their_pixels_have_the_scale_of_inputs() -> None:
    data = lowbit.synthesize(load_default(), method="zeroq", shape=(1, 8, 8), count=16, iterations=150, seed=2)
    assert data.losses[-1] < data.losses[0] / 20
    for entry in data.statistics:
        assert entry.samples.mean_error < entry.noise.mean_error and entry.samples.std_error < entry.noise.std_error, entry.norm
    pixels = data.inputs.args[0]
    assert abs(float(pixels.mean())) < 0.2 and 0.7 < float(pixels.std()) < 1.3


def test_activations_behind_relus_alone_are_quantized_and_weights_of_all_layers() -> None:
    model = load_default()
    quantized = lowbit.quantize(model, method="zeroq", policy="paper", weight_bits=4, activation_bits=5, sample=SAMPLE, iterations=5)
    layers = {layer.name: layer for layer in lowbit.summary(quantized).layers}
    assert {layer.weight_bits for layer in layers.values()} == {4}
    assert {name for name, layer in layers.items() if layer.activation_bits is None} == {"conv", "fc"}
    assert "no ReLU gives it" in layers["fc"].reason
    found = activation_quantizers(quantized)
    assert list(found) == [f"{name}.output" for name in RELUS]
    assert all(isinstance(q, RunningRangeQuantizer) and q.bit_width == 5 and not q.training and float(q.lower) == 0 for q in found.values())
    assert isinstance(quantized.norm, nn.BatchNorm2d)
    weight = quantized.block1.conv1.parametrizations.weight[0].quantizer
    assert isinstance(weight, MinMaxWeightQuantizer) and torch.equal(weight(model.block1.conv1.weight), quantized.block1.conv1.weight)


RELUS = ("relu", "block1.relu1", "block1.relu2", "block2.relu1", "block2.relu2", "separable.relu1", "separable.relu2")


def test_ranges_are_running_extremes_of_the_quantized_network_on_the_given_data() -> None:
    model, data = small(), torch.randn(40, 2, 6, 6)
    quantized = lowbit.quantize(model, method="zeroq", policy="paper", weight_bits=3, activation_bits=3, calibration=[data[:20], data[20:]])
    first, second = activation_quantizers(quantized).values()
    with torch.no_grad():
        conv = nn.functional.conv2d(data, MinMaxWeightQuantizer(3)(model[0].weight), model[0].bias, padding=1)
        hidden = model[1](conv).relu()
        assert float(first.upper) == pytest.approx(float(hidden.max())) and float(first.lower) == 0
        fresh, outputs = RunningRangeQuantizer(3), []
        for part in hidden.split(20):
            outputs.append(fresh(part))
        conv = nn.functional.conv2d(torch.cat(outputs), MinMaxWeightQuantizer(3)(model[3].weight), model[3].bias)
        assert float(second.upper) == pytest.approx(float(model[4](conv).relu().max()))


@pytest.mark.parametrize("options", [{"fold": True}, {"placement": "layers"}, {"activation_observer": "perc", "percentile": 99.0}])
def test_options_change_where_and_how_ranges_are_found(options: dict[str, object]) -> None:
    model, data = small(), torch.randn(40, 2, 6, 6)
    quantized = lowbit.quantize(model, method="zeroq", weight_bits=8, activation_bits=8, calibration=data, **options)
    assert isinstance(quantized[1], nn.Identity if "fold" in options else nn.BatchNorm2d)
    layers = lowbit.summary(quantized).layers
    assert (None in {layer.activation_bits for layer in layers}) is ("placement" not in options)
    with torch.no_grad():
        torch.testing.assert_close(quantized(data), model(data), atol=0.1, rtol=0.1)


def test_without_data_it_makes_its_own_samples_by_any_synthesis_method() -> None:
    for synthesis in ("zeroq", "dsg"):
        quantized = lowbit.quantize(
            load_default(), method="zeroq", sample=SAMPLE, samples=9, iterations=3, synthesis=synthesis, weight_bits=8, activation_bits=8
        )
        assert f"9 samples that {synthesis} made" in " ".join(lowbit.summary(quantized).notes)
    with pytest.raises(LayerError, match="Pass calibration data instead"):
        lowbit.quantize(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3)), method="zeroq", sample=SAMPLE)
    weights_alone = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3))
    assert lowbit.summary(lowbit.quantize(weights_alone, method="zeroq", activation_bits=None, sample=SAMPLE)).layers[0].weight_bits == 8


def test_a_network_without_a_dataflow_is_quantized_at_its_layers() -> None:
    quantized = lowbit.quantize(BranchNet(), method="zeroq", calibration=torch.rand(8, 3, 6, 6), weight_bits=8, activation_bits=8)
    assert "activations are quantized at layers, not behind ReLUs" in " ".join(lowbit.summary(quantized).notes)


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(SpecError, match="iterations must be 1 or more"):
        ZeroqSamples(iterations=0)
    with pytest.raises(SpecError, match="percentile must be from 50 to 100"):
        Zeroq(percentile=0.9)
