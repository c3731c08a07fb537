"""Turns an exported program into an integer graph: whatever lies between two quantizers becomes one operation on codes.

Values are followed through the program as codes, or as float values that a quantizer is still to see. A ReLU or clip before a quantizer
narrows its codes, which is exact because rounding is monotone; batch norms are folded into the layer before them; operators that only move
values move codes. Anything else that would have to be computed in float is an error that names the layer and the operation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import Tensor, fx
from torch.export.graph_signature import InputKind, OutputKind

from lowbit.errors import GraphError, LayerError
from lowbit.formats.fixed_point.context import Context, kind_of
from lowbit.formats.fixed_point.graph import (
    QMAX,
    QMIN,
    AveragePool,
    Buffer,
    Convolution,
    IntegerGraph,
    Linear,
    Operation,
    Sum,
    contiguous_strides,
)
from lowbit.formats.fixed_point.lower_layers import (
    lower_arithmetic,
    lower_clip,
    lower_codebook,
    lower_convolution,
    lower_linear,
    lower_norm,
)
from lowbit.formats.fixed_point.lower_shapes import (
    copy_codes,
    lower_average_pool,
    lower_concatenation,
    lower_max_pool,
    lower_mean,
    lower_move,
    lower_padding,
    lower_split,
    move_codes,
)
from lowbit.formats.fixed_point.values import Codes, FromConcatenation, FromInput, FromLayer, FromSum, Unquantized, Value, limited, volume
from lowbit.formats.fixed_point.weights import layer_weight, turned
from lowbit.formats.onnx.grid import Grid, uint8_grid
from lowbit.formats.program.constants import constant_of
from lowbit.formats.program.program import Program

MARGIN = 1.125  # of the output's range over that of the sample, for what other inputs give

Handler = Callable[[Context, fx.Node], Any]
_HANDLERS: dict[str, Handler] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), lower_convolution),
    "linear": lower_linear,
    "_native_batch_norm_legit_no_training": lower_norm,
    **dict.fromkeys(("add", "sub", "mul", "div"), lower_arithmetic),
    **dict.fromkeys(("relu", "relu6", "hardtanh", "clamp", "clamp_min"), lower_clip),
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"), lower_average_pool
    ),
    "mean": lower_mean,
    **dict.fromkeys(
        ("max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d", "max_pool3d_with_indices", "adaptive_max_pool1d",
         "adaptive_max_pool2d", "adaptive_max_pool3d"),
        lower_max_pool,
    ),
    "cat": lower_concatenation,
    **dict.fromkeys(("pad", "constant_pad_nd"), lower_padding),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), lower_split),
    **dict.fromkeys(
        ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "t", "expand", "slice",
         "select", "narrow", "alias", "detach", "clone", "contiguous", "dropout", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle"),
        lower_move,
    ),
    "fake_quantize_codebook": lower_codebook,
}  # fmt: skip


def lower(program: Program, output_range: tuple[float, float], *, as_onnx: bool = False) -> IntegerGraph:
    """The integer graph of a program.

    Args:
        program: A quantized network of one input and one output.
        output_range: Smallest and largest value of the output, for the grid of an output that no quantizer has seen.
        as_onnx: Whether the accumulators of layers are those of the ONNX file, so that its codes can be met.

    Raises:
        GraphError: The network has several inputs or outputs, or its input is not quantized once.
        LayerError: A layer or operation has no integer form.
    """
    return _Lowering(program, output_range, as_onnx).graph()


class _Lowering(Context):
    """Follows a program from its input to its output."""

    def __init__(self, program: Program, output_range: tuple[float, float], as_onnx: bool) -> None:
        super().__init__(program)
        self._output_range, self._as_onnx = output_range, as_onnx
        self._input: Buffer | None = None
        self._made: dict[tuple[int, Grid], tuple[Value, Codes]] = {}  # one operation for equal quantizers of one tensor
        self._notes: list[str] = []

    def graph(self) -> IntegerGraph:
        for node in self.program.exported.graph.nodes:
            if node.op == "placeholder":
                self._placeholder(node)
            elif node.op == "call_function":
                self.values[node] = self._call(node)
        output = self._output()
        if self._input is None:
            raise GraphError("nothing that the network computes from its input is quantized: quantize it with activation_bits=8")
        return IntegerGraph(self._input, output, tuple(self.operations), tuple(self._notes))

    def _placeholder(self, node: fx.Node) -> None:
        signature = self.program.exported.graph_signature
        constant = constant_of(self.program.exported, node)
        if constant is not None:
            self.values[node] = constant
        if node.name not in {spec.arg.name for spec in signature.input_specs if spec.kind is InputKind.USER_INPUT}:
            return
        if len(signature.user_inputs) != 1 or self.program.batch_dims.get(node.name) != 0:
            raise GraphError(
                f"integer networks take one tensor whose first dimension is the batch; this one takes {', '.join(map(str, signature.user_inputs))}"
            )
        self.values[node] = self.result(node, FromInput(node.name))

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            made = self.values[cast(fx.Node, node.args[0])]
            index = cast(int, node.args[1])
            return made[index] if isinstance(made, (tuple, list)) and index < len(made) else None
        operands = [self.values.get(source) for source in node.all_input_nodes]
        is_size = not isinstance(node.meta.get("val"), (Tensor, tuple, list))
        if is_size or not any(isinstance(operand, (Codes, Unquantized)) for operand in _flat(operands)):
            return node.target(*self.arguments(node), **node.kwargs)  # type: ignore[operator]
        kind = kind_of(node)
        if kind in ("fake_quantize_affine", "fake_quantize_grid"):
            return self._quantizer(node)
        if kind not in _HANDLERS:
            raise self.refused(node, "this operation has no integer form")
        return _HANDLERS[kind](self, node)

    def _quantizer(self, node: fx.Node) -> Value:
        qmin, qmax = cast("tuple[int, int]", node.args[-2:])
        tables = [self.values[cast(fx.Node, source)] for source in node.args[1:-2]]
        if not all(isinstance(table, Tensor) for table in tables):
            raise self.refused(node, "the grid of its activations depends on the input: use a method with fixed ranges")
        parts = [cast(Tensor, table).detach().numpy() for table in tables]
        if len(parts) == 2:
            scale, zero_point = parts
            parts = [-(zero_point * scale), scale, scale, zero_point]
        grid = uint8_grid(parts, qmin, qmax)
        if isinstance(grid, str):
            raise self.refused(node, f"8-bit codes cannot hold activations with {grid}")
        return self.quantize(self.value(node, 0), grid.moved_by(QMIN), node.name)

    def quantize(self, value: Value, grid: Grid, name: str) -> Codes:
        key = (id(value), grid)
        if key not in self._made:
            codes = self._requantized(value.buffer, grid, name) if isinstance(value, Codes) else self._quantized(value, grid, name)
            self._made[key] = value, codes  # with the value, whose id is not given away then
        return self._made[key][1]

    def _requantized(self, x: Buffer, grid: Grid, name: str) -> Codes:
        is_same = grid.is_plain and (grid.scale, grid.zero_point) == (x.grid.scale, x.grid.zero_point)
        if is_same and grid.lo <= x.grid.lo and x.grid.hi <= grid.hi:
            return Codes(x)
        target = Buffer(name, x.shape, grid, name)
        self.operations.append(Sum(name.partition(".")[0], target, (x,), (1,)))
        return Codes(target)

    def _quantized(self, value: Unquantized, grid: Grid, name: str) -> Codes:
        grid = limited(grid, value.clips)
        first = f"{name}.unmoved" if value.moves else name
        target = Buffer(first, value.shape, grid, first)
        source = value.source
        if not isinstance(source, (FromInput, FromLayer)) and value.shift is not None and value.factor is not None:
            if value.shift.size > 1 or bool((value.factor != 1).any()):
                raise LayerError(
                    f"layer {source.layer!r}: what it computes is scaled in float at {value.last!r}, and no layer before can take that in"
                )
            target = replace(target, grid=replace(grid, shift=grid.shift - float(value.shift.item())))
        if isinstance(source, FromInput):
            target = self._take_input(source, value, target)
        elif isinstance(source, FromLayer):
            self.operations.append(self._layer_operation(source, value, target))
        elif isinstance(source, FromSum):
            self.operations.append(Sum(source.layer, target, source.operands, source.signs))
        elif isinstance(source, FromConcatenation):
            self._concatenate(source, target)
        else:
            self.operations.append(
                AveragePool(source.layer, target, source.source, source.rows, source.columns, source.source_shape, source.is_global)
            )
        codes = Codes(target)
        for place, move in enumerate(value.moves, 1):
            codes = move_codes(self, move, codes.buffer, name if place == len(value.moves) else f"{name}.{move.name}", grid)
        return codes

    def _take_input(self, source: FromInput, value: Unquantized, target: Buffer) -> Buffer:
        if value.factor is not None:
            raise GraphError(f"the input {source.name!r} is scaled in float before it is quantized. Do that before the call.")
        if self._input is not None and self._input.grid != target.grid:
            raise GraphError(
                f"the input {source.name!r} is quantized in several ways, by {self._input.name} and {target.name}; the caller of an integer "
                "network quantizes it once. Give the layers that read it the same bits."
            )
        self._input = self._input or target
        return self._input

    def _layer_operation(self, source: FromLayer, value: Unquantized, target: Buffer) -> Operation:
        factor, shift = value.factor, value.shift
        if target.grid.shift:  # the quantizer subtracts it from the result: part of the bias
            factor = np.ones(1) if factor is None else factor
            shift = (np.zeros(1) if shift is None else shift) - target.grid.shift
        codes = self.program.weights[source.parameter]
        if source.window is not None and source.is_transposed:
            codes = turned(source.layer, codes, source.window.groups)
        weight = layer_weight(
            source.layer, source.parameter, codes, source.bias, factor, shift, source.source, target.grid, as_onnx=self._as_onnx
        )
        if source.window is None:
            return Linear(source.layer, target, source.source, weight)
        return Convolution(source.layer, target, source.source, weight, source.window, volume(source.source.shape), volume(target.shape))

    def _concatenate(self, source: FromConcatenation, target: Buffer) -> None:
        strides, offset = contiguous_strides(target.shape), 0
        for index, part in enumerate(source.parts):
            moved = self.quantize(part, target.grid, f"{target.name}.{index}").buffer
            copy_codes(self, source.layer, moved, target, offset)
            offset += moved.shape[source.axis] * strides[source.axis]

    def _output(self) -> Buffer:
        specs, node = self.program.exported.graph_signature.output_specs, self.program.exported.graph.output_node()
        pairs = zip(cast(Sequence[fx.Node], node.args[0]), specs, strict=True)
        results = [result for result, spec in pairs if spec.kind is OutputKind.USER_OUTPUT]
        value = self.values.get(results[0])
        if len(results) != 1 or not isinstance(value, (Codes, Unquantized)):
            raise GraphError(
                f"integer networks return one tensor that they compute from their input; this one returns {len(results)} tensors"
            )
        if isinstance(value, Unquantized):
            value = self.quantize(value, value.natural_grid or self._output_grid(), results[0].name)
        buffer = value.buffer
        if self._input is not None and buffer.storage == self._input.storage:
            target = replace(buffer, name=f"{buffer.name}.copy", storage=f"{buffer.name}.copy")
            copy_codes(self, buffer.name, buffer, target, 0)
            return target
        return buffer

    def _output_grid(self) -> Grid:
        lo, hi = min(self._output_range[0], 0.0) * MARGIN, max(self._output_range[1], 0.0) * MARGIN
        self._notes.append(f"the output is rounded to 8 bits between {lo:.3g} and {hi:.3g}: the sample's range and an eighth more")
        scale = np.float32((hi - lo) / (QMAX - QMIN) if hi > lo else 1.0)
        return Grid.plain(scale, int(np.clip(QMIN - round(lo / float(scale)), QMIN, QMAX)), QMIN, QMAX)


def _flat(values: Sequence[object]) -> list[object]:
    """Values, and those within tuples of them."""
    return [inner for value in values for inner in (value if isinstance(value, (tuple, list)) else (value,))]
