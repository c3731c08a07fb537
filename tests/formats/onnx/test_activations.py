from __future__ import annotations

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from tests.formats.onnx.graphs import Array, Builder, computed, constants_of, floats, node_of, operators  # noqa: E402

from lowbit.formats.onnx.activations import (  # noqa: E402
    Grid,
    only_moves,
    pool_globally,
    quantize_activation,
    repeat_quantizer,
    share_quantizers,
)
from lowbit.formats.onnx.surgery import Reasons, remove_unused  # noqa: E402
from lowbit.formats.onnx.translate import QUANTIZE  # noqa: E402

PAIR = ["QuantizeLinear", "DequantizeLinear"]
CLIPPED = ["QuantizeLinear", "Clip", "DequantizeLinear"]


def rewritten(builder: Builder, *outputs: object) -> tuple[ir.Model, list[Grid], Reasons]:
    """The model with its quantizers replaced, their grids, and what was left in float."""
    model, grids, reasons = builder.model(*outputs), {}, {}  # type: ignore[var-annotated, arg-type]
    for node in list(model.graph):
        if node.op_type == QUANTIZE:
            quantize_activation(node, grids, reasons)
    remove_unused(model)
    return model, list(grids.values()), reasons


def test_codes_of_3_bits_are_clipped_within_a_uint8_container() -> None:
    builder = Builder([7])
    y = builder.quantizer(builder.x, "y", lower=-1.0, step=0.5, scale=0.5, zero=2.0, qmin=0, qmax=7)
    model, grids, reasons = rewritten(builder, y)
    assert operators(model.graph) == CLIPPED
    assert constants_of(model.graph) == {"y.scale": 0.5, "y.zero_point": 2, "y.lowest": 0, "y.highest": 7}
    assert grids == [Grid(np.float32(0.5), 2, 0, 7, np.float32(0.5), 2)]
    assert reasons == {}
    # ties go to the even code: 0.25 and 0.75 are half a step from two codes
    assert computed(model, floats(-9, -0.6, 0, 0.25, 0.75, 1.1, 9))[0].tolist() == [-1.0, -0.5, 0.0, 0.0, 1.0, 1.0, 2.5]


def test_signed_codes_are_moved_so_that_the_lowest_is_0() -> None:
    builder = Builder([4])
    y = builder.quantizer(builder.x, "y", lower=0.0, step=0.25, scale=0.25, zero=0.0, qmin=-4, qmax=3)
    model, _, _ = rewritten(builder, y)
    assert constants_of(model.graph) == {"y.scale": 0.25, "y.zero_point": 4, "y.lowest": 0, "y.highest": 7}
    assert computed(model, floats(-5, -0.3, 0.5, 5))[0].tolist() == [-1.0, -0.25, 0.5, 0.75]


def test_256_codes_need_no_clip() -> None:
    builder = Builder([3])
    y = builder.quantizer(builder.x, "y", lower=0.0, step=0.5, scale=0.5, zero=0.0, qmin=-128, qmax=127)
    model, _, _ = rewritten(builder, y)
    assert operators(model.graph) == PAIR
    assert computed(model, floats(-100, 0.3, 100))[0].tolist() == [-64.0, 0.5, 63.5]


def test_codes_found_on_one_grid_and_decoded_on_another_have_both() -> None:
    builder = Builder([3])
    y = builder.quantizer(builder.x, "y", lower=-1.0, step=2.0, scale=0.5, zero=0.0, qmin=0, qmax=1)
    model, (grid,), _ = rewritten(builder, y)
    assert grid.shift == -1.0  # half a step: 0 is no whole number of steps from the codes
    assert operators(model.graph) == ["Sub", *CLIPPED]
    expected = {"y.scale": 0.5, "y.zero_point": 0, "y.step": 2.0, "y.origin": 0, "y.shift": -1.0, "y.lowest": 0, "y.highest": 1}
    assert constants_of(model.graph) == expected
    assert computed(model, floats(-3, -0.5, 0.5))[0].tolist() == [0.0, 0.0, 0.5]


