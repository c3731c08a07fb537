"""The trunk of small networks whose paths can be told by eye."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.inputs import Inputs
from lowbit.models.loading import load_model
from lowbit.network.graph.dataflow import Dataflow, capture
from lowbit.network.graph.trunk import before_activations, channel_axis, residual_sums, trunk


class Small(nn.Module):
    """Layers for networks that are written as functions."""

    def __init__(self, forward: Callable[[Small, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.norm, self.shift = nn.BatchNorm2d(2), nn.Parameter(torch.ones(2, 1, 1))
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


def flow_of(forward: Callable[[Small, Tensor], Tensor]) -> Dataflow:
    return capture(Small(forward).eval(), torch.rand(2, 2, 4, 4))


def ends(flow: Dataflow) -> list[str]:
    return [node.op for node in before_activations(flow)]


def test_what_has_a_way_around_it_is_not_in_the_trunk() -> None:
    def residual(net: Small, x: Tensor) -> Tensor:
        x = net.first(x).relu()
        y = net.second(x).relu() + x
        return net.third(y).mean((2, 3))

    flow = flow_of(residual)
    assert [node.op for node in trunk(flow)] == ["conv2d", "relu", "add", "conv2d", "mean"]
    assert [node.layer for node in trunk(flow) if node.layer] == ["first", "third"]
    assert residual_sums(flow) == ["add"]


def test_branches_side_by_side_are_not_in_the_trunk_and_what_joins_them_is() -> None:
    flow = flow_of(lambda net, x: torch.cat([net.first(x).relu(), net.second(x).relu()], 1).sigmoid())
    assert [node.op for node in trunk(flow)] == ["cat", "sigmoid"]


def test_a_gate_is_beside_the_trunk() -> None:
    def gated(net: Small, x: Tensor) -> Tensor:
        y = net.first(x).relu()
        return net.third(y * net.second(y.mean((2, 3), keepdim=True)).sigmoid()).relu().mean((2, 3))

    flow = flow_of(gated)
    assert [node.op for node in trunk(flow)] == ["conv2d", "relu", "mul", "conv2d", "relu", "mean"]
    assert [node.layer for node in before_activations(flow)] == ["first", "third"]


def test_a_second_input_or_output_is_a_way_around_what_comes_before_or_behind_it() -> None:
    class Two(Small):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            z = self.second(self.first(x) + y)
            return z, self.third(z)

    pair = torch.rand(2, 2, 4, 4), torch.rand(2, 2, 4, 4)
    flow = capture(Two(lambda _net, x: x).eval(), Inputs(pair))
    assert [(node.op, node.layer) for node in trunk(flow)] == [("add", None), ("conv2d", "second")]


def test_the_ends_of_blocks_are_sums_and_what_activations_read() -> None:
    def network(net: Small, x: Tensor) -> Tensor:
        x = functional.relu(net.norm(net.first(x)))
        x = functional.hardtanh(net.second(x) + x)
        return net.third(x).relu()

    # the last layer's activation is the network's output: nothing stands behind it
    assert ends(flow_of(network)) == ["batch_norm", "add"]


def test_of_several_without_a_layer_between_them_the_first_counts() -> None:
    def shifted(net: Small, x: Tensor) -> Tensor:
        x = net.first(x).relu()
        x = (net.norm(net.second(x) + x) + net.shift).relu()
        return net.third(x).mean((2, 3))

    flow = flow_of(shifted)
    assert ends(flow) == ["conv2d", "add"]
    assert residual_sums(flow) == ["add"]  # the other one adds a parameter


@pytest.mark.parametrize(
    ("name", "pixels", "expected"),
    [
        ("resnet8", 16, ["batch_norm", "add", "add", "add"]),
        ("mobilenet_v2_small", 16, ["batch_norm", "add", *["batch_norm", "batch_norm", "add"] * 3, "batch_norm"]),
        ("vgg_small", 32, ["batch_norm"] * 6),
    ],
)
def test_the_ends_of_known_networks(name: str, pixels: int, expected: list[str]) -> None:
    flow = capture(load_model(name, width=4).eval(), torch.rand(2, 3, pixels, pixels))
    assert ends(flow) == expected
    assert {channel_axis(flow, node) for node in before_activations(flow)} == {1}


def test_channels_are_the_last_dimension_behind_linear_layers_and_unknown_behind_moves() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(5, 4), nn.Linear(4, 4)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            x = x + self.linear(x)
            return self.linear(x.relu()).transpose(1, 2).relu().mean(1)

    flow = capture(Sequence().eval(), torch.zeros(2, 3, dtype=torch.int64))
    found = {node.op: channel_axis(flow, node) for node in trunk(flow)}
    assert (found["embedding"], found["add"], found["transpose"]) == (2, 2, None)
