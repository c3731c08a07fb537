"""Constants of an exported program: its parameters and buffers, and values computed from these alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

from lowbit.formats.program.operators import operator_name

_LARGEST = 256  # elements: enough for a codebook or the tables of an activation grid, too few for weights


def constant_of(exported: ExportedProgram, placeholder: fx.Node) -> Tensor | None:
    """The parameter, buffer or constant behind a placeholder; ``None`` for an input."""
    signature = exported.graph_signature
    name = signature.inputs_to_parameters.get(placeholder.name) or signature.inputs_to_buffers.get(placeholder.name)
    name = name or signature.inputs_to_lifted_tensor_constants.get(placeholder.name)
    if name is None:
        return None
    value = exported.state_dict.get(name, exported.constants.get(name))
    return value.detach() if isinstance(value, Tensor) else None


def fold_constants(exported: ExportedProgram) -> None:
    """Replace results of up to 256 elements that depend on parameters, buffers and constants alone by constants.

    So a file contains the few numbers of a quantizer's grid, rather than the computation that derives them from its parameters.
    """
    graph = exported.graph_module.graph
    outputs = set(graph.output_node().all_input_nodes)
    known = {node: value for node in graph.nodes if node.op == "placeholder" and (value := constant_of(exported, node)) is not None}
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and all(source in known for source in node.all_input_nodes):
            value = _computed(node, known) if operator_name(node.target) is not None else None
            if value is not None:
                known[node] = value
    folded = [node for node in known if node.op == "call_function" and any(reader not in known for reader in node.users)]
    for node in folded:
        if node not in outputs:
            node.replace_all_uses_with(_add_constant(exported, node, known[node]), delete_user_cb=lambda reader: reader not in known)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


def _computed(node: fx.Node, known: dict[fx.Node, Tensor]) -> Tensor | None:
    shape = getattr(node.meta.get("val"), "shape", None)
    if shape is None or any(not isinstance(size, int) for size in shape) or shape.numel() > _LARGEST:
        return None
    args: Any = fx.node.map_arg(node.args, known.__getitem__)
    kwargs: Any = fx.node.map_arg(node.kwargs, known.__getitem__)
    with torch.no_grad():
        value = node.target(*args, **kwargs)  # type: ignore[operator]
    return value.detach() if isinstance(value, Tensor) else None


def _add_constant(exported: ExportedProgram, node: fx.Node, value: Tensor) -> fx.Node:
    """Add a constant with a placeholder before the inputs, where torch keeps constants."""
    specs = exported.graph_signature.input_specs
    index = next(position for position, spec in enumerate(specs) if spec.kind is InputKind.USER_INPUT)
    placeholders = [found for found in exported.graph_module.graph.nodes if found.op == "placeholder"]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = next(name for name in _names(stack[-1][0] if stack else "", node.name) if not _is_taken(exported, name))
    with exported.graph_module.graph.inserting_before(placeholders[index]):
        added: fx.Node = exported.graph_module.graph.placeholder(f"c_{name.replace('.', '_')}")
    added.meta["val"] = node.meta["val"]
    specs.insert(index, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(added.name), name))
    exported.constants[name] = value.detach().clone()
    return added


def _names(path: str, operator: str) -> Iterator[str]:
    """Candidate names for a constant of the module at ``path``, the plain one first."""
    prefix = f"{path}." if path else ""
    yield f"{prefix}{operator}"
    yield from (f"{prefix}{operator}_{number}" for number in range(1, 10**6))


def _is_taken(exported: ExportedProgram, name: str) -> bool:
    known = [*exported.state_dict, *exported.constants]
    return any(name == other or other.startswith(f"{name}.") or name.startswith(f"{other}.") for other in known)