@pytest.mark.parametrize(
    ("operator", "ends", "codes", "answers"),
    [
        ("Relu", (), (2, 7), [0.0, 0.0, 0.5, 2.5]),
        ("Clip", (0.5, 1.5), (3, 5), [0.5, 0.5, 0.5, 1.5]),
        ("Clip", (None, 1.0), (0, 4), [-1.0, 0.0, 0.5, 1.0]),
    ],
)
def test_a_clip_before_a_quantizer_becomes_the_range_of_its_codes(
    operator: str, ends: tuple[float | None, ...], codes: tuple[int, int], answers: list[float]
) -> None:
    builder = Builder([4])
    bounds = [None if end is None else builder.constant(f"end{index}", np.asarray(end, np.float32)) for index, end in enumerate(ends)]
    y = builder.add(operator, [builder.x, *bounds], "clipped", [4])
    model, (grid,), _ = rewritten(builder, builder.quantizer(y, "y", lower=-1.0, step=0.5, scale=0.5, zero=2.0, qmin=0, qmax=7))
    assert operators(model.graph) == CLIPPED
    assert (grid.lo, grid.hi) == codes
    assert model.graph[0].inputs[0] is model.graph.inputs[0]
    assert computed(model, floats(-4, 0, 0.4, 4))[0].tolist() == answers


def test_a_relu_with_another_reader_stays() -> None:
    builder = Builder([2])
    relu = builder.add("Relu", [builder.x], "relu", [2])
    other = builder.add("Neg", [relu], "other", [2])
    y = builder.quantizer(relu, "y", lower=0.0, step=0.5, scale=0.5, zero=0.0, qmin=0, qmax=7)
    model, (grid,), _ = rewritten(builder, y, other)
    assert operators(model.graph) == ["Relu", "Neg", *CLIPPED]
    assert (grid.lo, grid.hi) == (0, 7)
    assert [result.tolist() for result in computed(model, floats(-1, 0.4))] == [[0.0, 0.5], [0.0, pytest.approx(-0.4)]]


def test_limits_of_channels_are_put_on_the_grid_between_two_quantizers() -> None:
    builder = Builder([1, 2])
    limit = builder.constant("limit", floats([[0.6, 9.0]]))
    limited = builder.add("Min", [builder.add("Relu", [builder.x], "relu", [1, 2]), limit], "limited", [1, 2])
    y = builder.quantizer(limited, "y", lower=0.0, step=0.5, scale=0.5, zero=0.0, qmin=0, qmax=7)
    model, _, _ = rewritten(builder, y)
    assert operators(model.graph) == [*CLIPPED, "Min", *PAIR]
    assert constants_of(model.graph)["y.limit"] == [[0.5, 3.5]]
    for values in ([5.0, 5.0], [0.4, 0.4], [-1.0, 2.3]):
        x = floats([values])
        exact = np.clip(np.rint(np.minimum(np.maximum(x, 0), floats([[0.6, 9.0]])) / 0.5), 0, 7) * 0.5
        assert computed(model, x)[0].tolist() == exact.tolist()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"qmax": 300}, "301 codes of scale 0.5"),
        ({"scale": -0.5}, "8 codes of scale -0.5"),
        ({"zero": 1.5}, "the zero point 1.5, which is not whole"),
        ({"zero": -3.0}, "the zero point -3, which is outside their container"),
        ({"zero": 256.0}, "the zero point 256, which is outside their container"),
    ],
)
def test_what_uint8_cannot_hold_is_computed_in_float_and_said(changes: dict[str, float], reason: str) -> None:
    builder = Builder([4])
    parts = {"lower": -1.0, "step": 0.5, "scale": 0.5, "zero": 2.0, "qmin": 0, "qmax": 7} | changes
    model, grids, reasons = rewritten(builder, builder.quantizer(builder.x, "y", **parts))  # type: ignore[arg-type]
    assert operators(model.graph) == ["Sub", "Div", "Round", "Clip", "Sub", "Mul"]
    assert reasons == {f"uint8 codes cannot hold activations with {reason}": ["y"]}
    assert grids == []
    x = floats(-9, 0.2, 0.75, 99)
    exact = (np.clip(np.rint((x + 1.0) / 0.5), 0, parts["qmax"]) - np.float32(parts["zero"])) * np.float32(parts["scale"])
    assert computed(model, x)[0].tolist() == exact.tolist()


def test_one_scale_for_each_channel_and_other_floats_stay_in_float() -> None:
    builder = Builder([1, 2])
    y = builder.quantizer(builder.x, "y", lower=0.0, step=1.0, scale=1.0, zero=0.0, qmin=0, qmax=3)
    node = node_of(builder.graph, QUANTIZE)
    for index in (2, 3):
        node.replace_input_with(index, builder.constant(f"y.in.channels{index}", floats([[1.0, 0.5]])))
    model, _, reasons = rewritten(builder, y)
    grid = "a grid that is not constant, or not one for the whole tensor"
    assert reasons == {f"uint8 codes cannot hold activations with {grid}": ["y"]}
    assert computed(model, floats([[1.4, 1.4]]))[0].tolist() == [[1.0, 1.5]]

    builder = Builder([2], ir.DataType.DOUBLE)
    _, _, reasons = rewritten(builder, builder.quantizer(builder.x, "y", lower=0.0, step=1.0, scale=1.0, zero=0.0, qmin=0, qmax=3))
    assert reasons == {"uint8 codes cannot hold activations with values that are not float32": ["y"]}


