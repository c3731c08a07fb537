"""Translates a program to an ONNX graph in which quantizers and quantized weights are still single nodes of a custom domain.

Torch's exporter and ONNX's optimizer work on this graph; as they do not know the domain, they cannot fold a quantizer or the codes of a
weight away. ``rewrite`` then turns the nodes into standard ONNX operators.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from lowbit.errors import GraphError, missing_extra
from lowbit.formats.onnx.pools import write_out_pools
from lowbit.formats.program.program import Program

if TYPE_CHECKING:
    import onnx_ir as ir

WeightContainer = Literal["int8", "int4"]

DOMAIN = "lowbit"
QUANTIZE = "FakeQuantize"  # (x, lower, step, scale, zero_point) {qmin, qmax}
WEIGHT = "QuantizedWeight"  # (decoded weight) {name}
OPSET = 18  # the version of torch's operator library; newer ones need a conversion
INT4_OPSET = 21  # the first with 4-bit integers


def require_onnx() -> None:
    """Raise MissingExtraError unless ``onnx``, ``onnxscript`` and ``onnxruntime`` can be imported."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise missing_extra(package, "onnx", "the ONNX format") from error


def translate(program: Program, *, opset: int = OPSET) -> ir.Model:
    """``program`` as an optimized ONNX model with ``lowbit::FakeQuantize`` and ``lowbit::QuantizedWeight`` nodes.

    Values keep the names of the program's nodes, and initializers those of its parameters.

    Raises:
        GraphError: An operator of the network has no ONNX form.
    """
    _refuse_projections(program)
    write_out_pools(program.exported)
    _allow_other_layouts(program)
    _register_schemas()
    with _quiet():
        try:
            converted = torch.onnx.export(
                program.exported, dynamo=True, opset_version=opset, optimize=False, verbose=False, custom_translation_table=_translations()
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise GraphError(f"the network has no ONNX form: {_reason(error)}. Export it to .lowbit, or rewrite that operation.") from error
        assert converted is not None
        _name_batch(converted, program.batch_dims)
        for name in reversed(list(program.weights)):  # each is inserted at the front
            _mark_weight(converted.model.graph, name)
        converted.optimize()
    return converted.model


def _allow_other_layouts(program: Program) -> None:
    """Let views copy their input: the exporter decomposes attention, whose intermediate results have a different memory layout."""
    aten, graph = torch.ops.aten, program.exported.graph
    for node in list(graph.nodes):
        if node.target is not aten.view.default or node.args[0].op != "call_function":
            continue
        with graph.inserting_before(node):
            copied = graph.call_function(aten.clone.default, (node.args[0],), {"memory_format": torch.contiguous_format})
        copied.meta = dict(node.args[0].meta)
        node.update_arg(0, copied)
    program.exported.graph_module.recompile()


def _refuse_projections(program: Program) -> None:
    for node in program.exported.graph.nodes:
        if node.target is torch.ops.aten.lstm.input:
            result, cell = (state.meta["val"].shape[-1] for state in node.args[1])
            if result != cell:
                path = program.exported.graph_signature.inputs_to_parameters.get(node.args[2][0].name, "")
                raise GraphError(
                    f"layer {path.rpartition('.')[0]!r} (LSTM): ONNX has no LSTM with projections (proj_size={result}). "
                    "Export the network to .lowbit, or replace the projections by a linear layer."
                )


def _translations() -> dict[Any, Any]:
    import onnx_ir as ir
    from onnxscript import opset18, values

    ours, op = values.Opset(DOMAIN, 1), opset18  # type: Any, Any

    # torch reads the annotations to distinguish attributes from inputs
    def affine(x, scale, zero_point, qmin: int, qmax: int):  # type: ignore[no-untyped-def]
        return ours.FakeQuantize(x, op.Neg(op.Mul(zero_point, scale)), scale, scale, zero_point, qmin=qmin, qmax=qmax)

    def grid(x, lower, step, scale, zero_point, qmin: int, qmax: int):  # type: ignore[no-untyped-def]
        return ours.FakeQuantize(x, lower, step, scale, zero_point, qmin=qmin, qmax=qmax)

    def codebook(x, boundaries, levels):  # type: ignore[no-untyped-def]
        above = op.Cast(op.Greater(op.Unsqueeze(x, [-1]), boundaries), to=7)  # int64; bucketize counts the boundaries below x
        return op.Gather(levels, op.ReduceSum(above, [-1], keepdims=0))

    def input_scale(x, kernel_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int):  # type: ignore[no-untyped-def]
        size, window = op.Abs(x), {"strides": stride, "pads": [*padding, *padding], "dilations": dilation, "group": groups}
        channels = 1
        if groups == 1:
            size = op.ReduceMean(size, [1], keepdims=1)
        else:  # one convolution computes both means, for any height and width
            channels = x.shape[1] // groups
        kernel = np.full((groups, channels, *kernel_size), 1 / (channels * math.prod(kernel_size)), np.float32)
        return op.Conv(size, op.CastLike(op.Constant(value=ir.tensor(kernel)), size), **window)

    return {
        torch.ops.lowbit.input_scale.default: input_scale,
        torch.ops.lowbit.fake_quantize_affine.default: affine,
        torch.ops.lowbit.fake_quantize_grid.default: grid,
        torch.ops.lowbit.fake_quantize_codebook.default: codebook,
    }


def _register_schemas() -> None:
    from onnx.defs import OpSchema, has, register_schema

    floats = [("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"], "any float")]

    kinds = OpSchema.AttrType
    quantize = [OpSchema.Attribute(name, kinds.INT, required=True) for name in ("qmin", "qmax")]
    weight = [OpSchema.Attribute("name", kinds.STRING, required=True)]
    for name, inputs, attributes in ((QUANTIZE, ("x", "lower", "step", "scale", "zero_point"), quantize), (WEIGHT, ("decoded",), weight)):
        if not has(name, DOMAIN):
            parameters = [OpSchema.FormalParameter(parameter, "T") for parameter in inputs]
            outputs = [OpSchema.FormalParameter("y", "T")]
            register_schema(
                OpSchema(name, DOMAIN, 1, "", inputs=parameters, outputs=outputs, type_constraints=floats, attributes=attributes)
            )


