"""The graph of a packed network rewritten so that layers run on few-bit kernels, with what stands around them computed along.

A layer becomes binary or ternary where its input is a sign and its weight holds ``-s``, ``+s`` and perhaps 0 for each output channel; it
becomes one of bit planes or of 8 bits where input and weight have affine grids of few enough bits. Batch norms go into scales, weights
or the comparison of the next sign; sums with another tensor of the same shape, activations and XNOR-Net's K are computed along with binary
layers. Layers whose weight alone is quantized can read packed codes, if asked to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from lowbit.errors import FileFormatError, SpecError
from lowbit.formats.onnx.integer_grid import integer_grid
from lowbit.formats.program.calls import Graph, Node, Stored
from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import SumDecoder
from lowbit.runtime.cpu.bits import WORD
from lowbit.runtime.layers.binary import binary_conv2d, binary_linear, pack_conv_weight
from lowbit.runtime.layers.int8 import has_exact_kernels, input_grid, int8_conv2d, int8_linear
from lowbit.runtime.layers.packed import pack_linear_weight, packed_conv2d, packed_linear
from lowbit.runtime.layers.planes import MOST_LEVELS, choose_kernel, input_thresholds, pack_planes, planes_conv2d, planes_linear
from lowbit.runtime.lowering.activation import activated
from lowbit.runtime.lowering.editor import GraphEditor
from lowbit.runtime.lowering.operator import Operator
from lowbit.runtime.lowering.surroundings import AFFINE, CONV, GRID, LINEAR, RESHAPE, Surroundings, options_of, window_of
from lowbit.runtime.lowering.thresholds import sign_threshold

_BINARY = {CONV: "lowbit.binary_conv2d.default", LINEAR: "lowbit.binary_linear.default"}
_PACKED = {CONV: "lowbit.packed_conv2d.default", LINEAR: "lowbit.packed_linear.default"}
_PLANES = {CONV: "lowbit.planes_conv2d.default", LINEAR: "lowbit.planes_linear.default"}
_INT8 = {CONV: "lowbit.int8_conv2d.default", LINEAR: "lowbit.int8_linear.default"}
OPERATORS: dict[str, Operator[...]] = {
    "lowbit.binary_conv2d.default": binary_conv2d,
    "lowbit.binary_linear.default": binary_linear,
    "lowbit.planes_conv2d.default": planes_conv2d,
    "lowbit.planes_linear.default": planes_linear,
    "lowbit.int8_conv2d.default": int8_conv2d,
    "lowbit.int8_linear.default": int8_linear,
    "lowbit.packed_linear.default": packed_linear,
    "lowbit.packed_conv2d.default": packed_conv2d,
}
_VIEWS = {"aten.view.default", "aten._unsafe_view.default"}
MOST_PRODUCTS = 2.0**24  # of a sum; float32 holds all whole numbers up to it
WeightOnly = Literal["none", "float", "int8"]


@dataclass(frozen=True)
class LayerPath:
    """What a layer runs on.

    Attributes:
        name: Of the layer.
        kernel: ``binary``, ``ternary``, ``planes`` or ``int8``; ``packed``: weights stay packed, inputs are not quantized; ``float`` as before.
        fused: What is computed along with it.
        reason: Why it stayed in float.
    """

    name: str
    kernel: str
    fused: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        along = f" with {', '.join(self.fused)}" if self.fused else ""
        return f"{self.name}: {self.kernel}{along}{f' ({self.reason})' if self.reason else ''}"


class Conversion:
    """Rewrites a graph.

    Args:
        graph: Of a packed file.
        stored: Its tensors, decoded.
        codes: The codes of quantized weights.
        weight_only: What becomes of layers with quantized weights and other inputs: ``none``: they stay in float; ``float``: weights stay
            packed and are decoded bit by bit, the arithmetic is float; ``int8``: inputs of linear layers are rounded to 8 bits besides, row by row.

    Attributes:
        graph: The rewritten graph.
        tensors: What it reads beside the tensors that it read before.
        paths: One entry for each layer.

    Raises:
        FileFormatError: The tensors of a layer do not fit it or each other; names the node.
    """

    def __init__(self, graph: Graph, stored: Mapping[str, Tensor], codes: Mapping[str, QTensor], weight_only: WeightOnly = "none") -> None:
        self._weight_only = weight_only
        self._editor, self._stored, self._codes = GraphEditor(graph), stored, codes
        self._find = Surroundings(self._editor, stored, codes)
        self.tensors: dict[str, Tensor] = {}
        self.paths: list[LayerPath] = []
        for node in graph.nodes:
            if node.operator in _VIEWS:  # layers will give another order of memory, in which views can be impossible
                self._editor.fuse([node], replace(node, operator=RESHAPE))
        for node in graph.nodes:
            if node.name not in self._editor.nodes:
                continue  # is computed along with a layer
            if node.operator in _BINARY:
                try:
                    self.paths.append(self._convert(node))
                except (SpecError, RuntimeError, ArithmeticError, LookupError, TypeError) as error:
                    raise FileFormatError(f"graph node {node.name!r}: its settings, weight and batch norm do not fit: {error}") from error
            elif node.operator.startswith(("aten.conv", "aten.matmul", "aten.addmm")):
                self.paths.append(LayerPath(node.name, "float", reason=f"there is no kernel for {node.operator}"))
        self.graph = self._editor.graph()

    def _convert(self, node: Node) -> LayerPath:
        weight, options = node.args[1], options_of(node)
        if not isinstance(weight, Stored):
            return LayerPath(node.name, "float", reason="its weight is computed")
        name = weight.name.removesuffix(".weight")
        if any(path.name == name for path in self.paths):  # a layer that is called twice, with norms of its own perhaps
            name = f"{name}.{node.name}"
        if isinstance(options.get("padding"), str):
            return LayerPath(name, "float", reason="its padding is given as a word")
        source = self._editor.source(node.args[0])
        if source is not None and self._find.is_sign(source):
            units = self._find.units(weight.name)
            if units is not None:
                return self._to_binary(node, name, source, *units)
            reason = "its weight has more levels than -s, 0 and s"
        elif source is not None and source.operator in (AFFINE, GRID):
            path = self._to_planes(node, name, source) or self._to_int8(node, name, source)
            if isinstance(path, LayerPath):
                return path
            reason = path
        else:
            reason = "its input is neither a sign nor on an affine grid"
        if self._weight_only != "none":
            arithmetic = self._to_packed(node, name)
            if arithmetic is not None:
                return LayerPath(name, "packed", (), arithmetic)
        return LayerPath(name, "float", self._fold_norm(node, name), reason)

    def _to_binary(self, node: Node, name: str, sign: Node, units: Tensor, scale: Tensor) -> LayerPath:
        """Replace a layer whose weight is ``units * scale``."""
        options = options_of(node)
        offset = self._find.bias(node, len(scale))
        replaced, fused = [node], list[str]()
        scaled = self._find.input_scaling_behind(node, sign.args[0])
        if scaled is not None:
            replaced += scaled
            fused.append("input scaling")
        norm = self._find.norm_behind(replaced[-1])
        if norm is not None:
            factor, shift = self._find.norm_parameters(norm[0])
            scale, offset = scale * factor, offset * factor + shift
            replaced += norm
            fused.append("batch norm")
        residual = self._find.sum_behind(replaced[-1])
        if residual is not None:
            replaced.append(residual[0])
            fused.append("sum")
        activation = self._find.activation_behind(replaced[-1], len(scale), -3 if node.operator == CONV else -1)
        if activation is not None:
            replaced += activation[0]
            fused.append("activation")
        groups = cast(int, options.get("groups", 1))
        channels = units.shape[1] * groups
        if scaled is None:
            source, threshold, flip, before = self._find.sign_chain(sign, channels, -3 if node.operator == CONV else -1)
        else:  # the magnitudes are those of what the sign is taken of
            source, threshold, flip, before = sign.args[0], None, None, ()
        if scaled is None and self._gives_signs(source, node, groups, threshold, flip, name):
            threshold = flip = None
            before = ("packed input",)
        words, mask = pack_conv_weight(units, groups)
        parts = {"words": words, "mask": mask, "scale": scale, "offset": offset, "threshold": threshold, "flip": flip}
        parts["activation"] = None if activation is None else activation[1].table(len(scale))
        stored = {part: self._keep(f"{name}.{part}", tensor) for part, tensor in parts.items()}
        arguments: tuple[object, ...] = (source, *(stored[part] for part in ("words", "mask", "scale", "offset")), channels)
        if node.operator == CONV:
            arguments = (*arguments, list(units.shape[2:]), *window_of(options), groups)
        keywords: dict[str, object] = {part: stored[part] for part in ("threshold", "flip", "activation") if stored[part] is not None}
        if residual is not None:
            keywords["residual"] = residual[1]
        if scaled is not None:
            keywords["input_scaling"] = True
        self._editor.fuse(replaced, Node(replaced[-1].name, _BINARY[node.operator], arguments, keywords))
        return LayerPath(name, "binary" if mask is None else "ternary", (*before, *fused))

    def _gives_signs(self, source: object, node: Node, groups: int, threshold: Tensor | None, flip: Tensor | None, name: str) -> bool:
        """Let a binary convolution give the packed signs that ``node`` takes, if nothing else reads its numbers, and say whether it does."""
        producer, reader = self._editor.source(source), self._editor.source(source)
        while reader is not None and reader.name != node.name:
            reader = self._editor.only_reader(reader)
        if producer is None or reader is None or {producer.operator, _BINARY[node.operator]} != {_BINARY[CONV]}:
            return False
        scale = self.tensors[cast(Stored, producer.args[3]).name]
        if groups > 1 and len(scale) // groups % WORD:
            return False
        limit, arguments, keywords = torch.zeros_like(scale) if threshold is None else threshold, list(producer.args), dict(producer.kwargs)
        whole = self._whole_threshold(producer, limit, flip)
        if whole is not None:
            limit, flip = whole
            arguments[3:5] = self._keep(f"{name}.in_scale", torch.ones_like(scale)), None
            keywords.pop("activation", None)
        keywords["out_threshold"], keywords["out_flip"] = self._keep(f"{name}.in_threshold", limit), self._keep(f"{name}.in_flip", flip)
        self._editor.fuse([producer], Node(producer.name, producer.operator, tuple(arguments), keywords))
        return True

    def _whole_threshold(self, producer: Node, limit: Tensor, flip: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """What its sums of products are compared with in place of its outputs; ``None`` where these depend on more, or do not only rise or fall."""
        table = producer.kwargs.get("activation")
        activation = self.tensors[table.name] if isinstance(table, Stored) else None
        if {"residual", "input_scaling"} & set(producer.kwargs) or (activation is not None and bool((activation[1] < 0).any())):
            return None
        scale, offset = (self.tensors[cast(Stored, value).name] for value in producer.args[3:5])

        def function(total: Tensor) -> Tensor:
            y = activated(total.clamp(-MOST_PRODUCTS, MOST_PRODUCTS) * scale + offset, activation, (-1,))
            is_one = y >= limit
            return torch.where(is_one if flip is None else is_one ^ flip, 1.0, -1.0)

        return sign_threshold(function, len(scale))

    def _to_planes(self, node: Node, name: str, quantizer: Node) -> LayerPath | None:
        """Replace a layer of whole-numbered weights and inputs of few bits each, where planes are what is fastest."""
        weight, options = self._find.whole_numbers(cast(Stored, node.args[1]).name), options_of(node)
        inputs = self._find.input_grid(quantizer)
        if weight is None or inputs is None:
            return None
        (numbers, scale), grid, groups = weight, input_grid(inputs), cast(int, options.get("groups", 1))
        if grid.qmax - grid.qmin > MOST_LEVELS:
            return None
        words, mask = pack_planes(numbers, groups)
        if choose_kernel(len(words), (grid.qmax - grid.qmin).bit_length())[0] != "planes":
            return None
        norm = self._find.norm_behind(node)
        factor, shift = self._find.norm_parameters(norm[0]) if norm is not None else (torch.ones(1), torch.zeros(1))
        parts = {
            "words": words,
            "mask": mask,
            "scale": scale * factor * grid.scale,
            "offset": self._find.bias(node, len(scale)) * factor + shift,
            "thresholds": input_thresholds(grid),
        }
        stored = (self._keep(f"{name}.{part}", tensor) for part, tensor in parts.items())
        arguments: tuple[object, ...] = (quantizer.args[0], *stored, grid.zero_code, numbers.shape[1] * groups)
        if node.operator == CONV:
            arguments = (*arguments, list(numbers.shape[2:]), *window_of(options), groups)
        replaced = [node, *(norm or ())]
        self._editor.fuse(replaced, Node(replaced[-1].name, _PLANES[node.operator], arguments, {}))
        return LayerPath(name, "planes", ("batch norm",) if norm is not None else ())

    def _to_int8(self, node: Node, name: str, quantizer: Node) -> LayerPath | str:
        """Replace a layer on affine grids; else why not."""
        weight, options = cast(Stored, node.args[1]), options_of(node)
        if weight.name not in self._codes:
            return "its weight is not quantized"
        if not has_exact_kernels():
            return "torch has no exact 8-bit kernels for this processor; an ONNX file runs it in integers"
        inputs, grid = self._find.input_grid(quantizer), integer_grid(self._codes[weight.name])
        if grid is None or inputs is None:
            return "a grid does not fit 8 bits around 0"
        grid = grid.centred()
        norm = self._find.norm_behind(node)
        factor, shift = self._find.norm_parameters(norm[0]) if norm is not None else (torch.ones(1), torch.zeros(1))
        channels = grid.codes.shape[0]
        rescaled = grid.rescaled(factor.expand(channels))
        if rescaled is None or bool(rescaled.zero_point.any()):
            return "a grid does not fit 8 bits around 0"
        stored = (
            self._keep(f"{name}.codes", rescaled.codes),
            self._keep(f"{name}.scale", rescaled.scale.expand(channels)),
            self._keep(f"{name}.offset", self._find.bias(node, channels) * factor + shift),
        )
        arguments: tuple[object, ...] = (quantizer.args[0], *stored, inputs)
        if node.operator == CONV:
            arguments = (*arguments, *window_of(options), options.get("groups", 1))
        replaced = [node, *(norm or ())]
        self._editor.fuse(replaced, Node(replaced[-1].name, _INT8[node.operator], arguments, {}))
        return LayerPath(name, "int8", ("batch norm",) if norm is not None else ())

    def _to_packed(self, node: Node, name: str) -> str | None:
        """Let a layer read packed codes, and say how it computes; ``None`` where its codes have no table for each output."""
        code = self._codes.get(cast(Stored, node.args[1]).name)
        if code is None or isinstance(code.decoder, SumDecoder) or code.decoder.granularity.kind in ("per_group", "per_axes"):
            return None
        if code.decoder.granularity.kind == "per_channel" and code.decoder.granularity.axis % code.codes.dim() != 0:
            return None
        lowest, shape = -(2 ** (code.bit_width - 1)) if code.codes.dtype.is_signed else 0, code.codes.shape
        every = torch.arange(lowest, lowest + 2**code.bit_width).expand(len(code.codes), -1).to(code.codes.dtype)
        levels = code.decoder.decode(every.reshape(*every.shape, *(1,) * (len(shape) - 2))).float().flatten(1)
        packed = pack_linear_weight(code.codes.flatten(1).short() - lowest, levels, code.bit_width)
        stored = self._keep(f"{name}.words", packed.words), self._keep(f"{name}.table", packed.table)
        arguments: tuple[object, ...] = (node.args[0], *stored, options_of(node).get("bias"), packed.bit_width)
        if node.operator == CONV:
            arguments = (*arguments, list(shape), *window_of(options_of(node)), options_of(node).get("groups", 1))
            self._editor.fuse([node], Node(node.name, _PACKED[CONV], arguments, {}))
            return "decoded for each call, float arithmetic"
        arguments = (*arguments, shape[1], shape[0], self._weight_only)
        self._editor.fuse([node], Node(node.name, _PACKED[LINEAR], arguments, {}))
        is_decoded = self._weight_only == "int8" and packed.table.shape[1] > 2
        return "8-bit inputs, but levels are unevenly spaced: decoded in float" if is_decoded else f"{self._weight_only} arithmetic"

    def _fold_norm(self, node: Node, name: str) -> tuple[str, ...]:
        """Put the batch norm behind a float layer into its weight and bias."""
        norm = self._find.norm_behind(node)
        if norm is None or node.operator != CONV:
            return ()
        factor, shift = self._find.norm_parameters(norm[0])
        weight, offset = self._stored[cast(Stored, node.args[1]).name].detach().float(), self._find.bias(node, len(factor))
        folded = self._keep(f"{name}.folded", weight * factor.reshape(-1, 1, 1, 1)), self._keep(f"{name}.offset", offset * factor + shift)
        self._editor.fuse([node, *norm], Node(norm[-1].name, CONV, (node.args[0], *folded, *node.args[3:]), node.kwargs))
        return ("batch norm",)

    def _keep(self, name: str, tensor: Tensor | None) -> Stored | None:
        if tensor is None:
            return None
        self.tensors[name] = tensor.contiguous()
        return Stored(name)
