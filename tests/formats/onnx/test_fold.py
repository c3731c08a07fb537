from __future__ import annotations

import numpy as np
import pytest
import torch

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from tests.formats.onnx.graphs import Array, Builder, computed, floats, node_of, operators  # noqa: E402

from lowbit.formats.onnx.fold import fold_affine  # noqa: E402
from lowbit.formats.onnx.integer_grid import IntegerGrid  # noqa: E402
from lowbit.formats.onnx.surgery import Reasons, constant_of  # noqa: E402
from lowbit.formats.onnx.translate import WEIGHT  # noqa: E402
from lowbit.quantizers import QTensor  # noqa: E402
from lowbit.quantizers.qtensor import AffineDecoder  # noqa: E402
from lowbit.spec import Granularity  # noqa: E402

CODES = torch.tensor([[1, -2], [3, 0]], dtype=torch.int8)
SCALE = torch.tensor([0.5, 0.25])
X = floats([[[[1.0]], [[-2.0]]]])


def weight_of(codes: torch.Tensor) -> QTensor:
    """The codes as a weight of 1x1 convolutions, with ``SCALE`` for its two channels."""
    codes = codes[:, :, None, None]
    scale = SCALE.reshape(2, 1, 1, 1)
    return QTensor(codes, AffineDecoder(scale, torch.zeros_like(scale), Granularity.channel(0)), 8)


class Convolution(Builder):
    """``x [1, 2, 1, 1]`` through a 1x1 convolution with weights ``[[0.5, -1], [0.75, 0]]``, and biases where they are given."""

    def __init__(self, *, bias: Array | None = None, codes: torch.Tensor = CODES) -> None:
        super().__init__([1, 2, 1, 1])
        self.quantized = {"conv.weight": weight_of(codes)}
        self.marked = self.weight("conv.weight", self.quantized["conv.weight"].decode().numpy())
        inputs = [self.x, self.marked, *([] if bias is None else [self.constant("conv.bias", bias)])]
        self.y = self.add("Conv", inputs, "y", [1, 2, 1, 1])

    def then(self, operator: str, constant: Array, *, is_second: bool = False) -> Convolution:
        """An operator with a constant behind what was added last."""
        operand = self.constant(f"{self.y.name}.{operator}", constant)
        inputs = [operand, self.y] if is_second else [self.y, operand]
        self.y = self.add(operator, inputs, f"{self.y.name}_{operator}", [1, 2, 1, 1])
        return self

    def norm(self, gamma: Array, beta: Array, mean: Array, variance: Array, **attributes: object) -> Convolution:
        tables = {"gamma": gamma, "beta": beta, "mean": mean, "variance": variance}
        inputs = [self.y, *(self.constant(f"norm.{name}", table) for name, table in tables.items())]
        self.y = self.add("BatchNormalization", inputs, f"{self.y.name}_norm", [1, 2, 1, 1], **attributes)
        return self

    def fold(self) -> tuple[list[Array], list[Array], dict[ir.Node, IntegerGrid], Reasons]:
        """What is computed before and after, with the new grids in the places of the weights; new grids; reasons."""
        reasons: Reasons = {}
        model = self.model(self.y)
        before = computed(model, X)
        folded = fold_affine(self.graph, self.quantized, reasons)
        for marker, grid in folded.items():
            marker.replace_input_with(0, self.constant("rescaled", grid.decode().numpy()))
        return before, computed(model, X), folded, reasons


def test_a_batch_norm_goes_into_scales_codes_and_bias() -> None:
    convolution = Convolution(bias=floats(1, 2)).norm(floats(3, -2), floats(0.5, 1), floats(4, 0), floats(8, 0.25), epsilon=1.0)
    before, after, folded, reasons = convolution.fold()
    (grid,) = folded.values()
    # factors: 3 / sqrt(8 + 1) = 1 and -2 / sqrt(0.25 + 1)
    factor = -2 / np.sqrt(1.25)
    assert grid.codes.flatten(1).tolist() == [[1, -2], [-3, 0]]
    np.testing.assert_allclose(grid.scale.numpy(), [0.5, 0.25 * -factor], rtol=1e-6)
    bias = constant_of(node_of(convolution.graph, "Conv").inputs[2])
    assert bias is not None
    np.testing.assert_allclose(bias, [1 * 1 + 0.5 - 4, 2 * factor + 1], rtol=1e-6)
    assert operators(convolution.graph) == [WEIGHT, "Conv"]
    np.testing.assert_allclose(after[0], before[0], rtol=1e-6)
    assert before[0].ravel()[0] == 2.5 + 1 + 0.5 - 4
    assert reasons == {}