def _mark_weight(graph: ir.Graph, name: str) -> None:
    import onnx_ir as ir

    weight = graph.initializers.get(name)
    uses = [] if weight is None else list(weight.uses())
    if weight is None or not uses:
        return
    marker = ir.Node(DOMAIN, WEIGHT, [weight], [ir.AttrString("name", name)])
    marker.outputs[0].name = f"{name}.quantized"
    marker.outputs[0].shape, marker.outputs[0].type = weight.shape, weight.type
    graph.insert_before(next(iter(graph)), marker)
    for use in uses:
        use.node.replace_input_with(use.idx, marker.outputs[0])


def _name_batch(converted: torch.onnx.ONNXProgram, batch_dims: Mapping[str, int]) -> None:
    """Name the open dimensions ``batch``, ``height`` and ``width`` instead of ``s77``."""
    import onnx_ir as ir

    sizes: set[str | ir.SymbolicDim] = set()
    for value in converted.model.graph.inputs:
        dim = value.shape[batch_dims[value.name or ""]] if value.shape and value.name in batch_dims else None
        if isinstance(dim, ir.SymbolicDim) and dim.value:
            sizes.add(dim.value)
    names = {sizes.pop(): "batch"} if len(sizes) == 1 else {}
    for value in converted.model.graph.inputs:
        for dim, name in zip((value.shape or ())[2:], ("height", "width"), strict=False):
            if isinstance(dim, ir.SymbolicDim) and dim.value and len(value.shape or ()) == 4 and name not in names.values():
                names.setdefault(dim.value, name)
    if names:
        converted.rename_axes(names)


def _reason(error: BaseException) -> str:
    """The innermost cause, on one line."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    node = next((line for line in str(error.__cause__ or error).splitlines() if "translating node" in line), "")
    return f"{str(cause).strip().splitlines()[0]}{' at ' + node.partition('translating node ')[2] if node else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's progress messages; failures raise exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
