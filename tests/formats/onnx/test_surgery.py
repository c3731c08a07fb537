from __future__ import annotations

import numpy as np
import pytest

ir = pytest.importorskip("onnx_ir")

from lowbit.formats.onnx.surgery import add_initializer, constant_of, input_of, pass_through, remove_unused, take_place_of, tidy  # noqa: E402


def chain(*operators: str) -> tuple[object, list[object]]:
    """A model of one input whose operators of one argument follow one another, and its nodes."""
    value = x = ir.val("x", dtype=ir.DataType.FLOAT, shape=[2])
    nodes = []
    for index, operator in enumerate(operators):
        node = ir.node(operator, [value])
        value = node.outputs[0]
        value.name, value.dtype, value.shape = f"v{index}", ir.DataType.FLOAT, ir.Shape([2])
        nodes.append(node)
    graph = ir.Graph([x], [value], nodes=nodes, opset_imports={"": 18}, name="g")
    return ir.Model(graph, ir_version=10), nodes


def operators(model: object) -> list[str]:
    return [node.op_type for node in model.graph]  # type: ignore[attr-defined]


def test_a_node_is_replaced_by_a_value_that_takes_its_name_even_as_an_output() -> None:
    model, (relu, negative) = chain("Relu", "Neg")
    take_place_of(negative, relu.outputs[0])
    assert operators(model) == ["Relu"]
    assert [output.name for output in model.graph.outputs] == ["v1"]  # type: ignore[attr-defined]
    assert model.graph.outputs[0] is relu.outputs[0]  # type: ignore[attr-defined]


def test_passing_through_leaves_an_identity_that_tidying_removes_inside_a_graph() -> None:
    model, nodes = chain("Relu", "Abs", "Neg")
    pass_through(nodes[1])
    assert operators(model) == ["Relu", "Identity", "Neg"]
    assert operators(tidy(model)) == ["Relu", "Neg"]
    assert (model.producer_name, model.producer_version) == ("lowbit", "")  # type: ignore[attr-defined]


def test_constants_are_read_and_computed_values_are_none() -> None:
    model, (relu,) = chain("Relu")
    value = add_initializer(model.graph, "c", np.asarray([1, -2], np.int8))  # type: ignore[attr-defined]
    content = constant_of(value)
    assert content is not None
    assert (content.tolist(), content.dtype) == ([1, -2], np.int8)
    assert constant_of(relu.outputs[0]) is None
    assert constant_of(None) is None
    assert input_of(relu, 0).name == "x"


def test_what_nothing_reads_is_removed() -> None:
    model, (relu,) = chain("Relu")
    graph = model.graph  # type: ignore[attr-defined]
    add_initializer(graph, "unread", np.zeros(2, np.float32))
    graph.append(ir.node("Abs", [relu.outputs[0]]))
    remove_unused(model)
    assert operators(model) == ["Relu"]
    assert list(graph.initializers) == []