@pytest.mark.parametrize(
    ("operator", "constant", "is_second", "scale", "codes", "bias"),
    [
        ("Mul", floats([[[2.0]], [[4.0]]]), False, [1.0, 1.0], [[1, -2], [3, 0]], [20, 80]),
        ("Mul", floats([-2.0]), True, [1.0, 0.5], [[-1, 2], [-3, 0]], [-20, -40]),
        ("Div", floats([[[2.0]], [[0.5]]]), False, [0.25, 0.5], [[1, -2], [3, 0]], [5, 40]),
        ("Add", floats([[[1.0]], [[-1.0]]]), True, [0.5, 0.25], [[1, -2], [3, 0]], [11, 19]),
        ("Sub", floats([3.0]), False, [0.5, 0.25], [[1, -2], [3, 0]], [7, 17]),
        ("Sub", floats([3.0]), True, [0.5, 0.25], [[-1, 2], [-3, 0]], [-7, -17]),
    ],
)
def test_products_and_sums_with_constants_are_folded(
    operator: str, constant: Array, is_second: bool, scale: list[float], codes: list[list[int]], bias: list[float]
) -> None:
    convolution = Convolution(bias=floats(10, 20)).then(operator, constant, is_second=is_second)
    before, after, folded, _ = convolution.fold()
    (grid,) = folded.values()
    assert grid.scale.tolist() == scale
    assert grid.codes.flatten(1).tolist() == codes
    found = constant_of(node_of(convolution.graph, "Conv").inputs[2])
    assert found is not None
    assert found.tolist() == bias
    assert operators(convolution.graph) == [WEIGHT, "Conv"]
    assert after[0].tolist() == before[0].tolist()


def test_steps_that_follow_one_another_are_folded_into_a_layer_without_bias() -> None:
    convolution = Convolution().then("Mul", floats(2.0)).then("Add", floats([[[1.0]], [[3.0]]])).then("Div", floats(0.5))
    before, after, folded, _ = convolution.fold()
    (grid,) = folded.values()
    assert grid.scale.tolist() == [2.0, 1.0]
    found = constant_of(node_of(convolution.graph, "Conv").inputs[2])
    assert found is not None
    assert found.tolist() == [2.0, 6.0]
    assert [output.name for output in convolution.graph.outputs] == ["y_Mul_Add_Div"]
    assert after[0].ravel().tolist() == before[0].ravel().tolist() == [12.0, 9.0]


@pytest.mark.parametrize(
    ("operator", "constant", "is_second"),
    [
        ("Div", floats([3.0]), True),
        ("Div", floats([[[2.0]], [[0.0]]]), False),
        ("Mul", floats([[1.0, 2.0, 3.0]]), False),
        ("Pow", floats([2.0]), False),
    ],
)
def test_what_is_no_factor_or_shift_of_a_channel_stays(operator: str, constant: Array, is_second: bool) -> None:
    convolution = Convolution().then(operator, constant, is_second=is_second)
    folded = fold_affine(convolution.graph, convolution.quantized, {})
    assert folded == {}
    assert operators(convolution.graph) == [WEIGHT, "Conv", operator]


def test_a_norm_in_training_mode_stays() -> None:
    convolution = Convolution().norm(*(floats(1, 1) for _ in range(4)), training_mode=1)
    assert fold_affine(convolution.graph, convolution.quantized, {}) == {}


def test_a_result_that_is_also_read_elsewhere_or_is_an_output_is_not_changed() -> None:
    convolution = Convolution()
    result = convolution.y
    convolution.then("Mul", floats(2.0))
    other = convolution.add("Neg", [result], "other", [1, 2, 1, 1])
    model = convolution.model(convolution.y, other)
    assert fold_affine(convolution.graph, convolution.quantized, {}) == {}
    assert [value.ravel().tolist() for value in computed(model, X)] == [[5.0, 1.5], [-2.5, -0.75]]

    convolution = Convolution()
    result = convolution.y
    convolution.then("Mul", floats(2.0)).model(result)
    assert fold_affine(convolution.graph, convolution.quantized, {}) == {}


def test_a_weight_that_two_layers_read_is_not_changed() -> None:
    convolution = Convolution().then("Mul", floats(2.0))
    second = convolution.add("Conv", [convolution.x, convolution.marked], "second", [1, 2, 1, 1])
    model = convolution.model(convolution.y, second)
    assert fold_affine(convolution.graph, convolution.quantized, {}) == {}
    assert [value.ravel().tolist() for value in computed(model, X)] == [[5.0, 1.5], [2.5, 0.75]]


def test_codes_whose_negatives_int8_cannot_hold_keep_their_norm_and_are_named() -> None:
    codes = torch.tensor([[-128, 127], [1, 1]], dtype=torch.int8)
    before, after, folded, reasons = Convolution(codes=codes).then("Mul", floats(-1.0)).fold()
    assert folded == {}
    assert reasons == {"int8 cannot hold 128, the negative of a code": ["conv"]}
    assert after[0].tolist() == before[0].tolist()


@pytest.mark.parametrize(("attributes", "is_folded"), [({"transB": 1}, True), ({"transB": 1, "alpha": 2.0}, False), ({}, False)])
def test_linear_layers_are_folded_into_where_they_are_plain_ones(attributes: dict[str, object], is_folded: bool) -> None:
    builder = Builder([1, 2])
    quantized = {"fc.weight": QTensor(CODES, AffineDecoder(SCALE.reshape(2, 1), torch.zeros(2, 1), Granularity.channel(0)), 4)}
    weight = builder.weight("fc.weight", quantized["fc.weight"].decode().numpy())
    y = builder.add("Gemm", [builder.x, weight, builder.constant("fc.bias", floats(1, 1))], "y", [1, 2], **attributes)
    y = builder.add("Mul", [y, builder.constant("factor", floats(2, 4))], "z", [1, 2])
    builder.model(y)
    folded = fold_affine(builder.graph, quantized, {})
    assert [grid.scale.tolist() for grid in folded.values()] == ([[1.0, 1.0]] if is_folded else [])
    assert operators(builder.graph) == [WEIGHT, "Gemm"] + ["Mul"] * (not is_folded)
