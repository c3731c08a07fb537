"""Networks in other floating-point types than float32: trained, and in both files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit

TYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)
    ).to(dtype)


def pictures(dtype: torch.dtype) -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


@TYPES
@pytest.mark.parametrize("method", ["lsq", "xnor_net", "lq_nets"])
def test_a_trained_network_keeps_its_type_and_a_packed_file_too(dtype: torch.dtype, method: str, tmp_path: Path) -> None:
    x, bits = pictures(dtype), 1 if method == "xnor_net" else 2
    data = (x, torch.arange(16) % 4)
    recipe = lowbit.Recipe(epochs=2, batch_size=8)
    model = lowbit.train(network(dtype), data, method=method, weight_bits=bits, activation_bits=bits, recipe=recipe)
    assert model(x).dtype == dtype
    lowbit.export(model, tmp_path / "net.lowbit", sample=x)
    torch.testing.assert_close(lowbit.load(tmp_path / "net.lowbit")(x), model(x).detach(), rtol=0, atol=0)


@TYPES
def test_an_onnx_file_computes_in_float32_and_says_so(dtype: torch.dtype, tmp_path: Path) -> None:
    x = pictures(dtype)
    quantized = lowbit.quantize(network(dtype).eval(), method="round_to_nearest", calibration=[x])
    report = lowbit.export(quantized, tmp_path / "net.onnx", sample=x, measure_speed=False)
    assert f"converted from {str(dtype).removeprefix('torch.')} to float32" in report.notes
    assert report.parity.passed
    assert next(quantized.parameters()).dtype == dtype


def test_nothing_is_said_of_a_network_in_float32(tmp_path: Path) -> None:
    x = pictures(torch.float32)
    quantized = lowbit.quantize(network(torch.float32).eval(), method="round_to_nearest", calibration=[x])
    report = lowbit.export(quantized, tmp_path / "net.onnx", sample=x, measure_speed=False)
    assert not any("converted" in note for note in report.notes)


@TYPES
def test_codes_are_those_of_the_network_in_float32(dtype: torch.dtype) -> None:
    x = pictures(dtype)
    model = lowbit.quantize(network(dtype).eval(), method="round_to_nearest", weight_bits=4, calibration=[x])
    same = lowbit.quantize(network(dtype).eval().float(), method="round_to_nearest", weight_bits=4, calibration=[x.float()])
    for name in ("3", "7"):
        codes = [net.get_submodule(name).parametrizations.weight[0].quantizer for net in (model, same)]
        weight = same.get_submodule(name).parametrizations.weight.original
        equal = (codes[0].encode(weight).codes == codes[1].encode(weight).codes).float().mean()
        assert float(equal) > 0.97
