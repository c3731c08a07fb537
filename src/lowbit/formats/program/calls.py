"""The graph of a packed file in plain JSON: a list of operator calls, each of which reads only earlier results.

Arguments are numbers, strings, ``null`` and lists, or one of: ``{"node": name}``, the result of an earlier call or an input;
``{"tensor": name}``, a stored tensor; ``{"dtype": name}``; ``{"memory_format": name}``; ``{"device": null}``, the device of the inputs;
``{"float": "inf" | "-inf" | "nan"}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar, cast

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from lowbit.errors import FileFormatError, GraphError
from lowbit.formats.program.operators import check_arguments, find_operator, operator_name
from lowbit.formats.program.structure import Json, check_structure

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float16, torch.bfloat16, torch.float32, torch.float64,
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    )
}  # fmt: skip
_MEMORY_FORMATS = {
    str(layout).removeprefix("torch."): layout
    for layout in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.channels_last_3d)
}
LARGEST_RANK = 16  # dimensions of a stored tensor
_DEEPEST = 6  # nesting of lists in an argument; torch's operators need 2


@dataclass(frozen=True)
class Result:
    """A reference to the result of an earlier node, or to an input."""

    name: str


@dataclass(frozen=True)
class Stored:
    """A reference to a stored tensor."""

    name: str


@dataclass(frozen=True)
class InputDevice:
    """The device of the inputs."""


@dataclass(frozen=True)
class OperatorCall:
    """A call of an operator."""

    name: str
    operator: str
    args: tuple[object, ...]
    kwargs: Mapping[str, object]


@dataclass(frozen=True)
class GraphInput:
    """An input: its name, shape (``None`` for open sizes), dtype, and the dimension over samples."""

    name: str
    shape: tuple[int | None, ...]
    dtype: torch.dtype
    batch_dim: int = 0

    def __str__(self) -> str:
        sizes = [("batch" if dim == self.batch_dim else "any") if size is None else str(size) for dim, size in enumerate(self.shape)]
        return f"{str(self.dtype).removeprefix('torch.')} [{', '.join(sizes)}]"


@dataclass(frozen=True)
class Graph:
    """Inputs, operator calls in order, and the returned values with their nesting.

    ``batch_range`` is the smallest and the largest batch size, ``None`` for no limit.
    """

    inputs: tuple[GraphInput, ...]
    nodes: tuple[OperatorCall, ...]
    outputs: tuple[object, ...]
    structure: Json
    batch_range: tuple[int, int | None] = (1, None)
    tensors: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        found = (reference.name for value in self._values() for reference in references(value) if isinstance(reference, Stored))
        object.__setattr__(self, "tensors", frozenset(found))

    def _values(self) -> Iterator[object]:
        for node in self.nodes:
            yield node.args
            yield tuple(node.kwargs.values())
        yield self.outputs


def references(value: object) -> Iterator[Result | Stored]:
    """The references within an argument."""
    if isinstance(value, (Result, Stored)):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from references(item)


def graph_from_exported(exported: ExportedProgram, structure: Json, names: Mapping[str, str], batch_dims: Mapping[str, int]) -> Graph:
    """The graph of an exported program.

    Args:
        exported: Functional program.
        structure: Nesting of its outputs.
        names: The name of the stored tensor for each parameter, buffer and constant.
        batch_dims: The dimension over samples of each input that has one.

    Raises:
        GraphError: It uses an operator or an argument that a packed file does not support; the error names the module.
    """
    known: dict[fx.Node, object] = {}
    inputs: list[GraphInput] = []
    nodes: list[OperatorCall] = []
    kinds = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for node in exported.graph.nodes:
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                inputs.append(_graph_input(node, batch_dims.get(node.name, 0)))
                known[node] = Result(node.name)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                known[node] = Stored(names.get(cast(str, spec.target), cast(str, spec.target)))
        elif node.op == "call_function":
            name = operator_name(node.target)
            if name is None:
                raise GraphError(
                    f"a packed file does not support the operator {node.target} (used by {_module_of(node)}). Rewrite that part."
                )
            args = tuple(_argument(arg, known, node) for arg in node.args)
            # pinned memory and layout always have torch's defaults
            kwargs = {key: _argument(arg, known, node) for key, arg in node.kwargs.items() if key not in ("layout", "pin_memory")}
            nodes.append(OperatorCall(node.name, name, args, kwargs))
            known[node] = Result(node.name)
        elif node.op == "output":
            outputs = tuple(_argument(arg, known, node) for arg in cast(tuple[object, ...], node.args[0]))
        else:
            raise GraphError(f"a packed file does not support {node.op} of {node.target} (used by {_module_of(node)}). Rewrite that part.")
    specs = exported.graph_signature.output_specs
    results = [output for output, spec in zip(outputs, specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]
    return Graph(tuple(inputs), tuple(nodes), tuple(results), structure, _batch_range(exported, batch_dims))


def _batch_range(exported: ExportedProgram, batch_dims: Mapping[str, int]) -> tuple[int, int | None]:
    batches = {str(node.meta["val"].shape[batch_dims[node.name]]) for node in exported.graph.nodes if node.name in batch_dims}
    lowest, highest = 1, math.inf
    for constraint in (found for size, found in exported.range_constraints.items() if str(size) in batches):
        if constraint.lower > 2:  # torch starts at 2, as it treats sizes 0 and 1 specially
            lowest = max(lowest, int(constraint.lower))
        highest = min(highest, float(constraint.upper))
    return lowest, None if math.isinf(highest) else int(highest)


def _graph_input(node: fx.Node, batch_dim: int) -> GraphInput:
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        raise GraphError(f"input {node.name!r} is a {type(value).__name__}; a packed file supports tensors only")
    return GraphInput(node.name, tuple(size if isinstance(size, int) else None for size in value.shape), value.dtype, batch_dim)


def _argument(value: object, known: Mapping[fx.Node, object], node: fx.Node) -> object:
    if isinstance(value, fx.Node):
        return known[value]
    if isinstance(value, (list, tuple)):
        return [_argument(item, known, node) for item in value]
    if isinstance(value, torch.device):
        return InputDevice()
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.memory_format)):
        return value
    raise GraphError(f"a packed file does not support the argument {value!r} of {node.target} (used by {_module_of(node)})")


def _module_of(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f"module {stack[-1][0]!r}" if stack and stack[-1][0] else "the network itself"


def graph_to_json(graph: Graph) -> Json:
    """The graph as plain JSON values; ``graph_from_json`` reads them."""
    return {
        "inputs": [
            [i.name, list(i.shape), str(i.dtype).removeprefix("torch."), *([i.batch_dim] if i.batch_dim else [])] for i in graph.inputs
        ],
        "batch": list(graph.batch_range),
        "nodes": [[n.name, n.operator, _to_json(n.args), {key: _to_json(arg) for key, arg in n.kwargs.items()}] for n in graph.nodes],
        "outputs": _to_json(graph.outputs),
        "structure": graph.structure,
    }


def _to_json(value: object) -> Json:
    if isinstance(value, Result):
        return {"node": value.name}
    if isinstance(value, Stored):
        return {"tensor": value.name}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.memory_format):
        return {"memory_format": str(value).removeprefix("torch.")}
    if isinstance(value, InputDevice):
        return {"device": None}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    return cast(Json, value)


def graph_from_json(data: object, tensors: frozenset[str]) -> Graph:
    """Read and check a graph: operators must be known, and references must point to earlier results.

    Args:
        data: The values from ``graph_to_json``.
        tensors: Names of the stored tensors.

    Raises:
        FileFormatError: The data is not a valid graph.
    """
    fields = _typed(data, dict, "graph")
    inputs = tuple(_input_from_json(item) for item in _typed(fields.get("inputs"), list, "graph inputs"))
    known = {item.name for item in inputs}
    if len(known) != len(inputs) or not inputs:
        raise FileFormatError("graph inputs: there must be at least one, and each name once")
    nodes: list[OperatorCall] = []
    for item in _typed(fields.get("nodes"), list, "graph nodes"):
        node = _node_from_json(item, known, tensors)
        if node.name in known:
            raise FileFormatError(f"graph: the name {node.name!r} appears twice")
        known.add(node.name)
        nodes.append(node)
    outputs = tuple(_from_json(value, known, tensors, "graph outputs") for value in _typed(fields.get("outputs"), list, "graph outputs"))
    check_structure(fields.get("structure"), len(outputs))
    return Graph(inputs, tuple(nodes), outputs, cast(Json, fields.get("structure")), _range_from_json(fields.get("batch")))


def _node_from_json(item: object, known: set[str], tensors: frozenset[str]) -> OperatorCall:
    if not (isinstance(item, list) and len(item) == 4 and isinstance(item[0], str) and isinstance(item[1], str)):
        raise FileFormatError(f"graph: a node must be [name, operator, arguments, options], got {str(item)[:80]}")
    where = f"graph node {item[0][:80]!r}"
    find_operator(item[1])
    args = tuple(_from_json(value, known, tensors, where) for value in _typed(item[2], list, where))
    options = {key: _from_json(value, known, tensors, where) for key, value in _typed(item[3], dict, where).items()}
    try:
        check_arguments(item[1], args, options)
    except FileFormatError as error:
        raise FileFormatError(f"{where}: {error}") from error
    return OperatorCall(item[0], item[1], args, options)


def _input_from_json(item: object) -> GraphInput:
    kinds = [str, list, str, int]
    if not (isinstance(item, list) and [type(part) for part in item] in (kinds, kinds[:3]) and item[2] in _DTYPES):
        raise FileFormatError(
            f"graph inputs: an input must be [name, shape, dtype] or [name, shape, dtype, batch_dim], got {str(item)[:80]}"
        )
    if not all(size is None or is_size(size) for size in item[1]):
        raise FileFormatError(f"graph input {item[0][:80]!r}: its shape must be sizes or null, got {str(item[1])[:80]}")
    batch_dim = item[3] if len(item) == 4 else 0
    if batch_dim and not 0 < batch_dim < len(item[1]):
        raise FileFormatError(f"graph input {item[0][:80]!r}: its batch_dim must be one of its {len(item[1])} dimensions, got {batch_dim}")
    return GraphInput(item[0], tuple(item[1]), _DTYPES[item[2]], batch_dim)


def _range_from_json(item: object) -> tuple[int, int | None]:
    if not (isinstance(item, list) and len(item) == 2 and is_size(item[0]) and (item[1] is None or is_size(item[1]))):
        raise FileFormatError(f"graph: the range of the batch size must be two sizes, got {str(item)[:80]}")
    return item[0], item[1]


def _from_json(value: object, known: set[str], tensors: frozenset[str], where: str, depth: int = 0) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list) and depth < _DEEPEST:
        return [_from_json(item, known, tensors, where, depth + 1) for item in value]
    kind, content = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (None, None)
    if kind == "device" and content is None:
        return InputDevice()
    if isinstance(content, str):
        if kind == "node":
            if content not in known:
                raise FileFormatError(f"{where}: it reads {content[:80]!r}, which no earlier node computes")
            return Result(content)
        if kind == "tensor":
            if content not in tensors:
                raise FileFormatError(f"{where}: it reads the tensor {content[:80]!r}, which the file does not contain")
            return Stored(content)
        if kind == "dtype" and content in _DTYPES:
            return _DTYPES[content]
        if kind == "memory_format" and content in _MEMORY_FORMATS:
            return _MEMORY_FORMATS[content]
        if kind == "float" and content in ("inf", "-inf", "nan"):
            return float(content)
    raise FileFormatError(f"{where}: cannot understand the argument {str(value)[:80]}")


def is_size(value: object) -> bool:
    """Whether a value from a file can be the size of a dimension."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40


def is_shape(value: object) -> bool:
    """Whether a value from a file can be the shape of a tensor."""
    return isinstance(value, list) and len(value) <= LARGEST_RANK and all(is_size(size) for size in value)


T = TypeVar("T")


def _typed(value: object, kind: type[T], where: str) -> T:
    if not isinstance(value, kind):
        raise FileFormatError(f"{where}: expected a {kind.__name__}, got {type(value).__name__}")
    return value
