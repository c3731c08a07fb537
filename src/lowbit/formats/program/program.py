"""Exports a quantized network as one functional graph, from which both file formats are written."""

from __future__ import annotations

import copy
import inspect
import operator
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, ShapesCollection
from torch.export.graph_signature import OutputKind

from lowbit.errors import GraphError, SpecError
from lowbit.formats.program.constants import constant_of, fold_constants
from lowbit.formats.program.naming import name_inputs
from lowbit.formats.program.structure import Json, flatten
from lowbit.inputs import Inputs, tensors_of
from lowbit.measure.cost import float_size
from lowbit.network.batch import checked_batch_dim, find_batch_dim
from lowbit.network.bits import layer_quantizers, set_bits, switches_of
from lowbit.network.graph.dataflow import check_names, quiet_export
from lowbit.network.insert import Coded, activation_quantizers, bake_weights
from lowbit.network.layers import evaluating
from lowbit.network.record import FloatSize
from lowbit.quantizers import QTensor

GRID_OF_ITS_OWN = "every input has its own grid"  # the reason why a layer is emulated

aten = torch.ops.aten


@dataclass(frozen=True)
class Program:
    """A quantized network in evaluation mode as a graph.

    Attributes:
        exported: The functional graph, with decoded weights and one ``lowbit::fake_quantize_*`` node for each activation quantizer. Its
            outputs are the flattened tensors of the network's output.
        weights: The codes of each quantized weight by parameter name (a value of ``graph_signature.inputs_to_parameters``).
        sample: The inputs that it was exported with.
        structure: Nesting of the flattened outputs.
        notes: Remarks for the user, such as that the batch size is fixed, and why.
        emulated: Layers (or sites of quantizers) whose input has a new grid in every call, which is emulated in float.
        float_size: What the float network takes.
    """

    exported: ExportedProgram
    weights: dict[str, QTensor]
    sample: Inputs
    structure: Json
    notes: tuple[str, ...] = ()
    emulated: tuple[str, ...] = ()
    float_size: FloatSize | None = None

    @property
    def is_batch_dynamic(self) -> bool:
        """Whether the graph accepts any batch size."""
        return _is_batch_dynamic(self.exported, self.sample)

    @property
    def batch_dims(self) -> dict[str, int]:
        """The dimension over samples of each input that has one, by the name of the input."""
        return _batch_dims(self.exported, self.sample)


def module_paths(program: Program) -> dict[str, str]:
    """The path of the module that computes each node of the graph; none for the network itself."""
    stacks = {node.name: list((node.meta.get("nn_module_stack") or {}).values()) for node in program.exported.graph.nodes}
    return {name: stack[-1][0] for name, stack in stacks.items() if stack}


def export_program(model: nn.Module, sample: object, dynamic: Sequence[str | int] = (), batch_dim: int | None = None) -> Program:
    """Export ``model`` in evaluation mode with its weights decoded.

    The batch size is left open if the model allows it, else fixed to the sample's, with a note. Shape checks, redundant copies and identity
    batch norms are removed, and whatever quantizers compute from their parameters alone is computed once.

    Args:
        model: A quantized (or float) network; it is not changed.
        sample: Inputs of one call: a tensor, a tuple of tensors, a dict of keyword tensors, or ``Inputs``.
        dynamic: Further dimensions to leave open, see ``lowbit.export``.
        batch_dim: The dimension over samples, see ``lowbit.export``.

    Raises:
        SpecError: No input has a dimension in ``dynamic``.
        GraphError: The model cannot be exported; the error names the line of its code, or the reason why a dimension cannot stay open.
    """
    check_names(model)
    inputs = Inputs.of(sample, model).distinct()
    inputs = replace(inputs, batch_dim=find_batch_dim(model, inputs) if batch_dim is None else checked_batch_dim(batch_dim, inputs))
    baked, weights = bake_weights(model)
    structure: list[Json] = [None]
    if isinstance(baked, (fx.GraphModule, Coded)):
        baked = _plain(baked)
    baked.register_forward_hook(_flattening(structure))
    with evaluating(baked):
        exported, notes = _export(baked, inputs) if not dynamic else (_export_open(baked, inputs, dynamic), ())
    if inputs.batch_dim and not dynamic:
        notes = (*notes, f"dimension {inputs.batch_dim} of the inputs is the batch; the others keep the sizes of the sample, see dynamic")
    _refuse_state(exported)
    _decode_in_float32(exported, weights)
    _simplify(exported)
    fold_constants(exported)
    return Program(exported, weights, inputs, structure[0], notes, _emulated(model), float_size(model))


