"""Each built-in network: counts of parameters worked out by hand or from the literature, shapes, and what blocks are made of."""

from __future__ import annotations

import inspect
from itertools import pairwise

import pytest
import torch
from torch import nn

from lowbit.models import BUILT_IN, load_model
from lowbit.models.digits import SeparableBlock
from lowbit.models.mobilenet import InvertedResidual
from lowbit.models.resnet import ResidualBlock, resnet8, resnet20
from lowbit.network.surgery.shortcuts import ShortcutBlock

CLASSIFIERS = [name for name, (factory, _) in BUILT_IN.items() if "num_classes" in inspect.signature(factory).parameters]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "count"), [("resnet20", 272_474), ("resnet32", 466_906), ("resnet56", 855_770), ("resnet18", 11_689_512)])
def test_residual_networks_have_the_known_number_of_parameters(name: str, count: int) -> None:
    assert parameters(load_model(name)) == count


def test_one_input_channel_saves_two_thirds_of_the_stem() -> None:
    assert parameters(resnet20(in_channels=1)) == 272_474 - 2 * 16 * 9


def test_vgg_small_has_the_sum_of_its_layers() -> None:
    widths = [3, 128, 128, 256, 256, 512, 512]
    convolutions = sum(9 * a * b + 2 * b for a, b in pairwise(widths))
    assert parameters(load_model("vgg_small")) == convolutions + 512 * 16 * 10 + 10


def test_an_inverted_residual_has_the_sum_of_its_layers() -> None:
    block = InvertedResidual(8, 12, 2, expansion=4)
    assert parameters(block) == (8 * 32 + 64) + (9 * 32 + 64) + (32 * 12 + 24)
    assert block.depthwise.groups == 32


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("channels", [1, 3])
def test_any_channels_and_classes(name: str, channels: int) -> None:
    size = 8 if name == "digits" else 32
    model = load_model(name, in_channels=channels, num_classes=7, width=8)
    out = model(torch.randn(2, channels, size, size))
    assert out.shape == (2, 7)
    assert out.isfinite().all()
    assert not model.training


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "mobilenet_v2_small", "vgg_small"])
def test_networks_take_28_pixels_too(name: str) -> None:
    assert load_model(name, in_channels=1, width=8)(torch.randn(1, 1, 28, 28)).shape == (1, 10)


def test_stages_halve_the_picture_and_double_the_channels() -> None:
    shapes = []
    model = resnet8(width=4).eval()
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    model(torch.randn(1, 3, 32, 32))
    assert shapes == [(4, 32, 32), (8, 16, 16), (16, 8, 8)]


def test_a_residual_block_adds_its_input() -> None:
    block = ResidualBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, 4, 6, 6)
    assert torch.equal(block(x), x.relu())


def test_the_shortcut_projects_where_the_shape_changes() -> None:
    assert isinstance(ResidualBlock(4, 4, 1).downsample, nn.Identity)
    shortcut = ResidualBlock(4, 8, 2).downsample
    assert isinstance(shortcut, nn.Sequential)
    assert shortcut[0].weight.shape == (8, 4, 1, 1)


def test_an_inverted_residual_adds_its_input_only_where_the_shape_stays() -> None:
    x = torch.randn(1, 4, 6, 6)
    same = InvertedResidual(4, 4, 1, expansion=2).eval()
    nn.init.zeros_(same.project.weight)
    assert torch.equal(same(x), x)
    wider = InvertedResidual(4, 6, 1, expansion=2).eval()
    nn.init.zeros_(wider.project.weight)
    assert wider(x).abs().max().item() == 0


def test_the_default_network_has_every_kind_of_layer_the_product_treats() -> None:
    model = load_model("digits")
    kinds = {type(module) for module in model.modules()}
    assert {nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Linear, ResidualBlock, SeparableBlock} <= kinds
    assert any(module.groups == module.in_channels > 1 for module in model.modules() if isinstance(module, nn.Conv2d))


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_activation_is_a_module_used_once(name: str) -> None:
    model = load_model(name, width=8)
    calls: list[str] = []
    for module_name, module in model.named_modules():
        if isinstance(module, nn.ReLU | nn.ReLU6):
            module.register_forward_hook(lambda *_args, n=module_name: calls.append(n))
    model(torch.randn(1, 1 if name == "digits" else 3, 8 if name == "digits" else 32, 8 if name == "digits" else 32))
    has_relus = not name.startswith(("bireal", "react"))
    assert bool(calls) == has_relus
    assert len(calls) == len(set(calls))


@pytest.mark.parametrize(("name", "plain", "blocks"), [("bireal_resnet20", "resnet20", 9), ("bireal_resnet18", "resnet18", 8)])
def test_binary_forms_are_the_plain_networks_with_a_shortcut_for_each_convolution(name: str, plain: str, blocks: int) -> None:
    model = load_model(name, num_classes=7, width=8)
    found = [module for module in model.modules() if isinstance(module, ShortcutBlock)]
    assert len(found) == blocks
    assert all(len(block.unit_names) == 2 for block in found)
    assert model.state_dict().keys() == load_model(plain, num_classes=7, width=8).state_dict().keys()
