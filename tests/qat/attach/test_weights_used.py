"""Layers whose weight is used without calling them: every method starts from finite, right values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.network import insert
from lowbit.network.insert import weight_sites
from lowbit.network.usage import WeightsUsed

X = torch.randn(16, 5, 8, generator=torch.Generator().manual_seed(0))
USED = "its weight is used without calling the layer; its input stays in float"


class Functional(nn.Module):
    """Weights that are used by ``functional.linear``: always, before the layer is called, in evaluation mode alone, and never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.by_weight, self.both, self.last = (nn.Linear(8, 8) for _ in range(4))
        self.evaluated, self.unused = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.first(x))
        x = functional.linear(x, self.by_weight.weight.t().contiguous().t(), self.by_weight.bias)
        x = functional.linear(x, self.both.weight)
        x = functional.relu(self.both(x))
        return self.last(x if self.training else self.evaluated(x))


class Attention(nn.Module):
    """What ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` use without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False)
        self.hidden, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(x + self.attention(x, x, x, need_weights=False)[0])
        return self.head(functional.relu(self.hidden(x)).mean(1))


def seeded(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def prepared(kind: type[nn.Module], method: str) -> nn.Module:
    info = lowbit.get_method(method, "training")
    bits = min(max(2, info.weight_bits.start), info.weight_bits.stop - 1)
    activations = None if info.activation_bits is None else max(2, info.activation_bits.start)
    activations = activations if activations is None else min(activations, info.activation_bits.stop - 1)
    return lowbit.prepare(seeded(kind), method=method, weight_bits=bits, activation_bits=activations, sample=X)


@pytest.mark.parametrize("kind", [Functional, Attention])
@pytest.mark.parametrize("method", [info.name for info in lowbit.list_methods(kind="training") if info.name != "fp_auxiliary"])
def test_every_method_starts_finite_and_gives_gradients_to_weights_that_are_used(kind: type[nn.Module], method: str) -> None:
    model = prepared(kind, method)  # fp_auxiliary takes networks with one output of [N, classes] alone
    assert bool(torch.isfinite(model.eval()(X)).all())
    model.train()(X).square().mean().backward()
    for name, layer in insert.quantized_layers(model).items():
        gradient = insert.float_weight(layer).grad
        if name not in ("evaluated", "unused"):
            assert gradient is not None and bool(torch.isfinite(gradient).all()), name


@pytest.mark.parametrize("method", ["lsq", "ewgs", "daq", "qil", "lcq", "lq_nets", "dsq", "quantization_networks"])
def test_a_weight_that_is_used_alone_is_as_near_to_the_float_one_as_that_of_a_called_layer(method: str) -> None:
    model = lowbit.prepare(seeded(Functional), method=method, weight_bits=4, activation_bits=4, sample=X).eval()

    def error(layer: nn.Module) -> float:
        weight = insert.float_weight(layer).detach()
        return float((layer.weight.detach() - weight).norm() / weight.norm())

    assert error(model.by_weight) < 0.3
    assert error(model.by_weight) < 2 * error(model.both) + 0.02


def test_the_table_says_how_each_layer_is_used() -> None:
    model = prepared(Functional, "lsq")
    reasons = {row.name: row.reason for row in lowbit.summary(model).layers}
    assert reasons["by_weight"] == USED
    assert reasons["both"] == reasons["evaluated"] == ""
    assert "never calls this layer" in reasons["unused"]
    quantized = lowbit.quantize(seeded(Attention), method="round_to_nearest", calibration=[X])
    reasons = {row.name: row.reason for row in lowbit.summary(quantized).layers}
    assert reasons["attention.out_proj"] == reasons["encoder.layers.0.self_attn.out_proj"] == USED
    assert [name for name, reason in reasons.items() if "never calls" in reason] == []


def test_only_weights_that_an_operation_reads_count_as_used() -> None:
    model = seeded(Functional)
    with torch.no_grad(), WeightsUsed(weight_sites(model)) as used:
        model.train()(X)
    assert used.names == {"first", "by_weight", "both", "last"}


def test_layers_that_share_a_weight_are_used_together() -> None:
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    second.weight = first.weight
    with WeightsUsed(weight_sites(nn.ModuleDict({"first": first, "second": second, "other": nn.Linear(3, 3)}))) as used:
        first(torch.ones(1, 3))
    assert used.names == {"first", "second"}
