"""Convolutions and linear layers whose weights are -1, 0 or +1 and whose inputs are signs: exclusive or, and counting bits.

``sum x w`` over ``n`` signs is ``n - 2 popcount(x ^ w)``; with a mask ``m`` of the weights that are not 0, ``popcount(m) - 2
popcount((x ^ w) & m)``. Source: Rastegari et al. 2016, "XNOR-Net", section 3.2.

Each function has a torch reference of the same signature beside it, which unpacks the signs and calls the float layer. Both give the
same integers; the reference is what runs without numba and on devices other than the CPU.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from lowbit.errors import SpecError
from lowbit.runtime.bits import WORD, pack_signs, unpack_bits, unpack_signs, words_for
from lowbit.runtime.checks import check_input, check_layer, check_residual, check_window, refuse_gradients
from lowbit.runtime.operator import register_operator
from lowbit.runtime.target import active_target

THREAD_WORK = 2**27  # products of one bit by one bit that one thread gets; below, starting it costs more than it saves

Pair = Sequence[int]
Array = npt.NDArray[np.generic]


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
) -> Tensor:
    """``binary_conv2d`` by the float convolution of unpacked signs."""
    is_one = x >= (0.0 if threshold is None else threshold.reshape(-1, 1, 1))
    if flip is not None:
        is_one = is_one ^ flip.reshape(-1, 1, 1)
    signs = functional.pad(is_one * 2.0 - 1.0, (padding[1], padding[1], padding[0], padding[0]), value=float(pad_value))
    weight = _unpacked(words, mask, in_channels // groups).movedim(-1, 1)
    # With one channel both orders of memory look alike, and torch can read one as the other (pytorch issue 82060): copies are unambiguous.
    signs, weight = (tensor.clone(memory_format=torch.contiguous_format) for tensor in (signs.float(), weight))
    y = functional.conv2d(signs, weight, None, tuple(stride), 0, tuple(dilation), groups).round()
    factor = scale.reshape(-1, 1, 1)
    if input_scaling:
        factor = factor * _input_scale(x, kernel_size, stride, padding, dilation, groups).repeat_interleave(len(words) // groups, 1)
    return _finished(y * factor, bias, residual, (-1, 1, 1)).contiguous(memory_format=torch.channels_last)


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
) -> Tensor:
    """``binary_linear`` by the float product of unpacked signs."""
    is_one = x >= (0.0 if threshold is None else threshold)
    if flip is not None:
        is_one = is_one ^ flip
    y = functional.linear(is_one * 2.0 - 1.0, _unpacked(words, mask, in_features)).round()
    return _finished(y * scale, bias, residual, (-1,))


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
    *_rest: object,
) -> Tensor:
    rows, columns = _output_size(x, kernel_size, stride, padding, dilation)
    out = words.shape[0]
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
) -> Tensor:
    """Convolution of the signs of ``x`` with weights of -1, 0 and +1.

    ``y = scale * K * sum(sign(x) w) + bias + residual`` over the window, where ``sign(x)`` is +1 for ``x >= threshold`` and -1 else,
    the other way round where ``flip``; places outside the image count as ``pad_value``. The sums are exact. NaN counts as negative.

    Args:
        x: ``[N, in_channels, H, W]`` float32; channels-last is fastest.
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

    Returns:
        ``[N, out, rows, columns]`` float32, channels-last.

    Raises:
        SpecError: An argument of another type or shape, or an image smaller than the kernel.
        LayerError: A gradient is expected: there is no derivative.
    """
    refuse_gradients("binary_conv2d", x, scale, bias, residual)
    check_window(kernel_size, stride, padding, dilation)
    check_layer(words, mask, scale, bias, in_channels, groups, kernel_size, pad_value, threshold, flip)
    check_input(x, in_channels, 4)
    check_residual(residual, x)
    out = words.shape[0]
    rows, columns = _output_size(x, kernel_size, stride, padding, dilation)
    residual = _residual(residual, (x.shape[0], out, rows, columns))
    loops = compiled_loops() if x.device.type == "cpu" else None
    if loops is None or not x.numel():
        return binary_conv2d_reference(
            x, words, mask, scale, bias, in_channels, kernel_size, stride, padding, dilation, groups, pad_value, threshold, flip, residual,
            input_scaling,
        )  # fmt: skip
    k_map = _input_scale(x, kernel_size, stride, padding, dilation, groups).movedim(1, -1) if input_scaling else x.new_empty(0, 0, 0, 0)
    y = torch.empty(x.shape[0], out, rows, columns, memory_format=torch.channels_last)
    shape = (*kernel_size, *stride, *padding, *dilation)
    _run(
        loops, _channels_last(x), _tiled(words, mask, in_channels // groups, groups, loops), scale, bias, groups, shape, pad_value, threshold,
        flip, _channels_last(residual) if residual is not None else x.new_empty(0, 0, 0, 0), k_map.contiguous(), y.movedim(1, -1),
    )  # fmt: skip
    return y


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
) -> Tensor:
    """Linear layer on the signs of ``x`` with weights of -1, 0 and +1; see ``binary_conv2d``.

    Args:
        x: ``[..., in_features]`` float32.
        words, mask: From ``pack_conv_weight``.
        scale, bias: ``[out]`` float32.
        in_features: Of the layer.
        threshold, flip: ``[in_features]``.
        residual: Shaped like the output.

    Returns:
        ``[..., out]`` float32.

    Raises:
        SpecError: An argument of another type or shape.
        LayerError: A gradient is expected: there is no derivative.
    """
    refuse_gradients("binary_linear", x, scale, bias, residual)
    check_layer(words, mask, scale, bias, in_features, 1, None, 0, threshold, flip)
    check_input(x, in_features, None)
    check_residual(residual, x)
    out = words.shape[0]
    shape = (*x.shape[:-1], out)
    residual = _residual(residual, shape)
    loops = compiled_loops() if x.device.type == "cpu" else None
    if loops is None or not x.numel():
        return binary_linear_reference(x, words, mask, scale, bias, in_features, threshold, flip, residual)
    y = torch.empty(shape)
    image = x.contiguous().view(1, 1, -1, in_features)
    none = x.new_empty(0, 0, 0, 0)
    added = none if residual is None else residual.contiguous().view(1, 1, -1, out)
    tiled = _tiled(words, mask, in_features, 1, loops)
    _run(loops, image, tiled, scale, bias, 1, (1, 1, 1, 1, 0, 0, 1, 1), 0, threshold, flip, added, none, y.view(1, 1, -1, out))
    return y


@functools.cache
def compiled_loops() -> ModuleType | None:
    """The compiled kernels of the active target; ``None`` where the reference is used. The first call compiles them, or reads them."""
    if not active_target()[0].lanes:
        return None
    try:
        return importlib.import_module("lowbit.runtime.binary_loops")
    except ImportError:
        return None


class _Tiled(NamedTuple):
    """A weight in the order in which the kernels of the active target read it."""

    words: Array  # [groups, tiles, words, ...]; for the lookup form of the micro-kernel the weights of -1
    mask: Array  # like it, or empty; for the lookup form the weights of +1
    total: Array  # [out], products that are counted
    missing: Array  # [kernel height, kernel width, out], sum of the weights at each place


_tiled_weights = WeakTensorKeyDictionary()  # packed weight -> (its mask, what these are, _Tiled)


def _tiled(words: Tensor, mask: Tensor | None, per_group: int, groups: int, loops: ModuleType) -> _Tiled:
    state = (_version(words), _version(mask), per_group, groups)
    known: tuple[Tensor | None, tuple[int, ...], _Tiled] | None = _tiled_weights.get(words)
    if known is not None and known[0] is mask and known[1] == state:
        return known[2]
    spread = words if words.dim() == 4 else words[:, None, None]
    spread_mask = mask if mask is None or mask.dim() == 4 else mask[:, None, None]
    weight = _unpacked(spread, spread_mask, per_group)
    first, second = spread, spread_mask
    if second is not None and loops.FORM == "lookup":
        first, second = second & ~spread, second & spread
    tiled = _Tiled(
        _in_tiles(first, groups, loops),
        np.empty((0,) * 4, loops.WEIGHT) if second is None else _in_tiles(second, groups, loops),
        weight.abs().sum((1, 2, 3)).int().numpy(),
        weight.sum(3).permute(1, 2, 0).int().contiguous().numpy(),
    )
    _tiled_weights[words] = (mask, state, tiled)
    return tiled


def _version(tensor: Tensor | None) -> int:
    """Changes when a state dict is loaded into a tensor."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def _in_tiles(words: Tensor, groups: int, loops: ModuleType) -> Array:
    by_group = words.flatten(1).unflatten(0, (groups, -1))
    tiles = -(-by_group.shape[1] // loops.CHANNELS)
    filled = functional.pad(by_group, (0, 0, 0, tiles * loops.CHANNELS - by_group.shape[1]))
    tiled = filled.unflatten(1, (tiles, loops.CHANNELS)).transpose(2, 3)
    if loops.FORM == "lookup":
        tiled = (tiled.unsqueeze(-2) >> torch.arange(0, WORD, 8)[:, None]).to(torch.uint8).flatten(-2)
    ready: Array = tiled.contiguous().numpy()
    return ready


def _run(
    loops: ModuleType,
    x: Tensor,
    weight: _Tiled,
    scale: Tensor,
    bias: Tensor | None,
    groups: int,
    shape: tuple[int, ...],
    pad_value: int,
    threshold: Tensor | None,
    flip: Tensor | None,
    residual: Tensor,
    k_map: Tensor,
    y: Tensor,
) -> None:
    """Pack the signs of ``x`` ``[N, H, W, C]`` and convolve them into ``y`` ``[N, rows, columns, out]``."""
    n, height, width, channels = x.shape
    top, left = shape[4], shape[5]
    words = words_for(channels // groups)
    image = _image((n, height + 2 * top, width + 2 * left, groups, words), loops.ROWS * shape[3], loops.IMAGE)
    limits = x.new_zeros(channels) if threshold is None else threshold.float()
    flips = torch.zeros(groups, words, dtype=torch.int32) if flip is None else pack_signs(flip.view(groups, -1) * 2 - 1)
    arrays = [*(t.detach().numpy() for t in (x, limits.contiguous(), flips.contiguous())), image]
    _shared(lambda first, last: loops.pack(*arrays, top, left, groups, first, last), n * height, x.numel() * 32)
    arguments = (
        image, *weight, pad_value + 1 if top or left else 0,
        scale.detach().float().contiguous().numpy(), (torch.zeros_like(scale) if bias is None else bias).detach().float().contiguous().numpy(),
        k_map.detach().numpy(), residual.detach().numpy(), y.numpy(), (height, width), shape,
    )  # fmt: skip
    work = y.numel() * shape[0] * shape[1] * words * 32
    _shared(lambda first, last: loops.convolve(*arguments, first, last), n * y.shape[1], work)


def _image(shape: tuple[int, ...], positions: int, kind: np.dtype[Any]) -> Array:
    """A padded image of words without bits; memory behind it for windows of ``positions`` more positions."""
    n, height, width, groups, words = shape
    count = n * height * width * groups * words
    return np.zeros(count + (positions + width) * groups * words, kind)[:count].reshape(shape)


_pools: dict[int, ThreadPoolExecutor] = {}


def _shared(run: Callable[[int, int], None], rows: int, work: int) -> None:
    """``run(first, last)`` over ``rows``, in as many threads as torch has and the work is worth."""
    count = max(min(torch.get_num_threads(), rows, work // THREAD_WORK), 1)
    if count == 1:
        run(0, rows)
        return
    if count not in _pools:
        _pools[count] = ThreadPoolExecutor(count - 1, "lowbit-runtime")
    ends = [rows * piece // count for piece in range(count + 1)]
    waiting = [_pools[count].submit(run, ends[piece], ends[piece + 1]) for piece in range(1, count)]
    run(0, ends[1])
    for done in waiting:
        done.result()


def _channels_last(x: Tensor) -> Tensor:
    """``[N, H, W, C]`` without gaps."""
    return x.detach().movedim(1, -1).contiguous()


def _unpacked(words: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """float32 -1, 0 and +1 along the last dimension."""
    signs = unpack_signs(words, count)
    return signs if mask is None else signs * unpack_bits(mask, count)


def _input_scale(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair, groups: int) -> Tensor:
    """``[N, groups, rows, columns]``: the mean of ``|x|`` over a group's channels and the window, places outside counting as 0."""
    mean = x.detach().abs().unflatten(1, (groups, -1)).mean(2)
    kernel = mean.new_full((groups, 1, *kernel_size), 1 / (kernel_size[0] * kernel_size[1]))
    return functional.conv2d(mean, kernel, None, tuple(stride), tuple(padding), tuple(dilation), groups)


def _finished(y: Tensor, bias: Tensor | None, residual: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    y = y if bias is None else y + bias.reshape(shape)
    return y if residual is None else y + residual


def _residual(residual: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    if residual is None or residual.shape == shape:
        return residual
    try:
        return residual.expand(shape)
    except RuntimeError as error:
        raise SpecError(f"residual must fit the output's shape {shape}, got {tuple(residual.shape)}") from error


def _output_size(x: Tensor, kernel_size: Pair, stride: Pair, padding: Pair, dilation: Pair) -> tuple[int, int]:
    reach = [dilation[i] * (kernel_size[i] - 1) + 1 for i in range(2)]
    size = [x.shape[2 + i] + 2 * padding[i] for i in range(2)]
    if size[0] < reach[0] or size[1] < reach[1]:
        raise SpecError(f"an image of {size[0]} x {size[1]} with its padding is smaller than the kernel's reach of {reach[0]} x {reach[1]}")
    return (size[0] - reach[0]) // stride[0] + 1, (size[1] - reach[1]) // stride[1] + 1
