"""The graph of a packed network, rewritten so that layers run on low-bit kernels, fused with the operators around them.

A layer becomes binary or ternary where its input is a sign and the weights of each output channel are ``-s``, ``+s`` and possibly 0; it
runs on bit planes or 8-bit kernels where input and weight have affine grids of few enough bits. Batch norms are folded into scales, weights
or the threshold of the next sign; sums with another tensor of the same shape, activations and XNOR-Net's K are fused with binary layers.
On request, layers of which only the weight is quantized read packed codes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor

from lowbit.errors import FileFormatError, SpecError
from lowbit.formats.onnx.integer_grid import integer_grid
from lowbit.formats.program.calls import Graph, OperatorCall, Result, Stored
from lowbit.quantizers import QTensor
from lowbit.quantizers.qtensor import SumDecoder
from lowbit.runtime.activation import Activation, activated
from lowbit.runtime.arguments import POINT, Affine, Epilogue, PlanesLayer, SignLayer
from lowbit.runtime.cpu.bits import WORD
from lowbit.runtime.layers.binary import binary_conv2d, binary_linear, pack_conv_weight
from lowbit.runtime.layers.int8 import are_multiplied_exactly, has_exact_kernels, input_grid, int8_conv2d, int8_linear
from lowbit.runtime.layers.operator import Operator
from lowbit.runtime.layers.packed import PackedWeight, pack_linear_weight, packed_conv2d, packed_linear
from lowbit.runtime.layers.planes import MOST_LEVELS, choose_kernel, input_thresholds, pack_planes, planes_conv2d, planes_linear
from lowbit.runtime.layers.pool import max_pool2d
from lowbit.runtime.lowering.editor import GraphEditor
from lowbit.runtime.lowering.fusion import AFFINE, CONV, GRID, LINEAR, MAX_POOL, RESHAPE, FusionPatterns, options_of
from lowbit.runtime.thresholds import sign_threshold

OPERATORS: dict[str, Operator[...]] = {
    operator.name: operator
    for operator in (
        binary_conv2d, binary_linear, planes_conv2d, planes_linear, int8_conv2d, int8_linear, packed_conv2d, packed_linear, max_pool2d,
    )
}  # fmt: skip
_VIEWS = {"aten.view.default", "aten._unsafe_view.default"}
MOST_PRODUCTS = 2.0**24  # in one sum; float32 represents all integers up to it exactly
WeightOnly = Literal["none", "float", "int8"]


@dataclass(frozen=True)
class LayerPath:
    """The kernel that a layer runs on.

    Attributes:
        name: Name of the layer.
        kernel: ``binary``, ``ternary``, ``planes`` or ``int8``; ``packed``: weights stay packed, inputs are not quantized; ``float``: unchanged.
        fused: The operators that are fused with it.
        reason: Why it stayed in float.
        elsewhere: Whether it runs on kernels of other processors.
    """

    name: str
    kernel: str
    fused: tuple[str, ...] = ()
    reason: str = ""
    elsewhere: bool = False

    def __str__(self) -> str:
        along = f" with {', '.join(self.fused)}" if self.fused else ""
        return f"{self.name}: {self.kernel}{along}{f' ({self.reason})' if self.reason else ''}"


@dataclass
class _FusedCalls:
    """The operators behind a binary layer that are fused with it.

    Attributes:
        calls: The layer and the calls behind it that are replaced.
        scale, offset: The layer's scale and bias, with the batch norm folded in.
        residual: The tensor that is added.
        input_scaling: Whether outputs are multiplied by XNOR-Net's K.
        activation: The activation that follows the sum.
        fused: A description of all of this.
    """

    calls: list[OperatorCall]
    scale: Tensor
    offset: Tensor
    residual: Result | None = None
    input_scaling: bool = False
    activation: Activation | None = None
    fused: list[str] = field(default_factory=list)


class Conversion:
    """Rewrites a graph.

    Args:
        graph: Graph of a packed file.
        stored: Its tensors, decoded.
        codes: The codes of quantized weights.
        weight_only: Treatment of layers with quantized weights and float inputs: ``none``: they stay in float; ``float``: weights stay
            packed and are decoded during the call, in float arithmetic; ``int8``: inputs of linear layers are also rounded to 8 bits per row.

    Attributes:
        graph: The rewritten graph.
        tensors: The new tensors that it reads.
        paths: One entry for each layer.

    Raises:
        FileFormatError: The tensors of a layer do not fit it or each other; the error names the node.
    """

    def __init__(self, graph: Graph, stored: Mapping[str, Tensor], codes: Mapping[str, QTensor], weight_only: WeightOnly = "none") -> None:
        self._weight_only = weight_only
        self._editor, self._stored, self._codes = GraphEditor(graph), stored, codes
        self._patterns = FusionPatterns(self._editor, stored, codes)
        self.tensors: dict[str, Tensor] = {}
        self.paths: list[LayerPath] = []
        for node in graph.nodes:
            if node.operator in _VIEWS:  # layers may return another memory format, for which a view can be impossible
                self._editor.fuse([node], replace(node, operator=RESHAPE))
        for node in graph.nodes:
            if node.name not in self._editor.nodes:
                continue  # it was fused with a layer
            if node.operator in (CONV, LINEAR):
                try:
                    self.paths.append(self._convert(node))
                except (SpecError, RuntimeError, ArithmeticError, LookupError, TypeError) as error:
                    raise FileFormatError(f"graph node {node.name!r}: its settings, weight and batch norm do not fit: {error}") from error
            elif node.operator == MAX_POOL:
                pooling = self._patterns.pooling_window(node)
                if pooling is not None:
                    self._replace([node], max_pool2d, node.args[0], pooling)
            elif node.operator.startswith(("aten.conv", "aten.matmul", "aten.addmm")):
                self.paths.append(LayerPath(node.name, "float", reason=f"there is no kernel for {node.operator}"))
        self.graph = self._editor.graph()

    def _convert(self, node: OperatorCall) -> LayerPath:
        weight, options = node.args[1], options_of(node)
        if not isinstance(weight, Stored):
            return LayerPath(node.name, "float", reason="its weight is computed")
        name = weight.name.removesuffix(".weight")
        if any(path.name == name for path in self.paths):  # a layer that is called twice, possibly with a norm for each call
            name = f"{name}.{node.name}"
        if isinstance(options.get("padding"), str):
            return LayerPath(name, "float", reason="its padding is a string ('same' or 'valid')")
        source = self._editor.source(node.args[0])
        if source is not None and self._patterns.is_sign(source):
            signs = self._patterns.signs_and_scale(weight.name)
            if signs is not None:
                return self._to_binary(node, name, source, *signs)
            path = LayerPath(name, "float", reason="its weight has more levels than -s, 0 and s")
        elif source is not None and source.operator in (AFFINE, GRID):
            path = self._to_planes(node, name, source) or self._to_int8(node, name, source)
            if path.kernel != "float":
                return path
        else:
            path = LayerPath(name, "float", reason="its input is neither a sign nor on an affine grid")
        if self._weight_only != "none":
            arithmetic = self._to_packed(node, name)
            if arithmetic is not None:
                return LayerPath(name, "packed", (), arithmetic)
        return replace(path, fused=self._fold_norm(node, name))

    def _to_binary(self, node: OperatorCall, name: str, sign: OperatorCall, signs: Tensor, scale: Tensor) -> LayerPath:
        """Replace a layer whose weight is ``signs * scale``."""
        behind = self._fusable_calls(node, sign, scale)
        window = self._patterns.window(node) if node.operator == CONV else POINT
        channels = signs.shape[1] * window.groups
        if behind.input_scaling:  # K is computed from the values before the sign
            source, threshold, flip, before = sign.args[0], None, None, list[str]()
        else:
            source, threshold, flip, before = self._patterns.sign_chain(sign, channels, -3 if node.operator == CONV else -1)
            if self._return_signs(source, node, window.groups, threshold, flip, name):
                threshold, flip, before = None, None, ["packed input"]
        words, mask = pack_conv_weight(signs, window.groups)
        keep = functools.partial(self._keep, name)
        layer = SignLayer[object](keep("words", words), channels, keep("mask", mask), keep("threshold", threshold), keep("flip", flip))
        epilogue = Epilogue[object](
            keep("scale", behind.scale),
            keep("offset", behind.offset),
            residual=behind.residual,
            input_scaling=behind.input_scaling,
            activation=keep("activation", None if behind.activation is None else behind.activation.table(len(scale))),
        )
        if node.operator == CONV:
            self._replace(behind.calls, binary_conv2d, source, layer, window, epilogue)
        else:
            self._replace(behind.calls, binary_linear, source, layer, epilogue)
        return LayerPath(name, "binary" if mask is None else "ternary", (*before, *behind.fused))

    def _fusable_calls(self, node: OperatorCall, sign: OperatorCall, scale: Tensor) -> _FusedCalls:
        """The operators behind a layer on ``sign`` that can be fused with it: K, a batch norm, a sum and an activation, in this order."""
        found = _FusedCalls([node], scale, self._patterns.bias(node, len(scale)))
        scaled = self._patterns.input_scaling_behind(node, sign.args[0])
        if scaled is not None:
            found.calls += scaled
            found.input_scaling = True
            found.fused.append("input scaling")
        norm = self._patterns.norm_behind(found.calls[-1])
        if norm is not None:
            factor, shift = self._patterns.norm_parameters(norm[0])
            found.scale, found.offset = scale * factor, found.offset * factor + shift
            found.calls += norm
            found.fused.append("batch norm")
        total = self._patterns.sum_behind(found.calls[-1])
        if total is not None:
            found.calls.append(total[0])
            found.residual = total[1]
            found.fused.append("sum")
        activation = self._patterns.activation_behind(found.calls[-1], len(scale), -3 if node.operator == CONV else -1)
        if activation is not None:
            found.calls += activation[0]
            found.activation = activation[1]
            found.fused.append("activation")
        return found

    def _return_signs(
        self, source: object, node: OperatorCall, groups: int, threshold: Tensor | None, flip: Tensor | None, name: str
    ) -> bool:
        """Let a binary convolution return the packed signs that ``node`` reads, if nothing else reads its output; return whether it does."""
        producer, reader = self._editor.source(source), self._editor.source(source)
        while reader is not None and reader.name != node.name:
            reader = self._editor.only_reader(reader)
        if producer is None or reader is None or (producer.operator, node.operator) != (binary_conv2d.name, CONV):
            return False
        x, layer, window, epilogue = binary_conv2d.rebuild(*producer.args, **producer.kwargs)
        scale = self.tensors[epilogue.scale.name]
        if groups > 1 and len(scale) // groups % WORD:
            return False
        limit = torch.zeros_like(scale) if threshold is None else threshold
        keep = functools.partial(self._keep, name)
        whole = self._whole_threshold(epilogue, limit, flip)
        if whole is not None:
            limit, flip = whole
            epilogue = Epilogue[object](keep("in_scale", torch.ones_like(scale)))
        epilogue = replace(epilogue, out_threshold=keep("in_threshold", limit), out_flip=keep("in_flip", flip))
        self._replace([producer], binary_conv2d, x, layer, window, epilogue)
        return True

    def _whole_threshold(self, epilogue: Epilogue[Stored], limit: Tensor, flip: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Threshold and flip for the sums of products themselves; ``None`` if the outputs depend on more than these or are not monotone."""
        activation = None if epilogue.activation is None else self.tensors[epilogue.activation.name]
        if epilogue.residual is not None or epilogue.input_scaling or (activation is not None and bool((activation[1] < 0).any())):
            return None
        assert epilogue.bias is not None
        scale, offset = self.tensors[epilogue.scale.name], self.tensors[epilogue.bias.name]

        def function(total: Tensor) -> Tensor:
            y = activated(total.clamp(-MOST_PRODUCTS, MOST_PRODUCTS) * scale + offset, activation, (-1,))
            is_one = y >= limit
            return torch.where(is_one if flip is None else is_one ^ flip, 1.0, -1.0)

        return sign_threshold(function, len(scale))

    def _to_planes(self, node: OperatorCall, name: str, quantizer: OperatorCall) -> LayerPath | None:
        """Replace a layer with low-bit integer weights and inputs if planes are fastest."""
        weight, inputs = self._patterns.whole_numbers(cast(Stored, node.args[1]).name), self._patterns.input_grid(quantizer)
        if weight is None or inputs is None:
            return None
        (numbers, scale), grid = weight, input_grid(inputs)
        if grid.qmax - grid.qmin > MOST_LEVELS:
            return None
        window = self._patterns.window(node) if node.operator == CONV else POINT
        words, mask = pack_planes(numbers, window.groups)
        if choose_kernel(len(words), (grid.qmax - grid.qmin).bit_length())[0] != "planes":
            return None
        norm, factor, shift = self._norm(node)
        keep = functools.partial(self._keep, name)
        thresholds = keep("thresholds", input_thresholds(grid))
        layer = PlanesLayer[object](
            keep("words", words), numbers.shape[1] * window.groups, thresholds, grid.zero_code, keep("mask", mask)
        )  # fmt: skip
        offset = self._patterns.bias(node, len(scale)) * factor + shift
        epilogue = Affine[object](keep("scale", scale * factor * grid.scale), keep("offset", offset))
        if node.operator == CONV:
            self._replace([node, *norm], planes_conv2d, quantizer.args[0], layer, window, epilogue)
        else:
            self._replace([node, *norm], planes_linear, quantizer.args[0], layer, epilogue)
        return LayerPath(name, "planes", ("batch norm",) if norm else ())

    def _to_int8(self, node: OperatorCall, name: str, quantizer: OperatorCall) -> LayerPath:
        """Replace a layer on affine grids, if 8-bit kernels compute it exactly."""
        stays = functools.partial(LayerPath, name, "float")
        weight = cast(Stored, node.args[1])
        if weight.name not in self._codes:
            return stays(reason="its weight is not quantized")
        inputs, grid = self._patterns.input_grid(quantizer), integer_grid(self._codes[weight.name])
        if grid is None or inputs is None:
            return stays(reason="a grid does not fit 8 bits around 0")
        grid = grid.centred()
        norm, factor, shift = self._norm(node)
        channels = grid.codes.shape[0]
        rescaled = grid.rescaled(factor.expand(channels))
        if rescaled is None or bool(rescaled.zero_point.any()):
            return stays(reason="a grid does not fit 8 bits around 0")
        if not are_multiplied_exactly(rescaled.codes, input_grid(inputs)):
            hint = "; it has for 7 bits of weights or inputs" if has_exact_kernels(127) else ""
            told = f"torch has no exact 8-bit kernels for this processor{hint}; an ONNX file runs it in integers"
            return stays(reason=told, elsewhere=True)
        keep = functools.partial(self._keep, name)
        codes = keep("codes", rescaled.codes)
        offset = self._patterns.bias(node, channels) * factor + shift
        epilogue = Affine[object](keep("scale", rescaled.scale.expand(channels)), keep("offset", offset))
        if node.operator == CONV:
            self._replace([node, *norm], int8_conv2d, quantizer.args[0], codes, inputs, self._patterns.window(node), epilogue)
        else:
            self._replace([node, *norm], int8_linear, quantizer.args[0], codes, inputs, epilogue)
        return LayerPath(name, "int8", ("batch norm",) if norm else ())

    def _norm(self, node: OperatorCall) -> tuple[list[OperatorCall], Tensor, Tensor]:
        """The batch norm behind a layer with its factor and shift; no calls, 1 and 0 if there is none."""
        norm = self._patterns.norm_behind(node)
        return ([], torch.ones(1), torch.zeros(1)) if norm is None else (norm, *self._patterns.norm_parameters(norm[0]))

    def _to_packed(self, node: OperatorCall, name: str) -> str | None:
        """Let a layer read packed codes, and describe its arithmetic; ``None`` if its codes have no table for each output."""
        code = self._codes.get(cast(Stored, node.args[1]).name)
        if code is None or isinstance(code.decoder, SumDecoder) or code.decoder.granularity.kind in ("per_group", "per_axes"):
            return None
        if code.decoder.granularity.kind == "per_channel" and code.decoder.granularity.axis % code.codes.dim() != 0:
            return None
        lowest, shape = -(2 ** (code.bit_width - 1)) if code.codes.dtype.is_signed else 0, code.codes.shape
        every = torch.arange(lowest, lowest + 2**code.bit_width).expand(len(code.codes), -1).to(code.codes.dtype)
        levels = code.decoder.decode(every.reshape(*every.shape, *(1,) * (len(shape) - 2))).float().flatten(1)
        packed = pack_linear_weight(code.codes.flatten(1).short() - lowest, levels, code.bit_width)
        stored = self._keep(name, "words", packed.words), self._keep(name, "table", packed.table)
        weight = PackedWeight[object](*stored, packed.bit_width, packed.out_features, packed.in_features)
        bias = options_of(node).get("bias")
        if node.operator == CONV:
            self._replace([node], packed_conv2d, node.args[0], weight, bias, self._patterns.window(node))
            return "decoded for each call, float arithmetic"
        self._replace([node], packed_linear, node.args[0], weight, bias, self._weight_only)
        is_decoded = self._weight_only == "int8" and packed.table.shape[1] > 2
        return "8-bit inputs, but levels are unevenly spaced: decoded in float" if is_decoded else f"{self._weight_only} arithmetic"

    def _fold_norm(self, node: OperatorCall, name: str) -> tuple[str, ...]:
        """Fold the batch norm behind a float layer into its weight and bias."""
        norm = self._patterns.norm_behind(node)
        if norm is None or node.operator != CONV:
            return ()
        factor, shift = self._patterns.norm_parameters(norm[0])
        weight, offset = self._stored[cast(Stored, node.args[1]).name].detach().float(), self._patterns.bias(node, len(factor))
        folded = self._keep(name, "folded", weight * factor.reshape(-1, 1, 1, 1)), self._keep(name, "offset", offset * factor + shift)
        self._editor.fuse([node, *norm], OperatorCall(norm[-1].name, CONV, (node.args[0], *folded, *node.args[3:]), node.kwargs))
        return ("batch norm",)

    def _replace(self, calls: Sequence[OperatorCall], operator: Operator[...], x: object, *parts: object) -> None:
        """Replace ``calls``, the last of which computes the result, by a call of ``operator``."""
        arguments = operator.flatten(x, *parts)
        self._editor.fuse(calls, OperatorCall(calls[-1].name, operator.name, (arguments.pop("x"),), arguments))

    def _keep(self, layer: str, part: str, tensor: Tensor | None) -> Stored | None:
        if tensor is None:
            return None
        self.tensors[f"{layer}.{part}"] = tensor.contiguous()
        return Stored(f"{layer}.{part}")