def test_quantizers_that_do_the_same_to_one_tensor_become_one() -> None:
    builder = Builder([2])
    same = {"lower": 0.0, "step": 0.5, "scale": 0.5, "zero": 0.0, "qmin": 0}
    values = [builder.quantizer(builder.x, f"y{index}", **same, qmax=qmax) for index, qmax in enumerate((7, 7, 3))]  # type: ignore[arg-type]
    outputs = [builder.add("Neg", [value], f"n{index}", [2]) for index, value in enumerate(values)]
    model = builder.model(*outputs)
    share_quantizers(model.graph)
    assert operators(model.graph) == [QUANTIZE, QUANTIZE, "Neg", "Neg", "Neg"]
    model, _, _ = rewritten(builder)
    assert [result.tolist() for result in computed(model, floats(1.1, 9))] == [[-1.0, -3.5], [-1.0, -3.5], [-1.0, -1.5]]


def pad(mode: str | None, fill: float | None) -> ir.Node:
    pads = ir.val("pads", const_value=ir.tensor(np.asarray([0, 1], np.int64)))
    filled = [] if fill is None else [ir.val("fill", const_value=ir.tensor(np.asarray(fill, np.float32)))]
    return ir.node("Pad", [ir.val("x"), pads, *filled], {} if mode is None else {"mode": mode})


@pytest.mark.parametrize(
    ("node", "moves"),
    [
        (ir.node("MaxPool", [ir.val("x")]), True),
        (ir.node("Reshape", [ir.val("x"), ir.val("shape")]), True),
        (ir.node("MaxPool", [ir.val("x")], domain="other"), False),
        (ir.node("AveragePool", [ir.val("x")]), False),
        (pad(None, None), True),
        (pad("constant", 0.0), True),
        (pad("constant", 1.0), False),
        (pad("reflect", 1.0), True),
        (ir.node("Pad", [ir.val("x"), ir.val("pads"), ir.val("computed")]), False),
    ],
)
def test_operators_that_move_values_are_told_from_those_that_make_new_ones(node: ir.Node, moves: bool) -> None:
    assert only_moves(node) is moves


def test_a_quantizer_is_repeated_behind_what_moves_its_values() -> None:
    builder = Builder([1, 1, 2, 2])
    y = builder.quantizer(builder.x, "y", lower=-1.0, step=0.5, scale=0.5, zero=2.0, qmin=0, qmax=7)
    pooled = builder.add("MaxPool", [y], "pooled", [1, 1, 1, 1], kernel_shape=[2, 2])
    model, grids = builder.model(builder.add("Neg", [pooled], "out", [1, 1, 1, 1])), {}  # type: ignore[var-annotated]
    quantize_activation(node_of(model.graph, QUANTIZE), grids, {})
    before = computed(model, floats([[[[0.1, 1.2], [-3.0, 0.6]]]]))
    repeat_quantizer(node_of(model.graph, "MaxPool"), grids)
    assert operators(model.graph) == [*CLIPPED, "MaxPool", *PAIR, "Neg"]
    content = constants_of(model.graph)
    assert (content["pooled.scale"], content["pooled.zero_point"]) == (0.5, 2)
    assert computed(model, floats([[[[0.1, 1.2], [-3.0, 0.6]]]])) == before == [floats([[[[-1.0]]]])]
    assert [(grid.lo, grid.hi) for grid in grids.values()] == [(0, 7), (0, 255)]


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_mean_over_height_and_width_is_a_global_pooling(keepdims: int, axes: list[int]) -> None:
    x: Array = np.arange(12, dtype=np.float32).reshape(1, 2, 3, 2)
    builder = Builder(x.shape)
    shape = [1, 2, 1, 1] if keepdims else [1, 2]
    model = builder.model(builder.add("ReduceMean", [builder.x, builder.constant("axes", np.asarray(axes))], "y", shape, keepdims=keepdims))
    pool_globally(model.graph)
    assert operators(model.graph) == ["GlobalAveragePool"] + ["Squeeze"] * (1 - keepdims)
    (result,) = computed(model, x)
    assert (result.shape, result.ravel().tolist()) == (tuple(shape), [2.5, 8.5])


def test_means_over_other_axes_stay() -> None:
    builder = Builder([1, 2, 3, 2])
    model = builder.model(builder.add("ReduceMean", [builder.x, builder.constant("axes", np.asarray([1, 2]))], "y", [1, 1, 1, 2]))
    pool_globally(model.graph)
    assert operators(model.graph) == ["ReduceMean"]
