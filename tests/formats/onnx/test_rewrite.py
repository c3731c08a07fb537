from __future__ import annotations

import re

import numpy as np
import pytest
import torch

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from tests.formats.onnx.graphs import Array, Builder, computed, constants_of, floats, operators  # noqa: E402

from lowbit.errors import SpecError  # noqa: E402
from lowbit.formats.onnx.rewrite import Rewritten, float_network, integer_network  # noqa: E402
from lowbit.formats.onnx.translate import DOMAIN  # noqa: E402
from lowbit.quantizers import QTensor  # noqa: E402
from lowbit.quantizers.qtensor import AffineDecoder  # noqa: E402
from lowbit.spec import Granularity  # noqa: E402

X = floats([[[[1.0]], [[-2.0]]]])
SCALE = torch.tensor([0.5, 0.25]).reshape(2, 1, 1, 1)
CONVOLUTION = QTensor(
    torch.tensor([[1, -2], [3, 0]], dtype=torch.int8)[:, :, None, None],
    AffineDecoder(SCALE, torch.zeros_like(SCALE), Granularity.channel(0)),
    4,
)


def network(last: str | None = "Sigmoid") -> tuple[ir.Model, dict[str, QTensor]]:
    """``x`` in eighths, a 1x1 convolution with a batch norm of factors 2 and 1, ReLU, quarters, and one more operator."""
    builder, shape = Builder([1, 2, 1, 1]), [1, 2, 1, 1]
    x = builder.quantizer(builder.x, "xq", lower=-16.0, step=0.125, scale=0.125, zero=128.0, qmin=0, qmax=255)
    weight = builder.weight("conv.weight", CONVOLUTION.decode().numpy())
    y = builder.add("Conv", [x, weight, builder.constant("conv.bias", floats(0.5, -0.25))], "conv", shape)
    tables = {"gamma": floats(2, 1), "beta": floats(0, 0.5), "mean": floats(0, 0), "variance": floats(1, 1)}
    constants = [builder.constant(f"norm.{name}", table) for name, table in tables.items()]
    y = builder.add("BatchNormalization", [y, *constants], "norm", shape, epsilon=0.0)
    y = builder.quantizer(builder.add("Relu", [y], "relu", shape), "yq", lower=0.0, step=0.25, scale=0.25, zero=0.0, qmin=0, qmax=15)
    return builder.model(y if last is None else builder.add(last, [y], "last", shape)), {"conv.weight": CONVOLUTION}


def answer(rewritten: Rewritten, x: Array = X) -> Array:
    (found,) = computed(rewritten.model, x)
    return found.ravel()


def test_a_network_becomes_integers_from_quantizer_to_quantizer() -> None:
    marked, weights = network(None)
    rewritten = integer_network(marked, weights)
    assert rewritten.notes == ()
    expected = ["QuantizeLinear"] + 3 * ["DequantizeLinear"] + ["Conv", "QuantizeLinear", "Clip", "DequantizeLinear"]
    assert sorted(operators(rewritten.model.graph)) == sorted(expected)
    assert DOMAIN not in rewritten.model.opset_imports
    content = constants_of(rewritten.model.graph)
    assert (content["yq.lowest"], content["yq.highest"]) == (0, 15)
    codes, scale = np.asarray(content["conv.weight.codes"]), np.asarray(content["conv.weight.scale"])
    np.testing.assert_allclose(codes[..., 0, 0] * scale[:, None], [[1.0, -2.0], [0.75, 0.0]], rtol=1e-6)  # the norm's factors in it
    np.testing.assert_allclose(np.asarray(content["norm.bias.codes"]) * np.asarray(content["norm.bias.scale"]), [1.0, 0.25], atol=1e-6)
    for x in ([1.0, -2.0], [0.3, 0.7], [-1.0, 4.0], [1.06, 0.1]):
        exact = np.rint(np.asarray(x, np.float32) / 0.125) * 0.125
        sums = np.asarray([2 * (0.5 * exact[0] - exact[1] + 0.5), 0.75 * exact[0] - 0.25 + 0.5])
        assert answer(rewritten, floats([[[[x[0]]], [[x[1]]]]])).tolist() == (np.clip(np.rint(sums / 0.25), 0, 15) * 0.25).tolist()


def test_the_marked_graph_stays_as_it_is_and_its_float_network_has_no_quantizer() -> None:
    marked, weights = network()
    before = operators(marked.graph)
    integer_network(marked, weights)
    plain = float_network(marked)
    assert operators(marked.graph) == before
    assert operators(plain.graph) == ["Conv", "BatchNormalization", "Relu", "Sigmoid"]
    assert plain.producer_name == "lowbit"
    sums = np.asarray([2 * (0.5 + 2 + 0.5), 0.75 - 0.25 + 0.5])
    np.testing.assert_allclose(computed(plain, X)[0].ravel(), 1 / (1 + np.exp(-sums)), rtol=1e-6)


def test_codes_of_4_bits_need_an_opset_that_has_them() -> None:
    marked, weights = network()
    with pytest.raises(SpecError, match=re.escape("4-bit codes need opset 21, the graph has 18")):
        integer_network(marked, weights, weight_container="int4")
    marked.graph.opset_imports[""] = 21
    rewritten = integer_network(marked, weights, weight_container="int4")
    assert rewritten.notes == ("computed in float, because runtimes decode 4-bit codes: conv",)
    assert rewritten.model.graph.initializers["conv.weight.codes"].dtype == ir.DataType.INT4
    np.testing.assert_allclose(answer(rewritten), 1 / (1 + np.exp(-np.asarray([3.75, 1.0]))), rtol=1e-6)


def test_layers_in_float_are_listed_by_reason_and_at_most_six_by_name() -> None:
    builder, shape = Builder([1, 2, 1, 1]), [1, 2, 1, 1]
    weights = {f"layer{index}.weight": CONVOLUTION for index in range(8)}
    y = builder.x
    for index, name in enumerate(weights):
        y = builder.add("Conv", [y, builder.weight(name, CONVOLUTION.decode().numpy())], f"y{index}", shape)
    marked = builder.model(y)
    before = computed(marked, X)[0].ravel()
    rewritten = integer_network(marked, weights)
    listed = "layer0, layer1, layer2, layer3, layer4, layer5 and 2 more"
    assert rewritten.notes == (f"computed in float, because the input is not quantized: {listed}",)
    assert operators(rewritten.model.graph).count("Cast") == 8
    np.testing.assert_allclose(answer(rewritten), before, rtol=1e-6)
