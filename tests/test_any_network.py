"""Quantize, export packed and to ONNX, and check parity on networks that nobody prepared for it."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import GraphError
from lowbit.models import load_model
from lowbit.network.insert import quantized_layers
from tests.networks import (
    BranchNet,
    DictOutputNet,
    FunctionalNet,
    LoopNet,
    ReusedNet,
    SharedWeightNet,
    TinyNet,
    Torture,
    TwoInputNet,
    settled,
)  # fmt: skip
from tests.optional import require


def image(count: int = 8, size: int = 8) -> Tensor:
    return torch.randn(count, 3, size, size)


AWKWARD: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "tiny": (TinyNet, lambda: (image(),)),
    "loop": (LoopNet, lambda: (torch.randn(8, 6),)),
    "reused": (ReusedNet, lambda: (image(),)),
    "functional": (FunctionalNet, lambda: (image(),)),
    "shared_weight": (SharedWeightNet, lambda: (torch.randn(8, 6),)),
    "two_inputs": (TwoInputNet, lambda: (image(), torch.randn(8, 5))),
    "dict_output": (DictOutputNet, lambda: (image(),)),
    "torture": (Torture, lambda: (image(), torch.randn(8, 5))),
}


def tensors_of(output: object) -> list[Tensor]:
    """The tensors of an output, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    assert isinstance(values, (list, tuple, type({}.values())))
    return [tensor for value in values for tensor in tensors_of(value)]


def relative_error(expected: object, got: object) -> float:
    """Largest relative error among the output tensors."""
    pairs = zip(tensors_of(expected), tensors_of(got), strict=True)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs)


def quantize_and_export(
    model: nn.Module, inputs: tuple[Tensor, ...], folder: Path, *, weight_bits: int, limit: float, is_chaotic: bool = False
) -> None:
    """The whole way, with every step compared to the one before it."""
    with torch.no_grad():
        expected = model(*inputs)
    quantized = lowbit.quantize(
        model,
        method="round_to_nearest",
        weight_bits=weight_bits,
        activation_bits=8,
        calibration=[inputs],
        weight_observer="min_max",
        activation_observer="min_max",
    )
    with torch.no_grad():
        got = quantized(*inputs)
    assert 0 < relative_error(expected, got) < limit

    packed = lowbit.export(quantized, folder / "model.lowbit", sample=inputs)
    assert packed.parity.passed
    with torch.no_grad():
        loaded = lowbit.load(folder / "model.lowbit")(*inputs)
    assert relative_error(got, loaded) < 1e-4

    onnx = lowbit.export(quantized, folder / "model.onnx", sample=inputs)
    assert onnx.parity.passed or (is_chaotic and onnx.parity.is_within_ties)


@pytest.mark.parametrize("weight_bits", [4, 8])
@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_networks_are_quantized_and_exported(case: str, weight_bits: int, tmp_path: Path) -> None:
    make, inputs = AWKWARD[case]
    batch = inputs()
    model = settled(make(), *batch)
    quantize_and_export(model, batch, tmp_path, weight_bits=weight_bits, limit=0.02 if weight_bits == 8 else 0.2)


def test_a_branch_on_data_is_quantized_and_both_branches_work() -> None:
    model = BranchNet().eval()
    bright, dark = image() + 1, image() - 1
    quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=[bright, dark])
    assert set(quantized_layers(quantized)) == {"bright", "dark", "head"}
    for batch in (bright, dark):
        with torch.no_grad():
            assert 0 < relative_error(model(batch), quantized(batch)) < 0.1


@pytest.mark.parametrize("suffix", [".lowbit", ".onnx"])
def test_what_cannot_be_exported_says_which_line_blocks(suffix: str, tmp_path: Path) -> None:
    quantized = lowbit.quantize(
        BranchNet().eval(), method="round_to_nearest", weight_bits=8, activation_bits=8, calibration=[image() + 1, image() - 1]
    )
    lines, first = inspect.getsourcelines(BranchNet)
    blocking = first + next(i for i, line in enumerate(lines) if "if x.mean() > 0" in line)
    with pytest.raises(GraphError, match=rf"networks\.py.*\b{blocking}\b"):
        lowbit.export(quantized, tmp_path / f"model{suffix}", sample=image())
    assert list(tmp_path.iterdir()) == []


TIMM = {
    "resnet18": 64,
    "mobilenetv3_small_100": 64,
    "efficientnet_lite0": 64,
    "regnety_002": 64,
    "ghostnet_100": 64,
    "vit_tiny_patch16_224": 64,
}


@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_are_quantized_and_exported(name: str, tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install 'lowbit[models]'")
    size = TIMM[name]
    with_size = {"img_size": size} if name.startswith("vit") else {}
    batch = image(2, size)
    model = settled(load_model(f"timm:{name}", num_classes=10, **with_size), image(8, size))
    quantize_and_export(model, (batch,), tmp_path, weight_bits=8, limit=0.8, is_chaotic=True)  # deep, with random weights


def vision_transformer(name: str) -> tuple[nn.Module, Tensor]:
    """A small one, with weights that answer, and pictures."""
    torch.manual_seed(0)
    size = 32 if name == "swin" else 16
    if name == "beit":
        model: nn.Module = require("timm.models.beit").Beit(
            img_size=size, patch_size=4, num_classes=5, embed_dim=16, depth=2, num_heads=2, init_values=0.1, use_rel_pos_bias=True
        )
    elif name == "swin":
        model = require("torchvision.models.swin_transformer").SwinTransformer([4, 4], 16, [2, 2], [2, 2], [4, 4], num_classes=5)
    else:
        model = require("torchvision.models.vision_transformer").VisionTransformer(size, 4, 2, 2, 16, 32, num_classes=5)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model.eval(), torch.randn(16, 3, size, size)


IN_FLOAT = {"vit": "encoder.pos_embedding", "swin": "features.1.0.attn.relative_position_bias_table", "beit": "blocks.0.attn.q_bias"}
BY_WEIGHT = {"vit": "encoder.layers.encoder_layer_0.self_attention.out_proj", "swin": "features.1.0.attn.qkv", "beit": "blocks.0.attn.qkv"}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["round_to_nearest", "white_paper", "lsq"])
@pytest.mark.parametrize("name", ["vit", "swin", "beit"])
def test_vision_transformers_are_quantized_trained_and_exported(name: str, method: str, tmp_path: Path) -> None:
    model, images = vision_transformer(name)
    if method == "lsq":
        quantized = lowbit.prepare(model, method=method, weight_bits=8, activation_bits=8, sample=images).train()
        optimizer = torch.optim.SGD(quantized.parameters(), 1e-4)
        for _ in range(3):
            optimizer.zero_grad()
            quantized(images).square().mean().backward()
            optimizer.step()
        quantized.eval()
    else:
        quantized = lowbit.quantize(model, method=method, weight_bits=8, activation_bits=8, calibration=images)
    with torch.no_grad():
        assert relative_error(model(images), quantized(images)) < 0.15
    rows = {row.name: row for row in lowbit.summary(quantized).layers}
    assert all(row.weight_bits == 8 for row in rows.values()) and not any("never" in row.reason for row in rows.values())
    assert rows[BY_WEIGHT[name]].reason == "its weight is used without calling the layer; its input stays in float"
    assert IN_FLOAT[name] in [row.name for row in lowbit.summary(quantized).others]
    for suffix in ("lowbit", "onnx"):
        report = lowbit.export(quantized, tmp_path / f"m.{suffix}", sample=images, measure_speed=False)
        assert report.parity.passed and report.parity.top1_agreement is not None and report.parity.top1_agreement > 0.99
