"""Convolutions and linear layers whose weights are -1, 0 or +1 and whose inputs are signs: exclusive or, and counting bits.

``sum x w`` over ``n`` signs is ``n - 2 popcount(x ^ w)``; with a mask ``m`` of the weights that are not 0, ``popcount(m) - 2
popcount((x ^ w) & m)``. Source: Rastegari et al. 2016, "XNOR-Net", section 3.2.

Each function has a torch reference of the same signature beside it, which unpacks the signs and calls the float layer. Both give the
same integers; the reference is what runs where there are no kernels: without numba on the CPU, without Triton on CUDA devices, elsewhere.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.runtime.activation import activated
from lowbit.runtime.cpu.bits import pack_signs, unpack_signs, unpack_weight, words_for
from lowbit.runtime.cpu.target import active_target, cuda_target
from lowbit.runtime.layers.checks import check_input, check_layer, check_packed_input, check_residual, check_window, refuse_gradients
from lowbit.runtime.layers.operator import register_operator
from lowbit.runtime.layers.prepared import LayerTensors, PreparedLayer, keep_layer, known_layer

Pair = Sequence[int]


def pack_conv_weight(weight: Tensor, groups: int = 1) -> tuple[Tensor, Tensor | None]:
    """The signs of a weight as words, and where it is not zero.

    Args:
        weight: ``[out, in / groups, kernel height, kernel width]`` or ``[out, in]``, of -1, 0 and +1.
        groups: Of the layer; ``out`` must be a multiple of it.

    Returns:
        int32 ``[out, kernel height, kernel width, words]`` or ``[out, words]`` with ``words = ceil(in / groups / 32)``, and a mask of the
        same shape, ``None`` where no weight is zero.

    Raises:
        SpecError: Another value or shape.
    """
    if weight.dim() not in (2, 4) or weight.shape[0] % groups:
        raise SpecError(
            f"a packed weight needs a shape [out, in] or [out, in / groups, h, w], got {tuple(weight.shape)} and {groups} groups"
        )
    if not bool(((weight == 0) | (weight.abs() == 1)).all()):
        raise SpecError("a packed weight holds -1, 0 and +1; divide by its scale first")
    channels_last = weight.movedim(1, -1)
    mask = None if bool((weight != 0).all()) else pack_signs(channels_last.ne(0) * 2 - 1)
    return pack_signs(channels_last), mask


def binary_conv2d_reference(
    x: Tensor,
    words: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    pad_value: int = 0,
    threshold: Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    input_scaling: bool = False,
    activation: Tensor | None = None,
    out_threshold: Tensor | None = None,
    out_flip: Tensor | None = None,
) -> Tensor:
    """``binary_conv2d`` by the float convolution of unpacked signs."""
    if x.dtype == torch.int32:
        x = unpack_signs(x, in_channels).permute(0, 3, 1, 2)
    is_one = x >= (0.0 if threshold is None else threshold.reshape(-1, 1, 1))
    if flip is not None:
        is_one = is_one ^ flip.reshape(-1, 1, 1)
    signs = functional.pad(is_one * 2.0 - 1.0, (padding[1], padding[1], padding[0], padding[0]), value=float(pad_value))
    weight = unpack_weight(words, mask, in_channels // groups).movedim(-1, 1)
    # With one channel both orders of memory look alike, and torch can read one as the other (pytorch issue 82060): copies are unambiguous.
    signs, weight = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (signs.float(), weight))
    y = functional.conv2d(signs, weight, None, tuple(stride), 0, tuple(dilation), groups).round()
    factor = scale.reshape(-1, 1, 1)
    if input_scaling:
        factor = factor * input_scale(x, kernel_size, stride, padding, dilation, groups).repeat_interleave(len(words) // groups, 1)
    y = _finished(y * factor, bias, residual, activation, (-1, 1, 1))
    if out_threshold is not None:
        return _packed(y, out_threshold, out_flip)
    return y.contiguous(memory_format=torch.channels_last)


def binary_linear_reference(
    x: Tensor,
    words: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    threshold: Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Tensor | None = None,
) -> Tensor:
    """``binary_linear`` by the float product of unpacked signs."""
    is_one = x >= (0.0 if threshold is None else threshold)
    if flip is not None:
        is_one = is_one ^ flip
    y = functional.linear(is_one * 2.0 - 1.0, unpack_weight(words, mask, in_features)).round()
    return _finished(y * scale, bias, residual, activation, (-1,))


def _empty_conv2d(
    x: Tensor,
    words: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    groups: int,
    pad_value: int = 0,
    threshold: Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    input_scaling: bool = False,
    activation: Tensor | None = None,
    out_threshold: Tensor | None = None,
    *_rest: object,
) -> Tensor:
    rows, columns = output_size(_image_size(x), kernel_size, stride, padding, dilation)
    out = words.shape[0]
    if out_threshold is not None:
        return torch.empty((x.shape[0], rows, columns, words_for(out)), dtype=torch.int32, device=x.device)
    strides = (rows * columns * out, 1, columns * out, out)
    return torch.empty_strided((x.shape[0], out, rows, columns), strides, dtype=torch.float32, device=x.device)


def _empty_linear(x: Tensor, words: Tensor, *_rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[0]), dtype=torch.float32)


@register_operator(_empty_conv2d)
def binary_conv2d(
    x: Tensor,
    words: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    in_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int = 0,
    threshold: Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    input_scaling: bool = False,
    activation: Tensor | None = None,
    out_threshold: Tensor | None = None,
    out_flip: Tensor | None = None,
) -> Tensor:
    """Convolution of the signs of ``x`` with weights of -1, 0 and +1.

    ``y = activated(scale * K * sum(sign(x) w) + bias + residual)`` over the window, where ``sign(x)`` is +1 for ``x >= threshold`` and -1 else,
    the other way round where ``flip``; places outside the image count as ``pad_value``. The sums are exact. NaN counts as negative.

    With ``out_threshold`` it gives packed signs, +1 for ``y >= out_threshold`` or the other way round where ``out_flip``, as the next layer can
    take them in place of ``x``: int32 ``[N, H, W, words]``.

    Args:
        x: ``[N, in_channels, H, W]`` float32, channels-last is fastest; or packed signs, of whole words for each group.
        words: From ``pack_conv_weight``.
        mask: From there too.
        scale: ``[out]`` float32.
        bias: ``[out]`` float32.
        in_channels: Of the layer.
        kernel_size, stride, padding, dilation: Each vertical and horizontal.
        groups: Of the layer.
        pad_value: -1, 0 or +1.
        threshold: ``[in_channels]`` float32; 0 where there is none.
        flip: ``[in_channels]`` bool.
        residual: Shaped like the output, or broadcasting to it; float32.
        input_scaling: Multiply by XNOR-Net's ``K``: the mean of ``|x|`` over the channels of a group and the window.
        activation: ``[5, out]`` float32, see ``lowbit.runtime.activation``.
        out_threshold: ``[out]`` float32.
        out_flip: ``[out]`` bool.

    Returns:
        ``[N, out, rows, columns]`` float32, channels-last; with ``out_threshold`` int32 ``[N, rows, columns, ceil(out / 32)]``.

    Raises:
        SpecError: An argument of another type or shape, or an image smaller than the kernel.
        LayerError: A gradient is expected: there is no derivative.
    """
    refuse_gradients("binary_conv2d", x, scale, bias, residual, activation)
    loops = compiled_loops() if x.device.type == "cpu" and x.numel() else None
    tensors = LayerTensors(words, mask, scale, bias, threshold, flip, activation, out_threshold, out_flip)
    settings = in_channels, groups, *kernel_size, *stride, *padding, *dilation, pad_value
    layer = None if loops is None else known_layer(tensors, settings)
    if layer is None:
        check_window(kernel_size, stride, padding, dilation)
        check_layer(words, mask, scale, bias, in_channels, groups, kernel_size, pad_value, *tensors[4:])
    if x.dtype == torch.int32:
        check_packed_input(x, in_channels, groups, threshold, flip, input_scaling)
    else:
        check_input(x, in_channels, 4)
    check_residual(residual, x)
    rows, columns = output_size(_image_size(x), kernel_size, stride, padding, dilation)
    residual = _residual(residual, (x.shape[0], words.shape[0], rows, columns))
    if x.is_cuda and x.numel() and (kernels := cuda_kernels()) is not None:
        numbers = unpack_signs(x, in_channels).permute(0, 3, 1, 2) if x.dtype == torch.int32 else x
        y: Tensor = kernels.conv2d(
            numbers, words, mask, scale, bias, in_channels, kernel_size, stride, padding, dilation, groups, pad_value, threshold, flip, residual,
            input_scaling,
        )  # fmt: skip
        y = activated(y, activation, (-1, 1, 1))
        return y if out_threshold is None else _packed(y, out_threshold, out_flip)
    if loops is None:
        return binary_conv2d_reference(
            x, words, mask, scale, bias, in_channels, kernel_size, stride, padding, dilation, groups, pad_value, threshold, flip, residual,
            input_scaling, activation, out_threshold, out_flip,
        )  # fmt: skip
    if layer is None:
        layer = keep_layer(PreparedLayer(loops, tensors, settings))
    k_map = input_scale(x, kernel_size, stride, padding, dilation, groups).movedim(1, -1).contiguous() if input_scaling else None
    pixels, added = x if x.dtype == torch.int32 else _channels_last(x), None if residual is None else _channels_last(residual)
    if out_threshold is not None:
        signs = torch.zeros((x.shape[0], rows, columns, words_for(len(words))), dtype=torch.int32)
        layer.run(pixels.contiguous(), signs, added, k_map)
        return signs
    y = torch.empty((x.shape[0], rows, columns, words.shape[0]))
    layer.run(pixels.contiguous(), y, added, k_map)
    return y.permute(0, 3, 1, 2)


@register_operator(_empty_linear)
def binary_linear(
    x: Tensor,
    words: Tensor,
    mask: Tensor | None,
    scale: Tensor,
    bias: Tensor | None,
    in_features: int,
    threshold: Tensor | None = None,
    flip: Tensor | None = None,
    residual: Tensor | None = None,
    activation: Tensor | None = None,
) -> Tensor:
    """Linear layer on the signs of ``x`` with weights of -1, 0 and +1; see ``binary_conv2d``.

    Args:
        x: ``[..., in_features]`` float32.
        words, mask: From ``pack_conv_weight``.
        scale, bias: ``[out]`` float32.
        in_features: Of the layer.
        threshold, flip: ``[in_features]``.
        residual: Shaped like the output.
        activation: ``[5, out]``.

    Returns:
        ``[..., out]`` float32.

    Raises:
        SpecError: An argument of another type or shape.
        LayerError: A gradient is expected: there is no derivative.
    """
    refuse_gradients("binary_linear", x, scale, bias, residual, activation)
    loops = compiled_loops() if x.device.type == "cpu" and x.numel() else None
    tensors, settings = LayerTensors(words, mask, scale, bias, threshold, flip, activation), (in_features, 1, 1, 1, 1, 1, 0, 0, 1, 1, 0)
    layer = None if loops is None else known_layer(tensors, settings)
    if layer is None:
        check_layer(words, mask, scale, bias, in_features, 1, None, 0, threshold, flip, activation)
    check_input(x, in_features, None)
    check_residual(residual, x)
    shape = (*x.shape[:-1], words.shape[0])
    residual = _residual(residual, shape)
    if x.is_cuda and x.numel() and (kernels := cuda_kernels()) is not None:
        y: Tensor = kernels.linear(x, words, mask, scale, bias, in_features, threshold, flip, residual)
        return activated(y, activation, (-1,))
    if loops is None:
        return binary_linear_reference(x, words, mask, scale, bias, in_features, threshold, flip, residual, activation)
    if layer is None:
        layer = keep_layer(PreparedLayer(loops, tensors, settings))
    y = x.new_empty(shape)
    added = None if residual is None else residual.detach().contiguous().view(1, 1, -1, shape[-1])
    layer.run(x.detach().contiguous().view(1, 1, -1, in_features), y.view(1, 1, -1, shape[-1]), added, None)
    return y


@functools.cache
def compiled_loops() -> ModuleType | None:
    """The compiled kernels of the active target; ``None`` where the reference is used. The first call compiles them, or reads them."""
    if not active_target()[0].lanes:
        return None
    try:
        return importlib.import_module("lowbit.runtime.cpu.binary_loops")
    except ImportError:
        return None


@functools.cache
def cuda_kernels() -> ModuleType | None:
    """The Triton kernels of CUDA devices; ``None`` where the reference is used there."""
    return importlib.import_module("lowbit.runtime.cuda.kernels") if cuda_target()[0] else None


def _channels_last(x: Tensor) -> Tensor:
    """``[N, H, W, C]`` without gaps."""
    return x.detach().permute(0, 2, 3, 1).contiguous()


def input_scale(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """``[N, groups, rows, columns]``: the mean of ``|x|`` over a group's channels and the window, places outside counting as 0."""
    mean = x.detach().abs().unflatten(1, (groups, -1)).mean(2)
    kernel = mean.new_full((groups, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]))
    return functional.conv2d(mean, kernel, None, tuple(stride), tuple(padding), tuple(dilation), groups)