def export_switches(model: nn.Module, sample: object, dynamic: Sequence[str | int] = (), batch_dim: int | None = None) -> list[Program]:
    """``export_program`` for each of the widths between which ``model`` switches, from the highest on; arguments and errors as there."""
    switched, programs = copy.deepcopy(model), []
    for switch in switches_of(model):
        set_bits(switched, switch)
        programs.append(export_program(switched, sample, dynamic, batch_dim))
    return programs


def _emulated(model: nn.Module) -> tuple[str, ...]:
    found = {name: quantizers.activation for name, quantizers in layer_quantizers(model).items()}
    found |= {site: quantizer for site, quantizer in activation_quantizers(model).items() if quantizer not in found.values()}
    return tuple(name for name, quantizer in found.items() if quantizer is not None and quantizer.is_dynamic and quantizer.enabled)


def _export(model: nn.Module, inputs: Inputs) -> tuple[ExportedProgram, tuple[str, ...]]:
    """Export with an open batch size if possible, else with that of ``inputs`` and a note with the reason."""
    reason = "the inputs have no batch dimension"
    if any(inputs.batch_dim_of(t) is not None for t in inputs.tensors):
        # torch always treats sizes 0 and 1 as fixed, so an open size must be traced with at least 2
        traced = inputs if inputs.batch_size > 1 else inputs.repeat(2)
        shapes = ShapesCollection()
        for tensor in traced.tensors:
            dim = traced.batch_dim_of(tensor)
            if dim is not None:
                shapes[tensor] = {dim: Dim.AUTO}
        try:
            exported = _trace(model, traced, shapes)
        except Exception as error:
            reason = _first_line(error)
        else:
            if _is_batch_dynamic(exported, inputs):
                return exported, ()
            reason = "its code computes with the size as a constant"
    try:
        exported = _trace(model, inputs, None)
    except GraphError:
        raise
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} cannot be exported: {blocking_line(error)}: {_first_line(error)}. "
            "A file needs one graph for all inputs: rewrite that line without depending on tensor values, or export a part of the model."
        ) from error
    return exported, (f"the batch size is fixed to {inputs.batch_size}: {reason}",)


_DIMENSIONS = {"D": -3, "H": -2, "W": -1, "L": -1}  # depth, height and width of pictures and volumes, length of sequences
_RANKS = {"D": (5,), "H": (4, 5), "W": (4, 5), "L": (3,)}


def _export_open(model: nn.Module, inputs: Inputs, dynamic: Sequence[str | int]) -> ExportedProgram:
    """Export with an open batch size and the dimensions in ``dynamic`` open, too."""
    traced = inputs if inputs.batch_size > 1 else inputs.repeat(2)
    shapes = ShapesCollection()
    wanted: dict[int, dict[int, str]] = {}
    for index, tensor in enumerate(traced.tensors):
        batch = traced.batch_dim_of(tensor)
        chosen = {dim: str(name) for name in dynamic if (dim := _dimension(name, tensor)) not in (None, batch)}
        wanted[index] = chosen
        shapes[tensor] = dict.fromkeys([*chosen, *([] if batch is None else [batch])], Dim.AUTO)
    named = {name for chosen in wanted.values() for name in chosen.values()}
    for name in dynamic:
        if str(name) not in named:
            held = ", ".join(str(list(tensor.shape)) for tensor in inputs.tensors)
            raise SpecError(
                f"dynamic: no input has the dimension {name!r} besides the batch (dimension {inputs.batch_dim}, which is open already); "
                f"the inputs have the shapes {held}. Allowed: H, W, D, L, or a number."
            )
    try:
        exported = _trace(model, traced, shapes)
    except Exception as error:
        raise GraphError(f"{_not_open(dynamic)}: {blocking_line(error)}: {_first_line(error)}. {_OPEN_ADVICE}") from error
    names = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    for index, name in enumerate(names):
        for dim, asked in wanted[index].items():
            size = values[str(name)].shape[dim]
            if isinstance(size, int):
                raise GraphError(f"{_not_open([asked])}: the network computes with its size as a constant, {size}. {_OPEN_ADVICE}")
    _try_another_size(model, exported, traced, wanted)
    return exported


