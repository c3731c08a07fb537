"""The dataflow of a network: which operation reads which tensor, and which modules a tensor passes through.

It comes from ``torch.export``. While exporting, hooks on every module send the tensors that enter and leave it through an
identity operator that carries the module's name, so that graph nodes map to modules whatever the network's code looks like.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export.graph_signature import InputKind

from lowbit.errors import GraphError
from lowbit.inputs import Inputs, tensors_of
from lowbit.network.calls import input_of
from lowbit.network.layers import QUANTIZABLE, evaluating
from lowbit.quantizers.ops import define_operator

LAYER_OPS = frozenset(
    {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "linear", "convolution", "addmm", "mm"}
)
_RENAMED = {"_native_batch_norm_legit_no_training": "batch_norm", "cudnn_batch_norm": "batch_norm", "concat": "cat", "concatenate": "cat"}
_UNWRITABLE = frozenset('"\\\n\r\0')  # characters of names that end a string in the code of a graph


def _copy(x: Tensor, place: int) -> Tensor:
    return x.clone()


_mark = define_operator("mark", _copy, _copy)


@dataclass
class Node:
    """One tensor of the network and the operation that makes it.

    Attributes:
        name: Unique name.
        op: Short operator name (``conv2d``, ``add``, ``relu``; in-place forms count as the plain ones), ``input`` or ``constant``.
        inputs: Names of the tensors it reads, in argument order.
        consumers: Names of the tensors made from it, in execution order.
        owner: Name of the innermost module whose forward ran the operation ("" is the network itself).
        layer: Name of the quantizable layer whose own computation this is, else ``None``.
        shape: Shape for the sample; that of the first of several tensors.
        is_activation: Floating point and computed from the network's inputs.
        returned_by: Modules that return this tensor, innermost first.
        received_by: Modules whose first floating-point input it is, by position or by keyword, and that do not get it within a list besides,
            innermost first.
        arguments: The operator's arguments as written, tensors by name.
    """

    name: str
    op: str
    inputs: list[str]
    owner: str
    shape: tuple[int, ...]
    is_activation: bool
    layer: str | None = None
    consumers: list[str] = field(default_factory=list)
    returned_by: list[str] = field(default_factory=list)
    received_by: list[str] = field(default_factory=list)
    arguments: tuple[object, ...] = ()


class Dataflow:
    """The nodes of a network in execution order."""

    def __init__(self, nodes: list[Node], outputs: set[str], calls: dict[str, int], containers: set[str]) -> None:
        self.nodes = nodes
        self._by_name = {node.name: node for node in nodes}
        self._outputs, self._calls, self._containers = outputs, calls, containers

    def __getitem__(self, name: str) -> Node:
        return self._by_name[name]

    def calls(self, module: str) -> int:
        """How often the module runs in one pass."""
        return self._calls.get(module, 0)

    def can_hold_quantizer(self, module: str) -> bool:
        """Whether a submodule may be added: the module runs once, and is no container whose forward runs all its children."""
        return self.calls(module) == 1 and module not in self._containers

    def is_first_input(self, node: Node) -> bool:
        """Whether it is the first floating-point input of the network."""
        return node is next((other for other in self.nodes if other.op == "input" and other.is_activation), None)

    def is_output(self, node: Node) -> bool:
        """Whether the network returns this tensor."""
        return node.name in self._outputs

    def of_layer(self, layer: str) -> list[Node]:
        """The nodes that are the computation of ``layer``, one for each call."""
        return [node for node in self.nodes if node.layer == layer]

    def consumers(self, node: Node) -> list[Node]:
        """The nodes that read ``node``."""
        return [self[name] for name in node.consumers]

    def producers(self, node: Node) -> list[Node]:
        """The activations that ``node`` reads, in argument order."""
        return [self[name] for name in node.inputs if self[name].is_activation]

    def order(self) -> list[str]:
        """Layer names in execution order, each once."""
        return list(dict.fromkeys(node.layer for node in self.nodes if node.layer is not None))

    def add_gate(self, node: Node, function: str, module: str) -> None:
        """Say that ``node``, the product of its input with ``function`` of it, reads that factor from ``module``."""
        (source,) = node.inputs
        place: dict[str, Any] = {"owner": module, "returned_by": [module], "received_by": [module]}
        gate = replace(node, name=f"{node.name}_{function}", op=function, consumers=[node.name], **place)
        self.nodes.insert(self.nodes.index(node), gate)
        self._by_name[gate.name] = gate
        self._calls[module] = 1
        self[source].consumers.append(gate.name)
        node.inputs = [source, gate.name]

    def forget(self, norm: str) -> None:
        """Turn the batch norm of module ``norm`` into the identity (it has been folded away)."""
        for node in self.nodes:
            if node.op == "batch_norm" and node.owner == norm:
                node.op = "identity"
        self._containers.add(norm)


def capture(model: nn.Module, sample: Inputs | Tensor) -> Dataflow:
    """The dataflow of ``model`` in evaluation mode for the shapes of ``sample``.

    Raises:
        GraphError: The model cannot be exported (it branches on values, or calls what export does not know); the message
            names the line of the model that blocks.
    """
    check_names(model)
    sample = Inputs.of(sample, model)
    names = {id(module): name for name, module in model.named_modules()}
    marks = _Marks()
    try:
        with evaluating(model), marks.on(model), quiet_export():
            exported = torch.export.export(model, sample.args, dict(sample.kwargs))
            if _mutates(exported.graph):
                exported = exported.run_decompositions({})
    except Exception as error:
        raise GraphError(_explain(model, error)) from error
    return _build(model, exported, names, marks)


def check_names(model: nn.Module) -> None:
    """Refuse names of modules and tensors that the code which ``torch.export`` writes for a graph cannot hold.

    Raises:
        GraphError: A name holds a quote, a backslash, a line break or a null character.
    """
    for name, module in model.named_modules():
        for own in (*module._modules, *module._parameters, *module._buffers):
            if not _UNWRITABLE.isdisjoint(own):
                raise GraphError(
                    f'{type(model).__name__} holds {f"{name}.{own}".lstrip(".")!r}: torch.export cannot write names with quotes ("), backslashes, '
                    "line breaks or null characters. Give it another name, such as letters, digits and underscores make."
                )


@contextmanager
def quiet_export() -> Iterator[None]:
    """Without the graph listings that torch prints before it raises; the error says what is needed."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


