"""Lowers layers, and what scales, adds or clips values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import Tensor, fx

from lowbit.formats.fixed_point.context import Context, kind_of
from lowbit.formats.fixed_point.graph import Buffer, Triple, Window
from lowbit.formats.fixed_point.values import Codes, Doubles, FromLayer, FromSum, Unquantized, Value

_WINDOW = ("stride", "padding", "dilation", "groups")
_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")
_CLIPS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (-1.0, 1.0)}


def lower_convolution(context: Context, node: fx.Node) -> Value:
    """A convolution over 1, 2 or 3 dimensions, transposed or not."""
    x, kind = context.codes(node, 0), kind_of(node)
    dims, is_transposed = len(x.shape) - 1, kind.startswith("conv_transpose")
    given = dict(zip(_TRANSPOSED if is_transposed else _WINDOW, node.args[3:], strict=False))
    if kind == "convolution":
        is_transposed = bool(node.args[6])
        given = dict(zip(_WINDOW, (*node.args[3:6], node.args[8]), strict=True))
    if dims not in (1, 2, 3):
        raise context.refused(node, f"of convolutions those over 1 to 3 dimensions have an integer form, not over {dims}")
    parameter, bias = _parameters(context, node)
    kernel = numbers_of(list(context.program.weights[parameter].shape[2:]), dims, 3)
    stride, dilation = (numbers_of(given.get(name, 1), dims, 3) for name in ("stride", "dilation"))
    reach = tuple(d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    padding, groups = given.get("padding", 0), cast(int, given.get("groups", 1))
    if isinstance(padding, str):  # torch adds what cannot be split evenly behind the input, where nothing has to be known of it
        margins = (0, 0, 0) if padding == "valid" else tuple(r // 2 for r in reach)
    else:
        margins = numbers_of(padding, dims, 3, filler=0)
    if is_transposed:  # what an output of it takes is what a kernel turned around finds in the inputs spread by the stride
        margins = tuple(r - margin for r, margin in zip(reach, margins, strict=True))
        window = Window(kernel, (1, 1, 1), dilation, cast(Triple, margins), groups, spread=stride)
    else:
        window = Window(kernel, stride, dilation, cast(Triple, margins), groups)
    return context.result(node, FromLayer(context.layer(node), x, parameter, bias, window, is_transposed))


def lower_linear(context: Context, node: fx.Node) -> Value:
    """A linear layer."""
    parameter, bias = _parameters(context, node)
    return context.result(node, FromLayer(context.layer(node), context.codes(node, 0), parameter, bias))


def _parameters(context: Context, node: fx.Node) -> tuple[str, Doubles | None]:
    names, weight = context.program.exported.graph_signature.inputs_to_parameters, node.args[1]
    parameter = names.get(weight.name, "") if isinstance(weight, fx.Node) else ""
    if parameter not in context.program.weights:
        raise context.refused(node, "its weight is not quantized (weight_bits=8)")
    bias = context.constant(node, 2)
    return parameter, None if bias is None else bias.double().numpy()


def lower_norm(context: Context, node: fx.Node) -> tuple[Value]:
    """A batch norm, to be folded into the layer before it."""
    gamma, beta, mean, variance = (
        None if table is None else table.double().numpy() for table in (context.constant(node, i) for i in range(1, 5))
    )
    value = context.value(node, 0)
    if mean is None or variance is None:
        raise context.refused(node, "it normalizes by statistics of its input")
    if isinstance(value, Codes) or not isinstance(value.source, FromLayer) or not value.is_open:
        raise context.refused(node, "there is no layer directly before it that it could be folded into")
    factor = (np.ones_like(mean) if gamma is None else gamma) / np.sqrt(variance + cast(float, node.args[-1]))
    shift = (np.zeros_like(mean) if beta is None else beta) - mean * factor
    return (replace(value.scaled(factor, shift), last=node.name),)


def lower_arithmetic(context: Context, node: fx.Node) -> Value:
    """Sums and differences of two tensors; sums, differences, products and quotients with a constant."""
    kind, alpha = kind_of(node), cast(float, node.kwargs.get("alpha", 1))
    operands = [context.values.get(arg) if isinstance(arg, fx.Node) else arg for arg in node.args[:2]]
    computed = [isinstance(operand, (Codes, Unquantized)) for operand in operands]
    if all(computed):
        if kind not in ("add", "sub") or abs(alpha) != 1:
            raise context.refused(node, "of operators on two tensors, sums and differences have an integer form")
        return _sum(context, node, (1, int(alpha) if kind == "add" else -int(alpha)))
    index = computed.index(True)
    value = cast(Value, operands[index])
    constant = _per_channel(operands[1 - index], len(value.moved_shape) + 1)
    is_usable = constant is not None and (kind != "div" or (index == 0 and bool(constant.all())))
    if constant is None or not is_usable:
        raise context.refused(node, "its constant is not one number, or one for each channel")
    one, zero = np.ones(1), np.zeros(1)
    if kind == "mul":
        factor, shift = constant, zero
    elif kind == "div":
        factor, shift = 1 / constant, zero
    elif kind == "add":
        factor, shift = one, constant * alpha
    else:
        factor, shift = (one, -constant * alpha) if index == 0 else (-one * alpha, constant)
    if isinstance(value, Codes):
        value = context.result(node, FromSum(context.layer(node), (value.buffer,), (1,)))
    if not value.is_open:
        raise context.refused(node, "it scales values that were clipped or moved, but not quantized")
    return replace(value.scaled(factor, shift), last=node.name)


def _sum(context: Context, node: fx.Node, signs: tuple[int, int]) -> Value:
    operands: list[Buffer] = []
    all_signs: list[int] = []
    for index, sign in enumerate(signs):
        value = context.value(node, index)
        if isinstance(value, Unquantized) and isinstance(value.source, FromSum) and value.factor is None and value.is_open:
            operands += value.source.operands
            all_signs += [sign * inner for inner in value.source.signs]
        else:
            operands.append(context.codes(node, index))
            all_signs.append(sign)
    result = context.result(node, FromSum(context.layer(node), tuple(operands), tuple(all_signs)))
    if any(operand.shape != result.shape for operand in operands):
        raise context.refused(
            node, f"it adds tensors of the shapes {' and '.join(str(list(operand.shape)) for operand in operands)}; they must be equal"
        )
    return result


def lower_clip(context: Context, node: fx.Node) -> Value:
    """A ReLU or a clip between constants."""
    kind, value = kind_of(node), context.value(node, 0)
    bounds = list(_CLIPS.get(kind, (-math.inf, math.inf)))
    for index, argument in enumerate(node.args[1:3]):
        bound = context.values.get(argument) if isinstance(argument, fx.Node) else argument
        if isinstance(bound, Tensor) and bound.numel() != 1:
            raise context.refused(node, "its bounds are not one number each")
        if bound is not None:
            bounds[index] = float(cast(Any, bound))
    if isinstance(value, Codes):
        value = context.result(node, FromSum(context.layer(node), (value.buffer,), (1,)))
    return replace(value.clipped(bounds[0], bounds[1]), last=node.name)


def lower_codebook(context: Context, node: fx.Node) -> Value:
    """Activations on a codebook: refused."""
    raise context.refused(
        node, "its activations have the levels of a codebook, which integers cannot hold: use a method with evenly spaced levels"
    )


def pair(value: object, dims: int, *, filler: int = 1) -> tuple[int, int]:
    """``numbers_of`` for height and width."""
    height, width = numbers_of(value, dims, 2, filler=filler)
    return height, width


def numbers_of(value: object, dims: int, rank: int, *, filler: int = 1) -> Any:
    """A setting for each of the last ``rank`` dimensions, from one number, or one for each of ``dims``; ``filler`` for those that are missing."""
    numbers = [value] * dims if isinstance(value, int) else list(cast(Sequence[int], value))
    numbers = numbers * dims if len(numbers) == 1 else numbers
    return tuple(int(number) for number in [filler] * (rank - dims) + numbers)


def _per_channel(value: object, rank: int) -> Doubles | None:
    """A constant with one number for each channel (axis 1 of ``rank``), or one for all."""
    constant = np.asarray(value.detach().numpy() if isinstance(value, Tensor) else value, np.float64)
    if constant.ndim > rank:
        return None
    shape = (1,) * (rank - constant.ndim) + constant.shape
    return constant.reshape(-1) if all(size == 1 for axis, size in enumerate(shape) if axis != 1) else None
