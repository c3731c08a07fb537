"""Activation instability: by hand, and on networks that know nothing of quantization."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import lowbit
from lowbit.measure.instability import InstabilityMeter, convolve, output_divergence


def test_the_divergence_is_that_of_two_normal_distributions() -> None:
    old = torch.tensor([[[0.0, 2.0]], [[4.0, 2.0]]])  # mean 2, variance 8 / 3
    new = 2 * old + 1  # mean 5, variance 32 / 3
    expected = math.log(0.5) + (32 / 3 + 9) / (2 * 8 / 3) - 0.5
    assert output_divergence(new, old).item() == pytest.approx(expected, rel=1e-5)
    assert output_divergence(10 * new, 10 * old).item() == pytest.approx(expected, rel=1e-5)
    assert output_divergence(old, old).item() == 0


def test_channels_without_a_deviation_are_left_out() -> None:
    torch.manual_seed(0)
    y, z = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    y[:, 1] = 7.0
    z[:, 2] = 0.0
    assert output_divergence(y, z).item() == pytest.approx(output_divergence(y[:, :1], z[:, :1]).item())
    assert output_divergence(torch.ones(2, 3, 4), torch.ones(2, 3, 4)).isnan()


class Shift(nn.Module):
    """One convolution whose weight the tests set."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def run(meter: InstabilityMeter, model: Shift, *weights: float) -> None:
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for weight in weights:
        with torch.no_grad():
            model.conv.weight.fill_(weight)
        with meter.watching(model):
            model(x)
            model(x)  # a second pass of the same step sees the same weights
        meter.step()


def test_the_metric_is_a_running_mean_of_divergences_that_are_not_too_large() -> None:
    meter, model = InstabilityMeter(decay=0.5), Shift()
    run(meter, model, 1.0)
    assert meter.metric == {}
    run(meter, model, 1.2)
    x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    one = output_divergence(1.2 * x, x).item()
    assert 0.01 < one < 1 and meter.metric["conv"] == pytest.approx(one / 2, rel=1e-4)
    run(meter, model, 1.2)
    assert meter.metric["conv"] == pytest.approx(one / 4, rel=1e-4)
    run(meter, model, 9.0)  # a divergence above 1 does not count
    assert output_divergence(9 * x, 1.2 * x) > 1 and meter.metric["conv"] == pytest.approx(one / 4, rel=1e-4)
    meter.forget()
    run(meter, model, 1.2)  # nothing before it
    assert meter.metric["conv"] == pytest.approx(one / 4, rel=1e-4)


def test_quantized_weights_are_measured_as_the_layer_sees_them() -> None:
    meter, x = InstabilityMeter(), torch.randn(16, 2, 6, 6)
    model = lowbit.prepare(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)), method="lsq", weight_bits=2, sample=x).train()
    for shift in (0.0, 1e-7):  # too little to change a code
        with torch.no_grad():
            model[0].parametrizations.weight.original.add_(shift)
        with meter.watching(model):
            model(x)
        meter.step()
    assert meter.metric == {"0": 0.0, "1": 0.0}
    assert not any(module._forward_hooks and name.endswith("weight") for name, module in model.named_modules())


@pytest.mark.parametrize(
    "options", [{"padding": 1, "padding_mode": "reflect"}, {"padding": "same", "padding_mode": "circular"}, {"padding": 2, "dilation": 2}]
)
def test_outputs_with_other_weights_are_those_of_the_layer_itself(options: dict[str, object]) -> None:
    layer, x = nn.Conv2d(2, 3, 3, bias=False, **options), torch.randn(2, 2, 7, 8)  # type: ignore[arg-type]
    torch.testing.assert_close(convolve(layer, x, layer.weight), layer(x))
    assert convolve(layer, x[0], layer.weight).shape[0] == 1
