"""DFQ: what it does to a network without looking at data."""

from __future__ import annotations

import pytest
import torch
from tests.networks import BranchNet, TinyNet, settled
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import CalibrationError, GraphError, SpecError
from lowbit.methods.post_training.dfq import OffsetQuantizer, channel_mean, corrected_bias, empirically_corrected_bias
from lowbit.network.graph.moments import clipped_normal_moments
from lowbit.network.insert import activation_quantizers, quantized_layers, weight_quantizer
from lowbit.quantizers import UniformQuantizer
from lowbit.spec import Granularity
from lowbit.testing import tiny

X = torch.randn(128, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def dfq(model: nn.Module, **options: object) -> nn.Module:
    settings = {"method": "dfq", "weight_bits": 8, "activation_bits": 8, "sample": X[:2], "input_range": (-4.0, 4.0), **options}
    return lowbit.quantize(model, **settings)  # type: ignore[arg-type]


def sqnr(model: nn.Module, other: nn.Module, x: Tensor = X) -> float:
    return tiny.sqnr_db(tiny.outputs(model, x), tiny.outputs(other, x))


def notes(model: nn.Module) -> str:
    return " ".join(lowbit.summary(model).notes)


class Depthwise(nn.Module):
    """Expand, depthwise, project with norms and ReLU6, residual."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.block = nn.Sequential(
            nn.Conv2d(8, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(),
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(),
            nn.Conv2d(channels, 8, 1, bias=False), nn.BatchNorm2d(8),
        )  # fmt: skip
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head((x + self.block(x)).mean((2, 3)))


def unbalanced_depthwise() -> nn.Module:
    """Channels whose ranges differ by factors up to 4096, without any effect on the function (nothing is clipped at 6)."""
    torch.manual_seed(0)
    model = Depthwise()
    settled(model, X)
    factor = torch.exp2(torch.linspace(-6, 6, 16)[torch.randperm(16)])
    with torch.no_grad():
        norm, depthwise = model.block[1], model.block[3]
        norm.weight.mul_(0.05 * factor / factor.max())
        norm.bias.mul_(0.05 * factor / factor.max())
        depthwise.weight.mul_((factor.max() / factor / 0.05)[:, None, None, None])
    return model.eval()


def test_an_unbalanced_network_is_repaired_without_data() -> None:
    model = unbalanced_depthwise()
    plain = lowbit.quantize(
        model,
        method="round_to_nearest",
        weight_granularity="per_tensor",
        weight_observer="min_max",
        activation_observer="min_max",
        calibration=X,
    )
    repaired = dfq(model)
    assert sqnr(model, plain) < 15
    assert sqnr(model, repaired) > sqnr(model, plain) + 10


def test_without_quantization_noise_the_function_stays() -> None:
    model = settled(TinyNet(), X)
    only_equalized = dfq(model, activation_bits=None, bias_correction="none", absorb_bias="none")
    for layer in quantized_layers(only_equalized).values():
        nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    torch.testing.assert_close(tiny.outputs(only_equalized, X), tiny.outputs(model, X), rtol=1e-3, atol=1e-4)


def test_weights_have_one_scale_and_ranges_come_from_statistics() -> None:
    model = dfq(settled(TinyNet(), X))
    for name, layer in quantized_layers(model).items():
        quantizer = weight_quantizer(layer)
        assert isinstance(quantizer, UniformQuantizer)
        assert quantizer.scale.numel() == 1, name
        assert quantizer.symmetric
    ranges = {
        name: float(q.scale) * (q.qmax - q.qmin) for name, q in activation_quantizers(model).items() if isinstance(q, UniformQuantizer)
    }
    assert len(ranges) >= 4
    assert ranges["stem.input"] == pytest.approx(8.0, rel=1e-3), ranges
    assert "no data was used" in notes(model)


def test_the_corrected_bias_restores_the_expected_output() -> None:
    torch.manual_seed(0)
    mean, std = torch.randn(6), torch.rand(6) + 0.1
    x = (mean + std * torch.randn(200_000, 6)).clamp(0, 6)
    weight = torch.randn(4, 6)
    rounded, bias = (weight * 2).round() / 2, torch.randn(4)
    expected, _ = clipped_normal_moments(mean, std, 0.0, 6.0)
    corrected = corrected_bias(bias.double(), weight.double(), rounded.double(), expected)
    wanted = (x @ weight.T + bias).mean(0)
    torch.testing.assert_close((x @ rounded.T + corrected.float()).mean(0), wanted, rtol=0.01, atol=0.01)
    assert ((x @ rounded.T + bias).mean(0) - wanted).abs().max() > 0.1
    empirical = empirically_corrected_bias(bias, channel_mean(x @ weight.T + bias), channel_mean(x @ rounded.T + bias))
    torch.testing.assert_close(empirical.float(), corrected.float(), rtol=0.02, atol=0.02)


def test_a_depthwise_layer_is_corrected_channel_by_channel() -> None:
    weight, quantized = torch.ones(3, 1, 2, 2), torch.ones(3, 1, 2, 2) * torch.tensor([1.5, 1.0, 0.5]).reshape(3, 1, 1, 1)
    corrected = corrected_bias(torch.zeros(3), weight, quantized, torch.tensor([1.0, 2.0, 3.0]), groups=3)
    torch.testing.assert_close(corrected, torch.tensor([-2.0, 0.0, 6.0]))


def test_empirical_correction_makes_output_means_those_of_the_float_network() -> None:
    model = settled(TinyNet(), X)
    coarse = {"weight_bits": 3, "activation_bits": None, "calibration": X}
    off, on = (dfq(model, bias_correction=kind, **coarse) for kind in ("none", "empirical"))
    wanted = tiny.outputs(model, X).mean(0)
    assert (tiny.outputs(on, X).mean(0) - wanted).abs().max() < 0.1 * (tiny.outputs(off, X).mean(0) - wanted).abs().max()


def test_analytic_correction_helps_a_coarse_network() -> None:
    model = tiny.trained()
    images = tiny.held_out()
    off, on = (
        lowbit.quantize(
            model, method="dfq", weight_bits=4, activation_bits=None, sample=images[:2], input_range=(-4, 4), bias_correction=kind
        )
        for kind in ("none", "analytic")
    )
    bias = {name: (tiny.outputs(m, images) - tiny.outputs(model, images)).mean(0).abs().mean() for name, m in (("off", off), ("on", on))}
    assert bias["on"] < bias["off"]


def test_relu6_is_scaled_replaced_or_ends_the_chain() -> None:
    model = settled(Depthwise(), X)
    scaled, replaced, kept = (dfq(model, relu6=kind) for kind in ("scale", "replace", "keep"))
    assert [sum(isinstance(m, nn.ReLU6) for m in result.modules()) for result in (scaled, replaced, kept)] == [0, 0, 2]
    assert "a limit for each channel in 2 places" in notes(scaled)
    assert "ReLU6 became ReLU in 2 places" in notes(replaced)
    assert sum(isinstance(m, nn.ReLU6) for m in model.modules()) == 2  # the caller's network is not changed


def test_a_network_that_relies_on_its_clips_keeps_them() -> None:
    model = settled(Depthwise(), X)
    with torch.no_grad():
        for norm in (model.block[1], model.block[4]):  # type: ignore[index]
            norm.weight *= 6  # now a good part of the values is above 6
    scaled, replaced = (dfq(model, relu6=kind, calibration=X) for kind in ("scale", "replace"))
    assert sqnr(model, scaled) > 25
    assert sqnr(model, replaced) < 10


def test_clipped_weights_get_a_narrower_range() -> None:
    model = settled(TinyNet(), X)
    with torch.no_grad():
        model.conv1.weight[0, 0, 0, 0] = 30.0  # type: ignore[union-attr, operator]
    wide, narrow = dfq(model, equalize="none"), dfq(model, equalize="none", weight_clip=0.5)
    scales = [weight_quantizer(m.get_submodule("conv1")).scale.item() for m in (wide, narrow)]  # type: ignore[union-attr]
    assert scales[0] > 10 * scales[1]
    assert scales[1] == pytest.approx(0.5 / 127, rel=1e-3)


def test_a_real_offset_puts_levels_from_the_least_weight_to_the_largest() -> None:
    quantizer = OffsetQuantizer(2)
    x = torch.tensor([-0.5, 0.05, 0.3, 1.0], requires_grad=True)
    quantizer.initialize(x)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == pytest.approx([-0.5, 0.0, 0.5, 1.0])
    assert x.grad is not None and x.grad.tolist() == pytest.approx([1, 1, 1, 1])
    assert torch.equal(quantizer.encode(x).decode(), y)
    constant = OffsetQuantizer(2, granularity=Granularity.channel())
    constant.initialize(torch.full((2, 3), 0.25))
    assert constant(torch.full((2, 3), 0.25)).unique().tolist() == [0.25]


def test_a_network_with_real_offsets_keeps_its_codes_and_function() -> None:
    model = unbalanced_depthwise()
    quantized = dfq(model, real_offset=True)
    for layer in quantized_layers(quantized).values():
        quantizer = weight_quantizer(layer)
        assert isinstance(quantizer, OffsetQuantizer)
    assert sqnr(model, quantized) > sqnr(model, dfq(model)) - 1  # dB; a grid that need not hold 0 has finer steps


def test_statistics_give_ranges_and_a_network_without_norms_is_told_by_its_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)).eval()
    assert sqnr(model, dfq(model)) > 20


def test_what_is_not_known_is_an_error_that_names_the_operation() -> None:
    class Softmaxed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).softmax(-1).sort(-1)[0])

    with pytest.raises(CalibrationError, match=r"'softmax'.*Pass calibration="):
        lowbit.quantize(Softmaxed().eval(), method="dfq", sample=torch.randn(2, 8), input_range=(-1, 1))
    lowbit.quantize(Softmaxed().eval(), method="dfq", calibration=torch.randn(16, 8))  # data tells it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_sigma": 0}, "n_sigma must be above 0"),
        ({"input_range": (1.0, -1.0)}, "two ascending numbers"),
        ({"input_range": (1.0,)}, "two ascending numbers"),
        ({"weight_clip": -1.0}, "weight_clip must be above 0"),
        ({"equalize": "all"}, "must be one of 'pairs', 'sets', 'none'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dfq(TinyNet().eval(), **options)


def test_missing_data_or_dataflow_is_an_error() -> None:
    with pytest.raises(CalibrationError, match="empirical bias correction needs calibration data"):
        dfq(TinyNet().eval(), bias_correction="empirical")
    with pytest.raises(GraphError, match="'dfq' needs the network's dataflow"):
        dfq(BranchNet().eval())
