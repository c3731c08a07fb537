"""Grids scale with the values down to 1e-30: small is not zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer, UniformQuantizer
from lowbit.quantizers.ranges.observers import OBSERVERS, make_observer
from lowbit.spec import Granularity

SMALL = pytest.mark.parametrize("factor", [2.0**-30, 2.0**-60, 2.0**-100])
VALUES = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))


def quantized(quantizer: Quantizer, x: Tensor) -> Tensor:
    quantizer.initialize(x)
    return quantizer(x).detach()


@SMALL
@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(0)], ids=str)
@pytest.mark.parametrize("name", OBSERVERS)
def test_every_observer_finds_the_same_codes_for_small_values(name: str, granularity: Granularity, factor: float) -> None:
    def make() -> Quantizer:
        return UniformQuantizer(4, signed=True, symmetric=True, granularity=granularity, observer=make_observer(name, granularity))

    small, large = quantized(make(), VALUES * factor) / factor, quantized(make(), VALUES)
    torch.testing.assert_close(small, large, rtol=1e-3, atol=1e-6)


@SMALL
def test_learned_scales_start_alike_and_stay_in_a_step(factor: float) -> None:
    small, large = (LearnedScaleQuantizer(4, signed=True) for _ in range(2))
    torch.testing.assert_close(quantized(small, VALUES * factor) / factor, quantized(large, VALUES), rtol=1e-5, atol=1e-6)
    before = small.scale.detach().clone()
    small.project()
    assert torch.equal(small.scale, before)


def test_a_row_of_zeros_beside_small_ones_has_the_scale_1() -> None:
    quantizer = UniformQuantizer(
        8, signed=True, symmetric=True, granularity=Granularity.channel(0), observer=make_observer("mse", Granularity.channel(0))
    )
    rows = torch.stack([torch.zeros(20), torch.linspace(-1e-30, 1e-30, 20), torch.linspace(-1, 1, 20)])
    assert float((quantized(quantizer, rows) - rows)[2].abs().max()) < 0.01
    assert float((quantizer(rows) - rows)[1].abs().max()) < 1e-32
    assert quantizer.scale[0].item() == 1.0


@pytest.mark.parametrize("method", ["round_to_nearest", "lbq"])
def test_a_network_whose_first_layer_gives_small_values_is_quantized_as_one_without(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    x = torch.randn(64, 8)
    expected = lowbit.quantize(net, method=method, calibration=[x])(x)
    with torch.no_grad():
        net[0].weight.mul_(2.0**-90), net[0].bias.mul_(2.0**-90), net[2].weight.mul_(2.0**90)
    torch.testing.assert_close(lowbit.quantize(net, method=method, calibration=[x])(x), expected, rtol=0, atol=5e-3)
