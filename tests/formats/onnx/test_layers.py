from __future__ import annotations

import numpy as np
import pytest
import torch

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from tests.formats.onnx.graphs import Builder, computed, constants_of, floats, node_of, operators  # noqa: E402

from lowbit.formats.onnx.activations import Grid, quantize_activation  # noqa: E402
from lowbit.formats.onnx.layers import (  # noqa: E402
    DecodedWeight,
    decode_weight,
    decode_while_loading,
    keep_float,
    note_layers_in_float,
    quantize_bias,
    why_in_float,
)
from lowbit.formats.onnx.surgery import Reasons, constant_of, input_of, remove_unused  # noqa: E402
from lowbit.formats.onnx.translate import QUANTIZE, WEIGHT  # noqa: E402
from lowbit.formats.program.program import GRID_OF_ITS_OWN  # noqa: E402
from lowbit.quantizers import CodebookQuantizer, QTensor  # noqa: E402
from lowbit.quantizers.qtensor import AffineDecoder  # noqa: E402
from lowbit.spec import Granularity  # noqa: E402

CODES = torch.tensor([[1, -2], [3, 0]], dtype=torch.int8)
SCALE = torch.tensor([[0.5], [0.25]])
WEIGHT_VALUES = QTensor(CODES, AffineDecoder(SCALE, torch.zeros(2, 1), Granularity.channel(0)), 4)
X = floats([[1.0, -2.0]])


class Linear(Builder):
    """``x [1, 2]``, quantized to eighths unless it is not, times the transposed weight ``[[0.5, -1], [0.75, 0]]`` and a bias."""

    def __init__(self, *, bias: tuple[float, float] | None = (0.5, -1.0), operator: str = "Gemm", is_quantized: bool = True) -> None:
        super().__init__([1, 2])
        self.grids: dict[ir.Value, Grid] = {}
        self.decoded: dict[ir.Value, DecodedWeight] = {}
        self.reasons: Reasons = {}
        x = self.x
        if is_quantized:
            x = self.quantizer(x, "xq", lower=-16.0, step=0.125, scale=0.125, zero=128.0, qmin=0, qmax=255)
        inputs = [x, self.weight("fc.weight", WEIGHT_VALUES.decode().numpy())]
        if bias is not None:
            inputs.append(self.constant("fc.bias", floats(*bias)))
        self.y = self.add(operator, inputs, "y", [1, 2], **({"transB": 1} if operator == "Gemm" else {}))

    def decode(self, weight: QTensor = WEIGHT_VALUES, container: str = "int8") -> Linear:
        """Replace the quantizer and the weight."""
        for node in list(self.graph):
            if node.op_type == QUANTIZE:
                quantize_activation(node, self.grids, self.reasons)
            elif node.op_type == WEIGHT:
                decode_weight(node, "fc.weight", weight, container, self.decoded, self.reasons)  # type: ignore[arg-type]
        return self

    @property
    def layer(self) -> ir.Node:
        producer = self.y.producer()
        assert producer is not None
        return producer


def test_a_weight_becomes_codes_on_the_finest_grid_within_64_and_its_scales() -> None:
    linear = Linear().decode()
    model = linear.model(linear.y)
    content = constants_of(model.graph)
    assert content["fc.weight.codes"] == [[16, -32], [48, 0]]  # times 16: 3 becomes 48
    assert content["fc.weight.scale"] == [0.5 / 16, 0.25 / 16]
    assert content["fc.weight.zero_point"] == [0, 0]
    assert computed(model, X)[0].tolist() == [[0.5 + 2 + 0.5, 0.75 - 1]]
    assert linear.reasons == {}


def test_codes_of_4_bits_share_bytes_and_stay_what_they_are() -> None:
    linear = Linear().decode(container="int4")
    (weight,) = linear.decoded.values()
    codes = linear.graph.initializers["fc.weight.codes"]
    assert (weight.is_int4, weight.name, codes.dtype) == (True, "fc.weight", ir.DataType.INT4)
    assert constants_of(linear.graph)["fc.weight.codes"] == [[1, -2], [3, 0]]
    assert why_in_float(linear.layer, linear.grids, linear.decoded) == "runtimes decode 4-bit codes"


