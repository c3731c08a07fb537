from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.calibration import Inputs
from lowbit.errors import LayerError, SpecError
from lowbit.models import load_model
from lowbit.network.shortcuts import (
    PaddedShortcut,
    ShiftedPReLU,
    ShortcutBlock,
    ShortcutUnit,
    give_shortcuts,
    pooled_shortcut,
    shortcut_block,
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
    assert give_shortcuts(model, Inputs.of(images())) == ["layer2.0.downsample.0", "layer3.0.downsample.0"]
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
    assert give_shortcuts(model, Inputs.of(images()), ShiftedPReLU) == []
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
    with pytest.raises(SpecError, match="takes none away"):
        PaddedShortcut(8, 4, 1)


def test_a_pooled_shortcut_is_the_identity_where_nothing_changes() -> None:
    assert isinstance(pooled_shortcut(8, 8, 1), nn.Identity)
    kinds = [type(layer) for layer in pooled_shortcut(8, 16, 2)]
    assert kinds == [nn.AvgPool2d, nn.Conv2d, nn.BatchNorm2d]
    assert [type(layer) for layer in pooled_shortcut(8, 16, 1)] == kinds[1:]


def test_without_the_branch_a_unit_is_its_shortcut() -> None:
    block = shortcut_block(8, 8).eval()
    for unit in block:
        assert isinstance(unit, ShortcutUnit)
        nn.init.zeros_(unit.norm.weight)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)


def test_a_prelu_with_shifts() -> None:
    unit = ShiftedPReLU(3)
    unit.shift_in.data = torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1)
    unit.shift_out.data = torch.tensor([0.0, 2.0, 0.0]).view(3, 1, 1)
    y = unit(torch.zeros(1, 3, 1, 1)).flatten()
    assert y.tolist() == [1.0, 2.0, -0.25]
