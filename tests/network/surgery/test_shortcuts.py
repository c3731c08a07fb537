from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import LayerError
from lowbit.inputs import Inputs
from lowbit.models import load_model
from lowbit.network.surgery.shortcuts import (
    PaddedShortcut,
    ShiftedPReLU,
    ShortcutBlock,
    ShortcutUnit,
    give_shortcuts,
)


class Unusual(nn.Module):
    """A residual block written in its own way: other names, functions for modules, three convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.ModuleDict({"norm": nn.BatchNorm2d(channels), "weights": nn.Conv2d(channels, channels, 3, padding=1)}) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, part in enumerate(self.parts):
            y = part["norm"](part["weights"](torch.relu(y) if index else y))
        return functional.relu(x + y)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.stem, self.block, self.head = nn.Conv2d(3, 8, 3), block, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.block(self.stem(x)).mean((2, 3)))
        return out


def images() -> Tensor:
    return torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["resnet8", "resnet20"])
def test_each_convolution_of_every_block_gets_a_shortcut_and_layers_keep_their_names(name: str) -> None:
    model = load_model(name, num_classes=5).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    given = give_shortcuts(model, Inputs.of(images()))
    assert (given.own, given.without) == (("layer2.0.downsample.0", "layer3.0.downsample.0"), ())
    blocks = [module for module in model.modules() if isinstance(module, ShortcutBlock)]
    assert len(blocks) == {"resnet8": 3, "resnet20": 9}[name]
    assert all(module.training for module in model.modules())
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_a_block_is_the_sum_of_convolution_and_shortcut_twice() -> None:
    model = load_model("resnet8", num_classes=5).eval()
    parts = copy.deepcopy(model.layer2[0])
    give_shortcuts(model, Inputs.of(images()))
    x = torch.randn(2, 16, 8, 8)
    conv, norm = parts.downsample
    shortcut = norm(functional.conv2d(functional.avg_pool2d(x, 2), conv.weight))
    y = parts.norm1(parts.conv1(x)) + shortcut
    torch.testing.assert_close(model.layer2[0](x), parts.norm2(parts.conv2(y)) + y)


def test_how_a_block_is_written_does_not_matter() -> None:
    model = Net(Unusual(8)).eval()
    parts = copy.deepcopy(model.block.parts)
    assert give_shortcuts(model, Inputs.of(images()), ShiftedPReLU).own == ()
    assert isinstance(model.block, ShortcutBlock)
    x = torch.randn(2, 8, 6, 6)
    y = x
    for part in parts:
        y = functional.prelu(part["norm"](part["weights"](y)) + y, torch.tensor(0.25))
    torch.testing.assert_close(model.block(x), y)


class Plain(nn.Module):
    """Two convolutions without a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def test_a_network_without_residual_blocks_is_refused_and_left_alone() -> None:
    model = Net(Plain())
    before = str(model)
    with pytest.raises(LayerError, match="no residual block"):
        give_shortcuts(model, Inputs.of(images()))
    assert str(model) == before


@pytest.mark.parametrize("pooled", [False, True])
def test_a_shortcut_without_weights_skips_positions_and_adds_channels_on_both_sides(pooled: bool) -> None:
    x = torch.randn(2, 4, 6, 6)
    y = PaddedShortcut(4, 9, 2, pooled=pooled)(x)
    assert y.shape == (2, 9, 3, 3)
    assert torch.equal(y[:, 2:6], functional.avg_pool2d(x, 2) if pooled else x[:, :, ::2, ::2])
    assert not y[:, :2].any() and not y[:, 6:].any()


