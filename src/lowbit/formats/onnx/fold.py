"""Folds operators that only scale and shift channels into the integer-weight layer before them.

A trained network keeps its batch norms; one between a layer and its quantizer would keep the layer in float. It is folded into the scales of
the weight, one for each channel, and into the bias; codes do not change, except for their sign where the norm's factor is negative.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch

from lowbit.formats.onnx.integer_grid import IntegerGrid, integer_grid
from lowbit.formats.onnx.surgery import Reasons, add_initializer, constant_of, take_place_of
from lowbit.formats.onnx.translate import DOMAIN, WEIGHT
from lowbit.quantizers import QTensor

Doubles = npt.NDArray[np.float64]


def fold_affine(graph: ir.Graph, weights: Mapping[str, QTensor], reasons: Reasons) -> dict[ir.Node, IntegerGrid]:
    """Fold batch norms, and products and sums with constants, into the convolutions and linear layers before them.

    Args:
        graph: Graph with weight nodes; changed in place.
        weights: The codes of the weights by parameter name.
        reasons: Receives the layers whose codes prevent the folding of their batch norm.

    Returns:
        The new grid of each weight node that was changed.
    """
    folded: dict[ir.Node, IntegerGrid] = {}
    for layer in list(graph):
        marker = _weight_node(layer)
        name = "" if marker is None else marker.attributes["name"].as_string()
        grid = None if marker is None else integer_grid(weights[name])
        if marker is None or grid is None:
            continue
        steps, factor, shift = _affine_steps(layer, int(grid.codes.shape[0]))
        bias = constant_of(layer.inputs[2]) if len(layer.inputs) > 2 else np.zeros_like(shift)
        if not steps or bias is None or bias.shape != shift.shape:
            continue
        rescaled = grid.rescaled(torch.from_numpy(factor))
        if rescaled is None:
            reasons.setdefault("int8 cannot hold 128, the negative of a code", []).append(name.rpartition(".")[0])
            continue
        folded[marker] = rescaled
        for step in steps:
            take_place_of(step, layer.outputs[0])
        layer.resize_inputs(3)
        content = (bias.astype(np.float64) * factor + shift).astype(np.float32)
        layer.replace_input_with(2, add_initializer(graph, f"{layer.outputs[0].name}.bias", content))
    return folded


def _weight_node(layer: ir.Node) -> ir.Node | None:
    """The weight node of a layer, if the layer is its only reader and its first axis is the output channels."""
    if layer.domain != "" or layer.op_type not in ("Conv", "Gemm"):
        return None
    if layer.op_type == "Gemm":
        plain = {"transA": 0, "transB": 0, "alpha": 1.0, "beta": 1.0}
        given = {name: layer.attributes[name].value for name in plain if name in layer.attributes}
        if plain | given != plain | {"transB": 1}:
            return None
    producer = None if layer.inputs[1] is None else layer.inputs[1].producer()
    if producer is None or (producer.domain, producer.op_type) != (DOMAIN, WEIGHT):
        return None
    return producer if len(producer.outputs[0].uses()) == 1 else None


def _affine_steps(layer: ir.Node, channels: int) -> tuple[list[ir.Node], Doubles, Doubles]:
    """The chain of operators behind ``layer`` that scale and shift its channels, with their combined factor and shift."""
    steps: list[ir.Node] = []
    factor, shift = np.ones(channels), np.zeros(channels)
    value = layer.outputs[0]
    while not value.is_graph_output() and len(uses := list(value.uses())) == 1 and value.shape is not None:
        found = _affine(uses[0].node, uses[0].idx, channels, len(value.shape))
        if found is None:
            break
        steps.append(uses[0].node)
        factor, shift = factor * found[0], shift * found[0] + found[1]
        value = steps[-1].outputs[0]
    return steps, factor, shift


def _affine(node: ir.Node, index: int, channels: int, rank: int) -> tuple[Doubles, Doubles] | None:
    """``(factor, shift)`` of a node whose input ``index`` is a layer's output; ``None`` if it does anything else."""
    if node.domain != "":
        return None
    if node.op_type == "BatchNormalization":
        return _norm(node) if index == 0 and len(node.outputs) == 1 else None
    if node.op_type not in ("Mul", "Div", "Add", "Sub"):
        return None
    other = _per_channel(node.inputs[1 - index], channels, rank)
    if other is None or (node.op_type == "Div" and (index == 1 or not other.all())):
        return None
    one, zero = np.ones(channels), np.zeros(channels)
    if node.op_type == "Add":
        return one, other
    if node.op_type == "Sub":
        return (one, -other) if index == 0 else (-one, other)
    return (other if node.op_type == "Mul" else one / other), zero


def _norm(node: ir.Node) -> tuple[Doubles, Doubles] | None:
    tables = [constant_of(value) for value in node.inputs[1:]]
    is_training = "training_mode" in node.attributes and node.attributes["training_mode"].as_int() != 0
    if is_training or any(table is None for table in tables):
        return None
    gamma, beta, mean, variance = (table.astype(np.float64) for table in tables if table is not None)
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    factor = gamma / np.sqrt(variance + epsilon)
    return factor, beta - mean * factor


def _per_channel(value: ir.Value | None, channels: int, rank: int) -> Doubles | None:
    """A constant with one number for each channel (axis 1 of ``rank``), or one for all."""
    constant = constant_of(value)
    if constant is None or constant.dtype != np.float32 or constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    if any(size != 1 for axis, size in enumerate(shape) if axis != 1) or shape[1] not in (1, channels):
        return None
    return np.broadcast_to(constant.astype(np.float64).reshape(-1), (channels,))
