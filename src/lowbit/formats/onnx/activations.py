"""Writes the activation quantizers of a translated graph as QuantizeLinear and DequantizeLinear."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from lowbit.formats.onnx.grid import Grid, uint8_grid
from lowbit.formats.onnx.surgery import FLOAT, Array, Reasons, add_initializer, constant_of, graph_of, input_of, take_place_of
from lowbit.formats.onnx.translate import DOMAIN, QUANTIZE

# operators whose output consists of values of their first input, or zeros
MOVES = frozenset({
    "MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Expand", "Gather",
    "DepthToSpace", "SpaceToDepth", "Tile",
})  # fmt: skip


def quantize_activation(node: ir.Node, grids: dict[ir.Value, Grid], reasons: Reasons) -> None:
    """Replace a quantizer node by QuantizeLinear and DequantizeLinear with uint8 codes, absorbing a preceding ReLU or clip."""
    x = input_of(node, 0)
    qmin, qmax = (node.attributes[name].as_int() for name in ("qmin", "qmax"))
    parts = [constant_of(value) for value in node.inputs[1:]]
    grid = uint8_grid(parts, qmin, qmax) if x.dtype in (None, FLOAT) else "values that are not float32"
    if isinstance(grid, str):
        reasons.setdefault(f"uint8 codes cannot hold activations with {grid}", []).append(str(node.outputs[0].name))
        _quantize_in_float(node, qmin, qmax)
        return
    name = node.outputs[0].name
    limit = _channel_limit(x)
    if limit is None:
        x, grid = _absorb_clips(x, grid)
        quantized = _insert_pair(node, x, grid, name, after=False)
    else:
        quantized = _quantize_limited(node, x, limit, grid)
    grids[quantized] = grid
    take_place_of(node, quantized)


def _quantize_limited(node: ir.Node, x: ir.Value, limit: Array, grid: Grid) -> ir.Value:
    """Quantize before and after the limit, so that the output of the preceding layer is integer.

    Rounding preserves order: ``Q(min(y, limit)) = min(Q(y), Q(limit))``.
    """
    name, producer = node.outputs[0].name, x.producer()
    assert producer is not None
    before, unlimited = _absorb_clips(input_of(producer, 0), grid, reader="Min")
    quantized = _insert_pair(node, before, unlimited, f"{name}.unlimited", after=False)
    codes = (
        np.clip(np.rint((limit.astype(np.float32) - np.float32(grid.shift)) / grid.step) + grid.origin, grid.lo, grid.hi) - grid.zero_point
    )
    on_grid = add_initializer(graph_of(node), f"{name}.limit", (codes * grid.scale).astype(np.float32))
    limited = ir.node("Min", [quantized, on_grid])
    limited.outputs[0].shape, limited.outputs[0].type = x.shape, x.type
    graph_of(node).insert_before(node, limited)
    return _insert_pair(node, limited.outputs[0], Grid.plain(grid.scale, grid.zero_point, 0, 255), name, after=False)


def _channel_limit(x: ir.Value) -> Array | None:
    """The constant upper limits of ``x`` if it is a minimum that only quantizers read."""
    node = x.producer()
    if node is None or node.domain != "" or node.op_type != "Min" or len(node.inputs) != 2 or node.inputs[1] is None:
        return None
    is_free = not x.is_graph_output() and all(use.node.op_type == QUANTIZE for use in x.uses())
    return constant_of(node.inputs[1]) if is_free else None


def _absorb_clips(x: ir.Value, grid: Grid, *, reader: str = QUANTIZE) -> tuple[ir.Value, Grid]:
    """The input of a ReLU or clip that only operators ``reader`` read, and ``grid`` limited to the remaining codes."""
    while (bounds := _clip_bounds(x)) is not None and not x.is_graph_output() and all(use.node.op_type == reader for use in x.uses()):
        lo, hi = (min(max(grid.code(bound), grid.lo), grid.hi) for bound in bounds)
        grid = grid.within(lo, hi)
        producer = x.producer()
        assert producer is not None
        x = input_of(producer, 0)
    return x, grid


def _clip_bounds(x: ir.Value) -> tuple[float, float] | None:
    """The range of ``x`` if it is the output of a ReLU or of a clip between constants."""
    node = x.producer()
    if node is None or node.domain != "" or node.op_type not in ("Relu", "Clip"):
        return None
    if node.op_type == "Relu":
        return 0.0, math.inf
    ends = [-math.inf, math.inf]
    for index, value in enumerate(node.inputs[1:]):
        if value is not None:
            constant = constant_of(value)
            if constant is None:
                return None
            ends[index] = float(constant)
    return ends[0], ends[1]


def _insert_pair(anchor: ir.Node, x: ir.Value, grid: Grid, name: str | None, *, after: bool) -> ir.Value:
    """Insert QuantizeLinear, a clip of the codes if they do not fill the container, and DequantizeLinear next to ``anchor``.

    A shift is subtracted first; behind a layer it becomes part of the layer's bias.
    """
    graph = graph_of(anchor)
    scale = add_initializer(graph, f"{name}.scale", np.asarray(grid.scale, np.float32))
    zero_point = add_initializer(graph, f"{name}.zero_point", np.asarray(grid.zero_point, np.uint8))
    step, origin = scale, zero_point
    if (grid.step, grid.origin) != (grid.scale, grid.zero_point):
        step = add_initializer(graph, f"{name}.step", np.asarray(grid.step, np.float32))
        origin = add_initializer(graph, f"{name}.origin", np.asarray(grid.origin, np.uint8))
    nodes: list[ir.Node] = []
    if grid.shift != 0:
        nodes.append(ir.node("Sub", [x, add_initializer(graph, f"{name}.shift", np.asarray(grid.shift, np.float32))]))
        shifted = nodes[0].outputs[0]
        shifted.name, shifted.shape, shifted.type = f"{name}.shifted", x.shape, x.type
        x = shifted
    nodes.append(ir.node("QuantizeLinear", [x, step, origin]))
    if (grid.lo, grid.hi) != (0, 255):
        ends = [
            add_initializer(graph, f"{name}.{end}", np.asarray(code, np.uint8)) for end, code in (("lowest", grid.lo), ("highest", grid.hi))
        ]
        nodes.append(ir.node("Clip", [nodes[-1].outputs[0], *ends]))
    nodes.append(ir.node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero_point]))
    for part in nodes[int(grid.shift != 0) : -1]:
        part.outputs[0].name = f"{name}.{part.op_type}"
        part.outputs[0].shape, part.outputs[0].type = x.shape, ir.TensorType(ir.DataType.UINT8)
    quantized = nodes[-1].outputs[0]
    quantized.name, quantized.shape, quantized.type = f"{name}.quantized", x.shape, x.type
    (graph.insert_after if after else graph.insert_before)(anchor, nodes)
    return quantized


def _quantize_in_float(node: ir.Node, qmin: int, qmax: int) -> None:
    x, lower, step_size, scale, zero_point = (input_of(node, index) for index in range(5))
    graph = graph_of(node)
    dtype = np.float32 if x.dtype is None else x.dtype.numpy()
    ends = [
        add_initializer(graph, f"{node.outputs[0].name}.{end}", np.asarray(code, dtype))
        for end, code in (("lowest", qmin), ("highest", qmax))
    ]
    value = x
    for op, operands in (("Sub", [lower]), ("Div", [step_size]), ("Round", []), ("Clip", ends), ("Sub", [zero_point]), ("Mul", [scale])):
        step = ir.node(op, [value, *operands])
        graph.insert_before(node, step)
        value = step.outputs[0]
        value.shape, value.type = x.shape, x.type
    take_place_of(node, value)


def only_moves(node: ir.Node) -> bool:
    """Whether every value of the output is one of the first input, or zero."""
    if node.domain != "":
        return False
    if node.op_type == "Pad":
        fill = node.inputs[2] if len(node.inputs) > 2 else None
        mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "constant"
        constant = None if fill is None else constant_of(fill)
        return mode in ("reflect", "edge", "wrap") or fill is None or (constant is not None and float(constant) == 0)
    return node.op_type in MOVES


def repeat_quantizer(node: ir.Node, grids: dict[ir.Value, Grid]) -> None:
    """Quantize the output of ``node``, which only moves values, on the grid of its input."""
    known = grids[input_of(node, 0)]
    grid = Grid.plain(known.scale, known.zero_point, 0, 255)  # its codes already lie in the narrower range
    for output in node.outputs if node.op_type == "Split" else node.outputs[:1]:
        uses = list(output.uses())
        if output.is_graph_output() or all(use.node.op_type == QUANTIZE for use in uses):
            continue
        repeated = _insert_pair(node, output, grid, output.name, after=True)
        grids[repeated] = grid
        for use in uses:
            use.node.replace_input_with(use.idx, repeated)


def hide_codes(x: ir.Value, grid: Grid, name: str) -> ir.Value:
    """``x`` behind a clip to the range that it is in anyway, so that runtimes do not see that it comes from codes."""
    decoder = x.producer()
    assert decoder is not None
    graph = graph_of(decoder)
    lowest, highest = ((np.float32(code) - np.float32(grid.zero_point)) * grid.scale for code in (0, 255))
    ends = [add_initializer(graph, f"{name}.{end}", np.asarray(v)) for end, v in (("lowest", lowest), ("highest", highest))]
    clip = ir.node("Clip", [x, *ends])
    clip.outputs[0].name, clip.outputs[0].shape, clip.outputs[0].type = name, x.shape, x.type
    graph.insert_after(decoder, clip)
    return clip.outputs[0]


def decode_once(grids: dict[ir.Value, Grid]) -> None:
    """Let float operators that read the same codes read them through one clip.

    ONNX Runtime decodes codes once for each operator that reads them, which also keeps it from seeing that several are one function, such
    as GELU. A clip is one operator.
    """
    for x, grid in grids.items():
        uses = [use for use in x.uses() if _is_float_operator(use.node, grids)]
        if len(uses) > 1:
            hidden = hide_codes(x, grid, f"{x.name}.once")
            for use in uses:
                use.node.replace_input_with(use.idx, hidden)


def _is_float_operator(node: ir.Node, grids: Mapping[ir.Value, Grid]) -> bool:
    if node.domain != "" or node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") or only_moves(node):
        return False
    reads_codes = all(value is None or value in grids or constant_of(value) is not None for value in node.inputs)
    writes_codes = all(use.node.op_type == "QuantizeLinear" for output in node.outputs for use in output.uses())
    return not (reads_codes and writes_codes)


def share_quantizers(graph: ir.Graph) -> None:
    """Merge identical quantizers of one tensor, such as a shared quantizer that is hooked at each of its readers."""
    known: dict[tuple[object, ...], ir.Node] = {}
    for node in list(graph):
        if node.op_type != QUANTIZE or node.domain != DOMAIN:
            continue
        constants = [constant_of(value) for value in node.inputs[1:]]
        if any(constant is None for constant in constants):
            continue
        key = (
            node.inputs[0],
            *(constant.tobytes() for constant in constants if constant is not None),
            *(attribute.value for attribute in node.attributes.values()),
        )
        first = known.setdefault(key, node)
        if first is not node and not node.outputs[0].is_graph_output():
            ir.convenience.replace_all_uses_with(node.outputs[0], first.outputs[0])
            graph.remove(node, safe=True)


def pool_globally(graph: ir.Graph) -> None:
    """Replace a mean over height and width by global average pooling, which has an integer kernel."""
    for node in list(graph):
        if node.op_type != "ReduceMean" or node.domain != "" or len(node.inputs) < 2:
            continue
        x, axes = input_of(node, 0), constant_of(node.inputs[1])
        if axes is None or x.shape is None or len(x.shape) != 4 or sorted(int(axis) % 4 for axis in axes) != [2, 3]:
            continue
        pooled = ir.node("GlobalAveragePool", [x])
        last = pooled
        if "keepdims" in node.attributes and node.attributes["keepdims"].as_int() == 0:
            last = ir.node(
                "Squeeze", [pooled.outputs[0], add_initializer(graph, f"{node.outputs[0].name}.axes", np.asarray([2, 3], np.int64))]
            )
            pooled.outputs[0].type = x.type
        graph.insert_before(node, [pooled] if last is pooled else [pooled, last])
        last.outputs[0].shape, last.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
        take_place_of(node, last.outputs[0])