def _try_another_size(model: nn.Module, exported: ExportedProgram, inputs: Inputs, wanted: Mapping[int, Mapping[int, str]]) -> None:
    """Raise GraphError unless the network and its graph agree when the open dimensions are twice as large."""
    larger = [
        tensor.repeat(*(2 if dim in wanted[index] else 1 for dim in range(tensor.dim()))) for index, tensor in enumerate(inputs.tensors)
    ]
    count = len(inputs.args)
    args, kwargs = tuple(larger[:count]), dict(zip(inputs.kwargs, larger[count:], strict=True))
    names = list(dict.fromkeys(name for chosen in wanted.values() for name in chosen.values()))
    try:
        expected, found = model(*args, **kwargs), exported.module()(*args, **kwargs)
    except Exception as error:
        raise GraphError(
            f"{_not_open(names)}, twice the size fails: {blocking_line(error)}: {_first_line(error)}. {_OPEN_ADVICE}"
        ) from error
    pairs = list(zip(tensors_of(expected), tensors_of(found), strict=True))
    if not all(
        a.shape == b.shape and float((a - b).abs().mean()) <= 0.01 * float(a.abs().mean()) + 1e-6 for a, b in pairs
    ):  # a few codes may round to the other side of a tie
        raise GraphError(f"{_not_open(names)}: at twice the size the graph does not compute what the network computes. {_OPEN_ADVICE}")


def _dimension(name: str | int, tensor: Tensor) -> int | None:
    """The index of the dimension called ``name``; ``None`` if the tensor does not have it."""
    if isinstance(name, str):
        return tensor.dim() + _DIMENSIONS[name] if tensor.dim() in _RANKS.get(name, ()) else None
    return name if 0 <= name < tensor.dim() else None


def _not_open(dynamic: Sequence[str | int]) -> str:
    return f"the dimension{'s' if len(dynamic) > 1 else ''} {', '.join(map(str, dynamic))} cannot stay open"


_OPEN_ADVICE = (
    "Only networks that accept any size can: convolutions and attention, and pooling to one size before linear layers; recurrent layers keep "
    "the length of the sample. Leave it out of dynamic, or use nn.AdaptiveAvgPool2d(1) before nn.Flatten."
)


def _trace(model: nn.Module, inputs: Inputs, shapes: ShapesCollection | None) -> ExportedProgram:
    dynamic = None if shapes is None else shapes.dynamic_shapes(model, inputs.args, dict(inputs.kwargs))
    with quiet_export():
        exported: ExportedProgram = torch.export.export(model, inputs.args, dict(inputs.kwargs), dynamic_shapes=dynamic, strict=False)
        # makes the graph functional; with the empty table, convolution, linear and attention are not decomposed
        functional = cast(ExportedProgram, exported.run_decompositions({}))
    _name_as_first(functional, model)
    return functional


def _name_as_first(exported: ExportedProgram, model: nn.Module) -> None:
    """Name tensors of modules that a network holds under several names by the first one, as policies and tables do; torch takes the last."""
    first: dict[int, str] = {}
    held = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    aliases = {name: first.setdefault(id(tensor), name) for name, tensor in held}
    for spec in exported.graph_signature.input_specs:
        if spec.target is not None and aliases.get(spec.target, spec.target) != spec.target:
            spec.target = aliases[spec.target]


def _batch_dims(exported: ExportedProgram, inputs: Inputs) -> dict[str, int]:
    named = name_inputs([str(name) for name in exported.graph_signature.user_inputs], inputs)
    return {name: dim for name, tensor in named.items() if (dim := inputs.batch_dim_of(tensor)) is not None}


def _is_batch_dynamic(exported: ExportedProgram, inputs: Inputs) -> bool:
    dims = _batch_dims(exported, inputs)
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    return any(isinstance(values[name].shape[dim], torch.SymInt) for name, dim in dims.items())


