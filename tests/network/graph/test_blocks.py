"""Blocks of networks: residual, repeated, or named by the user."""

from __future__ import annotations

import pytest
import torch
from tests.networks import LoopNet, TinyNet
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import SpecError
from lowbit.models.mobilenet import mobilenet_v2_small
from lowbit.models.resnet import resnet20
from lowbit.network.graph.blocks import Block, find_blocks
from lowbit.network.graph.dataflow import capture
from lowbit.network.layers import quantizable_layers

STAGES = [f"layer{stage}.{index}" for stage in (1, 2, 3) for index in range(3)]


class Attention(nn.Module):
    """Self-attention with one head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(torch.softmax(q @ k.transpose(1, 2) / q.shape[-1] ** 0.5, -1) @ v)


class Mlp(nn.Module):
    """Two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TransformerBlock(nn.Module):
    """Attention and MLP, each with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(width), Attention(width), nn.LayerNorm(width), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TinyTransformer(nn.Module):
    """Patch embedding, two blocks, classifier."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.ModuleList([TransformerBlock(width) for _ in range(2)])
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def units(model: nn.Module, *, patterns: tuple[str, ...] = (), with_graph: bool = True) -> list[Block]:
    """The units of a network for 8x8 images; each layer is in exactly one."""
    graph = capture(model.eval(), torch.randn(2, 3, 8, 8)) if with_graph else None
    found = find_blocks(model, graph, patterns)
    assert sorted(layer for unit in found for layer in unit.layers) == sorted(quantizable_layers(model))
    assert all(unit.kind == "block" or unit.layers == (unit.name,) for unit in found)
    return found


def blocks(found: list[Block]) -> list[str]:
    return [unit.name for unit in found if unit.kind == "block"]


@pytest.mark.parametrize("with_graph", [True, False])
def test_a_residual_network_has_its_residual_blocks_between_stem_and_classifier(with_graph: bool) -> None:
    found = units(resnet20(), with_graph=with_graph)
    assert [unit.name for unit in found] == ["conv", *STAGES, "fc"]
    assert blocks(found) == STAGES
    by_name = {unit.name: unit.layers for unit in found}
    assert by_name["layer1.0"] == ("layer1.0.conv1", "layer1.0.conv2")
    assert by_name["layer2.0"] == ("layer2.0.conv1", "layer2.0.conv2", "layer2.0.downsample.0")


@pytest.mark.parametrize("with_graph", [True, False])
def test_inverted_residuals_without_a_shortcut_are_blocks_like_those_with_one(with_graph: bool) -> None:
    model = mobilenet_v2_small()
    found = units(model, with_graph=with_graph)
    assert blocks(found) == [f"blocks.{index}" for index in range(7)]
    assert [block.has_shortcut for block in model.blocks] == [True, False, True, False, True, False, True]
    assert [unit.name for unit in found if unit.kind == "layer"] == ["stem", "head", "classifier"]


@pytest.mark.parametrize("with_graph", [True, False])
def test_a_transformer_has_attention_and_mlp_in_one_block(with_graph: bool) -> None:
    found = units(TinyTransformer(), with_graph=with_graph)
    assert [unit.name for unit in found] == ["patch", "blocks.0", "blocks.1", "head"]
    assert found[1].layers == ("blocks.0.attn.qkv", "blocks.0.attn.proj", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2")


def test_another_block_at_the_same_place_is_a_block_too() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x).relu())

    class Shortcut(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sequential(Plain(), Shortcut(), nn.Conv2d(8, 8, 1)))
    assert [unit.name for unit in units(model)] == ["0", "1.0", "1.1", "1.2"]
    assert blocks(units(model)) == ["1.0", "1.1"]


@pytest.mark.parametrize("with_graph", [True, False])
def test_plain_containers_and_the_network_itself_are_no_blocks(with_graph: bool) -> None:
    stack = nn.Sequential(*(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 3, 1)) for _ in range(3)))
    assert [unit.name for unit in units(stack, with_graph=with_graph)] == ["0.0", "0.2", "1.0", "1.2", "2.0", "2.2"]
    assert blocks(units(TinyNet(), with_graph=with_graph)) == []
    assert [unit.name for unit in find_blocks(LoopNet(), None)] == ["layers.0", "layers.1", "layers.2"]


def test_patterns_name_blocks_and_the_outermost_match_wins() -> None:
    assert blocks(units(resnet20(), patterns=("layer*.*",))) == STAGES
    found = units(resnet20(), patterns=("layer[12]", "layer3.2"))
    assert blocks(found) == ["layer1", "layer2", "layer3.2"]
    assert len(found[1].layers) == 6
    assert len(found[2].layers) == 7
    assert [unit.name for unit in found] == [
        "conv", "layer1", "layer2", "layer3.0.conv1", "layer3.0.conv2", "layer3.0.downsample.0", "layer3.1.conv1", "layer3.1.conv2", "layer3.2", "fc",
    ]  # fmt: skip


@pytest.mark.parametrize("pattern", ["stage*.*", "layer1.0.conv1", "*.relu1"])
def test_a_pattern_that_matches_no_module_with_layers_says_what_there_is(pattern: str) -> None:
    with pytest.raises(SpecError, match=r"matches no module that holds layers; the network has: layer1, layer1\.0, .*\.\.\.") as error:
        units(resnet20(), patterns=("layer1.*", pattern))
    assert repr(pattern) in str(error.value)
