"""Quantizer and weight nodes of a translated graph as QuantizeLinear and DequantizeLinear, placed so that runtimes compute in integers.

What ONNX Runtime and OpenVINO need to see, and what each step here does for it:

- activations as uint8 codes: a quantizer is shifted so that its lowest code is 0; fewer codes than 256 are a clip *of the codes*;
- a convolution directly followed by its quantizer: a ReLU or clip between the two becomes part of the clip of the codes, which is
  exact because rounding is monotone, and disappears where the codes' range implies it;
- integer weights with one scale for each output channel, the transpose of a linear layer applied to the codes;
- integer biases of scale ``x_scale * w_scale``;
- codes on both sides of operators that only move values: the quantizer is repeated behind them, which changes nothing.
"""
from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as passes
import torch

from lowbit.errors import SpecError
from lowbit.export.onnx_translate import DOMAIN, INT4_OPSET, QUANTIZE, WEIGHT
from lowbit.export.onnx_weights import IntegerGrid, integer_grid
from lowbit.quantizers import QTensor

Array = npt.NDArray[np.generic]
WeightContainer = Literal["int8", "int4"]

_FLOAT = ir.DataType.FLOAT

# operators whose output holds values of their first input, or zeros
MOVES = frozenset({
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Gather", "DepthToSpace", "SpaceToDepth", "Tile",
    "Identity",
})  # fmt: skip
BIASED = frozenset({"Conv", "Gemm"})
LARGEST_INT32 = 2**31 - 1


@dataclass(frozen=True)
class Grid:
    """Codes of an activation in a uint8 container: ``lo`` to ``hi``, zero at ``zero_point``."""

    scale: np.float32
    zero_point: int
    lo: int
    hi: int

    def code(self, value: float) -> int:
        """Where ``value`` is rounded to, before clipping."""
        return int(np.clip(np.rint(np.float32(value) / self.scale), -LARGEST_INT32, LARGEST_INT32)) + self.zero_point


@dataclass
class Rewritten:
    """An ONNX model of standard operators and what is to be said about it."""

    model: ir.Model
    notes: list[str] = field(default_factory=list)


def float_network(marked: ir.Model) -> ir.Model:
    """The same network without any quantizer: what the quantized file is timed against."""
    model = marked.clone()
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _pass_through(node)
    return _tidy(model)


def integer_network(marked: ir.Model, weights: Mapping[str, QTensor], *, weight_container: WeightContainer = "int8") -> Rewritten:
    """Replace every quantizer and quantized weight by ONNX's operators.

    Args:
        marked: What ``translate`` returned; it is not changed.
        weights: The codes of the weights by parameter name.
        weight_container: ``int8`` (integer kernels), or ``int4``, which takes half a byte for codes of up to 4 bits but which
            runtimes decode and compute in float.

    Raises:
        SpecError: An unknown container.
    """
    if weight_container not in ("int8", "int4"):
        raise SpecError(f"weight_container must be 'int8' or 'int4', got {weight_container!r}")
    if weight_container == "int4" and marked.opset_imports[""] < INT4_OPSET:
        raise SpecError(f"4-bit codes need opset {INT4_OPSET}, the graph has {marked.opset_imports['']}")
    result = Rewritten(marked.clone())
    graph = result.model.graph
    _pool_globally(graph)
    _share_quantizers(graph)
    grids: dict[ir.Value, Grid] = {}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == QUANTIZE:
            _quantize_activation(node, grids, result.notes)
        elif _only_moves(node) and node.inputs[0] in grids:
            _repeat_quantizer(node, grids)
    decoded: dict[ir.Value, IntegerGrid] = {}
    for node in list(graph):
        if node.domain == DOMAIN and node.op_type == WEIGHT:
            _decode_weight(node, weights, weight_container, decoded, result.notes)
    for node in list(graph):
        if node.op_type in BIASED and node.domain == "" and len(node.inputs) > 2:
            _quantize_bias(node, grids, decoded, result.notes)
    _tidy(result.model)
    return result


# activations