def _plain(network: nn.Module) -> nn.Module:
    """A module with the same submodules that runs the code of ``network``.

    torch.export ignores the hooks of a traced network, takes a property of a loaded one for the submodule of that name, and needs the names
    of its inputs, ``lowbit_inputs``, in a signature.
    """
    module: nn.Module = type(type(network).__name__, (nn.Module,), {})()  # errors name it
    module._parameters, module._buffers, module._modules = network._parameters, network._buffers, network._modules
    module._non_persistent_buffers_set = network._non_persistent_buffers_set

    def forward(*args: Tensor, **kwargs: Tensor) -> object:
        return network.forward(*args, **kwargs)

    names = getattr(network, "lowbit_inputs", None)
    parameters = None if names is None else [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in names]
    forward.__signature__ = inspect.signature(network.forward) if parameters is None else inspect.Signature(parameters)  # type: ignore[attr-defined]
    module.forward = forward
    return module.eval()


def _flattening(structure: list[Json]) -> Callable[[nn.Module, object, object], object]:
    """A forward hook that returns the tensors of the output and stores their nesting."""

    def hook(_module: nn.Module, _args: object, output: object) -> object:
        leaves: list[Tensor | torch.SymInt] = []
        structure[0] = flatten(output, leaves)
        if not leaves:
            raise GraphError("the model returns no tensor, so there is nothing to export")
        return tuple(leaves)

    return hook


def blocking_line(error: BaseException) -> str:
    """``file:line: source`` of the innermost line outside of torch and lowbit that led to ``error``."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(ours)]
    if not frames:
        return "inside torch"
    frame = frames[-1]
    return f"{frame.filename}, line {frame.lineno}, in {frame.name}: `{frame.line}`"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _refuse_state(exported: ExportedProgram) -> None:
    kept = (OutputKind.USER_OUTPUT, OutputKind.USER_INPUT_MUTATION)
    for output in exported.graph_signature.output_specs:
        if output.kind not in kept:
            raise GraphError(
                f"the model changes {output.target!r} while it runs ({output.kind.name.lower()}), but a file keeps no state between calls. "
                "Turn that off in evaluation mode."
            )


def _decode_in_float32(exported: ExportedProgram, weights: Mapping[str, QTensor]) -> None:
    """Store weights with codes as their decoded float32 values, and convert them if the network computes with another dtype."""
    graph = exported.graph_module.graph
    names = exported.graph_signature.inputs_to_parameters
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    for node in inputs:
        codes = weights.get(names.get(node.name, ""))
        dtype = node.meta["val"].dtype
        if codes is None or dtype == torch.float32:
            continue
        with graph.inserting_after(inputs[-1]):
            converted = graph.call_function(aten._to_copy.default, (node,), {"dtype": dtype})
        converted.meta = dict(node.meta)
        node.replace_all_uses_with(converted, delete_user_cb=lambda reader, converted=converted: reader is not converted)
        node.meta["val"] = node.meta["val"].to(torch.float32)
        exported.state_dict[names[node.name]] = nn.Parameter(codes.decode(), requires_grad=False)
    exported.graph_module.recompile()


def _simplify(exported: ExportedProgram) -> None:
    """Remove shape checks, redundant copies, identity batch norms and unused nodes."""
    graph = exported.graph_module.graph
    outputs = set(graph.output_node().all_input_nodes)
    state = {node: constant_of(exported, node) for node in graph.nodes if node.op == "placeholder"}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _CHECKS:
            graph.erase_node(node)
        elif node not in outputs and _is_copy(node):
            node.replace_all_uses_with(node.args[0])
        elif node.target is aten._native_batch_norm_legit_no_training.default and _is_identity_norm(node, state):
            for reader in [user for user in node.users if user.target is operator.getitem and user.args[1] == 0 and user not in outputs]:
                reader.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


_CHECKS = frozenset({
    aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.default, aten._assert_async.msg,
    aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default,
})  # fmt: skip


def _is_copy(node: fx.Node) -> bool:
    """Whether a node returns its input with the same memory layout."""
    if node.target in (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default):
        return True
    if node.target is not aten.clone.default or node.kwargs.get("memory_format") not in (None, torch.preserve_format):
        return False
    before, after = cast(fx.Node, node.args[0]).meta["val"], node.meta["val"]
    return bool(before.stride() == after.stride())


def _is_identity_norm(node: fx.Node, state: dict[fx.Node, Tensor | None]) -> bool:
    weight, bias, mean, var = (None if arg is None else state.get(cast(fx.Node, arg)) for arg in node.args[1:5])
    if mean is None or var is None or node.args[6] != 0:
        return False
    plain = (weight is None or bool((weight == 1).all())) and (bias is None or bool((bias == 0).all()))
    return plain and bool((mean == 0).all()) and bool((var == 1).all())