class _Marks:
    """The operators ``lowbit::mark`` of a network that is being exported, and the modules at each.

    A tensor that goes from module to module untouched has one mark for all of them: each operator costs export milliseconds.

    Attributes:
        calls: How often each module runs.
        places: Module, side (``in`` or ``out``) and position of what passes a mark, in the order in which it does.
    """

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.places: list[list[tuple[str, str, int]]] = []
        self._last: dict[tuple[int, int], tuple[Tensor, int]] = {}  # by identity and version, which in-place operations change

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Within the context every module of ``model`` marks what enters and leaves it."""
        handles = []
        for name, module in model.named_modules():
            if name:
                handles.append(module.register_forward_pre_hook(partial(self._enter, name), with_kwargs=True))
                handles.append(module.register_forward_hook(partial(self._leave, name)))
            else:
                handles.append(module.register_forward_pre_hook(self._start))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last.clear()

    def _start(self, _module: nn.Module, _args: object) -> None:
        self.calls.clear()
        self.calls[""] = 1
        self._last.clear()

    def _enter(
        self, name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.calls[name] += 1
        first = input_of(args, kwargs)
        nested = tensors_of([value for value in (*args, *kwargs.values()) if not isinstance(value, Tensor)])
        positions = count(int(any(tensor is first for tensor in nested)))

        def mark(value: Any) -> Any:
            return self._mark(value, (name, "in", next(positions))) if _is_float(value) else value

        return tuple(map(mark, args)), {key: mark(value) for key, value in kwargs.items()}

    def _leave(self, name: str, _module: nn.Module, _args: object, output: Any) -> Any:
        return self._mark(output, (name, "out", 0)) if _is_float(output) else output

    def _mark(self, x: Tensor, place: tuple[str, str, int]) -> Tensor:
        known = self._last.get((id(x), x._version))
        if known is not None:
            self.places[known[1]].append(place)
            return x
        marked = _mark(x, len(self.places))
        self._last[id(marked), marked._version] = marked, len(self.places)
        self.places.append([place])
        return marked


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _mutates(graph: fx.Graph) -> bool:
    """Whether an in-place operation changes a tensor that is read again afterwards."""
    for node in graph.nodes:
        if node.op == "call_function" and _op_name(node).endswith("_") and isinstance(node.args[0], fx.Node):
            changed = node.args[0]
            if not node.users or len(changed.users) > 1 or (changed.op == "call_function" and "view" in str(changed.target)):
                return True
    return False


def _op_name(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    return getattr(node.target, "__name__", str(node.target))


def _build(model: nn.Module, exported: torch.export.ExportedProgram, names: dict[int, str], marks: _Marks) -> Dataflow:
    user_inputs = {spec.arg.name for spec in exported.graph_signature.input_specs if spec.kind is InputKind.USER_INPUT}
    nodes: dict[str, Node] = {}
    alias: dict[str, str] = {}  # marks and tuple picks stand for the node behind them
    outputs: set[str] = set()
    for fx_node in exported.graph.nodes:
        if fx_node.op == "output":
            outputs = {alias[arg.name] for arg in fx_node.all_input_nodes if arg.name in alias}
            continue
        op = "constant" if fx_node.op == "placeholder" else _op_name(fx_node)
        if op == "mark":
            source = nodes[alias[fx_node.args[0].name]]
            for module, side, position in marks.places[fx_node.args[1]]:
                if side == "out":
                    source.returned_by.append(module)
                elif position == 0:
                    source.received_by.append(module)
            alias[fx_node.name] = source.name
            continue
        value = fx_node.meta.get("val")
        if fx_node.target is operator.getitem and not isinstance(value, Tensor):
            alias[fx_node.name] = alias[fx_node.args[0].name]
            continue
        if fx_node.target is operator.getitem and nodes[alias[fx_node.args[0].name]].op == "batch_norm":
            alias[fx_node.name] = alias[fx_node.args[0].name]
            nodes[alias[fx_node.name]].shape = tuple(value.shape)
            continue
        inputs = [alias[arg.name] for arg in fx_node.all_input_nodes if arg.name in alias]
        op = op.rstrip("_") if not op.startswith("__") else op.strip("_")
        op = _RENAMED.get(op, op)
        made = value if isinstance(value, (tuple, list)) else (value,)
        is_float = any(isinstance(part, Tensor) and part.is_floating_point() for part in made)
        is_input = fx_node.name in user_inputs
        owner = _owner(model, fx_node, names)
        node = Node(
            name=fx_node.name,
            op="input" if is_input else op,
            inputs=inputs,
            owner=owner,
            shape=next((tuple(int(s) for s in part.shape) for part in made if isinstance(part, Tensor)), ()),
            is_activation=is_float and (is_input or any(nodes[name].is_activation for name in inputs)),
            layer=owner if op in LAYER_OPS and isinstance(model.get_submodule(owner), QUANTIZABLE) else None,
            arguments=tuple(alias.get(a.name, a.name) if isinstance(a, fx.Node) else a for a in fx_node.args),
        )
        nodes[node.name] = node
        alias[fx_node.name] = node.name
        for name in dict.fromkeys(inputs):
            nodes[name].consumers.append(node.name)
    for node in nodes.values():
        node.received_by.sort(key=lambda module: -module.count("."))
    containers = {name for name, module in model.named_modules() if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))}
    return Dataflow(list(nodes.values()), outputs, dict(marks.calls), containers)


def _owner(model: nn.Module, node: fx.Node, names: dict[int, str]) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else entry
    path = ".".join(part.partition("@")[0] for part in path.split("."))
    try:
        return names.get(id(model.get_submodule(path)), path)
    except AttributeError:
        return ""


def _explain(model: nn.Module, error: Exception) -> str:
    here = Path(inspect.getfile(nn.Module)).parents[2], Path(__file__).parents[1]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(Path(frame.filename).is_relative_to(folder) for folder in here)
    ]
    frames = [frame for frame in frames if not frame.filename.startswith("<")]
    place = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else "an unknown line"
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the dataflow of {type(model).__name__} cannot be captured because of {place} ({type(error).__name__}: {reason}). "
        "Quantizing layer by layer works without it; batch-norm folding, equalization, quantized adds and export need it: make that line independent of tensor values."
    )
