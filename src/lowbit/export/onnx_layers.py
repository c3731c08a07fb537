"""Quantized weights of a translated graph as integer codes, and the biases that go with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch

from lowbit.export.integer_grid import IntegerGrid, integer_grid
from lowbit.export.onnx_activations import Grid
from lowbit.export.onnx_surgery import FLOAT, Array, add_initializer, constant_of, graph_of, pass_through, take_place_of
from lowbit.export.onnx_translate import WeightContainer
from lowbit.quantizers import QTensor

LARGEST_INT32 = 2**31 - 1
_LISTED = 6  # names of layers in a note


@dataclass(frozen=True)
class DecodedWeight:
    """Where a weight's codes come from: the parameter's name and the grid in the file."""

    name: str
    grid: IntegerGrid


def decode_weight(
    node: ir.Node, name: str, weight: QTensor, container: WeightContainer, decoded: dict[ir.Value, DecodedWeight], notes: list[str]
) -> None:
    """Replace a weight node by DequantizeLinear of its codes, or by its float values where no integer grid holds them."""
    grid = integer_grid(weight)
    if grid is None:
        levels = (
            "groups within a channel"
            if weight.decoder.granularity.kind == "per_group"
            else f"the levels of a {weight.decoder.kind} quantizer"
        )
        notes.append(f"{name}: stored and computed in float, because integer kernels cannot hold {levels}")
        pass_through(node)
        return
    for use in list(node.outputs[0].uses()):
        reader = use.node
        if reader.op_type == "Transpose" and reader.domain == "":
            order = tuple(reader.attributes["perm"].as_ints()) if "perm" in reader.attributes else tuple(reversed(range(grid.codes.dim())))
            take_place_of(reader, _insert(node, f"{name}.transposed", DecodedWeight(name, grid.permute(order)), container, decoded))
    if node.outputs[0].uses():
        take_place_of(node, _insert(node, name, DecodedWeight(name, grid), container, decoded))


def _insert(
    anchor: ir.Node, name: str, weight: DecodedWeight, container: WeightContainer, decoded: dict[ir.Value, DecodedWeight]
) -> ir.Value:
    is_int4 = container == "int4" and weight.grid.fits_int4
    dtype, grid = (ir.DataType.INT4, weight.grid) if is_int4 else (ir.DataType.INT8, weight.grid.widened())
    # ONNX Runtime fuses a linear layer only where the zero point is written out, zeros too
    contents = (("codes", grid.codes, dtype), ("scale", grid.scale, None), ("zero_point", grid.zero_point, dtype))
    value = _insert_decoder(anchor, name, {part: (content.numpy(), kind) for part, content, kind in contents}, grid.axis)
    decoded[value] = DecodedWeight(weight.name, grid)
    return value


def quantize_bias(node: ir.Node, grids: Mapping[ir.Value, Grid], decoded: Mapping[ir.Value, DecodedWeight], notes: list[str]) -> None:
    """An int32 bias of scale ``x_scale * w_scale`` for a layer that is computed in integers; any other keeps its float bias."""
    if len(node.inputs) < 3 or why_in_float(node, grids, decoded) is not None:
        return
    x, weight, bias_value = (node.inputs[index] for index in range(3))
    bias = constant_of(bias_value)
    if x not in grids or weight not in decoded or bias is None or bias.ndim != 1:
        return
    assert x is not None and weight is not None
    scale = (torch.tensor(grids[x].scale) * decoded[weight].grid.scale).expand(bias.shape[0]).contiguous().numpy()
    codes = np.rint(bias.astype(np.float64) / scale)
    if not bool((np.abs(codes) <= LARGEST_INT32).all()):
        notes.append(f"{decoded[weight].name}: computed in float, because the bias is too large for 32 bits at the scale of its products")
        return
    contents = {"codes": (codes.astype(np.int32), None), "scale": (scale, None)}
    node.replace_input_with(2, _insert_decoder(node, f"{node.outputs[0].name}.bias", contents, 0))


def _insert_decoder(anchor: ir.Node, name: str, contents: Mapping[str, tuple[Array, ir.DataType | None]], axis: int | None) -> ir.Value:
    """DequantizeLinear of new initializers in front of ``anchor``."""
    graph = graph_of(anchor)
    inputs = [add_initializer(graph, f"{name}.{part}", content, dtype) for part, (content, dtype) in contents.items()]
    step = ir.node("DequantizeLinear", inputs, {} if axis is None else {"axis": axis})
    value = step.outputs[0]
    value.name, value.shape, value.type = f"{name}.decoded", ir.Shape(contents["codes"][0].shape), ir.TensorType(FLOAT)
    graph.insert_before(anchor, step)
    return value


def why_in_float(node: ir.Node, grids: Mapping[ir.Value, Grid], decoded: Mapping[ir.Value, DecodedWeight]) -> str | None:
    """Why runtimes cannot compute a layer in integers although its weight is; ``None`` if they can, or if it is no such layer."""
    if node.domain != "" or len(node.inputs) < 2 or node.inputs[1] not in decoded:
        return None
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return f"{node.op_type} has no integer kernel"
    if node.inputs[0] not in grids:
        return "the input is not quantized"
    if node.op_type == "Conv":  # linear layers may end in float
        if node.outputs[0].is_graph_output():
            return "the result is the network's output"
        after = sorted({use.node.op_type for use in node.outputs[0].uses()} - {"QuantizeLinear"})
        if after:
            return f"the result is not quantized before {', '.join(after)}"
        if len(node.outputs[0].uses()) > 1:
            return "the result is quantized in several ways"
    return None


def layers_in_float(graph: ir.Graph, grids: Mapping[ir.Value, Grid], decoded: Mapping[ir.Value, DecodedWeight]) -> list[str]:
    """One note for each reason that keeps layers with integer weights in float."""
    reasons: dict[str, list[str]] = {}
    for node in graph:
        why = why_in_float(node, grids, decoded)
        weight = node.inputs[1] if why is not None else None
        if why is not None and weight is not None:
            reasons.setdefault(why, []).append(decoded[weight].name.rpartition(".")[0])
    return [f"computed in float, because {why}: {_listed(names)}" for why, names in reasons.items()]


def _listed(names: list[str]) -> str:
    more = len(names) - _LISTED
    return ", ".join(names[:_LISTED]) + (f" and {more} more" if more > 0 else "")