def _quantize_activation(node: ir.Node, grids: dict[ir.Value, Grid], notes: list[str]) -> None:
    x = _input(node, 0)
    qmin, qmax = (node.attributes[name].as_int() for name in ("qmin", "qmax"))
    grid = _uint8_grid(_constant(node.inputs[1]), _constant(node.inputs[2]), qmin, qmax) if x.dtype in (None, _FLOAT) else None
    if grid is None:
        notes.append(f"{node.outputs[0].name}: this activation quantizer is computed in float; uint8 codes cannot hold its grid")
        _quantize_in_float(node, qmin, qmax)
        return
    x, grid = _absorb_clips(x, grid)
    quantized = _insert_pair(node, x, grid, node.outputs[0].name, after=False)
    grids[quantized] = grid
    _replace(node, quantized)


def _uint8_grid(scale: Array | None, zero_point: Array | None, qmin: int, qmax: int) -> Grid | None:
    if scale is None or zero_point is None or scale.size != 1 or zero_point.size != 1 or qmax - qmin > 255:
        return None
    zero = zero_point.item()
    if zero != round(zero) or not qmin <= zero <= qmax:
        return None
    return Grid(np.float32(scale.item()), int(zero) - qmin, 0, qmax - qmin)


def _absorb_clips(x: ir.Value, grid: Grid) -> tuple[ir.Value, Grid]:
    """The input of a ReLU or clip that only quantizers read, and the codes that are left of ``grid``."""
    while (bounds := _clip_bounds(x)) is not None and not x.is_graph_output() and all(use.node.op_type == QUANTIZE for use in x.uses()):
        lo, hi = (min(max(grid.code(bound), grid.lo), grid.hi) for bound in bounds)
        grid = Grid(grid.scale, grid.zero_point, lo, hi)
        producer = x.producer()
        assert producer is not None
        x = _input(producer, 0)
    return x, grid


def _clip_bounds(x: ir.Value) -> tuple[float, float] | None:
    """The range of ``x`` if it comes from a ReLU or a clip between constants."""
    node = x.producer()
    if node is None or node.domain != "" or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, math.inf
    ends = [-math.inf, math.inf]
    for index, value in enumerate(node.inputs[1:]):
        if value is not None:
            constant = _constant(value)
            if constant is None:
                return None
            ends[index] = float(constant)
    return ends[0], ends[1]


def _insert_pair(anchor: ir.Node, x: ir.Value, grid: Grid, name: str | None, *, after: bool) -> ir.Value:
    """QuantizeLinear, a clip of the codes where they do not fill the container, and DequantizeLinear, beside ``anchor``."""
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    scale = _initializer(graph, f"{name}.scale", np.asarray(grid.scale, np.float32))
    zero_point = _initializer(graph, f"{name}.zero_point", np.asarray(grid.zero_point, np.uint8))
    nodes = [ir.node("QuantizeLinear", [x, scale, zero_point])]
    if (grid.lo, grid.hi) != (0, 255):
        ends = [_initializer(graph, f"{name}.{end}", np.asarray(code, np.uint8)) for end, code in (("lowest", grid.lo), ("highest", grid.hi))]
        nodes.append(ir.node("Clip", [nodes[0].outputs[0], *ends]))
    nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero_point]))
    for step in nodes[:-1]:
        step.outputs[0].name = f"{name}.{step.op_type}"
        step.outputs[0].shape, step.outputs[0].type = x.shape, ir.TensorType(ir.DataType.UINT8)
    quantized = nodes[-1].outputs[0]
    quantized.name, quantized.shape, quantized.type = f"{name}.quantized", x.shape, x.type
    (graph.insert_after if after else graph.insert_before)(anchor, nodes)
    return quantized


