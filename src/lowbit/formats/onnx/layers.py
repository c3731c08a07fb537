"""Writes the quantized weights of a translated graph as integer codes, with matching biases."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from lowbit.formats.onnx.activations import MOVES, hide_codes
from lowbit.formats.onnx.bias import Steps, place_bias
from lowbit.formats.onnx.grid import Grid
from lowbit.formats.onnx.integer_grid import IntegerGrid, integer_grid, why_no_integer_grid
from lowbit.formats.onnx.surgery import FLOAT, Array, Reasons, add_initializer, constant_of, graph_of, input_of, take_place_of
from lowbit.formats.onnx.translate import WeightContainer
from lowbit.formats.program.program import GRID_OF_ITS_OWN
from lowbit.network.insert import site_name
from lowbit.quantizers import QTensor

_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_LINEAR = {"Mul", "Div", "Add", "Sub", "BatchNormalization", "LeakyRelu"}  # can be fused into the layer before them


@dataclass(frozen=True)
class DecodedWeight:
    """A weight in the file: the parameter's name, its grid, whether two codes share a byte, and whether its products can express the bias."""

    name: str
    grid: IntegerGrid
    is_int4: bool = False
    holds_bias: bool = True


def decode_weight(
    node: ir.Node,
    name: str,
    weight: QTensor,
    container: WeightContainer,
    decoded: dict[ir.Value, DecodedWeight],
    reasons: Reasons,
    folded: IntegerGrid | None = None,
) -> None:
    """Replace a weight node by DequantizeLinear of its codes, or by its float values if they have no integer grid.

    ``folded`` is the grid to use if a batch norm or the like was folded into the weight.
    """
    grid = folded or integer_grid(weight)
    if grid is None:
        reasons.setdefault(f"integer kernels cannot hold {why_no_integer_grid(weight)}", []).append(site_name(name))
        ir.convenience.replace_all_uses_with(node.outputs[0], input_of(node, 0))
        graph_of(node).remove(node, safe=True)
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
    dtype, grid = (ir.DataType.INT4, weight.grid) if is_int4 else (ir.DataType.INT8, weight.grid.centred().widened())
    # ONNX Runtime fuses a linear layer only if the zero point is explicit, even if it is 0
    contents = (("codes", grid.codes, dtype), ("scale", grid.scale, None), ("zero_point", grid.zero_point, dtype))
    value = _insert_decoder(anchor, name, {part: (content.numpy(), kind) for part, content, kind in contents}, grid.axis)
    decoded[value] = DecodedWeight(weight.name, grid, is_int4)
    return value


def quantize_bias(node: ir.Node, grids: Mapping[ir.Value, Grid], decoded: dict[ir.Value, DecodedWeight]) -> None:
    """Give a layer that is computed in integers an int32 bias of scale ``x_scale * w_scale`` (``place_bias``); others keep their float bias.

    A layer for whose bias the integers are too coarse stays in float.
    """
    if len(node.inputs) < 3 or why_in_float(node, grids, decoded) is not None:
        return
    x, weight, bias_value = (node.inputs[index] for index in range(3))
    bias = constant_of(bias_value)
    if x not in grids or weight not in decoded or bias is None or bias.ndim != 1:
        return
    assert x is not None and weight is not None
    x_scale, parameter = float(grids[x].scale), decoded[weight]
    placed = place_bias(torch.from_numpy(bias).double(), parameter.grid, x_scale, grids[x].hi, _steps_behind(node))
    _replace_weight(node, DecodedWeight(parameter.name, placed.grid, holds_bias=not placed.is_coarse), decoded)
    if placed.is_coarse:
        _hide_codes(node, grids)
        return
    bias_contents: dict[str, tuple[Array, ir.DataType | None]] = {
        "codes": (placed.codes.to(torch.int32).numpy(), None),
        "scale": (placed.scale.contiguous().numpy(), None),
    }
    node.replace_input_with(2, _insert_decoder(node, f"{node.outputs[0].name}.bias", bias_contents, 0))


def _replace_weight(node: ir.Node, weight: DecodedWeight, decoded: dict[ir.Value, DecodedWeight]) -> None:
    """Replace the grid of the weight for ``node`` only; the names stay if nothing else reads that weight."""
    old, graph = input_of(node, 1), graph_of(node)
    step = old.producer()
    assert step is not None
    name, is_shared = str(input_of(step, 0).name).removesuffix(".codes"), len(old.uses()) > 1
    if not is_shared:
        node.replace_input_with(1, None)
        graph.remove(step, safe=True)
        for part in ("codes", "scale", "zero_point"):
            graph.initializers.pop(f"{name}.{part}", None)
    contents = {part: (getattr(weight.grid, part).numpy(), None) for part in ("codes", "scale", "zero_point")}
    new = _insert_decoder(node, f"{name}.{node.outputs[0].name}" if is_shared else name, contents, weight.grid.axis)
    decoded[new] = weight
    node.replace_input_with(1, new)


