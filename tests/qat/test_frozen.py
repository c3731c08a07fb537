"""What the user froze stays as it was, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.network.insert import weight_sites
from lowbit.registry import MethodInfo, list_methods

X = torch.randn(32, 3, 6, 6, generator=torch.Generator().manual_seed(0))
DATA = X, torch.arange(32) % 4


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    ).train()


def trained(net: nn.Module, method: str = "lsq") -> nn.Module:
    return lowbit.train(net, DATA, method=method, recipe=lowbit.Recipe(epochs=2, batch_size=8))


def statistics(norm: nn.Module) -> list[Tensor]:
    return [buffer.clone() for buffer in norm.buffers()]


def same(before: list[Tensor], after: list[Tensor]) -> bool:
    return all(map(torch.equal, before, after))


def test_norms_in_evaluation_mode_keep_their_statistics_and_others_do_not() -> None:
    net = network()
    net[1].eval()
    model = trained(net)
    assert same(statistics(net[1]), statistics(model[1]))
    assert not same(statistics(net[4]), statistics(model[4]))


def test_norms_whose_parameters_are_frozen_keep_their_statistics() -> None:
    net = network()
    net[4].requires_grad_(False)
    model = trained(net)
    assert same(statistics(net[4]), statistics(model[4]))
    assert not same(statistics(net[1]), statistics(model[1]))
    assert torch.equal(net[4].weight, model[4].weight)


def test_all_norms_learn_in_a_network_that_comes_in_evaluation_mode() -> None:
    net = network().eval()
    model = trained(net)
    assert not any(same(statistics(net[index]), statistics(model[index])) for index in (1, 4))


@pytest.mark.parametrize("info", list_methods(kind="training"), ids=lambda info: info.name)
def test_frozen_weights_stay_bit_identical(info: MethodInfo) -> None:
    net = network()
    net[3].weight.requires_grad_(False).mul_(8)  # some are beyond 1, where methods clip
    bits = [
        None if widths is None else min(widths, key=lambda width: abs(width - 3)) for widths in (info.weight_bits, info.activation_bits)
    ]
    recipe = lowbit.Recipe(epochs=2, batch_size=8)
    model = lowbit.train(net, DATA, method=info.name, weight_bits=bits[0], activation_bits=bits[1], recipe=recipe)
    sites = weight_sites(model)
    assert torch.equal(sites["3"].original, net[3].weight)
    if sites["0"].quantizer is not None:
        assert not torch.equal(sites["0"].original, net[0].weight)
