"""Features of named layers, seen while a network runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, UnknownNameError
from lowbit.network.graph.dataflow import capture
from lowbit.network.taps import Tap, tapped, taps_of


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Sequential(nn.Linear(6, 6), nn.ReLU()), nn.Linear(6, 2))


def test_outputs_and_inputs_are_those_of_the_layers_with_their_gradients() -> None:
    model, x = network(), torch.randn(5, 4)
    with tapped(model, ["0", "2.0"]) as outputs, tapped(model, ["2.0"], "input") as inputs:
        model(x)
    assert torch.equal(outputs["0"], model[0](x)) and torch.equal(inputs["2.0"], model[1](outputs["0"]))
    (gradient,) = torch.autograd.grad(outputs["2.0"].sum(), model[0].weight)
    assert gradient.abs().sum() > 0
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_input_is_seen_before_it_is_quantized() -> None:
    x = torch.rand(16, 4)
    model = lowbit.prepare(network(), method="lsq", policy=lowbit.BitPolicy.uniform(4, 2, first_last=None), sample=x)
    with tapped(model, ["2.0"], "input") as inputs, tapped(model, ["1"]) as outputs:
        model(x)
    assert torch.equal(inputs["2.0"], outputs["1"]) and inputs["2.0"].unique().numel() > 4


def test_the_last_call_counts_and_hooks_go_where_the_network_fails() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            raised: Tensor = self.layer(self.layer(x))
            if bool(x.sum() > 100):
                raise RuntimeError
            return raised

    model, x = Twice(), torch.ones(1, 2)
    with tapped(model, ["layer"]) as found:
        y = model(x)
    assert torch.equal(found["layer"], y)
    with pytest.raises(RuntimeError), tapped(model, ["layer"]):
        model(1000 * x)
    assert not model.layer._forward_hooks


def test_modules_that_are_not_there_or_hold_no_features_are_named() -> None:
    with pytest.raises(UnknownNameError, match=r"'2\.00'. Did you mean '2\.0'"), tapped(network(), ["2.00"]):
        pass
    embedding = nn.Sequential(nn.Embedding(4, 2))
    with (
        pytest.raises(LayerError, match=r"module '0' .Embedding. has no floating-point tensor as its input"),
        tapped(embedding, ["0"], "input"),
    ):
        embedding(torch.tensor([1]))


def test_a_tap_names_one_of_several_calls_of_a_pass() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.relu = nn.Linear(2, 2), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.relu(self.layer(self.relu(x)))

    model, x = Shared(), torch.tensor([[1.0, -2.0]])
    first, second, third = (Tap("relu", "input", call) for call in range(3))
    with tapped(model, [first, second, third, Tap("relu")]) as found:
        model(2 * x)
        y = model(x)  # calls are counted from 0 in every pass
    assert torch.equal(found[first], x) and torch.equal(found[second], model.layer(x.relu())) and torch.equal(found[Tap("relu")], y)
    assert third not in found


def test_copies_are_what_it_was_before_operations_in_place() -> None:
    model, x = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True)), torch.randn(4, 3)
    with tapped(model, ["0"]) as changed, tapped(model, ["0"], copies=True) as kept:
        model(x)
    assert torch.equal(changed["0"], model(x)) and torch.equal(kept["0"], model[0](x))
    assert kept["0"].min() < 0 and torch.autograd.grad(kept["0"].sum(), model[0].weight)[0].abs().sum() > 0


def test_the_taps_of_a_tensor_of_the_dataflow_give_that_tensor() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.relu = nn.Linear(3, 4), nn.Linear(4, 4), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            x = self.relu(self.stem(x))
            y = self.inner(x)
            y += x
            return self.relu(torch.sigmoid(y) + 1)

    model, x = Functional(), torch.randn(2, 3)
    flow = capture(model, x)
    total, shifted = (node for node in flow.nodes if node.op == "add")
    inner = next(node for node in flow.nodes if node.op == "sigmoid")
    assert taps_of(flow, total) == (Tap("inner", "output", 0), Tap("relu", "output", 0))
    assert taps_of(flow, shifted) == (Tap("relu", "input", 1),)
    assert taps_of(flow, inner) == ()  # no module gives or reads it
    with tapped(model, taps_of(flow, total), copies=True) as found:
        model(x)
    expected = model.stem(x).relu()
    torch.testing.assert_close(sum(found.values()), model.inner(expected) + expected, rtol=0, atol=0)
