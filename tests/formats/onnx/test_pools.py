"""Average pools mean the same in ONNX Runtime as in torch, whatever their divisors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import GraphError

POOLS: dict[str, nn.Module] = {
    "window behind the padding": nn.AvgPool2d(4, 3, 1, ceil_mode=True),
    "window behind the input": nn.AvgPool2d(3, 2, 0, ceil_mode=True),
    "two sizes": nn.AvgPool2d((4, 3), (3, 2), (1, 0), ceil_mode=True),
    "padding not counted": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "divisor": nn.AvgPool2d(3, 2, 1, divisor_override=5),
    "plain": nn.AvgPool2d(3, 2, 1),
}


def _export(pool: nn.Module, x: Tensor, path: Path, sizes: tuple[str, ...] = ()) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    conv = (nn.Conv2d, nn.Conv1d, nn.Conv3d)[0 if x.dim() == 4 else 1 if x.dim() == 3 else 2]
    net = nn.Sequential(conv(3, 4, 1), pool, conv(4, 2, 1)).eval()
    quantized = lowbit.quantize(net, method="round_to_nearest", weight_bits=8, activation_bits=None, calibration=x)
    lowbit.export(quantized, path, sample=x, dynamic=sizes)
    return quantized, onnxruntime.InferenceSession(path)


@pytest.mark.parametrize("name", POOLS)
def test_an_average_pool_in_onnx_runtime_is_that_of_torch(name: str, tmp_path: Path) -> None:
    x = torch.randn(4, 3, 9, 12)
    quantized, session = _export(POOLS[name], x, tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), quantized(x).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pool, shape", [(nn.AvgPool1d(4, 3, 1, ceil_mode=True), (9,)), (nn.AvgPool3d(4, 3, 1, ceil_mode=True), (6, 6, 9))])
def test_pools_of_one_and_three_dimensions_too(pool: nn.Module, shape: tuple[int, ...], tmp_path: Path) -> None:
    x = torch.randn(2, 3, *shape)
    quantized, session = _export(pool, x, tmp_path / "net.onnx")
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), quantized(x).detach(), rtol=1e-4, atol=1e-5)


def test_open_heights_and_widths_are_pooled_alike(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    quantized, session = _export(POOLS["window behind the padding"], x, tmp_path / "net.onnx", ("H", "W"))
    for size in (9, 10, 11, 12):
        other = torch.randn(1, 3, size, size + 1)
        (found,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), quantized(other).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "pool, reason",
    [
        (nn.AvgPool2d(2, 2, 1, ceil_mode=True), "no ceil_mode with count_include_pad where windows of 2 with padding 1 move by 2"),
        (nn.AvgPool2d(3, 2, ceil_mode=True, divisor_override=4), "no divisor_override with ceil_mode"),
    ],
)
def test_a_pool_without_onnx_form_is_refused_with_the_reason(pool: nn.Module, reason: str, tmp_path: Path) -> None:
    with pytest.raises(GraphError, match=f"average pool 'avg_pool2d': ONNX has {reason}"):
        _export(pool, torch.randn(2, 3, 9, 9), tmp_path / "net.onnx")