def test_a_weight_without_integer_grid_keeps_its_floats_and_is_named() -> None:
    quantizer = CodebookQuantizer(2, granularity=Granularity.channel(0))
    quantizer.initialize(torch.tensor([[0.1, 0.5], [0.7, 0.9]]))
    linear = Linear().decode(quantizer.encode(torch.tensor([[0.1, 0.5], [0.7, 0.9]])))
    assert linear.decoded == {}
    assert linear.reasons == {"integer kernels cannot hold the levels of a codebook quantizer": ["fc"]}
    assert input_of(linear.layer, 1) is linear.graph.initializers["fc.weight"]


def test_the_transpose_of_a_weight_is_applied_to_its_codes() -> None:
    builder = Builder([1, 2])
    transposed = builder.add("Transpose", [builder.weight("fc.weight", WEIGHT_VALUES.decode().numpy())], "t", [2, 2])
    model = builder.model(builder.add("MatMul", [builder.x, transposed], "y", [1, 2]))
    before = computed(model, X)
    decode_weight(node_of(model.graph, WEIGHT), "fc.weight", WEIGHT_VALUES, "int8", decoded := {}, {})
    remove_unused(model)
    assert operators(model.graph) == ["DequantizeLinear", "MatMul"]
    assert constants_of(model.graph)["fc.weight.transposed.codes"] == [[16, 48], [-32, 0]]
    assert node_of(model.graph, "DequantizeLinear").attributes["axis"].as_int() == 1
    assert [weight.name for weight in decoded.values()] == ["fc.weight"]
    assert computed(model, X)[0].tolist() == before[0].tolist() == [[2.5, 0.75]]


def test_a_bias_is_a_whole_number_of_products_of_input_and_weight() -> None:
    linear = Linear().decode()
    quantize_bias(linear.layer, linear.grids, linear.decoded)
    model = linear.model(linear.y)
    content = constants_of(model.graph)
    units = 0.125 * np.asarray(content["fc.weight.scale"])
    assert content["y.bias.scale"] == pytest.approx(units.tolist(), rel=1e-6)
    assert content["y.bias.codes"] == np.rint([0.5, -1.0] / units).astype(int).tolist()
    bias = node_of(model.graph, "Gemm").inputs[2]
    assert bias is not None
    assert bias.name == "y.bias.decoded"
    assert computed(model, X)[0].tolist() == [[3.0, -0.25]]


def test_a_bias_too_coarse_for_the_codes_behind_it_keeps_the_layer_in_float() -> None:
    codes = torch.tensor([[127, -126], [127, 1]], dtype=torch.int8)  # full: no multiple of them fits
    weight = QTensor(codes, AffineDecoder(SCALE, torch.zeros(2, 1), Granularity.channel(0)), 8)
    for step, is_held in ((0.01, False), (1.0, True)):
        linear = Linear(bias=(0.03, 0.0)).decode(weight)  # half of the unit 0.125 * 0.5 away from both neighbours
        scale, zero = linear.constant("q.scale", np.asarray(step, np.float32)), linear.constant("q.zero", np.asarray(0, np.uint8))
        linear.add("QuantizeLinear", [linear.y, scale, zero], "q", [1, 2])
        quantize_bias(linear.layer, linear.grids, linear.decoded)
        why = why_in_float(linear.layer, linear.grids, linear.decoded)
        assert why == (None if is_held else "the integers of the sums are too coarse for the bias")
        assert ("Clip" in operators(linear.graph)) is not is_held
        assert (constant_of(linear.layer.inputs[2]) is None) is is_held  # a float bias is a constant