def test_fewer_channels_are_means_of_neighbours_and_edges_count_as_far_as_they_reach() -> None:
    x = torch.randn(2, 6, 5, 5)
    torch.testing.assert_close(PaddedShortcut(6, 3, 1)(x), x.unflatten(1, (3, 2)).mean(2))
    y = PaddedShortcut(6, 6, 2, pooled=True)(x)
    assert y.shape == (2, 6, 3, 3)
    torch.testing.assert_close(y[:, :, 2, 2], x[:, :, 4, 4])


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut around them, some children named unhappily."""

    def __init__(self, channels: int, inner: int, out: int, stride: int = 1) -> None:
        super().__init__()
        sizes = ((channels, inner, 1, 1), (inner, inner, 3, stride), (inner, out, 1, 1))
        self.units = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2) for a, b, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in sizes)
        changes = stride > 1 or channels != out
        self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride), nn.BatchNorm2d(out)) if changes else nn.Identity()
        self.activations = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (conv, norm) in enumerate(zip(self.units, self.norms, strict=True)):
            y = norm(conv(self.activations(y) if index else y))
        return self.activations(y + self.shortcut(x))  # type: ignore[no-any-return]


@pytest.mark.parametrize(("out", "stride"), [(8, 1), (16, 1), (16, 2)])
def test_a_bottleneck_keeps_its_own_shortcut_around_all_and_each_other_convolution_gets_one(out: int, stride: int) -> None:
    model = Net(Bottleneck(8, 4, out, stride)).eval()
    model.head = nn.Linear(out, 4)
    parts = copy.deepcopy(model.block)
    given = give_shortcuts(model, Inputs.of(images()))
    assert given.own == (() if out == 8 and stride == 1 else ("block.shortcut.0",))
    x = torch.randn(2, 8, 6, 6)
    y = parts.norms[0](parts.units[0](x)) + x.unflatten(1, (4, 2)).mean(2)
    y = parts.norms[1](parts.units[1](y)) + (functional.avg_pool2d(y, 2) if stride == 2 else y)
    if given.own:
        conv, norm = parts.shortcut
        own = norm(functional.conv2d(functional.avg_pool2d(x, stride), conv.weight, conv.bias))
    else:
        own = x
    torch.testing.assert_close(model.block(x), parts.norms[2](parts.units[2](y)) + own)


class Wider(nn.Module):
    """Two convolutions with more channels in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, padding=1), nn.BatchNorm2d(8)
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.layers(x) + x)


def test_a_block_that_is_wider_inside_runs_and_convolutions_elsewhere_are_named() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), Wider(), Plain()).eval()
    parts = copy.deepcopy(model[1].layers)
    given = give_shortcuts(model, Inputs.of(images()))
    assert given.blocks == ("1",)
    assert given.without == ("2.layers.0", "2.layers.3")
    x = torch.randn(2, 8, 6, 6)
    y = parts[1](parts[0](x)) + functional.pad(x, (0, 0, 0, 0, 2, 2))
    torch.testing.assert_close(model[1](x), parts[4](parts[3](y)) + x)


def test_new_parts_are_of_the_blocks_dtype() -> None:
    model = Net(Unusual(8)).double().eval()
    give_shortcuts(model, Inputs.of(images().double()), ShiftedPReLU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_a_child_with_a_name_that_is_needed_is_an_error_and_nothing_is_changed() -> None:
    block = Unusual(8)
    block.unit_names = nn.Identity()
    model = Net(block)
    before = str(model)
    with pytest.raises(LayerError, match="'unit_names'"):
        give_shortcuts(model, Inputs.of(images()))
    assert str(model) == before


def test_without_the_branch_a_unit_is_its_shortcut() -> None:
    unit = ShortcutUnit(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)).eval()
    nn.init.zeros_(unit.norm.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(unit(x), x)


def test_a_prelu_with_shifts() -> None:
    unit = ShiftedPReLU(3)
    unit.shift_in.data = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    unit.shift_out.data = torch.tensor([0.0, 2.0, 0.0]).view(3, 1, 1)
    y = unit(torch.zeros(1, 3, 1, 1)).flatten()
    assert y.tolist() == [1.0, 2.0, -0.25]
