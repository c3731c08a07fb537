"""Rewrites quantizer and weight nodes of a translated graph as QuantizeLinear and DequantizeLinear, so that runtimes compute in integers.

ONNX Runtime and OpenVINO require, and the rewriting provides:

- activations as uint8 codes: a quantizer is shifted so that its lowest code is 0; fewer codes than 256 become a clip *of the codes*;
- a convolution directly followed by its quantizer: a ReLU or clip between the two becomes part of the clip of the codes, which is
  exact because rounding is monotone, and is dropped where the range of the codes implies it;
- batch norms behind layers folded into the scales of their weights and into their biases;
- integer weights with one scale for each output channel, the transpose of a linear layer applied to the codes;
- integer biases of scale ``x_scale * w_scale``;
- layers with float weights that stay in float: ONNX Runtime would quantize them on its own where their input is quantized;
- codes that several operators of a float function such as GELU read, decoded once for all of them;
- codes on both sides of operators that only move values: the quantizer is repeated behind them, which does not change the values.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lowbit.errors import SpecError
from lowbit.formats.onnx.activations import (
    decode_once,
    only_moves,
    pool_globally,
    quantize_activation,
    repeat_quantizer,
    share_quantizers,
)
from lowbit.formats.onnx.fold import fold_affine
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.onnx.layers import (
    DecodedWeight,
    decode_weight,
    decode_weights_of_others,
    decode_while_loading,
    keep_float,
    note_layers_in_float,
    quantize_bias,
)
from lowbit.formats.onnx.surgery import Reasons, pass_through, remove_unused, tidy
from lowbit.formats.onnx.translate import DOMAIN, INT4_OPSET, QUANTIZE, WEIGHT, WeightContainer
from lowbit.quantizers import QTensor

_LISTED = 6  # layers named in a note


@dataclass(frozen=True)
class Rewritten:
    """An ONNX model of standard operators, and notes on the layers that stay in float."""

    model: ir.Model
    notes: tuple[str, ...]


def float_network(marked: ir.Model) -> ir.Model:
    """The same network without quantizers, as the baseline for timing the quantized file."""
    model = marked.clone()
    for node in list(model.graph):
        if node.domain == DOMAIN:
            pass_through(node)
    return tidy(model)


def integer_network(
    marked: ir.Model, weights: Mapping[str, QTensor], *, weight_container: WeightContainer = "int8", emulated: Collection[str] = ()
) -> Rewritten:
    """Replace every quantizer and quantized weight by ONNX's operators.

    Args:
        marked: The graph from ``translate``; it is not changed.
        weights: The codes of the weights by parameter name.
        weight_container: ``int8`` (integer kernels), or ``int4``, which stores codes of up to 4 bits in half a byte, but which runtimes
            decode to compute in float.
        emulated: Layers whose input has a new grid in every call.

    Raises:
        SpecError: The graph's opset has no 4-bit integers.
    """
    if weight_container == "int4" and marked.opset_imports[""] < INT4_OPSET:
        raise SpecError(f"4-bit codes need opset {INT4_OPSET}, the graph has {marked.opset_imports['']}")
    model = marked.clone()
    reasons: Reasons = {}
    pool_globally(model.graph)
    share_quantizers(model.graph)
    grids: dict[ir.Value, Grid] = {}
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == QUANTIZE:
            quantize_activation(node, grids, reasons)
        elif only_moves(node) and node.inputs[0] in grids:
            repeat_quantizer(node, grids)
    remove_unused(model)  # ReLUs and clips that quantizers absorbed
    folded = fold_affine(model.graph, weights, reasons)
    decoded: dict[ir.Value, DecodedWeight] = {}
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == WEIGHT:
            name = node.attributes["name"].as_string()
            decode_weight(node, name, weights[name], weight_container, decoded, reasons, folded.get(node))
    for node in list(model.graph):
        quantize_bias(node, grids, decoded)
        keep_float(node, grids, decoded)
    decode_once(grids)
    note_layers_in_float(model.graph, grids, decoded, reasons, emulated)
    for node in list(model.graph):
        decode_while_loading(node, grids, decoded)
    decode_weights_of_others(model.graph, decoded)
    return Rewritten(tidy(model), tuple(f"computed in float, because {why}: {_listed(names)}" for why, names in reasons.items()))


def _listed(names: list[str]) -> str:
    distinct = list(dict.fromkeys(names))
    more = len(distinct) - _LISTED
    return ", ".join(distinct[:_LISTED]) + (f" and {more} more" if more > 0 else "")