@pytest.mark.parametrize(
    ("linear", "why"),
    [
        (Linear(), None),
        (Linear(is_quantized=False), "the input is not quantized"),
        (Linear(operator="ConvTranspose"), "ConvTranspose has no integer kernel"),
        (Linear(operator="Add"), "Add has no integer kernel"),
    ],
    ids=["linear", "float input", "transposed", "sum"],
)
def test_the_reason_for_float_is_named(linear: Linear, why: str | None) -> None:
    linear.decode()
    assert why_in_float(linear.layer, linear.grids, linear.decoded) == why
    note_layers_in_float(linear.graph, linear.grids, linear.decoded, linear.reasons)
    assert linear.reasons == ({} if why is None else {why: ["fc"]})
    emulated: Reasons = {}
    note_layers_in_float(linear.graph, linear.grids, linear.decoded, emulated, ["fc"])
    assert emulated == ({} if why is None else {GRID_OF_ITS_OWN: ["fc"]})


@pytest.mark.parametrize(
    ("readers", "why"),
    [
        ([], "the result is the network's output"),
        (["QuantizeLinear"], None),
        (["Sigmoid"], "the result is not quantized before Sigmoid"),
        (["QuantizeLinear", "Tanh", "Sigmoid"], "the result is not quantized before Sigmoid, Tanh"),
        (["QuantizeLinear", "QuantizeLinear"], "the result is quantized in several ways"),
    ],
)
def test_a_convolution_has_to_end_in_one_quantizer(readers: list[str], why: str | None) -> None:
    linear = Linear(operator="Conv").decode()
    scale, zero = linear.constant("q.scale", floats([0.5])), linear.constant("q.zero", np.asarray([0], np.uint8))
    for index, reader in enumerate(readers):
        linear.add(reader, [linear.y, scale, zero] if reader == "QuantizeLinear" else [linear.y], f"reader{index}", [1, 2])
    if not readers:
        linear.model(linear.y)
    assert why_in_float(linear.layer, linear.grids, linear.decoded) == why


def test_a_float_layer_behind_a_quantizer_reads_it_through_a_clip_that_changes_nothing() -> None:
    linear = Linear()
    quantize_activation(node_of(linear.graph, QUANTIZE), linear.grids, {})
    marker = node_of(linear.graph, WEIGHT)
    ir.convenience.replace_all_uses_with(marker.outputs[0], marker.inputs[0])
    model = linear.model(linear.y)
    before = computed(model, X)
    keep_float(linear.layer, linear.grids, {})
    assert input_of(linear.layer, 0).producer().op_type == "Clip"  # type: ignore[union-attr]
    content = constants_of(model.graph)
    assert (content["y.input.lowest"], content["y.input.highest"]) == (-16.0, 127 * 0.125)
    assert computed(model, X)[0].tolist() == before[0].tolist() == [[3.0, -0.25]]


@pytest.mark.parametrize("zero_point", [0.0, 1.0])
def test_a_layer_in_float_has_its_weight_as_a_cast_and_a_product(zero_point: float) -> None:
    decoder = AffineDecoder(SCALE, torch.full((2, 1), zero_point), Granularity.channel(0))
    codes = torch.tensor([[-128, 127], [3, 0]], dtype=torch.int8)  # no room to move the zero point to 0
    linear = Linear(is_quantized=False).decode(QTensor(codes, decoder, 8))
    model = linear.model(linear.y)
    before = computed(model, X)
    decode_while_loading(linear.layer, linear.grids, linear.decoded)
    steps = ["Cast", *(["Sub"] if zero_point else []), "Mul"]
    assert [op for op in operators(model.graph) if op not in ("DequantizeLinear", "Gemm")] == steps
    exact = X @ ((codes.float() - zero_point) * SCALE).numpy().T + floats(0.5, -1.0)
    assert computed(model, X)[0].tolist() == before[0].tolist() == exact.tolist()


def test_a_layer_that_is_computed_in_integers_keeps_its_decoder() -> None:
    linear = Linear().decode()
    decode_while_loading(linear.layer, linear.grids, linear.decoded)
    assert input_of(linear.layer, 1).producer().op_type == "DequantizeLinear"  # type: ignore[union-attr]
