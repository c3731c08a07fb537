"""The graph of a packed network rewritten so that layers run on few-bit kernels, with what stands around them computed along.

A layer becomes binary or ternary where its input is a sign and its weight holds ``-s``, ``+s`` and perhaps 0 for each output channel; it
becomes one of bit planes or of 8 bits where input and weight have affine grids of few enough bits. Batch norms go into scales, weights
or the comparison of the next sign; sums with another tensor of the same shape, activations and XNOR-Net's K are computed along with binary
layers. Layers whose weight alone is quantized can read packed codes, if asked to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, cast

import torch
from torch import Tensor

from lowbit.errors import FileFormatError, SpecError
from lowbit.export.graph import Graph, Node, Result, Stored
from lowbit.export.integer_grid import integer_grid
from lowbit.export.operators import find_operator
from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import SumDecoder
from lowbit.runtime.activation import Activation, activated
from lowbit.runtime.binary_conv import binary_conv2d, binary_linear, pack_conv_weight
from lowbit.runtime.bits import WORD
from lowbit.runtime.editor import GraphEditor
from lowbit.runtime.int8_layers import has_exact_kernels, input_grid, int8_conv2d, int8_linear
from lowbit.runtime.operator import Operator
from lowbit.runtime.packed_linear import pack_linear_weight, packed_conv2d, packed_linear
from lowbit.runtime.planes import MOST_LEVELS, MOST_WEIGHT, choose_kernel, input_thresholds, pack_planes, planes_conv2d, planes_linear
from lowbit.runtime.thresholds import sign_threshold

_SIGN = "lowbit.fake_quantize_codebook.default"
_AFFINE, _GRID = "lowbit.fake_quantize_affine.default", "lowbit.fake_quantize_grid.default"
_NORM = "aten._native_batch_norm_legit_no_training.default"
_CONV, _LINEAR = "aten.conv2d.default", "aten.linear.default"
_BINARY = {_CONV: "lowbit.binary_conv2d.default", _LINEAR: "lowbit.binary_linear.default"}
_PACKED = {_CONV: "lowbit.packed_conv2d.default", _LINEAR: "lowbit.packed_linear.default"}
_PLANES = {_CONV: "lowbit.planes_conv2d.default", _LINEAR: "lowbit.planes_linear.default"}
_INT8 = {_CONV: "lowbit.int8_conv2d.default", _LINEAR: "lowbit.int8_linear.default"}
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
_VIEWS, _RESHAPE = {"aten.view.default", "aten._unsafe_view.default"}, "aten.reshape.default"
MOST_PRODUCTS = 2.0**24  # of a sum; float32 holds all whole numbers up to it
WeightOnly = Literal["none", "float", "int8"]
_MONOTONE = {"aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.clamp.default", "aten.hardtanh.default", "aten.relu.default"}


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
        self.tensors: dict[str, Tensor] = {}
        self.paths: list[LayerPath] = []
        for node in graph.nodes:
            if node.operator in _VIEWS:  # layers will give another order of memory, in which views can be impossible
                self._editor.fuse([node], replace(node, operator=_RESHAPE))
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
        weight, options = node.args[1], _options(node)
        if not isinstance(weight, Stored):
            return LayerPath(node.name, "float", reason="its weight is computed")
        name = weight.name.removesuffix(".weight")
        if any(path.name == name for path in self.paths):  # a layer that is called twice, with norms of its own perhaps
            name = f"{name}.{node.name}"
        if isinstance(options.get("padding"), str):
            return LayerPath(name, "float", reason="its padding is given as a word")
        source = self._editor.source(node.args[0])
        if source is not None and self._is_sign(source):
            units = self._units(weight.name)
            if units is not None:
                return self._to_binary(node, name, source, *units)
            reason = "its weight has more levels than -s, 0 and s"
        elif source is not None and source.operator in (_AFFINE, _GRID):
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
        options = _options(node)
        offset = self._bias(node, len(scale))
        replaced, fused = [node], list[str]()
        scaled = self._input_scaling_behind(node, sign.args[0])
        if scaled is not None:
            replaced += scaled
            fused.append("input scaling")
        norm = self._norm_behind(replaced[-1])
        if norm is not None:
            factor, shift = self._norm_parameters(norm[0])
            scale, offset = scale * factor, offset * factor + shift
            replaced += norm
            fused.append("batch norm")
        residual = self._sum_behind(replaced[-1])
        if residual is not None:
            replaced.append(residual[0])
            fused.append("sum")
        activation = self._activation_behind(replaced[-1], len(scale), -3 if node.operator == _CONV else -1)
        if activation is not None:
            replaced += activation[0]
            fused.append("activation")
        groups = cast(int, options.get("groups", 1))
        channels = units.shape[1] * groups
        if scaled is None:
            source, threshold, flip, before = self._sign_chain(sign, channels, -3 if node.operator == _CONV else -1)
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
        if node.operator == _CONV:
            arguments = (*arguments, list(units.shape[2:]), *_window(options), groups)
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
        if producer is None or reader is None or {producer.operator, _BINARY[node.operator]} != {_BINARY[_CONV]}:
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
        weight, options = self._whole_numbers(cast(Stored, node.args[1]).name), _options(node)
        inputs = self._input_grid(quantizer)
        if weight is None or inputs is None:
            return None
        (numbers, scale), grid, groups = weight, input_grid(inputs), cast(int, options.get("groups", 1))
        if grid.qmax - grid.qmin > MOST_LEVELS:
            return None
        words, mask = pack_planes(numbers, groups)
        if choose_kernel(len(words), (grid.qmax - grid.qmin).bit_length())[0] != "planes":
            return None
        norm = self._norm_behind(node)
        factor, shift = self._norm_parameters(norm[0]) if norm is not None else (torch.ones(1), torch.zeros(1))
        parts = {
            "words": words,
            "mask": mask,
            "scale": scale * factor * grid.scale,
            "offset": self._bias(node, len(scale)) * factor + shift,
            "thresholds": input_thresholds(grid),
        }
        stored = (self._keep(f"{name}.{part}", tensor) for part, tensor in parts.items())
        arguments: tuple[object, ...] = (quantizer.args[0], *stored, grid.zero_code, numbers.shape[1] * groups)
        if node.operator == _CONV:
            arguments = (*arguments, list(numbers.shape[2:]), *_window(options), groups)
        replaced = [node, *(norm or ())]
        self._editor.fuse(replaced, Node(replaced[-1].name, _PLANES[node.operator], arguments, {}))
        return LayerPath(name, "planes", ("batch norm",) if norm is not None else ())

    def _to_int8(self, node: Node, name: str, quantizer: Node) -> LayerPath | str:
        """Replace a layer on affine grids; else why not."""
        weight, options = cast(Stored, node.args[1]), _options(node)
        if weight.name not in self._codes:
            return "its weight is not quantized"
        if not has_exact_kernels():
            return "torch has no exact 8-bit kernels for this processor; an ONNX file runs it in integers"
        inputs, grid = self._input_grid(quantizer), integer_grid(self._codes[weight.name])
        if grid is None or inputs is None:
            return "a grid does not fit 8 bits around 0"
        grid = grid.centred()
        norm = self._norm_behind(node)
        factor, shift = self._norm_parameters(norm[0]) if norm is not None else (torch.ones(1), torch.zeros(1))
        channels = grid.codes.shape[0]
        rescaled = grid.rescaled(factor.expand(channels))
        if rescaled is None or bool(rescaled.zero_point.any()):
            return "a grid does not fit 8 bits around 0"
        stored = (
            self._keep(f"{name}.codes", rescaled.codes),
            self._keep(f"{name}.scale", rescaled.scale.expand(channels)),
            self._keep(f"{name}.offset", self._bias(node, channels) * factor + shift),
        )
        arguments: tuple[object, ...] = (quantizer.args[0], *stored, inputs)
        if node.operator == _CONV:
            arguments = (*arguments, *_window(options), options.get("groups", 1))
        replaced = [node, *(norm or ())]
        self._editor.fuse(replaced, Node(replaced[-1].name, _INT8[node.operator], arguments, {}))
        return LayerPath(name, "int8", ("batch norm",) if norm is not None else ())

    def _to_packed(self, node: Node, name: str) -> str | None:
        """Let a layer read packed codes, and say how it computes; ``None`` where its codes have no table for each output."""
        code = self._codes.get(cast(Stored, node.args[1]).name)
        if code is None or isinstance(code.decoder, SumDecoder) or code.decoder.granularity.kind == "per_group":
            return None
        if code.decoder.granularity.kind == "per_channel" and code.decoder.granularity.axis % code.codes.dim() != 0:
            return None
        lowest, shape = -(2 ** (code.bit_width - 1)) if code.codes.dtype.is_signed else 0, code.codes.shape
        every = torch.arange(lowest, lowest + 2**code.bit_width).expand(len(code.codes), -1).to(code.codes.dtype)
        levels = code.decoder.decode(every.reshape(*every.shape, *(1,) * (len(shape) - 2))).float().flatten(1)
        packed = pack_linear_weight(code.codes.flatten(1).short() - lowest, levels, code.bit_width)
        stored = self._keep(f"{name}.words", packed.words), self._keep(f"{name}.table", packed.table)
        arguments: tuple[object, ...] = (node.args[0], *stored, _options(node).get("bias"), packed.bit_width)
        if node.operator == _CONV:
            arguments = (*arguments, list(shape), *_window(_options(node)), _options(node).get("groups", 1))
            self._editor.fuse([node], Node(node.name, _PACKED[_CONV], arguments, {}))
            return "decoded for each call, float arithmetic"
        arguments = (*arguments, shape[1], shape[0], self._weight_only)
        self._editor.fuse([node], Node(node.name, _PACKED[_LINEAR], arguments, {}))
        is_decoded = self._weight_only == "int8" and packed.table.shape[1] > 2
        return "8-bit inputs, but levels are unevenly spaced: decoded in float" if is_decoded else f"{self._weight_only} arithmetic"

    def _fold_norm(self, node: Node, name: str) -> tuple[str, ...]:
        """Put the batch norm behind a float layer into its weight and bias."""
        norm = self._norm_behind(node)
        if norm is None or node.operator != _CONV:
            return ()
        factor, shift = self._norm_parameters(norm[0])
        weight, offset = self._stored[cast(Stored, node.args[1]).name].detach().float(), self._bias(node, len(factor))
        folded = self._keep(f"{name}.folded", weight * factor.reshape(-1, 1, 1, 1)), self._keep(f"{name}.offset", offset * factor + shift)
        self._editor.fuse([node, *norm], Node(norm[-1].name, _CONV, (node.args[0], *folded, *node.args[3:]), node.kwargs))
        return ("batch norm",)

    def _keep(self, name: str, tensor: Tensor | None) -> Stored | None:
        if tensor is None:
            return None
        self.tensors[name] = tensor.contiguous()
        return Stored(name)

    def _units(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The weight as -1, 0 and 1, and the scale of each output channel; ``None`` where it has other levels."""
        values = self._stored[name].detach().float()
        scale = values.abs().flatten(1).amax(1)
        units = values / torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, *(1,) * (values.dim() - 1))
        return (units, scale) if bool(((units == 0) | (units.abs() == 1)).all()) else None

    def _whole_numbers(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The weight as whole numbers that planes hold, and the scale of each output channel; ``None`` where it has other levels."""
        units = self._units(name)
        if units is not None or name not in self._codes:
            return units
        grid = integer_grid(self._codes[name])
        if grid is None or grid.axis not in (None, 0):
            return None
        numbers = grid.centred().codes.float()
        is_small = bool((numbers.abs() <= MOST_WEIGHT).all()) and not bool(grid.centred().zero_point.any())
        return (numbers, grid.scale.expand(len(numbers))) if is_small else None

    def _is_sign(self, node: Node) -> bool:
        """Whether a node gives -1 below zero and +1 from zero on."""
        if node.operator != _SIGN or not all(isinstance(value, Stored) for value in node.args[1:3]):
            return False
        boundaries, levels = (self._stored[cast(Stored, value).name].flatten().tolist() for value in node.args[1:3])
        smallest = torch.finfo(torch.float32).smallest_normal
        return levels == [-1.0, 1.0] and len(boundaries) == 1 and -smallest < boundaries[0] < 0

    def _sign_chain(self, sign: Node, channels: int, axis: int) -> tuple[object, Tensor | None, Tensor | None, tuple[str, ...]]:
        """What a sign is really taken of, the threshold and flip that stand for the operators in between, and what these were."""
        chain: list[Node] = []
        value = sign.args[0]
        while (node := self._editor.source(value)) is not None and self._is_monotone(node, channels, axis):
            chain.insert(0, node)
            value = node.args[0]
        if not chain:
            return value, None, None, ()
        shape = [1, channels, 1, 1] if axis == -3 else [1, channels]

        def function(x: Tensor) -> Tensor:
            results: dict[str, object] = {value.name: x.reshape(shape)} if isinstance(value, Result) else {}
            for node in chain:
                arguments = [self._evaluated(argument, results) for argument in node.args]
                results[node.name] = find_operator(node.operator)(*arguments)
            return cast(Tensor, results[chain[-1].name]).reshape(channels)

        with torch.no_grad():
            threshold, flip = sign_threshold(function, channels)
        names = ("batch norm before" if any(node.operator == _NORM for node in chain) else "shift or clip before",)
        return value, threshold, flip, names

    def _evaluated(self, argument: object, results: Mapping[str, object]) -> object:
        if isinstance(argument, Stored):
            return self._stored[argument.name].detach()
        return results[argument.name] if isinstance(argument, Result) else argument

    def _is_monotone(self, node: Node, channels: int, axis: int) -> bool:
        """Whether a node's result rises or falls with its first argument in each channel and depends on nothing else."""
        if node.kwargs or not isinstance(node.args[0], Result):
            return False
        if node.operator == _NORM:
            return all(isinstance(value, Stored) for value in node.args[1:5])
        if node.operator == "getitem":
            source = self._editor.source(node.args[0])
            return node.args[1] == 0 and source is not None and source.operator == _NORM
        return node.operator in _MONOTONE and all(self._is_per_channel(value, channels, axis) for value in node.args[1:])

    def _is_per_channel(self, value: object, channels: int, axis: int) -> bool:
        if not isinstance(value, Stored):
            return not isinstance(value, Result)
        shape = self._stored[value.name].shape
        return all(size == 1 or (place == axis and size == channels) for place, size in zip(range(-len(shape), 0), shape, strict=True))

    def _bias(self, node: Node, channels: int) -> Tensor:
        """The bias of a layer; zeros where it has none."""
        bias = _options(node).get("bias")
        return self._stored[bias.name].detach().float() if isinstance(bias, Stored) else torch.zeros(channels)

    def _input_scaling_behind(self, node: Node, x: object) -> list[Node] | None:
        """The operators behind a convolution that multiply it, without its bias, with XNOR-Net's K for its input ``x``.

        ``xnor_net`` gives them this form: where there is a bias, it is taken off before and added again.
        """
        has_bias, found = _options(node).get("bias") is not None, [node]
        for operator in ("sub", "mul", "add") if has_bias else ("mul",):
            reader = self._editor.only_reader(found[-1])
            if node.operator != _CONV or reader is None or reader.operator != f"aten.{operator}.Tensor" or reader.kwargs:
                return None
            found.append(reader)
        product = found[2 if has_bias else 1]
        others = [value for value in product.args if value != Result(found[found.index(product) - 1].name)]
        is_bias = all(self._is_bias(value, node) for other in found[1:] if other is not product for value in other.args[1:])
        return found[1:] if is_bias and len(others) == 1 and self._is_input_scale(others[0], node, x) else None

    def _is_bias(self, value: object, node: Node) -> bool:
        """Whether ``value`` holds the bias of ``node``."""
        bias = _options(node)["bias"]
        return (
            isinstance(value, Stored)
            and isinstance(bias, Stored)
            and torch.equal(self._stored[value.name].flatten(), self._stored[bias.name])
        )

    def _is_input_scale(self, value: object, node: Node, x: object) -> bool:
        """Whether ``value`` is the convolution of the mean magnitude of ``x`` with a constant kernel, over the windows of ``node``."""
        options = _options(node)
        groups, size = cast(int, options.get("groups", 1)), list(self._stored[cast(Stored, node.args[1]).name].shape[2:])
        source = self._editor.source(value)
        if groups > 1 and source is not None and source.operator == "aten.repeat_interleave.self_int":
            source = self._editor.source(source.args[0])
        chain: list[Node] = []
        for operator in (_CONV, "aten.mean.dim", _RESHAPE, "aten.abs.default"):
            if source is None or source.operator != operator:
                return False
            chain.append(source)
            source = self._editor.source(source.args[0])
        convolution, mean, by_group, magnitude = chain
        kernel = self._editor.source(convolution.args[1])
        ones = None if kernel is None or kernel.operator != "aten.div.Tensor" else self._editor.source(kernel.args[0])
        if kernel is None or ones is None or ones.operator != "aten.new_ones.default":
            return False
        return (
            magnitude.args[0] == x
            and cast("list[object]", by_group.args[1])[1] == groups
            and mean.args[1:] == ([-3],)
            and ones.args[1] == [groups, 1, *size]
            and kernel.args[1] == math.prod(size)
            and _window(_options(convolution)) == _window(options)
            and _options(convolution).get("bias") is None
        )

    def _norm_behind(self, node: Node) -> list[Node] | None:
        """A batch norm that alone reads ``node``, and the node that takes its first result."""
        norm = self._editor.only_reader(node)
        if norm is None or norm.operator != _NORM or not all(isinstance(value, Stored) for value in norm.args[1:5]):
            return None
        item = self._editor.only_reader(norm)
        return [norm, item] if item is not None and item.operator == "getitem" and item.args[1] == 0 else None

    def _norm_parameters(self, norm: Node) -> tuple[Tensor, Tensor]:
        """Factor and shift of a batch norm."""
        weight, bias, mean, variance = (self._stored[cast(Stored, value).name].detach().float() for value in norm.args[1:5])
        factor = weight / torch.sqrt(variance + cast(float, norm.args[6]))
        return factor, bias - mean * factor

    def _sum_behind(self, node: Node) -> tuple[Node, Result] | None:
        """A sum that alone reads ``node``, and what is added."""
        total = self._editor.only_reader(node)
        if total is None or total.operator != "aten.add.Tensor" or total.kwargs or len(total.args) != 2:
            return None
        others = [value for value in total.args if value != Result(node.name)]
        return (total, others[0]) if len(others) == 1 and isinstance(others[0], Result) else None

    def _activation_behind(self, node: Node, channels: int, axis: int) -> tuple[list[Node], Activation] | None:
        """Operators behind ``node``, each the only reader of the one before it, that are one activation."""
        found, activation = list[Node](), Activation()
        while (reader := self._editor.only_reader(([node, *found])[-1])) is not None and not reader.kwargs:
            values = reader.args[1:]
            weight = reader.operator == "aten.prelu.default" and isinstance(values[0], Stored)  # of rank 1 whatever the input's
            if reader.args[0] != Result(([node, *found])[-1].name) or not (
                weight or all(self._is_per_channel(value, channels, axis) for value in values)
            ):
                break
            longer = activation.followed_by(reader.operator, [cast("Tensor | float", self._evaluated(value, {})) for value in values])
            if longer is None:
                break
            found.append(reader)
            activation = longer
        return (found, activation) if found else None

    def _input_grid(self, node: Node) -> list[float] | None:
        """The values of an ``InputGrid``; ``None`` where codes do not fit a byte or 0 is none of them."""
        parts = [self._stored[value.name] for value in node.args[1:] if isinstance(value, Stored)]
        qmin, qmax = cast(int, node.args[-2]), cast(int, node.args[-1])
        if len(parts) != len(node.args) - 3 or any(part.numel() != 1 for part in parts) or qmax - qmin > 255:
            return None
        numbers = [float(part) for part in parts]
        lower, step, scale, zero_point = numbers if node.operator == _GRID else (0.0, numbers[0], numbers[0], numbers[1])
        shift = 0.0 if node.operator == _GRID else zero_point
        is_byte = zero_point == round(zero_point) and qmin <= zero_point <= qmax and step > 0
        return [lower, step, shift, zero_point, scale, float(qmin), float(qmax)] if is_byte else None


def _options(node: Node) -> dict[str, object]:
    """The arguments of a layer after its weight, by name."""
    return {**dict(zip(("bias", "stride", "padding", "dilation", "groups"), node.args[2:], strict=False)), **node.kwargs}


def _window(options: dict[str, object]) -> list[list[int]]:
    """Stride, padding and dilation of a convolution, each vertical and horizontal."""
    return [_pair(options.get(key, default)) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]


def _pair(value: object) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [cast(int, value)] * 2
