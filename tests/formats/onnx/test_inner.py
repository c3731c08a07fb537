"""Layers cut out of their files compute what they compute there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.formats.onnx.inner import cut_out
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.inputs import Inputs

pytest.importorskip("onnxruntime")


def exported(layer: nn.Module, x: torch.Tensor, bits: int, path: Path) -> None:
    """A layer between a quantizer of its input and one of its output."""
    policy = lowbit.BitPolicy.uniform(8, bits, bits, first_last=None)
    quantized = lowbit.quantize(nn.Sequential(layer).eval(), method="round_to_nearest", policy=policy, calibration=x)
    lowbit.export(quantized, path, sample=x, measure_speed=False)


@pytest.mark.parametrize(
    ("bits", "operators"), [(8, ("QLinearConv",)), (4, ("QLinearConv", "Clip"))], ids=["bytes", "clips of its own codes alone"]
)
def test_a_convolution_takes_codes_and_returns_codes(bits: int, operators: tuple[str, ...], tmp_path: Path) -> None:
    x = torch.rand(2, 16, 9, 9)
    exported(nn.Conv2d(16, 16, 3, padding=1), x, bits, tmp_path / "whole.onnx")
    codes, found = cut_out(tmp_path / "whole.onnx", x, tmp_path / "layer.onnx")
    assert found == operators
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == 2**bits - 1
    (whole,) = load_onnx(tmp_path / "whole.onnx")(Inputs((x,))).values()
    (layer,) = load_onnx(tmp_path / "layer.onnx")(Inputs((codes,))).values()
    assert layer.dtype == torch.uint8
    as_torch = layer if layer.shape == whole.shape else layer.movedim(-1, 1)
    step = (whole.max() - whole.min()) / (2**bits - 1)
    assert torch.allclose(as_torch.float() - float(as_torch.float().min()), (whole - whole.min()) / step, atol=1e-3)


def test_what_is_no_chain_of_operators_stays_whole(tmp_path: Path) -> None:
    x = torch.rand(2, 4, 6, 6)
    exported(nn.ConvTranspose2d(4, 4, 3, stride=2), x, 8, tmp_path / "whole.onnx")
    same, operators = cut_out(tmp_path / "whole.onnx", x, tmp_path / "layer.onnx")
    assert same is x
    assert {"QuantizeLinear", "ConvTranspose"} <= set(operators)
    assert load_onnx(tmp_path / "layer.onnx")(Inputs((x,))).keys() == load_onnx(tmp_path / "whole.onnx")(Inputs((x,))).keys()