def _quantize_in_float(node: ir.Node, qmin: int, qmax: int) -> None:
    x, scale, zero_point = (_input(node, index) for index in range(3))
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    dtype = np.float32 if x.dtype is None else x.dtype.numpy()
    ends = [_initializer(graph, f"{node.outputs[0].name}.{end}", np.asarray(code, dtype)) for end, code in (("lowest", qmin), ("highest", qmax))]
    value = x
    for op, operands in (("Div", [scale]), ("Round", []), ("Add", [zero_point]), ("Clip", ends), ("Sub", [zero_point]), ("Mul", [scale])):
        step = ir.node(op, [value, *operands])
        graph.insert_before(node, step)
        value = step.outputs[0]
        value.shape, value.type = x.shape, x.type
    _replace(node, value)


def _only_moves(node: ir.Node) -> bool:
    if node.domain != "":
        return False
    if node.op_type == "Pad":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        constant = None if fill is None else _constant(fill)
        return mode in ("reflect", "edge", "wrap") or fill is None or (constant is not None and float(constant) == 0)
    return node.op_type in MOVES


def _repeat_quantizer(node: ir.Node, grids: dict[ir.Value, Grid]) -> None:
    known = grids[_input(node, 0)]
    grid = Grid(known.scale, known.zero_point, 0, 255)  # its codes are in the narrower range already
    for output in node.outputs if node.op_type == "Split" else node.outputs[:1]:
        uses = list(output.uses())
        if output.is_graph_output() or all(use.node.op_type == QUANTIZE for use in uses):
            continue
        repeated = _insert_pair(node, output, grid, output.name, after=True)
        grids[repeated] = grid
        for use in uses:
            use.node.replace_input_with(use.idx, repeated)


def _share_quantizers(graph: ir.Graph) -> None:
    """Quantizers that do the same to one tensor (a shared quantizer hooked at each of its readers) become one."""
    known: dict[tuple[object, ...], ir.Node] = {}
    for node in list(graph):
        if node.op_type != QUANTIZE or node.domain != DOMAIN:
            continue
        constants = [_constant(value) for value in node.inputs[1:]]
        if any(constant is None for constant in constants):
            continue
        key = (node.inputs[0], *(constant.tobytes() for constant in constants if constant is not None), *(attribute.value for attribute in node.attributes.values()))
        first = known.setdefault(key, node)
        if first is not node and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0])
            graph.remove(node, safe=True)


