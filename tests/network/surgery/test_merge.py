"""Reparametrized tensors become plain ones; what comes of it is what one gets by removing them first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lowbit
from lowbit.errors import LayerError
from lowbit.network.surgery.merge import merge_reparametrized

pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")


class Doubled(nn.Module):
    """A parametrization of one's own."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def doubled(layer: nn.Module) -> nn.Module:
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def doubled_under_weight_norm(layer: nn.Module) -> nn.Module:
    return doubled(parametrizations.weight_norm(layer))


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


def pruned_twice(layer: nn.Module) -> nn.Module:
    return prune.random_structured(pruned(layer), "weight", amount=1, dim=0)


KINDS: dict[str, tuple[Callable[[nn.Module], nn.Module], str]] = {
    "weight norm": (parametrizations.weight_norm, "weight norm"),
    "spectral norm": (parametrizations.spectral_norm, "spectral norm"),
    "orthogonal": (parametrizations.orthogonal, "orthogonality"),
    "old weight norm": (nn.utils.weight_norm, "weight norm"),
    "old spectral norm": (nn.utils.spectral_norm, "spectral norm"),
    "own": (doubled, "Doubled"),
    "two": (doubled_under_weight_norm, "weight norm and Doubled"),
    "pruned": (pruned, "pruning"),
    "pruned twice": (pruned_twice, "pruning"),
}
EACH = pytest.mark.parametrize("kind", KINDS)
X = torch.randn(64, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network(kind: str) -> nn.Sequential:
    torch.manual_seed(3)
    middle = KINDS[kind][0](nn.Conv2d(8, 8, 3))
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), middle, nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()


def removed(net: nn.Sequential) -> nn.Sequential:
    """The same function with an ordinary layer, built by hand."""
    with torch.no_grad():
        net(X)
        plain = nn.Conv2d(8, 8, 3)
        plain.weight.copy_(net[2].weight)
        plain.bias.copy_(net[2].bias)
        copied = nn.Sequential(*(plain if index == 2 else copy.deepcopy(layer) for index, layer in enumerate(net)))
    return copied.eval()


@EACH
def test_the_merged_network_computes_the_same_with_ordinary_parameters(kind: str) -> None:
    net = network(kind)
    expected = net(X).detach()
    assert merge_reparametrized(net) == {"2.weight": KINDS[kind][1]}
    torch.testing.assert_close(net(X), expected, rtol=1e-5, atol=1e-6)
    assert type(net[2]) is nn.Conv2d
    assert sorted(net[2].state_dict()) == ["bias", "weight"]
    assert not net[2]._forward_pre_hooks


@EACH
@pytest.mark.parametrize("method", ["round_to_nearest", "lbq"])
def test_quantizing_gives_what_it_gives_without_the_reparametrization(kind: str, method: str, tmp_path: Path) -> None:
    net = network(kind)
    plain = removed(net)
    with torch.no_grad():
        net.train()(X[:1])  # what is computed by hooks is left with a graph, or from the last step
    expected = lowbit.quantize(removed(net.eval()), method=method, weight_bits=4, calibration=[X])
    got = lowbit.quantize(net, method=method, weight_bits=4, calibration=[X])
    torch.testing.assert_close(got(X), expected(X), rtol=1e-4, atol=1e-4 * float(plain(X).detach().abs().max()))
    assert f"{KINDS[kind][1]} was merged into plain parameters: 2.weight" in lowbit.summary(got).notes
    for file in ("net.lowbit", "net.onnx"):
        lowbit.export(got, tmp_path / file, sample=X[:8], **({"measure_speed": False} if file == "net.onnx" else {}))
    torch.testing.assert_close(lowbit.load(tmp_path / "net.lowbit")(X), got(X), rtol=1e-4, atol=1e-4)


@EACH
@pytest.mark.parametrize("method", ["lsq", "dorefa", "ewgs"])
def test_a_network_prepared_for_training_is_the_merged_one_and_learns(kind: str, method: str) -> None:
    net = network(kind)
    net.train()(X).sum().backward()  # hooks leave weights with a graph
    net.eval()
    expected = lowbit.prepare(removed(net), method=method, sample=X)
    prepared = lowbit.prepare(net, method=method, sample=X)
    torch.testing.assert_close(prepared(X), expected(X), rtol=1e-4, atol=1e-4)
    prepared.train()(X).square().sum().backward()
    assert float(prepared[2].parametrizations.weight.original.grad.abs().sum()) > 0


def test_the_users_network_keeps_its_reparametrization() -> None:
    net = network("weight norm")
    lowbit.quantize(net, method="round_to_nearest", calibration=[X])
    assert parametrize.is_parametrized(net[2], "weight")
    copied = copy.deepcopy(net)
    merge_reparametrized(copied)
    assert parametrize.is_parametrized(net[2], "weight")
    assert torch.equal(net(X), network("weight norm")(X))


def test_frozen_parameters_and_buffers_stay_what_they_are() -> None:
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    doubled(layer)
    layer.register_buffer("table", torch.ones(2))
    parametrize.register_parametrization(layer, "table", Doubled())
    assert merge_reparametrized(layer) == {"weight": "Doubled", "table": "Doubled"}
    assert not layer.weight.requires_grad
    assert dict(layer.named_buffers())["table"].tolist() == [2.0, 2.0]


def test_recurrent_layers_compute_with_the_merged_weight() -> None:
    torch.manual_seed(0)
    lstm = parametrizations.weight_norm(nn.LSTM(4, 6), "weight_hh_l0")
    x = torch.randn(5, 2, 4)
    expected = lstm(x)[0].detach()
    merge_reparametrized(lstm)
    torch.testing.assert_close(lstm(x)[0], expected)
    with torch.no_grad():
        lstm.weight_hh_l0.zero_()
    assert not torch.allclose(lstm(x)[0], expected)


def test_a_weight_that_a_hook_of_ones_own_computes_is_refused_by_the_layers_name() -> None:
    layer = nn.Linear(3, 3)
    raw = layer._parameters.pop("weight")
    layer.register_parameter("raw", raw)
    layer.weight = raw.detach()
    layer.register_forward_pre_hook(lambda module, _: setattr(module, "weight", module.raw * 2))
    with pytest.raises(LayerError, match=r"layer '0' .* its weight is no parameter"):
        lowbit.prepare(nn.Sequential(layer), sample=torch.ones(2, 3))
