"""Small edits of an ONNX graph."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes

Reasons = dict[str, list[str]]  # reason for staying in float -> names of the layers or tensors
Array = npt.NDArray[np.generic]

FLOAT = ir.DataType.FLOAT


def graph_of(node: ir.Node) -> ir.Graph:
    """The graph that contains ``node``."""
    assert isinstance(node.graph, ir.Graph)
    return node.graph


def input_of(node: ir.Node, index: int) -> ir.Value:
    """A required input of the operator."""
    value = node.inputs[index]
    assert value is not None
    return value


def constant_of(value: ir.Value | None) -> Array | None:
    """The content of a constant or initializer; ``None`` for anything else."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def add_initializer(graph: ir.Graph, name: str, content: Array, dtype: ir.DataType | None = None) -> ir.Value:
    """Add an initializer to the graph."""
    value = ir.val(name, const_value=ir.tensor(content, dtype=dtype, name=name))
    graph.register_initializer(value)
    return value


def pass_through(node: ir.Node) -> None:
    """Replace ``node`` by an identity; ``tidy`` removes it where possible."""
    step = ir.node("Identity", [input_of(node, 0)])
    step.outputs[0].shape, step.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph_of(node).insert_before(node, step)
    take_place_of(node, step.outputs[0])


def take_place_of(node: ir.Node, value: ir.Value) -> None:
    """Replace the output of ``node`` by ``value``, which inherits its name, and remove ``node``."""
    old = node.outputs[0]
    name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph_of(node).remove(node, safe=True)
    value.name = name


def name_outputs(model: ir.Model, names: Sequence[str | None]) -> None:
    """Name the outputs, each a separate value even if two are the same tensor or one is an input; ``None`` keeps a name.

    An output that returns an input under the input's own name does not change.
    """
    graph = model.graph
    inner = {str(value.name): value for node in graph for value in node.outputs}
    taken = {str(value.name) for value in (*graph.inputs, *graph.initializers.values())}
    seen: set[str] = set()
    for index, value in enumerate(list(graph.outputs)):
        wanted = names[index] or str(value.name)
        if wanted == value.name and wanted not in seen:
            seen.add(wanted)
            continue
        if wanted in taken | seen:
            wanted = next(name for number in count(2) if (name := f"{wanted}_{number}") not in taken | seen | set(inner))
        if wanted in inner:
            inner[wanted].name = f"{wanted}.inner"
        step = ir.node("Identity", [value])
        named = step.outputs[0]
        named.name, named.shape, named.type = wanted, value.shape, value.type
        seen.add(wanted)
        graph.append(step)
        graph.outputs[index] = named


def remove_unused(model: ir.Model) -> None:
    """Remove nodes and initializers that nothing reads."""
    passes.RemoveUnusedNodesPass()(model)


def tidy(model: ir.Model) -> ir.Model:
    """Remove everything that is not read, and traces of the exporting machine such as file names in stack traces."""
    has_subgraphs = any(True for _ in model.graph.subgraphs())
    for step in (
        *(() if has_subgraphs else (passes.IdentityEliminationPass(),)),  # subgraphs must return values of their own
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.ClearMetadataAndDocStringPass(),
        passes.TopologicalSortPass(),
    ):
        model = step(model).model
    model.producer_name, model.producer_version = "lowbit", ""
    return model
