"""The emulators against ONNX Runtime itself, ties included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.formats.fixed_point.onnx_operators import (
    dequantize_linear,
    dynamic_quantize_linear,
    is_far_from_ties,
    qdq_conv,
    qlinear_conv,
    qlinear_matmul,
    quantize_linear,
    runs_in_integers,
)
from lowbit.formats.fixed_point.operators import accumulate_conv
from lowbit.formats.onnx.sessions import PRECISE_PRODUCTS, saturates

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
CODES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def run(
    nodes: Sequence[Any], inputs: dict[str, Tensor], outputs: Sequence[str], constants: dict[str, Tensor], *, optimized: bool = True
) -> Any:
    """What ONNX Runtime computes for a graph of these nodes."""
    helper, kinds = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kinds(t.numpy().dtype), t.shape) for name, t in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    if saturates():
        options.add_session_config_entry(*PRECISE_PRODUCTS)
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(np.asarray(y)) for y in session.run(list(outputs), {name: t.numpy() for name, t in inputs.items()})]


def codes(kind: torch.dtype, *shape: int, seed: int = 0, bound: int = 128) -> Tensor:
    lo, hi = CODES[kind]
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(max(lo, -bound), min(hi, 2 * bound) + 1, shape, generator=generator).to(kind)


@pytest.mark.parametrize("kind", [torch.uint8, torch.int8])
def test_quantize_and_dequantize_linear(kind: torch.dtype) -> None:
    x = torch.cat([torch.arange(-400, 400) / 8, torch.tensor([1e9, -1e9, 0.0, -0.0])]).reshape(2, -1).T.contiguous()
    scale, zero_point = torch.tensor([0.25, 0.1]), torch.tensor([3, 100]).to(kind)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], axis=1),
    ]
    q, y = run(nodes, {"x": x}, ("q", "y"), {"s": scale, "z": zero_point}, optimized=False)
    found = quantize_linear(x, scale, zero_point, *CODES[kind])
    assert torch.equal(found, q.int()) and torch.equal(dequantize_linear(found, scale, zero_point), y)


@pytest.mark.parametrize("x", [torch.randn(50), torch.rand(50) + 1, -torch.rand(50), torch.zeros(3)])
def test_dynamic_quantize_linear(x: Tensor) -> None:
    nodes = [onnx.helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])]
    expected = run(nodes, {"x": x}, ("q", "s", "z"), {})
    for found, wanted in zip(dynamic_quantize_linear(x), expected, strict=True):
        assert torch.equal(found.double(), wanted.double())


@pytest.mark.parametrize(("kind", "relu"), [(torch.uint8, False), (torch.int8, True), (torch.int8, False)])
@pytest.mark.parametrize("scales", [(0.25, 0.125, 0.5), (0.037, 0.0061, 0.043)])
def test_both_forms_of_a_quantized_convolution(kind: torch.dtype, relu: bool, scales: tuple[float, ...]) -> None:
    x_scale, y_scale = torch.tensor(scales[0]), torch.tensor(scales[2])
    w_scale = torch.tensor(scales[1]) * torch.tensor([1.0, 2.0, 1.5, 1.0])
    qmin, qmax = CODES[kind]
    zeros = {"zx": torch.tensor(9).to(kind), "zy": torch.tensor(qmin if relu else 12).to(kind), "zw": torch.zeros(4, dtype=torch.int8)}
    x, w = codes(kind, 2, 3, 6, 6), codes(torch.int8, 4, 3, 3, 3, seed=1, bound=20)
    bias = torch.tensor([5, -300, 4, 900], dtype=torch.int32)
    constants = {**zeros, "sx": x_scale, "sw": w_scale, "sy": y_scale, "w": w, "b": bias, "sb": x_scale * w_scale}
    constants["zb"] = torch.zeros(4, dtype=torch.int32)
    node = onnx.helper.make_node
    conv = [node("QLinearConv", ["x", "sx", "zx", "w", "sw", "zw", "sy", "zy", "b"], ["y"], pads=[1] * 4)]
    common = {"x_scale": x_scale, "w_scale": w_scale, "y_scale": y_scale, "qmin": qmin, "qmax": qmax, "padding": 1}
    points = {"x_zero_point": 9, "y_zero_point": int(zeros["zy"])}
    one = {name: constants[name] for name in ("sx", "zx", "w", "sw", "zw", "sy", "zy", "b")}
    assert torch.equal(qlinear_conv(x, w, bias, **common, **points), run(conv, {"x": x}, ["y"], one)[0].int())  # type: ignore[arg-type]

    nodes = [
        node("DequantizeLinear", ["x", "sx", "zx"], ["rx"]),
        node("DequantizeLinear", ["w", "sw", "zw"], ["rw"], axis=0),
        node("DequantizeLinear", ["b", "sb", "zb"], ["rb"], axis=0),
        node("Conv", ["rx", "rw", "rb"], ["c"], pads=[1] * 4),
        *([node("Relu", ["c"], ["r"])] if relu else []),
        node("QuantizeLinear", ["r" if relu else "c", "sy", "zy"], ["y"]),
    ]
    is_far = is_far_from_ties(accumulate_conv(x, w, bias, x_zero_point=9, padding=1), x_scale, w_scale, y_scale, relu=relu)
    assert is_far.any() and (scales[0] != 0.25 or not is_far.all())  # powers of two tie
    for optimized in (True, False):
        found = qdq_conv(x, w, bias, bias_scale=x_scale * w_scale, relu=relu, optimized=optimized, **common, **points)  # type: ignore[arg-type]
        expected = run(nodes, {"x": x}, ["y"], constants, optimized=optimized)[0].int()
        assert (found - expected).abs().max().item() <= (0 if optimized else 1)
        assert torch.equal(found[is_far], expected[is_far])


def test_a_relu_leaves_the_integers_unless_the_lowest_code_is_zero() -> None:
    x, w = torch.tensor(0.1), torch.tensor([0.2, 0.3])
    assert runs_in_integers(x, w, x * w, -128, -128, relu=True) and runs_in_integers(x, w, x * w, 5, -128, relu=False)
    assert not runs_in_integers(x, w, x * w, 5, -128, relu=True)
    assert not runs_in_integers(x, w, x * w * 1.01, -128, -128, relu=True)


def test_products_of_matrices() -> None:
    a, b = codes(torch.uint8, 5, 24), codes(torch.int8, 24, 4, seed=1, bound=60)
    scales = {"sa": torch.tensor(0.02), "sb": torch.tensor(0.005), "sy": torch.tensor(0.01)}
    zeros = {"za": torch.tensor(120, dtype=torch.uint8), "zb": torch.tensor(0, dtype=torch.int8), "zy": torch.tensor(99, dtype=torch.uint8)}
    nodes = [onnx.helper.make_node("QLinearMatMul", ["a", "sa", "za", "b", "sb", "zb", "sy", "zy"], ["y"])]
    expected = run(nodes, {"a": a}, ["y"], {"b": b, **scales, **zeros})[0].int()
    found = qlinear_matmul(
        a, b, a_scale=scales["sa"], a_zero_point=120, b_scale=scales["sb"], y_scale=scales["sy"], y_zero_point=99, qmin=0, qmax=255
    )
    assert torch.equal(found, expected)