def _pool_globally(graph: ir.Graph) -> None:
    """A mean over height and width is a global average pooling, which has an integer kernel."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or node.domain != "" or len(node.inputs) < 2:
            continue
        x, axes = _input(node, 0), _constant(node.inputs[1])
        if axes is None or x.shape is None or len(x.shape) != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        pooled = ir.node("GlobalAveragePool", [x])
        last = pooled
        if "keepdims" in node.attributes and node.attributes["keepdims"].as_int() == 0:
            last = ir.node("Squeeze", [pooled.outputs[0], _initializer(graph, f"{node.outputs[0].name}.axes", np.asarray([2, 3], np.int64))])
            pooled.outputs[0].type = x.type
        graph.insert_before(node, [pooled] if last is pooled else [pooled, last])
        last.outputs[0].shape, last.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        _replace(node, last.outputs[0])


# weights and biases


def _decode_weight(
    node: ir.Node, weights: Mapping[str, QTensor], container: WeightContainer, decoded: dict[ir.Value, IntegerGrid], notes: list[str]
) -> None:
    name = node.attributes["name"].as_string()
    weight = weights[name]
    grid = integer_grid(weight)
    if grid is None:
        kind = "groups within a channel" if weight.decoder.granularity.kind == "per_group" else f"{weight.decoder.kind} levels, which are not evenly spaced"
        notes.append(f"{name}: stored and computed in float; it has {kind}")
        _pass_through(node)
        return
    for use in list(node.outputs[0].uses()):
        reader = use.node
        if reader.op_type == "Transpose" and reader.domain == "":
            order = tuple(reader.attributes["perm"].as_ints()) if "perm" in reader.attributes else tuple(reversed(range(grid.codes.dim())))
            value = _insert_weight(node, f"{name}.transposed", grid.permute(order), container)
            decoded[value] = grid.permute(order)
            _replace(reader, value)
    if node.outputs[0].uses():
        value = _insert_weight(node, name, grid, container)
        decoded[value] = grid
        _replace(node, value)


def _insert_weight(anchor: ir.Node, name: str, grid: IntegerGrid, container: WeightContainer) -> ir.Value:
    graph = anchor.graph
    assert isinstance(graph, ir.Graph)
    dtype = ir.DataType.INT4 if container == "int4" and grid.fits_int4 else ir.DataType.INT8
    # ONNX Runtime fuses a linear layer only where the zero point is written out, zeros too
    contents = (("codes", grid.codes, dtype), ("scale", grid.scale, None), ("zero_point", grid.zero_point, dtype))
    inputs = [_initializer(graph, f"{name}.{part}", content.numpy(), kind) for part, content, kind in contents]
    step = ir.node("DequantizeLinear", inputs, {} if grid.axis is None else {"axis": grid.axis})
    step.outputs[0].name = f"{name}.decoded"
    step.outputs[0].shape, step.outputs[0].type = ir.Shape(grid.codes.shape), ir.TensorType(_FLOAT)
    graph.insert_before(anchor, step)
    return step.outputs[0]


def _quantize_bias(node: ir.Node, grids: Mapping[ir.Value, Grid], decoded: Mapping[ir.Value, IntegerGrid], notes: list[str]) -> None:
    """An int32 bias for a layer that is going to be computed in integers; any other keeps its float bias."""
    x, weight, bias_value = (node.inputs[index] for index in range(3))
    bias = None if bias_value is None else _constant(bias_value)
    if x not in grids or weight not in decoded or bias is None or bias.ndim != 1:
        return
    if node.op_type == "Conv" and any(use.node.op_type != "QuantizeLinear" for use in node.outputs[0].uses()):
        return  # runtimes compute it in float, where the exact bias is the better one
    assert x is not None and weight is not None
    scale = (torch.from_numpy(np.asarray(grids[x].scale)) * decoded[weight].scale).expand(bias.shape[0]).numpy()
    codes = np.rint(bias.astype(np.float64) / scale)
    if not bool((np.abs(codes) <= LARGEST_INT32).all()):
        notes.append(f"{node.outputs[0].name}: computed in float; its bias is too large for 32 bits at the scale of its products")
        return
    graph = node.graph
    assert isinstance(graph, ir.Graph)
    name = f"{node.outputs[0].name}.bias"
    inputs = [_initializer(graph, f"{name}.codes", codes.astype(np.int32)), _initializer(graph, f"{name}.scale", np.ascontiguousarray(scale))]
    step = ir.node("DequantizeLinear", inputs, {"axis": 0})
    step.outputs[0].name = f"{name}.decoded"
    step.outputs[0].shape, step.outputs[0].type = ir.Shape(bias.shape), ir.TensorType(_FLOAT)
    graph.insert_before(node, step)
    node.replace_input_with(2, step.outputs[0])


# graph surgery


def _input(node: ir.Node, index: int) -> ir.Value:
    value = node.inputs[index]
    assert value is not None
    return value


def _constant(value: ir.Value | None) -> Array | None:
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _initializer(graph: ir.Graph, name: str, content: Array, dtype: ir.DataType | None = None) -> ir.Value:
    value = ir.val(name, const_value=ir.tensor(content, dtype=dtype, name=name))
    graph.register_initializer(value)
    return value


def _pass_through(node: ir.Node) -> None:
    """Put an identity in the place of ``node``; ``_tidy`` removes those that may go."""
    step = ir.node("Identity", [_input(node, 0)])
    step.outputs[0].shape, step.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    graph = node.graph
    assert graph is not None
    graph.insert_before(node, step)
    _replace(node, step.outputs[0])


def _replace(node: ir.Node, value: ir.Value) -> None:
    """Let ``value`` take the place and the name of the output of ``node``, and remove ``node``."""
    old = node.outputs[0]
    name = old.name
    ir.convenience.replace_all_uses_with(old, value, replace_graph_outputs=True)
    graph = node.graph
    assert graph is not None
    graph.remove(node, safe=True)
    value.name = name


def _tidy(model: ir.Model) -> ir.Model:
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