def _steps_behind(node: ir.Node) -> Steps | None:
    """The steps of the quantizer that is the only reader of a layer's result."""
    readers = {use.node for use in node.outputs[0].uses()}
    reader = readers.pop() if len(readers) == 1 else None
    if reader is None or reader.op_type != "QuantizeLinear":
        return None
    step, origin = (constant_of(value) for value in reader.inputs[1:3])
    return None if step is None or origin is None or step.size != 1 else Steps(float(step), int(origin))


def keep_float(node: ir.Node, grids: Mapping[ir.Value, Grid], decoded: Mapping[ir.Value, DecodedWeight]) -> None:
    """Keep a layer in float that has no integer weight although its input is quantized.

    ONNX Runtime would quantize its weight to 8 bits on its own. A clip to the range of the input, which changes nothing, hides the codes.
    """
    if node.domain != "" or node.op_type not in _LAYERS or node.inputs[1] in decoded:
        return
    x = node.inputs[0]
    if x is None or x not in grids or (constant_of(node.inputs[1]) is None and not _is_decoded(node.inputs[1])):
        return
    _hide_codes(node, grids)


def _hide_codes(node: ir.Node, grids: Mapping[ir.Value, Grid]) -> None:
    x = input_of(node, 0)
    node.replace_input_with(0, hide_codes(x, grids[x], f"{node.outputs[0].name}.input"))


def decode_while_loading(node: ir.Node, grids: Mapping[ir.Value, Grid], decoded: Mapping[ir.Value, DecodedWeight]) -> None:
    """Decode the weight of a layer that is computed in float by a cast and a product, which runtimes compute once, when loading.

    They would compute a DequantizeLinear in every call. This is not done where ONNX Runtime would then quantize the weight again.
    """
    if why_in_float(node, grids, decoded) is None or (node.inputs[0] in grids and _may_end_in_quantizer(node.outputs[0])):
        return
    name, weight = f"{node.outputs[0].name}.weight", input_of(node, 1)
    node.replace_input_with(1, _decode_by_steps(node, name, _codes_of(weight), *_tables(graph_of(node), name, decoded[weight].grid)))


def decode_weights_of_others(graph: ir.Graph, decoded: Mapping[ir.Value, DecodedWeight]) -> None:
    """Avoid decoding a whole weight in every call for other readers, such as those in embeddings and recurrent layers.

    A lookup decodes only the rows that it finds; anything else that depends on weights alone is computed once, when loading.
    """
    for value, weight in decoded.items():
        source, readers = value.producer(), dict.fromkeys(use.node for use in value.uses() if use.node.op_type not in _LAYERS)
        if source is None or not readers or value.is_graph_output():
            continue
        codes, tables = _codes_of(value), _tables(graph, f"{value.name}.table", weight.grid)
        others = []
        for reader in readers:
            if weight.is_int4 or not _looks_up_rows(reader, value):  # ONNX cannot look up 4-bit codes
                others.append(reader)
                continue
            factors, zeros = (None if table is None else _same_lookup(reader, table) for table in tables)
            assert factors is not None
            name = f"{reader.outputs[0].name}.rows"
            take_place_of(reader, _decode_by_steps(reader, name, _same_lookup(reader, codes), factors, zeros))
        if others:
            whole = _decode_by_steps(source, f"{value.name}.whole", codes, *tables)
            for reader in others:
                for index, given in enumerate(reader.inputs):
                    if given is value:
                        reader.replace_input_with(index, whole)


def _looks_up_rows(reader: ir.Node, value: ir.Value) -> bool:
    axis = reader.attributes.get("axis")
    return reader.op_type == "Gather" and reader.inputs[0] is value and (axis is None or axis.as_int() == 0)


def _same_lookup(reader: ir.Node, table: ir.Value) -> ir.Value:
    """The lookup of ``reader`` in another table; a table of one row applies to all rows."""
    if table.shape is not None and table.shape[0] == 1:
        return table
    step = ir.node("Gather", [table, input_of(reader, 1)], {"axis": 0})
    step.outputs[0].name = f"{reader.outputs[0].name}.{table.name}"
    graph_of(reader).insert_before(reader, step)
    return step.outputs[0]


def _codes_of(weight: ir.Value) -> ir.Value:
    source = weight.producer()
    assert source is not None
    return input_of(source, 0)


