"""Loops around the micro-kernel, compiled for the active target when the module is imported.

Pack the signs of an image into words with the layer's padding around them, then convolve: every tile of output positions reads its
windows from the padded image where they lie, so that nothing is copied for overlapping windows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.micro_kernel import Tile, make_finish, make_micro_kernel, pack_bits_of_32, subtract_multiple
from lowbit.runtime.cpu.target import active_target

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]
Image = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Weight = npt.NDArray[np.int32] | npt.NDArray[np.uint8]

_target = active_target()[0]
if not _target.lanes or getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("there are no compiled kernels for this processor, or numba is disabled (NUMBA_DISABLE_JIT)")
ROWS, CHANNELS, FORM = _target.rows, _target.lanes * _target.columns, _target.form
IMAGE, WEIGHT = (np.dtype(np.int64), np.dtype(np.uint8)) if FORM == "lookup" else (np.dtype(np.int32),) * 2
_STEP = IMAGE.itemsize
_plain = make_micro_kernel(Tile(FORM, _target.lanes, ROWS, _target.columns))
_masked = make_micro_kernel(Tile(FORM, _target.lanes, ROWS, _target.columns, is_masked=True))
_finish = make_finish(_target.floats)


def _spread(bits: Any) -> Any:
    """Four bits of 32, in uint64, into the upper half of each byte: the order of the ``lookup`` form."""
    bits = (bits | bits << np.uint64(16)) & np.uint64(0x0000FFFF0000FFFF)
    bits = (bits | bits << np.uint64(8)) & np.uint64(0x00FF00FF00FF00FF)
    bits = (bits | bits << np.uint64(4)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return bits << np.uint64(4)


_spread_compiled: Any = numba.njit(_spread)


def _spread_word(word: Any) -> Any:
    return np.int64(_spread_compiled(np.uint64(np.uint32(word))))


def _same(word: Any) -> Any:
    return word


_image_word: Any = numba.njit(_spread_word if FORM == "lookup" else _same)


def _few_bits(x: Floats, threshold: Floats, step: int) -> Any:
    """``pack_bits_of_32`` for fewer than 32 numbers, from level ``step - 1`` on."""
    bits = np.uint32(0)
    for level in range(step - 1, threshold.shape[0], step):
        for i in range(x.size):
            bits ^= np.uint32(x[i] >= threshold[level, i]) << np.uint32(i)
    return np.int32(bits)


_pack_few_bits: Any = numba.njit(_few_bits)


def _pack(x: Floats, threshold: Floats, flip: Words, image: Image, top: int, left: int, groups: int, first: int, last: int) -> None:
    """The bits of the number of thresholds that each ``x[n, h, w, c]`` reaches, in the padded images of words of each bit.

    With one threshold, ``image[n, top + h, left + w, g, :]`` are the signs of ``x[n, h, w, group g] >= threshold``, flipped where ``flip``
    has ones. With more of them, in ascending order, ``image[p N + n]`` are bits ``p`` of their number: threshold ``k`` turns bit ``p``
    over if ``2**p`` divides ``k``. For rows ``first`` to ``last`` of all images, counted over ``n`` and ``h``.

    Args:
        x: ``[N, H, W, C]``.
        threshold: ``[levels, C]``.
        flip: ``[G, words]``.
        image: ``[planes * N, ...]``.
        top, left: Padding of the image.
        groups: Number of groups.
        first, last: Which rows.
    """
    images, height, width, channels = x.shape
    levels, per_group = threshold.shape[0], channels // groups
    whole, words, planes = per_group // 32, image.shape[4], image.shape[0] // images
    flat, flips, together = image.reshape(image.size), flip.reshape(flip.size), groups * words
    for row in range(first, last):
        n, h = row // height, row % height
        if levels == 1 and whole == words:  # nothing but whole words, one after the other
            place, values = ((n * image.shape[1] + top + h) * image.shape[2] + left) * together, x.ctypes.data + 4 * row * width * channels
            for _ in range(width):
                for i in range(together):
                    bits = pack_bits_of_32(values + 128 * i, threshold.ctypes.data + 128 * i, 0, 0, 1, 1)
                    flat[place + i] = _image_word(bits ^ flips[i])
                place, values = place + together, values + 4 * channels
            continue
        for plane in range(planes):
            at, step = plane * images + n, 1 << plane
            for w in range(width):
                for g in range(groups):
                    values = x.ctypes.data + 4 * ((row * width + w) * channels + g * per_group)
                    limits = threshold.ctypes.data + 4 * g * per_group
                    for word in range(whole):
                        bits = pack_bits_of_32(values + 128 * word, limits + 128 * word, 4 * channels, step - 1, levels, step)
                        image[at, top + h, left + w, g, word] = _image_word(bits ^ flip[g, word])
                    if whole < words:
                        begin, end = g * per_group + 32 * whole, (g + 1) * per_group
                        bits = _pack_few_bits(x[n, h, w, begin:end], threshold[:, begin:end], step)
                        image[at, top + h, left + w, g, whole] = _image_word(bits ^ flip[g, whole])


def _differing(
    x: int, x_row: int, y_runs: int, y_stride: int, x_runs: int, x_stride: int, length: int, weight: int, mask: int, out: int
) -> None:
    """The micro-kernel for weights with a mask, and for those without, whose address is 0."""
    if mask:
        _masked(x, x_row, y_runs, y_stride, x_runs, x_stride, length, weight, mask, out)
    else:
        _plain(x, x_row, y_runs, y_stride, x_runs, x_stride, length, weight, 0, out)


_count: Any = numba.njit(_differing)


def _add(total: Words, found: Words, shift: int) -> None:
    """``total += found * 2**shift``."""
    for i in range(total.size):
        total[i] += found[i] << np.int32(shift)


_add_shifted: Any = numba.njit(_add)


def _subtract(
    found: int,
    count: int,
    missing: int,
    outputs: int,
    factor: int,
    size: tuple[int, int],
    shape: tuple[int, int, int, int, int, int, int, int],
    y: int,
    x: int,
) -> None:
    """Take ``factor * missing`` off ``found`` for every place outside of the image, of the window that begins at ``(y, x)``.

    Args:
        found: Address of ``count`` int32.
        missing: Address of those of the first place; those of the next one are ``outputs`` int32 behind.
    """
    kernel_h, kernel_w, dilation_h, dilation_w = shape[0], shape[1], shape[6], shape[7]
    for i in range(kernel_h):
        at_y = y + i * dilation_h
        is_outside = at_y < 0 or at_y >= size[0]
        for j in range(kernel_w):
            at_x = x + j * dilation_w
            if is_outside or at_x < 0 or at_x >= size[1]:
                subtract_multiple(found, missing + 4 * (i * kernel_w + j) * outputs, factor, count)


_add_missing: Any = numba.njit(_subtract)


def _signs(y: Floats, limits: Floats, flips: Words, begin: int, signs: Words) -> None:
    """Put the signs of outputs from ``begin`` on into their words of one position."""
    c = begin
    while c < begin + y.size:
        word = c // 32
        if c % 32 == 0 and c + 32 <= begin + y.size:
            signs[word] = pack_bits_of_32(y.ctypes.data + 4 * (c - begin), limits.ctypes.data + 4 * c, 0, 0, 1, 1) ^ flips[word]
            c += 32
        else:
            bit = np.uint32(y[c - begin] >= limits[c]) << np.uint32(c % 32)
            signs[word] ^= np.int32(bit ^ (np.uint32(flips[word]) & (np.uint32(1) << np.uint32(c % 32))))
            c += 1


_add_signs: Any = numba.njit(_signs)


def place(signs: Words, image: Image, top: int, left: int) -> None:
    """Signs ``[N, H, W, words]`` into a padded image of words."""
    images, height, width, _ = signs.shape
    words = signs.reshape(images, height, width, *image.shape[3:])
    inner = image[:, top : top + height, left : left + width]
    inner[...] = _spread(words.view(np.uint32).astype(np.uint64)).view(np.int64) if FORM == "lookup" else words


def _convolve(
    image: Image,
    weight: Weight,
    mask: Weight,
    total: Words,
    missing: Words,
    border: int,
    scale: Floats,
    bias: Floats,
    activation: Floats,
    k_map: Floats,
    residual: Floats,
    y: Floats,
    limits: Floats,
    flips: Words,
    signs: Words,
    out_shape: tuple[int, int, int, int],
    size: tuple[int, int],
    shape: tuple[int, int, int, int, int, int, int, int],
    first: int,
    last: int,
) -> None:
    """Rows ``first`` to ``last`` of the outputs, counted over images and output rows.

    ``y = activated(dot * (scale * k_map) + bias + residual)`` with ``dot = total - 2 count`` and, where the window reaches over the border, plus
    ``border * missing`` of the places outside: the image holds zeros there, that is -1. With several bits of inputs and weights, ``count`` is
    the sum of ``2**(p + q)`` times the count of bit ``p`` of the inputs and ``q`` of the weights, and there is no ``border``.

    Args:
        image: ``[input bits * N, H, W, G, words]``, padded; behind it lies memory for ``ROWS`` more positions.
        weight: ``[weight bits * G, tiles, kernel height * width * words, ...]``, a row the words of ``CHANNELS`` outputs as the micro-kernel
            wants them.
        mask: Like ``weight``, or empty.
        total: ``[out]``, what the dot product is if no bit differs.
        missing: ``[kernel height, kernel width, out]``, the sum of the weights at each place.
        border: What the padding counts as, plus 1.
        scale, bias: ``[out]``.
        activation: ``[5, out]`` or empty.
        k_map: ``[N, rows, columns, G]`` or empty.
        residual: ``[N, rows, columns, out]`` or empty.
        y: ``[N, rows, columns, out]``, or empty where only signs are asked for.
        limits, flips: ``[out]`` and ``[out words]``, of signs: ``(y >= limit) ^ flip``; or empty.
        signs: ``[N, rows, columns, out words]`` full of zeros, or empty.
        out_shape: ``N, rows, columns, out``.
        size: Height and width of the input without its padding.
        shape: Kernel, stride, padding (top, left) and dilation, each vertical and horizontal.
        first, last: Which rows.
    """
    kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w = shape
    groups, words = image.shape[3], image.shape[4]
    rows, columns, channels = out_shape[1], out_shape[2], out_shape[3] // groups
    pixel = groups * words
    line = image.shape[2] * pixel
    runs, run_stride, length = kernel_w, dilation_w * pixel, words
    if groups == 1 and dilation_w == 1:
        runs, run_stride, length = 1, 0, kernel_w * words
    reach_h, reach_w = (kernel_h - 1) * dilation_h + 1, (kernel_w - 1) * dilation_w + 1
    origin = image.ctypes.data
    input_bits, weight_bits = image.shape[0] // out_shape[0], weight.shape[0] // groups
    plane = _STEP * out_shape[0] * image.shape[1] * line  # bytes from one bit of the inputs to the next
    counts = np.empty((ROWS, CHANNELS), np.int32)
    counts_of_bits = np.empty((ROWS, CHANNELS), np.int32)
    has_planes = input_bits * weight_bits > 1
    flat_counts, flat_counts_of_bits = counts.ravel(), counts_of_bits.ravel()
    weight_address, mask_address, weight_step, tile_step = weight.ctypes.data, mask.ctypes.data, weight.strides[0], weight.strides[1]
    has_mask, has_map, has_residual, is_active = mask.size > 0, k_map.size > 0, residual.size > 0, activation.size > 0
    outputs, has_signs = out_shape[3], signs.size > 0
    values = np.empty((ROWS, CHANNELS), np.float32)
    for g in range(groups):
        for tile in range(weight.shape[1]):
            begin = g * channels + tile * CHANNELS
            size_out = min(CHANNELS, (g + 1) * channels - begin)
            for row in range(first, last):
                n, oy = row // rows, row % rows
                y_in = oy * stride_h - top
                is_outside = y_in < 0 or y_in + reach_h > size[0]
                for ox in range(0, columns, ROWS):
                    start = origin + _STEP * ((n * image.shape[1] + oy * stride_h) * line + ox * stride_w * pixel + g * words)
                    if has_planes:
                        flat_counts[:] = 0
                        for p in range(input_bits):
                            for q in range(weight_bits):
                                at = (q * groups + g) * weight_step + tile * tile_step
                                _count(
                                    start + p * plane, stride_w * pixel, kernel_h, dilation_h * line, runs, run_stride, length,
                                    weight_address + at, mask_address + at if has_mask else 0, counts_of_bits.ctypes.data,
                                )  # fmt: skip
                                _add_shifted(flat_counts, flat_counts_of_bits, p + q)
                    else:
                        at = g * weight_step + tile * tile_step
                        _count(
                            start, stride_w * pixel, kernel_h, dilation_h * line, runs, run_stride, length,
                            weight_address + at, mask_address + at if has_mask else 0, counts.ctypes.data,
                        )  # fmt: skip
                    positions = min(ROWS, columns - ox)
                    x_in, x_last = ox * stride_w - left, (ox + positions - 1) * stride_w - left
                    if border and (is_outside or x_in < 0 or x_last + reach_w > size[1]):
                        for r in range(positions):
                            x = (ox + r) * stride_w - left
                            if is_outside or x < 0 or x + reach_w > size[1]:
                                _add_missing(
                                    counts.ctypes.data + 4 * r * CHANNELS, size_out, missing.ctypes.data + 4 * begin, outputs, border,
                                    size, shape, y_in, x,
                                )  # fmt: skip
                    place = 4 * ((row * columns + ox) * outputs + begin)
                    factors = k_map.ctypes.data + 4 * ((row * columns + ox) * groups + g) if has_map else 0
                    _finish(
                        counts.ctypes.data, 4 * CHANNELS, total.ctypes.data + 4 * begin, scale.ctypes.data + 4 * begin,
                        bias.ctypes.data + 4 * begin, factors, 4 * groups, residual.ctypes.data + place if has_residual else 0, 4 * outputs,
                        activation.ctypes.data + 4 * begin if is_active else 0, 4 * outputs,
                        values.ctypes.data if has_signs else y.ctypes.data + place, 4 * (CHANNELS if has_signs else outputs), positions,
                        size_out,
                    )  # fmt: skip
                    if has_signs:
                        for r in range(positions):
                            _add_signs(values[r, :size_out], limits, flips, begin, signs[n, oy, ox + r])


_INDEX = types.int64
_PAIR, _EIGHT = types.UniTuple(_INDEX, 2), types.UniTuple(_INDEX, 8)


def _array(kind: Any, rank: int) -> Any:
    return types.Array(kind, rank, "C", aligned=True)


_FLOATS, _WORDS = types.float32, types.int32
_IMAGE, _WEIGHT = (types.int64, types.uint8) if FORM == "lookup" else (types.int32, types.int32)
_PACK = types.void(_array(_FLOATS, 4), _array(_FLOATS, 2), _array(_WORDS, 2), _array(_IMAGE, 5), *[_INDEX] * 5)
_CONVOLVE = types.void(
    _array(_IMAGE, 5), _array(_WEIGHT, 4), _array(_WEIGHT, 4), _array(_WORDS, 1), _array(_WORDS, 3), _INDEX,
    _array(_FLOATS, 1), _array(_FLOATS, 1), _array(_FLOATS, 2), _array(_FLOATS, 4), _array(_FLOATS, 4), _array(_FLOATS, 4),
    _array(_FLOATS, 1), _array(_WORDS, 1), _array(_WORDS, 4), types.UniTuple(_INDEX, 4), _PAIR, _EIGHT, _INDEX, _INDEX,
)  # fmt: skip

FOLDER = compiled.cache_folder(_target.name, [Path(__file__), Path(__file__).with_name("micro_kernel.py")])
with compiled.cached_in(FOLDER) as is_cached:
    pack = numba.njit([_PACK], nogil=True, cache=is_cached)(_pack)
    convolve = numba.njit([_CONVOLVE], nogil=True, cache=is_cached)(_convolve)
