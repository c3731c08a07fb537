"""Quantizer and weight nodes of a translated graph as QuantizeLinear and DequantizeLinear, placed so that runtimes compute in integers.

What ONNX Runtime and OpenVINO need to see, and what is done for it:

- activations as uint8 codes: a quantizer is shifted so that its lowest code is 0; fewer codes than 256 are a clip *of the codes*;
- a convolution directly followed by its quantizer: a ReLU or clip between the two becomes part of the clip of the codes, which is
  exact because rounding is monotone, and disappears where the codes' range implies it;
- batch norms behind layers folded into the scales of their weights and into their biases;
- integer weights with one scale for each output channel, the transpose of a linear layer applied to the codes;
- integer biases of scale ``x_scale * w_scale``;
- layers with float weights are kept from being quantized by the runtime on its own, which ONNX Runtime does where their input is;
- codes read by several operators of a function in float, such as GELU, decoded once for all of them;
- codes on both sides of operators that only move values: the quantizer is repeated behind them, which changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from lowbit.errors import SpecError
from lowbit.formats.onnx.activations import (
    Grid,
    decode_once,
    only_moves,
    pool_globally,
    quantize_activation,
    repeat_quantizer,
    share_quantizers,
)
from lowbit.formats.onnx.fold import fold_affine
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

_LISTED = 6  # names of layers in a note


@dataclass(frozen=True)
class Rewritten:
    """An ONNX model of standard operators, and what was left in float and why."""

    model: ir.Model
    notes: tuple[str, ...]


def float_network(marked: ir.Model) -> ir.Model:
    """The same network without any quantizer: what the quantized file is timed against."""
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
        marked: What ``translate`` returned; it is not changed.
        weights: The codes of the weights by parameter name.
        weight_container: ``int8`` (integer kernels), or ``int4``, which takes half a byte for codes of up to 4 bits but which
            runtimes decode and compute in float.
        emulated: Layers whose input has its own grid in every call.

    Raises:
        SpecError: 4-bit codes in a graph of an opset without them.
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
    remove_unused(model)  # ReLUs and clips that quantizers took in
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
