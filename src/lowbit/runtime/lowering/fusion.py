"""Patterns around a layer in a graph that a kernel can fuse with the layer, and the grids of its weight and its input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from lowbit.formats.onnx.integer_grid import integer_grid
from lowbit.formats.program.arguments import check_tensors
from lowbit.formats.program.calls import OperatorCall, Result, Stored
from lowbit.formats.program.operators import find_operator, find_overload
from lowbit.quantizers import QTensor
from lowbit.runtime.activation import Activation
from lowbit.runtime.arguments import Window
from lowbit.runtime.layers.planes import MOST_WEIGHT
from lowbit.runtime.lowering.editor import GraphEditor
from lowbit.runtime.thresholds import sign_threshold

SIGN = "lowbit.fake_quantize_codebook.default"
AFFINE, GRID = "lowbit.fake_quantize_affine.default", "lowbit.fake_quantize_grid.default"
NORM = "aten._native_batch_norm_legit_no_training.default"
CONV, LINEAR = "aten.conv2d.default", "aten.linear.default"
MAX_POOL, RESHAPE = "aten.max_pool2d.default", "aten.reshape.default"
INPUT_SCALE = "lowbit.input_scale.default"
_MONOTONE = {"aten.add.Tensor", "aten.sub.Tensor", "aten.mul.Tensor", "aten.clamp.default", "aten.hardtanh.default", "aten.relu.default"}


class FusionPatterns:
    """Finds the patterns that can be fused with a layer.

    Args:
        editor: The graph, which may be rewritten in the meantime.
        stored: Its tensors, decoded.
        codes: The codes of quantized weights.
    """

    def __init__(self, editor: GraphEditor, stored: Mapping[str, Tensor], codes: Mapping[str, QTensor]) -> None:
        self._editor, self._stored, self._codes = editor, stored, codes

    def signs_and_scale(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The weight as -1, 0 and 1, and the scale of each output channel; ``None`` if it has other levels."""
        values = self._stored[name].detach().float()
        scale = values.abs().flatten(1).amax(1)
        signs = values / torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, *(1,) * (values.dim() - 1))
        return (signs, scale) if bool(((signs == 0) | (signs.abs() == 1)).all()) else None

    def whole_numbers(self, name: str) -> tuple[Tensor, Tensor] | None:
        """The weight as integers that bit planes can represent, and the scale of each output channel; ``None`` if it has other levels."""
        signs = self.signs_and_scale(name)
        if signs is not None or name not in self._codes:
            return signs
        grid = integer_grid(self._codes[name])
        if grid is None or grid.axis not in (None, 0):
            return None
        numbers = grid.centred().codes.float()
        is_small = bool((numbers.abs() <= MOST_WEIGHT).all()) and not bool(grid.centred().zero_point.any())
        return (numbers, grid.scale.expand(len(numbers))) if is_small else None

    def is_sign(self, node: OperatorCall) -> bool:
        """Whether a node returns -1 below zero, and +1 at zero and above."""
        if node.operator != SIGN or not all(isinstance(value, Stored) for value in node.args[1:3]):
            return False
        boundaries, levels = (self._stored[cast(Stored, value).name].flatten().tolist() for value in node.args[1:3])
        smallest = torch.finfo(torch.float32).smallest_normal
        return levels == [-1.0, 1.0] and len(boundaries) == 1 and -smallest < boundaries[0] < 0

    def sign_chain(self, sign: OperatorCall, channels: int, axis: int) -> tuple[object, Tensor | None, Tensor | None, list[str]]:
        """The source of a sign, the threshold and flip that replace the operators in between, and a description of these."""
        chain: list[OperatorCall] = []
        value = sign.args[0]
        while (node := self._editor.source(value)) is not None and self._is_monotone(node, channels, axis):
            chain.insert(0, node)
            value = node.args[0]
        if not chain:
            return value, None, None, []
        shape = [1, channels, 1, 1] if axis == -3 else [1, channels]

        def function(x: Tensor) -> Tensor:
            results: dict[str, object] = {value.name: x.reshape(shape)} if isinstance(value, Result) else {}
            for node in chain:
                arguments = [self._evaluated(argument, results) for argument in node.args]
                if (overload := find_overload(node.operator)) is not None:
                    check_tensors(overload, arguments, {})
                results[node.name] = find_operator(node.operator)(*arguments)
            return cast(Tensor, results[chain[-1].name]).reshape(channels)

        with torch.no_grad():
            threshold, flip = sign_threshold(function, channels)
        return value, threshold, flip, ["batch norm before" if any(node.operator == NORM for node in chain) else "shift or clip before"]

    def _evaluated(self, argument: object, results: Mapping[str, object]) -> object:
        if isinstance(argument, Stored):
            return self._stored[argument.name].detach()
        return results[argument.name] if isinstance(argument, Result) else argument

    def _is_monotone(self, node: OperatorCall, channels: int, axis: int) -> bool:
        """Whether a node's result is monotone in its first argument in each channel and depends on nothing else."""
        if node.kwargs or not isinstance(node.args[0], Result):
            return False
        if node.operator == NORM:
            return all(isinstance(value, Stored) for value in node.args[1:5])
        if node.operator == "getitem":
            source = self._editor.source(node.args[0])
            return node.args[1] == 0 and source is not None and source.operator == NORM
        return node.operator in _MONOTONE and all(self._is_per_channel(value, channels, axis) for value in node.args[1:])

    def _is_per_channel(self, value: object, channels: int, axis: int) -> bool:
        if not isinstance(value, Stored):
            return not isinstance(value, Result)
        shape = self._stored[value.name].shape
        return all(size == 1 or (place == axis and size == channels) for place, size in zip(range(-len(shape), 0), shape, strict=True))

    def bias(self, node: OperatorCall, channels: int) -> Tensor:
        """The bias of a layer; zeros where it has none."""
        bias = options_of(node).get("bias")
        return self._stored[bias.name].detach().float() if isinstance(bias, Stored) else torch.zeros(channels)

    def input_scaling_behind(self, node: OperatorCall, x: object) -> list[OperatorCall] | None:
        """The operators behind a convolution that multiply its output, without the bias, by XNOR-Net's K of its input ``x``.

        Where there is a bias, they subtract it first and add it again.
        """
        has_bias, found = options_of(node).get("bias") is not None, [node]
        for operator in ("sub", "mul", "add") if has_bias else ("mul",):
            reader = self._editor.only_reader(found[-1])
            if node.operator != CONV or reader is None or reader.operator != f"aten.{operator}.Tensor" or reader.kwargs:
                return None
            found.append(reader)
        product = found[2 if has_bias else 1]
        others = [value for value in product.args if value != Result(found[found.index(product) - 1].name)]
        is_bias = all(self._is_bias(value, node) for other in found[1:] if other is not product for value in other.args[1:])
        return found[1:] if is_bias and len(others) == 1 and self._is_input_scale(others[0], node, x) else None

    def _is_bias(self, value: object, node: OperatorCall) -> bool:
        """Whether ``value`` is the bias of ``node``."""
        bias = options_of(node)["bias"]
        return (
            isinstance(value, Stored)
            and isinstance(bias, Stored)
            and torch.equal(self._stored[value.name].flatten(), self._stored[bias.name])
        )

    def _is_input_scale(self, value: object, node: OperatorCall, x: object) -> bool:
        """Whether ``value`` is K of ``x`` over the windows of ``node``, for each output channel where there are groups."""
        scale, window = self._editor.source(value), self.window(node)
        if window.groups > 1 and scale is not None and scale.operator == "aten.repeat_interleave.self_int":
            scale = self._editor.source(scale.args[0])
        if scale is None or scale.operator != INPUT_SCALE or scale.kwargs or scale.args[0] != x:
            return False
        pairs = [list(pair) for pair in (window.kernel_size, window.stride, window.padding, window.dilation)]
        return list(scale.args[1:]) == [*pairs, window.groups]

    def window(self, node: OperatorCall) -> Window:
        """The geometry of a convolution."""
        kernel, options = self._stored[cast(Stored, node.args[1]).name].shape[2:], options_of(node)
        stride, padding, dilation = (_pair(options.get(key, default)) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
        return Window(list(kernel), stride, padding, dilation, cast(int, options.get("groups", 1)))

    def pooling_window(self, node: OperatorCall) -> Window | None:
        """The geometry of a max pool of images; ``None`` if it rounds sizes up, or torch would refuse it."""
        given = {**dict(zip(("kernel_size", "stride", "padding", "dilation", "ceil_mode"), node.args[1:], strict=False)), **node.kwargs}
        kernel = _pair(given["kernel_size"])
        window = Window(kernel, _pair(given.get("stride") or kernel), _pair(given.get("padding", 0)), _pair(given.get("dilation", 1)))
        numbers = window.numbers
        is_plain = len(numbers) == 8 and all(type(number) is int for number in numbers) and not given.get("ceil_mode")
        is_allowed = is_plain and min(numbers[:4]) > 0 and min(numbers[6:]) > 0
        return window if is_allowed and all(0 <= 2 * pad <= size for pad, size in zip(window.padding, kernel, strict=True)) else None

    def norm_behind(self, node: OperatorCall) -> list[OperatorCall] | None:
        """A batch norm that is the only reader of ``node``, and the node that selects its first result."""
        norm = self._editor.only_reader(node)
        if norm is None or norm.operator != NORM or not all(isinstance(value, Stored) for value in norm.args[1:5]):
            return None
        item = self._editor.only_reader(norm)
        return [norm, item] if item is not None and item.operator == "getitem" and item.args[1] == 0 else None

    def norm_parameters(self, norm: OperatorCall) -> tuple[Tensor, Tensor]:
        """Factor and shift of a batch norm."""
        weight, bias, mean, variance = (self._stored[cast(Stored, value).name].detach().float() for value in norm.args[1:5])
        factor = weight / torch.sqrt(variance + cast(float, norm.args[6]))
        return factor, bias - mean * factor

    def sum_behind(self, node: OperatorCall) -> tuple[OperatorCall, Result] | None:
        """A sum that is the only reader of ``node``, and its other operand."""
        total = self._editor.only_reader(node)
        if total is None or total.operator != "aten.add.Tensor" or total.kwargs or len(total.args) != 2:
            return None
        others = [value for value in total.args if value != Result(node.name)]
        return (total, others[0]) if len(others) == 1 and isinstance(others[0], Result) else None

    def activation_behind(self, node: OperatorCall, channels: int, axis: int) -> tuple[list[OperatorCall], Activation] | None:
        """Operators behind ``node``, each the only reader of the one before it, that form one activation."""
        found, activation, last = list[OperatorCall](), Activation(), node
        while (reader := self._editor.only_reader(last)) is not None and not reader.kwargs and reader.args[0] == Result(last.name):
            slopes = reader.operator == "aten.prelu.default" and isinstance(reader.args[1], Stored)  # rank 1 whatever the input's
            if not slopes and not all(self._is_per_channel(value, channels, axis) for value in reader.args[1:]):
                break
            values = [cast("Tensor | float", self._evaluated(value, {})) for value in reader.args[1:]]
            longer = activation.followed_by(reader.operator, values)
            if longer is None:
                break
            found.append(reader)
            activation, last = longer, reader
        return (found, activation) if found else None

    def input_grid(self, node: OperatorCall) -> list[float] | None:
        """The values of an ``InputGrid``; ``None`` if the codes do not fit a byte or 0 is not among the levels."""
        parts = [self._stored[value.name] for value in node.args[1:] if isinstance(value, Stored)]
        qmin, qmax = cast(int, node.args[-2]), cast(int, node.args[-1])
        if len(parts) != len(node.args) - 3 or any(part.numel() != 1 for part in parts) or qmax - qmin > 255:
            return None
        numbers = [float(part) for part in parts]
        lower, step, scale, zero_point = numbers if node.operator == GRID else (0.0, numbers[0], numbers[0], numbers[1])
        shift = 0.0 if node.operator == GRID else zero_point
        is_byte = zero_point == round(zero_point) and qmin <= zero_point <= qmax and step > 0
        return [lower, step, shift, zero_point, scale, float(qmin), float(qmax)] if is_byte else None


def options_of(node: OperatorCall) -> dict[str, object]:
    """The arguments of a layer that follow its weight, by name."""
    return {**dict(zip(("bias", "stride", "padding", "dilation", "groups"), node.args[2:], strict=False)), **node.kwargs}


def _pair(value: object) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [cast(int, value)] * 2
