"""Small edits of an ONNX graph."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

Reasons = dict[str, list[str]]  # why something stays in float, and the names of what does
Array = npt.NDArray[np.generic]

FLOAT = ir.DataType.FLOAT


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that ``node`` is in."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def input_of(node: ir.Node, index: int) -> ir.Value:
    """An input that the operator requires."""
    value = node.inputs[index]
    assert value is not None
    return value


def constant_of(value: ir.Value | None) -> Array | None:
    """The content of a constant or initializer, ``None`` for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_initializer(graph: ir.Graph, name: str, content: Array, dtype: ir.DataType | None = None) -> ir.Value:
    """A new initializer."""
    value = ir.val(name, const_value=ir.tensor(content, dtype=dtype, name=name))
    graph.register_initializer(value)
    return value


def pass_through(node: ir.Node) -> None:
    """Put an identity in the place of ``node``; ``tidy`` removes those that may go."""
    step = ir.node("Identity", [input_of(node, 0)])
    step.outputs[0].shape, step.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph_of(node).insert_before(node, step)
    take_place_of(node, step.outputs[0])


def take_place_of(node: ir.Node, value: ir.Value) -> None:
    """Let ``value`` take the place and the name of the output of ``node``, and remove ``node``."""
    old = node.outputs[0]
    name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph_of(node).remove(node, safe=True)
    value.name = name


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads."""
    passes.RemoveUnusedNodesPass()(model)


def tidy(model: ir.Model) -> ir.Model:
    """Remove what nothing reads, and traces of the exporting machine such as file names in stack traces."""
    for step in (
        passes.IdentityEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.TopologicalSortPass(),
    ):
        model = step(model).model
    model.producer_name, model.producer_version = "lowbit", ""
    return model
