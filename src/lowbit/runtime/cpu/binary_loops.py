"""Loops around the micro-kernel, compiled for the active target when the module is imported.

Pack the signs of an image into words with the layer's padding around them, then convolve: every tile of output positions reads its
windows from the padded image where they lie, so that nothing is copied for overlapping windows. A few rows are packed just before they
are read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.micro_kernel import Job, Tile, copy_bytes, make_micro_kernel, pack_bits_of_32
from lowbit.runtime.cpu.target import active_target

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]
Image = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Table = npt.NDArray[np.int64]
Geometry = tuple[int, ...]
Weight = npt.NDArray[np.int32] | npt.NDArray[np.uint8]

_target = active_target()[0]
if not _target.lanes or getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("there are no compiled kernels for this processor, or numba is disabled (NUMBA_DISABLE_JIT)")
ROWS, CHANNELS, FORM = _target.rows, _target.lanes * _target.columns, _target.form
IMAGE, WEIGHT = (np.dtype(np.int64), np.dtype(np.uint8)) if FORM == "lookup" else (np.dtype(np.int32),) * 2
_STEP = IMAGE.itemsize
FIELDS = len(Job)
BLOCK = 2**16  # outputs that are computed between packing and packing
_plain, _masked = (make_micro_kernel(Tile(FORM, _target.lanes, ROWS, _target.columns, _target.floats, masked)) for masked in (False, True))


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


def _pack_words(x: int, thresholds: int, stride: int, first: int, step: int, levels: int, count: int, rest: Floats, bits: Words) -> None:
    """The bits of ``count`` numbers at address ``x`` as words, as ``pack_bits_of_32`` does; ``rest`` is memory to work in."""
    for word in range(bits.size):
        values, left = x + 128 * word, count - 32 * word
        if left < 32:  # the thresholds behind the last number are NaN, which nothing reaches
            copy_bytes(rest.ctypes.data, values, 4 * left)
            values = rest.ctypes.data
        bits[word] = pack_bits_of_32(values, thresholds + 128 * word, stride, first, levels, step)


_pack_run: Any = numba.njit(_pack_words)


def _pack(x: int, threshold: Floats, flip: Words, image: Image, geometry: Geometry, first: int, last: int) -> None:
    """The bits of the number of thresholds that each ``x[n, h, w, c]`` reaches, in the padded images of words of each bit.

    With one threshold, ``image[n, top + h, left + w, g, :]`` are the signs of ``x[n, h, w, group g] >= threshold``, flipped where ``flip``
    has ones. With more of them, in ascending order, ``image[p N + n]`` are bits ``p`` of their number: threshold ``k`` turns bit ``p``
    over if ``2**p`` divides ``k``. For rows ``first`` to ``last`` of all images, counted over ``n`` and ``h``.

    Args:
        x: Address of ``[N, H, W, C]`` float32.
        threshold: ``[levels, G, 32 words]``, filled up with NaN.
        flip: ``[G, words]``.
        image: ``[planes * N, H + 2 top, W + 2 left, G, words]``.
        geometry: See ``convolve``.
        first, last: Which rows.
    """
    images, height, width, channels = geometry[:4]
    top, left = geometry[11], geometry[12]
    groups, words = image.shape[3], image.shape[4]
    levels, per_group, planes = threshold.shape[0], channels // groups, image.shape[0] // images
    flat, flips, together, limits = image.reshape(image.size), flip.reshape(flip.size), groups * words, threshold.ctypes.data
    rest, bits = np.empty(32, np.float32), np.empty(words, np.int32)
    for row in range(first, last):
        n, h = row // height, row % height
        values = x + 4 * row * width * channels
        if levels == 1 and per_group == 32 * words:  # nothing but whole words, one after the other
            place = ((n * image.shape[1] + top + h) * image.shape[2] + left) * together
            for _ in range(width):
                for i in range(together):
                    flat[place + i] = _image_word(pack_bits_of_32(values + 128 * i, limits + 128 * i, 0, 0, 1, 1) ^ flips[i])
                place, values = place + together, values + 4 * channels
            continue
        for plane in range(planes):
            step = 1 << plane
            for w in range(width):
                for g in range(groups):
                    _pack_run(
                        values + 4 * (w * channels + g * per_group), limits + 128 * g * words, 128 * together, step - 1, step, levels,
                        per_group, rest, bits,
                    )  # fmt: skip
                    for word in range(words):
                        image[plane * images + n, top + h, left + w, g, word] = _image_word(bits[word] ^ flip[g, word])


_pack_compiled: Any = numba.njit(_pack)


def _signs(y: int, positions: int, outputs: int, limits: Floats, flips: Words, signs: int) -> None:
    """Signs ``(y >= limit) ^ flip`` of outputs ``[positions, outputs]`` at address ``y``, as words at address ``signs``."""
    rest, bits = np.empty(32, np.float32), np.empty(flips.size, np.int32)
    for position in range(positions):
        _pack_run(y + 4 * position * outputs, limits.ctypes.data, 0, 0, 1, 1, outputs, rest, bits)
        for word in range(bits.size):
            bits[word] ^= flips[word]
        copy_bytes(signs + 4 * position * bits.size, bits.ctypes.data, 4 * bits.size)


_signs_compiled: Any = numba.njit(_signs)


def place(signs: Words, image: Image, top: int, left: int) -> None:
    """Signs ``[N, H, W, words]`` into a padded image of words."""
    images, height, width, _ = signs.shape
    words = signs.reshape(images, height, width, *image.shape[3:])
    inner = image[:, top : top + height, left : left + width]
    inner[...] = _spread(words.view(np.uint32).astype(np.uint64)).view(np.int64) if FORM == "lookup" else words


def _either(job: int, has_mask: bool, x: int, totals: int, kinds: int, factors: int, residual: int, y: int) -> None:
    """The micro-kernel for weights with a mask, and for those without."""
    if has_mask:
        _masked(job, x, totals, kinds, factors, residual, y)
    else:
        _plain(job, x, totals, kinds, factors, residual, y)


_kernel: Any = numba.njit(_either)


def _part_of_tile(
    job: Table, x: int, totals: int, kinds: int, factors: int, residual: int, y: int, positions: int, size: int, scratch: Floats
) -> None:
    """Compute ``positions`` times ``size`` outputs, fewer than a tile has, in ``scratch``."""
    y_row, residual_row, factor_row, row = job[Job.Y_ROW], job[Job.RESIDUAL_ROW], job[Job.FACTOR_ROW], 4 * CHANNELS
    job[Job.Y_ROW], job[Job.RESIDUAL_ROW], job[Job.FACTOR_ROW] = row, row, 4
    work = scratch.ctypes.data
    own_residual, own_factors = work + ROWS * row if residual else 0, work + 2 * ROWS * row if factors else 0
    for r in range(positions):
        if residual:
            copy_bytes(own_residual + r * row, residual + r * residual_row, 4 * size)
        if factors:
            copy_bytes(own_factors + 4 * r, factors + r * factor_row, 4)
    _kernel(job.ctypes.data, job[Job.MASK] != 0, x, totals, kinds, own_factors, own_residual, work)
    for r in range(positions):
        copy_bytes(y + r * y_row, work + r * row, 4 * size)
    job[Job.Y_ROW], job[Job.RESIDUAL_ROW], job[Job.FACTOR_ROW] = y_row, residual_row, factor_row


_part: Any = numba.njit(_part_of_tile)


def _convolve(
    image: Image,
    weight: Weight,
    mask: Weight,
    totals: Words,
    row_kinds: Table,
    column_kinds: Table,
    scale: Floats,
    bias: Floats,
    activation: Floats,
    factors: int,
    residual: int,
    y: int,
    geometry: Geometry,
    first: int,
    last: int,
) -> None:
    """Rows ``first`` to ``last`` of the outputs, counted over images and output rows.

    ``y = activated(dot * (scale * factor) + bias + residual)`` with ``dot = total - 2 count``: the image holds zeros as padding, that is
    -1, and where the window reaches over the border, ``total`` makes up for it. With several bits of inputs and weights, ``count`` is the
    sum of ``2**(p + q)`` times the count of bit ``p`` of the inputs and ``q`` of the weights.

    Args:
        image: ``[input bits * N, H + 2 top, W + 2 left, G, words]``; behind it lies memory for ``ROWS`` more positions.
        weight: ``[weight bits * G, tiles, kernel height * width * words, ...]``, a row the words of ``CHANNELS`` outputs as the micro-kernel
            wants them.
        mask: Like ``weight``, or empty.
        totals: ``[G, tiles, kinds of rows, kinds of columns, CHANNELS]``.
        row_kinds, column_kinds: ``[rows]`` and ``[columns + ROWS]``: the bytes from a tile of ``totals`` to a kind.
        scale, bias: ``[G, tiles, CHANNELS]``.
        activation: ``[G, tiles, 5, CHANNELS]`` or empty.
        factors: Address of ``[N, rows, columns, G]`` float32; 0 for none.
        residual: Address of ``[N, rows, columns, out]`` float32; 0 for none.
        y: Address of ``[N, rows, columns, out]`` float32.
        geometry: ``N``, height, width and number of channels of the input, rows, columns and number of channels of the output; kernel
            size, stride, padding (top, left) and dilation, each vertical and horizontal.
        first, last: Which rows.
    """
    images, _, _, _, rows, columns, outputs, kernel_h, kernel_w, stride_h, stride_w, _, _, dilation_h, dilation_w = geometry
    groups, words, tiles = image.shape[3], image.shape[4], weight.shape[1]
    pixel, channels = groups * words, outputs // groups
    line = image.shape[2] * pixel
    plane = _STEP * images * image.shape[1] * line  # bytes from one bit of the inputs to the next
    input_bits, weight_bits = image.shape[0] // images, weight.shape[0] // groups
    counts, scratch = np.empty(ROWS * CHANNELS, np.int32), np.empty(2 * ROWS * CHANNELS + ROWS, np.float32)
    job = np.empty(FIELDS, np.int64)
    job[Job.X_ROW], job[Job.Y_RUNS], job[Job.Y_STRIDE] = stride_w * pixel, kernel_h, dilation_h * line
    job[Job.X_RUNS], job[Job.X_STRIDE], job[Job.LENGTH] = kernel_w, dilation_w * pixel, words
    if groups == 1 and dilation_w == 1:
        job[Job.X_RUNS], job[Job.LENGTH] = 1, kernel_w * words
    job[Job.COUNTS], job[Job.FACTOR_ROW], job[Job.RESIDUAL_ROW], job[Job.Y_ROW] = counts.ctypes.data, 4 * groups, 4 * outputs, 4 * outputs
    for g in range(groups):
        for tile in range(tiles):
            begin, part = g * channels + tile * CHANNELS, g * tiles + tile
            size = min(CHANNELS, (g + 1) * channels - begin)
            job[Job.SCALE], job[Job.BIAS] = scale.ctypes.data + 4 * CHANNELS * part, bias.ctypes.data + 4 * CHANNELS * part
            job[Job.ACTIVATION] = activation.ctypes.data + activation.strides[1] * part if activation.size else 0
            for row in range(first, last):
                n, oy = row // rows, row % rows
                start = image.ctypes.data + _STEP * ((n * image.shape[1] + oy * stride_h) * line + g * words)
                total = totals.ctypes.data + totals.strides[1] * part + row_kinds[oy]
                for ox in range(0, columns, ROWS):
                    position = row * columns + ox
                    place = 4 * (position * outputs + begin)
                    # from the pair of the highest bits on: what was counted is doubled from one sum of p and q to the next
                    before = input_bits + weight_bits - 2
                    for both in range(before, -1, -1):
                        for p in range(max(both - weight_bits + 1, 0), min(both + 1, input_bits)):
                            q = both - p
                            at = (q * groups + g) * weight.strides[0] + tile * weight.strides[1]
                            job[Job.WEIGHT], job[Job.MASK] = weight.ctypes.data + at, mask.ctypes.data + at if mask.size else 0
                            job[Job.IS_FIRST], job[Job.IS_LAST] = p + q == input_bits + weight_bits - 2, p + q == 0
                            job[Job.SHIFT], before = before - both, both
                            at_x, kinds = start + p * plane + _STEP * ox * stride_w * pixel, column_kinds.ctypes.data + 8 * ox
                            at_factors = factors + 4 * (position * groups + g) if factors else 0
                            at_residual = residual + place if residual else 0
                            if size == CHANNELS and ox + ROWS <= columns:
                                _kernel(job.ctypes.data, mask.size > 0, at_x, total, kinds, at_factors, at_residual, y + place)
                            else:
                                positions = min(ROWS, columns - ox)
                                _part(job, at_x, total, kinds, at_factors, at_residual, y + place, positions, size, scratch)


_convolve_compiled: Any = numba.njit(_convolve)


def _layer(
    x: int,
    threshold: Floats,
    flip: Words,
    image: Image,
    weight: Weight,
    mask: Weight,
    totals: Words,
    row_kinds: Table,
    column_kinds: Table,
    scale: Floats,
    bias: Floats,
    activation: Floats,
    limits: Floats,
    flips: Words,
    factors: int,
    residual: int,
    y: int,
    geometry: Geometry,
    first: int,
    last: int,
) -> None:
    """Rows ``first`` to ``last`` of the outputs, counted over images and output rows, and all that is packed for them.

    Args:
        x, threshold, flip, image: See ``pack``; where the address ``x`` is 0, the image is packed already.
        weight, mask, totals, row_kinds, column_kinds, scale, bias, activation, factors, residual, geometry: See ``convolve``.
        limits, flips: ``[32 words]``, filled up with NaN, and ``[words]``: signs of outputs are ``(y >= limit) ^ flip``; or empty.
        y: Address of ``[N, rows, columns, out]`` float32, with ``limits`` of ``[N, rows, columns, words]`` int32.
        first, last: Which rows.
    """
    _, height, _, _, rows, columns, outputs, kernel_h, _, stride_h, _, top, _, dilation_h, _ = geometry
    step = max(BLOCK // (columns * outputs), 1)
    values = np.empty(step * columns * outputs if flips.size else 0, np.float32)
    packed = first // rows * height  # rows of inputs
    begin = first
    while begin < last:
        n = begin // rows
        end = min(begin + step, last, (n + 1) * rows)
        if x:
            needed = (end - 1 - n * rows) * stride_h - top + (kernel_h - 1) * dilation_h + 1
            needed = n * height + min(max(needed, 0), height)
            _pack_compiled(x, threshold, flip, image, geometry, packed, needed)
            packed = (n + 1) * height if end == (n + 1) * rows else needed
        at = begin * columns
        out = values.ctypes.data - 4 * at * outputs if flips.size else y
        _convolve_compiled(
            image, weight, mask, totals, row_kinds, column_kinds, scale, bias, activation, factors, residual, out, geometry, begin, end
        )
        if flips.size:
            _signs_compiled(values.ctypes.data, (end - begin) * columns, outputs, limits, flips, y + 4 * at * flips.size)
        begin = end


def _array(kind: Any, rank: int) -> Any:
    return types.Array(kind, rank, "C", aligned=True)


_FLOATS, _WORDS, _INDEX = types.float32, types.int32, types.int64
_IMAGE, _WEIGHT = (types.int64, types.uint8) if FORM == "lookup" else (types.int32, types.int32)
_PACKING = types.intp, _array(_FLOATS, 3), _array(_WORDS, 2), _array(_IMAGE, 5)
_GEOMETRY = types.UniTuple(_INDEX, 15)
_LAYER = types.void(
    *_PACKING, _array(_WEIGHT, 4), _array(_WEIGHT, 4), _array(_WORDS, 5), _array(_INDEX, 1), _array(_INDEX, 1), _array(_FLOATS, 3),
    _array(_FLOATS, 3), _array(_FLOATS, 4), _array(_FLOATS, 1), _array(_WORDS, 1), _INDEX, _INDEX, _INDEX, _GEOMETRY, _INDEX, _INDEX,
)  # fmt: skip

FOLDER = compiled.cache_folder(_target.name, [Path(__file__), Path(__file__).with_name("micro_kernel.py")])
with compiled.cached_in(FOLDER) as is_cached:
    pack = numba.njit([types.void(*_PACKING, _GEOMETRY, _INDEX, _INDEX)], nogil=True, cache=is_cached)(_pack)
    layer = numba.njit([_LAYER], nogil=True, cache=is_cached)(_layer)