def _finished(y: Tensor, bias: Tensor | None, residual: Tensor | None, activation: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    y = y if bias is None else y + bias.reshape(shape)
    return activated(y if residual is None else y + residual, activation, shape)


def _packed(y: Tensor, threshold: Tensor, flip: Tensor | None) -> Tensor:
    """The signs of ``y`` ``[N, C, H, W]`` as int32 ``[N, H, W, words]``."""
    is_one = y >= threshold.reshape(-1, 1, 1)
    if flip is not None:
        is_one = is_one ^ flip.reshape(-1, 1, 1)
    return pack_signs(is_one.permute(0, 2, 3, 1) * 2 - 1).contiguous()


def _image_size(x: Tensor) -> tuple[int, int]:
    """Height and width of an image or of packed signs."""
    return (x.shape[1], x.shape[2]) if x.dtype == torch.int32 else (x.shape[2], x.shape[3])


def _residual(residual: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if residual is None or residual.shape == shape:
        return residual
    try:
        return residual.expand(shape)
    except RuntimeError as error:
        raise SpecError(f"residual must fit the output's shape {shape}, got {tuple(residual.shape)}") from error


def output_size(image: Pair, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    """Rows and columns that a convolution of an image of this height and width has; ``SpecError`` where there are none."""
    reach = [dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)]
    size = [image[i] + 2 * padding[i] for i in range(2)]
    if size[0] < reach[0] or size[1] < reach[1]:
        raise SpecError(f"an image of {size[0]} x {size[1]} with its padding is smaller than the kernel's reach of {reach[0]} x {reach[1]}")
    return (size[0] - reach[0]) // stride[0] + 1, (size[1] - reach[1]) // stride[1] + 1