def _tables(graph: ir.Graph, name: str, grid: IntegerGrid) -> tuple[ir.Value, ir.Value | None]:
    """Factors and zero points, if any, in shapes that broadcast with the codes."""
    shape, zeros = [-1 if axis == grid.axis else 1 for axis in range(grid.codes.dim())], None
    if bool(grid.zero_point.any()):
        zeros = add_initializer(graph, f"{name}.zeros", grid.zero_point.float().reshape(shape).numpy())
    return add_initializer(graph, f"{name}.factors", grid.scale.reshape(shape).numpy()), zeros


def _decode_by_steps(anchor: ir.Node, name: str, codes: ir.Value, factors: ir.Value, zeros: ir.Value | None) -> ir.Value:
    """Insert ``(codes - zeros) * factors`` in front of ``anchor``."""
    steps = [ir.node("Cast", [codes], {"to": FLOAT})]
    if zeros is not None:
        steps.append(ir.node("Sub", [steps[0].outputs[0], zeros]))
    steps.append(ir.node("Mul", [steps[-1].outputs[0], factors]))
    for step in steps:
        step.outputs[0].name = f"{name}.{step.op_type}"
        step.outputs[0].shape, step.outputs[0].type = codes.shape, ir.TensorType(FLOAT)
    graph_of(anchor).insert_before(anchor, steps)
    return steps[-1].outputs[0]


def _may_end_in_quantizer(value: ir.Value) -> bool:
    """Whether a runtime that fuses or reorders operators may find a quantizer directly behind the layer."""
    uses = list(value.uses())
    merged = {"Relu", "Clip", *MOVES} | (_LINEAR if len(uses) == 1 else set())
    return any(
        use.node.op_type == "QuantizeLinear" or (use.node.op_type in merged and _may_end_in_quantizer(use.node.outputs[0])) for use in uses
    )


def _is_decoded(value: ir.Value | None) -> bool:
    producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear" and constant_of(producer.inputs[0]) is not None


def _insert_decoder(anchor: ir.Node, name: str, contents: Mapping[str, tuple[Array, ir.DataType | None]], axis: int | None) -> ir.Value:
    """Insert DequantizeLinear of new initializers in front of ``anchor``."""
    graph = graph_of(anchor)
    inputs = [add_initializer(graph, f"{name}.{part}", content, dtype) for part, (content, dtype) in contents.items()]
    step = ir.node("DequantizeLinear", inputs, {} if axis is None else {"axis": axis})
    value = step.outputs[0]
    value.name, value.shape, value.type = f"{name}.decoded", ir.Shape(contents["codes"][0].shape), ir.TensorType(FLOAT)
    graph.insert_before(anchor, step)
    return value


def why_in_float(node: ir.Node, grids: Mapping[ir.Value, Grid], decoded: Mapping[ir.Value, DecodedWeight]) -> str | None:
    """Why runtimes cannot compute a layer with an integer weight in integers; ``None`` if they can, or if it is no such layer."""
    if node.domain != "" or len(node.inputs) < 2 or (weight := node.inputs[1]) is None or weight not in decoded:
        return None
    if decoded[weight].is_int4:
        return "runtimes decode 4-bit codes"
    if not decoded[weight].holds_bias:
        return "the integers of the sums are too coarse for the bias"
    if node.op_type not in ("Conv", "Gemm", "MatMul"):
        return f"{node.op_type} has no integer kernel"
    if node.inputs[0] not in grids:
        return "the input is not quantized"
    if node.op_type == "Conv":  # the output of linear layers may be float
        if node.outputs[0].is_graph_output():
            return "the result is the network's output"
        after = sorted({use.node.op_type for use in node.outputs[0].uses()} - {"QuantizeLinear"})
        if after:
            return f"the result is not quantized before {', '.join(after)}"
        if len(node.outputs[0].uses()) > 1:
            return "the result is quantized in several ways"
    return None


def note_layers_in_float(
    graph: ir.Graph,
    grids: Mapping[ir.Value, Grid],
    decoded: Mapping[ir.Value, DecodedWeight],
    reasons: Reasons,
    emulated: Collection[str] = (),
) -> None:
    """Note the layers with integer weights that are computed in float; inputs of ``emulated`` layers have a new grid in every call."""
    for node in graph:
        why = why_in_float(node, grids, decoded)
        weight = node.inputs[1] if why is not None else None
        if why is not None and weight is not None:
            name = site_name(decoded[weight].name)
            reasons.setdefault(GRID_OF_ITS_OWN if name in emulated else why, []).append(name)
