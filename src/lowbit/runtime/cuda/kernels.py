"""Binary and ternary layers on CUDA devices in Triton: signs are packed into words, and words are compared.

``sum x w = popcount(m) - 2 popcount((x ^ w) & m)`` as in ``layers.binary``, whose references compute the same integers. Padding has no
bits set, that is, it counts as -1; adding ``(pad_value + 1) * sum(w)`` over the weights that meet padding corrects that.

Importing this file needs Triton, which comes with CUDA builds of torch; ``cuda.target`` decides whether it is used. With
``TRITON_INTERPRET=1`` in the environment the kernels run in Triton's interpreter, on tensors of the CPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers.ops import input_scale
from lowbit.runtime.arguments import POINT, Epilogue, SignLayer, Window
from lowbit.runtime.cpu.bits import WORD, unpack_weight, words_for
from lowbit.runtime.kept import PreparedWeights

TILE = 2048  # sums that a program keeps in registers; with twice as many, registers run out
TILE_CHANNELS = 64
THREAD_SUMS = 8
PACKED_POSITIONS = 64


def conv2d(x: Tensor, layer: SignLayer[Tensor], window: Window, epilogue: Epilogue[Tensor]) -> Tensor:
    """``binary_conv2d`` for checked arguments, without activation and packed outputs.

    Raises:
        SpecError: A tensor is not on the device of ``x``.
    """
    _check_devices(x, layer, epilogue)
    shape = (x.shape[0], layer.words.shape[0], *window.output_size(x.shape[2:]))
    y = torch.empty(shape, dtype=torch.float32, device=x.device, memory_format=torch.channels_last)
    k_map = None
    if epilogue.input_scaling:
        k_map = input_scale(x.detach(), window.kernel_size, window.stride, window.padding, window.dilation, window.groups).contiguous()
    added = None if epilogue.residual is None else epilogue.residual.float().expand(shape)
    per_group = layer.in_channels // window.groups
    weight = _turned_weights.get(layer.words, layer.mask, (per_group,), lambda: _transpose(layer.words, layer.mask, per_group))
    _convolve(pack(x, window.groups, layer.threshold, layer.flip), x, weight, window, epilogue, added, k_map, y)
    return y


def linear(x: Tensor, layer: SignLayer[Tensor], epilogue: Epilogue[Tensor]) -> Tensor:
    """``binary_linear`` for checked arguments, computed as a convolution of an image of one row.

    Raises:
        SpecError: A tensor is not on the device of ``x``.
    """
    _check_devices(x, layer, epilogue)
    words, mask, features = layer.words, layer.mask, layer.in_channels
    y = torch.empty(*x.shape[:-1], words.shape[0], dtype=torch.float32, device=x.device)
    image = _as_image(x)
    added = None if epilogue.residual is None else _as_image(epilogue.residual.float().expand(y.shape))
    weight = _turned_weights.get(
        words, mask, (features,), lambda: _transpose(words[:, None, None], None if mask is None else mask[:, None, None], features)
    )
    _convolve(pack(image, 1, layer.threshold, layer.flip), image, weight, POINT, epilogue, added, None, _as_image(y))
    return y


def pack(x: Tensor, groups: int, threshold: Tensor | None, flip: Tensor | None) -> Tensor:
    """Pack the signs of ``x`` ``[N, C, H, W]`` with any strides as int32 ``[groups * words, N * H * W]``, 32 channels of a group to a word.

    A bit is 1 where ``x >= threshold`` (default 0), inverted where ``flip``; bits beyond a group's channels are 0.
    """
    n, channels, height, width = x.shape
    per_group = channels // groups
    words, positions = words_for(per_group), n * height * width
    image = torch.empty(groups * words, positions, dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        pack_kernel[(triton.cdiv(positions, PACKED_POSITIONS) * groups * words,)](
            x, None if threshold is None else threshold.float().contiguous(), None if flip is None else flip.contiguous().view(torch.uint8),
            image, positions, height, width, *x.stride(), per_group, words,
            BITS=min(triton.next_power_of_2(per_group), WORD), POSITIONS=PACKED_POSITIONS,
        )  # fmt: skip
    return image


class _TransposedWeight(NamedTuple):
    """A weight with its output channels last, so that neighbouring threads read neighbouring words."""

    words: Tensor  # [kernel height * kernel width * words, out]
    mask: Tensor | None  # shaped like words
    total: Tensor  # [out], number of products
    missing: Tensor  # [kernel height * kernel width, out], sum of the weights at each kernel position


_turned_weights: PreparedWeights[_TransposedWeight] = PreparedWeights()


def _transpose(words: Tensor, mask: Tensor | None, per_group: int) -> _TransposedWeight:
    weight = unpack_weight(words, mask, per_group)
    return _TransposedWeight(
        words.flatten(1).t().contiguous(),
        None if mask is None else mask.flatten(1).t().contiguous(),
        weight.abs().sum((1, 2, 3)).int(),
        weight.sum(3).flatten(1).t().int().contiguous(),
    )


def _convolve(
    image: Tensor,
    x: Tensor,
    weight: _TransposedWeight,
    window: Window,
    epilogue: Epilogue[Tensor],
    residual: Tensor | None,
    k_map: Tensor | None,
    y: Tensor,
) -> None:
    """Convolve the packed signs of ``x`` into ``y`` ``[N, out, rows, columns]``, channels-last."""
    n, out, rows, columns = y.shape
    groups, scale, bias = window.groups, epilogue.scale, epilogue.bias
    per_group, positions = out // groups, n * rows * columns
    channels = min(triton.next_power_of_2(per_group), TILE_CHANNELS)
    tile = min(TILE // channels, triton.next_power_of_2(positions))
    with torch.cuda.device_of(x):
        convolve_kernel[(triton.cdiv(positions, tile) * groups * triton.cdiv(per_group, channels),)](
            image, *weight, scale.float().contiguous(), None if bias is None else bias.float().contiguous(), k_map, residual, y,
            positions, image.shape[1], *x.shape[2:], rows, columns, groups, per_group, len(image) // groups, *window.numbers,
            *((0, 0, 0, 0) if residual is None else residual.stride()),
            PAD_FACTOR=window.pad_value + 1 if any(window.padding) else 0, POSITIONS=tile, CHANNELS=channels,
            num_warps=max(tile * channels // (THREAD_SUMS * 32), 1),  # a warp has 32 threads
            enable_fp_fusion=False,  # the reference rounds after each step
        )  # fmt: skip


def _as_image(x: Tensor) -> Tensor:
    """``[..., features]`` as ``[1, features, 1, rows]``."""
    return x.reshape(-1, x.shape[-1]).t()[None, :, None]


def _check_devices(x: Tensor, layer: SignLayer[Tensor], epilogue: Epilogue[Tensor]) -> None:
    for part in (layer, epilogue):
        for name, tensor in vars(part).items():
            if isinstance(tensor, Tensor) and tensor.device != x.device:
                raise SpecError(f"a binary layer's input is on {x.device} and its {name} on {tensor.device}; move the layer or the input")


@triton.jit
def _popcount(words):
    """Count the set bits with masks and shifts; in a loop, LLVM turns this into one instruction."""
    bits = words.to(tl.uint32, bitcast=True)
    bits = bits - ((bits >> 1) & 0x55555555)
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return ((((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def pack_kernel(
    x, threshold, flip, image, positions, height, width, x_n, x_c, x_h, x_w, per_group, words, BITS: tl.constexpr, POSITIONS: tl.constexpr
):  # fmt: skip
    """Pack one word at each of ``POSITIONS`` positions."""
    blocks = tl.cdiv(positions, POSITIONS)
    word = tl.program_id(0) // blocks
    position = (tl.program_id(0) % blocks) * POSITIONS + tl.arange(0, POSITIONS)
    is_position = position < positions
    bit = tl.arange(0, BITS)
    in_group = (word % words) * 32 + bit
    channel = (word // words) * per_group + in_group
    is_channel = in_group < per_group
    sample, row, column = position // (height * width), position // width % height, position % width
    start = x + sample.to(tl.int64) * x_n + row.to(tl.int64) * x_h + column.to(tl.int64) * x_w
    is_there = is_position[:, None] & is_channel[None, :]
    value = tl.load(start[:, None] + (channel.to(tl.int64) * x_c)[None, :], mask=is_there, other=0.0)
    if threshold is not None:
        is_one = value >= tl.load(threshold + channel, mask=is_channel, other=0.0)[None, :]
    else:
        is_one = value >= 0.0
    if flip is not None:
        is_one = is_one ^ (tl.load(flip + channel, mask=is_channel, other=0) != 0)[None, :]
    ones = tl.where(is_one & is_there, (tl.full((BITS,), 1, tl.int32) << bit)[None, :], 0)
    tl.store(image + word.to(tl.int64) * positions + position, tl.sum(ones, 1), mask=is_position)


@triton.jit
def convolve_kernel(
    image, weight, mask, total, missing, scale, bias, k_map, residual, y,
    positions, image_positions, height, width, rows, columns, groups, per_group, words,
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, residual_n, residual_c, residual_h, residual_w,
    PAD_FACTOR: tl.constexpr, POSITIONS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute a tile of ``POSITIONS`` output positions by ``CHANNELS`` output channels of one group."""
    tiles = tl.cdiv(per_group, CHANNELS)
    group = tl.program_id(0) % (groups * tiles) // tiles
    in_group = tl.program_id(0) % tiles * CHANNELS + tl.arange(0, CHANNELS)
    is_channel = in_group < per_group
    channel = group * per_group + in_group
    position = tl.program_id(0) // (groups * tiles) * POSITIONS + tl.arange(0, POSITIONS)
    is_position = position < positions
    sample, row, column = position // (rows * columns), position // columns % rows, position % columns
    first_word = image + (group * words).to(tl.int64) * image_positions

    differing = tl.zeros((POSITIONS, CHANNELS), tl.int32)
    outside = tl.zeros((POSITIONS, CHANNELS), tl.int32)
    for i in range(kernel_h):
        for j in range(kernel_w):
            at_row, at_column = row * stride_h - padding_h + i * dilation_h, column * stride_w - padding_w + j * dilation_w
            is_inside = is_position & (at_row >= 0) & (at_row < height) & (at_column >= 0) & (at_column < width)
            place = first_word + (sample * height + at_row) * width + at_column
            place_in_kernel = i * kernel_w + j
            for k in range(words):
                signs = tl.load(place, mask=is_inside, other=0)
                at = (place_in_kernel * words + k) * groups * per_group + channel
                different = signs[:, None] ^ tl.load(weight + at, mask=is_channel, other=0)[None, :]
                if mask is not None:
                    different = different & tl.load(mask + at, mask=is_channel, other=0)[None, :]
                differing += _popcount(different)
                place += image_positions
            if PAD_FACTOR != 0:
                lost = tl.load(missing + place_in_kernel * groups * per_group + channel, mask=is_channel, other=0)
                outside += tl.where(is_inside[:, None], 0, lost[None, :])

    products = tl.load(total + channel, mask=is_channel, other=0)[None, :] - 2 * differing + PAD_FACTOR * outside
    factor = tl.load(scale + channel, mask=is_channel, other=0.0)[None, :]
    if k_map is not None:
        at_map = ((sample * groups + group) * rows + row) * columns + column
        factor = factor * tl.load(k_map + at_map, mask=is_position, other=0.0)[:, None]
    value = products.to(tl.float32) * factor
    if bias is not None:
        value += tl.load(bias + channel, mask=is_channel, other=0.0)[None, :]
    is_there = is_position[:, None] & is_channel[None, :]
    if residual is not None:
        start = residual + sample.to(tl.int64) * residual_n + row.to(tl.int64) * residual_h + column.to(tl.int64) * residual_w
        value += tl.load(start[:, None] + (channel.to(tl.int64) * residual_c)[None, :], mask=is_there, other=0.0)
    tl.store(y + (position.to(tl.int64) * (groups * per_group))[:, None] + channel[None, :], value, mask=is_there)
