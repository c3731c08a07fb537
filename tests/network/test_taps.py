"""Features of named layers, seen while a network runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, UnknownNameError
from lowbit.network.taps import tapped


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
