"""Loops around the micro-kernel, compiled for the active target when the module is imported.

Pack the signs of an image into words with the layer's padding around them, then convolve: every tile of output positions reads its
windows from the padded image where they lie, so that nothing is copied for overlapping windows. A few rows are packed just before they
are read.
"""

from __future__ import annotations

from enum import IntEnum, auto
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import carray, types  # type: ignore[attr-defined]

from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.micro_kernel import Job, Tile, copy_bytes, make_micro_kernel, pack_bits_of_32, pack_signs_of_32, pointer_to
from lowbit.runtime.cpu.target import active_target

Floats = npt.NDArray[np.float32]
Words = npt.NDArray[np.int32]
Image = npt.NDArray[np.int32] | npt.NDArray[np.int64]
Table = npt.NDArray[np.int64]

_target = active_target()[0]
if not _target.lanes or getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("there are no compiled kernels for this processor, or numba is disabled (NUMBA_DISABLE_JIT)")
ROWS, CHANNELS, FORM = _target.rows, _target.lanes * _target.columns, _target.form
IMAGE, WEIGHT = (np.dtype(np.int64), np.dtype(np.uint8)) if FORM == "lookup" else (np.dtype(np.int32),) * 2
_STEP = IMAGE.itemsize
FIELDS = len(Job)
BLOCK = 2**16  # outputs that are computed between packing and packing
_plain, _masked = (make_micro_kernel(Tile(FORM, _target.lanes, ROWS, _target.columns, _target.floats, masked)) for masked in (False, True))


class Field(IntEnum):
    """Places in the table of int64 that tells the loops what calls of a layer with inputs of one size have in common.

    Numbers are counts; arrays are given by their addresses, 0 for none. A call passes only the table and what is new: passing a dozen
    arrays would take longer than to pack a small image.

    Attributes:
        IMAGES, HEIGHT, WIDTH, CHANNELS: Size of the input, ``[N, H, W, C]``.
        ROWS, COLUMNS, OUTPUTS: Size of the output.
        KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, TOP, LEFT, DILATION_H, DILATION_W: The window; ``TOP`` and ``LEFT`` are its padding.
        GROUPS, WORDS: Groups, and the words of a group at each position of the input.
        INPUT_BITS, WEIGHT_BITS: Bits of inputs and weights.
        LEVELS, THRESHOLD: ``[levels, G, 32 words]`` float32, in ascending order, filled up with NaN: the input's bits, see ``pack``.
        FLIP: ``[G, words]`` int32: signs that are the other way round.
        IMAGE: ``[input bits * N, H + 2 top, W + 2 left, G, words]``: where inputs are packed; behind it lies memory for ``ROWS`` more positions.
        WEIGHT: ``[weight bits * G, tiles, kernel height * width * words, ...]``, a row the words of ``CHANNELS`` outputs as the
            micro-kernel wants them.
        MASK: Like ``WEIGHT``.
        TOTALS, TILE_OF_TOTALS: ``[G, tiles, kinds of rows, kinds of columns, CHANNELS]`` int32, and the bytes from one tile to the next.
        ROW_KINDS, COLUMN_KINDS: ``[rows]`` and ``[columns + ROWS]`` int64: the bytes from a tile of ``TOTALS`` to a kind.
        SCALE, BIAS: ``[G, tiles, CHANNELS]`` float32.
        ACTIVATION: ``[G, tiles, 5, CHANNELS]`` float32.
        OUT_THRESHOLD, OUT_FLIP: ``[32 words]`` float32, filled up with NaN, and ``[words]`` int32: the signs of outputs.
    """

    IMAGES = 0
    HEIGHT = auto()
    WIDTH = auto()
    CHANNELS = auto()
    ROWS = auto()
    COLUMNS = auto()
    OUTPUTS = auto()
    KERNEL_H = auto()
    KERNEL_W = auto()
    STRIDE_H = auto()
    STRIDE_W = auto()
    TOP = auto()
    LEFT = auto()
    DILATION_H = auto()
    DILATION_W = auto()
    GROUPS = auto()
    WORDS = auto()
    INPUT_BITS = auto()
    WEIGHT_BITS = auto()
    LEVELS = auto()
    THRESHOLD = auto()
    FLIP = auto()
    IMAGE = auto()
    WEIGHT = auto()
    MASK = auto()
    TOTALS = auto()
    TILE_OF_TOTALS = auto()
    ROW_KINDS = auto()
    COLUMN_KINDS = auto()
    SCALE = auto()
    BIAS = auto()
    ACTIVATION = auto()
    OUT_THRESHOLD = auto()
    OUT_FLIP = auto()


def table_of(**values: int | npt.NDArray[np.generic]) -> Table:
    """A table with these fields by name, the others 0. It does not keep the arrays alive."""
    table = np.zeros(len(Field), np.int64)
    for name, value in values.items():
        table[Field[name]] = value if isinstance(value, int) else value.ctypes.data if value.size else 0
    return table


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


def _at(address: Any, count: Any, kind: Any) -> Any:
    """The array of ``count`` numbers at an address."""
    return carray(pointer_to(address), (count,), kind)


_array_at: Any = numba.njit(_at)


def _pack_whole_words(x: int, channels: int, limits: int, flips: Words, count: int, signs: int, words: int) -> None:
    """Signs ``(x[i, c] >= limits[c]) ^ flip[c]`` of ``count`` pixels, as ``flips.size`` of the ``words`` that each pixel has at ``signs``."""
    for word in range(flips.size):
        pack_signs_of_32(x + 128 * word, 4 * channels, limits + 128 * word, count, signs + 4 * word, 4 * words)
        if flips[word]:
            found = _array_at(signs + 4 * word, count * words - word, np.int32)
            for i in range(0, found.size, words):
                found[i] ^= flips[word]


_pack_whole: Any = numba.njit(_pack_whole_words)


def _pack_words(x: int, thresholds: int, stride: int, first: int, step: int, levels: int, count: int, rest: Floats, bits: Words) -> None:
    """The bits of ``count`` numbers at address ``x`` as words, as ``pack_bits_of_32`` does; ``rest`` is memory to work in."""
    for word in range(bits.size):
        values, left = x + 128 * word, count - 32 * word
        if left < 32:  # the thresholds behind the last number are NaN, which nothing reaches
            copy_bytes(rest.ctypes.data, values, 4 * left)
            values = rest.ctypes.data
        bits[word] = pack_bits_of_32(values, thresholds + 128 * word, stride, first, levels, step)


_pack_run: Any = numba.njit(_pack_words)


def _pack(table: Table, x: int, first: int, last: int) -> None:
    """The bits of the number of thresholds that each ``x[n, h, w, c]`` reaches, in the padded images of words of each bit.

    With one threshold, ``image[n, top + h, left + w, g, :]`` are the signs of ``x[n, h, w, group g] >= threshold``, flipped where ``flip``
    has ones. With more of them, in ascending order, ``image[p N + n]`` are bits ``p`` of their number: threshold ``k`` turns bit ``p``
    over if ``2**p`` divides ``k``. For rows ``first`` to ``last`` of all images, counted over ``n`` and ``h``.

    Args:
        table: See ``Field``.
        x: Address of ``[N, H, W, C]`` float32.
        first, last: Which rows.
    """
    images, height, width, channels = table[Field.IMAGES], table[Field.HEIGHT], table[Field.WIDTH], table[Field.CHANNELS]
    top, left, groups, words = table[Field.TOP], table[Field.LEFT], table[Field.GROUPS], table[Field.WORDS]
    levels, planes, limits = table[Field.LEVELS], table[Field.INPUT_BITS], table[Field.THRESHOLD]
    per_group, together = channels // groups, groups * words
    lines, line = height + 2 * top, (width + 2 * left) * together
    image = _array_at(table[Field.IMAGE], planes * images * lines * line, IMAGE)
    flips = _array_at(table[Field.FLIP], together, np.int32)
    rest, bits = np.empty(32, np.float32), np.empty(words, np.int32)
    packed = np.empty(width * together if FORM == "lookup" else 0, np.int32)
    for row in range(first, last):
        n, h = row // height, row % height
        values, place = x + 4 * row * width * channels, (n * lines + top + h) * line + left * together
        if levels == 1 and per_group == 32 * words:  # nothing but whole words, one after the other
            signs = packed.ctypes.data if FORM == "lookup" else table[Field.IMAGE] + _STEP * place
            _pack_whole(values, channels, limits, flips, width, signs, together)
            for i in range(packed.size):
                image[place + i] = _image_word(packed[i])
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
                        at = plane * images * lines * line + place + w * together + g * words + word
                        image[at] = _image_word(bits[word] ^ flips[g * words + word])


_pack_compiled: Any = numba.njit(_pack)


def _signs(table: Table, y: int, positions: int, signs: int) -> None:
    """Signs ``(y >= threshold) ^ flip`` of outputs ``[positions, outputs]`` at address ``y``, as words at address ``signs``."""
    outputs, limits = table[Field.OUTPUTS], table[Field.OUT_THRESHOLD]
    words = (outputs + 31) // 32
    flips, rest, bits = _array_at(table[Field.OUT_FLIP], words, np.int32), np.empty(32, np.float32), np.empty(words, np.int32)
    _pack_whole(y, outputs, limits, flips[: outputs // 32], positions, signs, words)
    if outputs % 32:
        last = words - 1
        for position in range(positions):
            _pack_run(y + 4 * position * outputs + 128 * last, limits + 128 * last, 0, 0, 1, 1, outputs % 32, rest, bits[:1])
            bits[0] ^= flips[last]
            copy_bytes(signs + 4 * (position * words + last), bits.ctypes.data, 4)


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
    job: Table, has_mask: bool, x: int, totals: int, kinds: int, factors: int, residual: int, y: int, positions: int, size: int,
    scratch: Floats,
) -> None:  # fmt: skip
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
    _kernel(job.ctypes.data, has_mask, x, totals, kinds, own_factors, own_residual, work)
    for r in range(positions):
        copy_bytes(y + r * y_row, work + r * row, 4 * size)
    job[Job.Y_ROW], job[Job.RESIDUAL_ROW], job[Job.FACTOR_ROW] = y_row, residual_row, factor_row


_part: Any = numba.njit(_part_of_tile)


def _convolve(table: Table, factors: int, residual: int, y: int, first: int, last: int) -> None:
    """Rows ``first`` to ``last`` of the outputs, counted over images and output rows.

    ``y = activated(dot * (scale * factor) + bias + residual)`` with ``dot = total - 2 count``: the image holds zeros as padding, that is
    -1, and where the window reaches over the border, ``total`` makes up for it. With several bits of inputs and weights, ``count`` is the
    sum of ``2**(p + q)`` times the count of bit ``p`` of the inputs and ``q`` of the weights.

    Args:
        table: See ``Field``.
        factors: Address of ``[N, rows, columns, G]`` float32; 0 for none.
        residual: Address of ``[N, rows, columns, out]`` float32; 0 for none.
        y: Address of ``[N, rows, columns, out]`` float32.
        first, last: Which rows.
    """
    rows, columns, outputs, groups, words = (
        table[Field.ROWS], table[Field.COLUMNS], table[Field.OUTPUTS], table[Field.GROUPS], table[Field.WORDS],
    )  # fmt: skip
    kernel_h, kernel_w, dilation_w = table[Field.KERNEL_H], table[Field.KERNEL_W], table[Field.DILATION_W]
    pixel, channels = groups * words, outputs // groups
    tiles, tile_bytes = (channels + CHANNELS - 1) // CHANNELS, 4 * kernel_h * kernel_w * words * CHANNELS
    line, lines = (table[Field.WIDTH] + 2 * table[Field.LEFT]) * pixel, table[Field.HEIGHT] + 2 * table[Field.TOP]
    stride = table[Field.STRIDE_W] * pixel
    row_kinds, has_mask = _array_at(table[Field.ROW_KINDS], rows, np.int64), table[Field.MASK] != 0

    # from the pair of the highest bits on: what was counted is doubled from one sum of p and q to the next
    input_bits, weight_bits = table[Field.INPUT_BITS], table[Field.WEIGHT_BITS]
    pairs, step, before = np.empty((input_bits * weight_bits, 3), np.int64), 0, input_bits + weight_bits - 2
    for both in range(before, -1, -1):
        for p in range(max(both - weight_bits + 1, 0), min(both + 1, input_bits)):
            pairs[step, 0] = _STEP * p * table[Field.IMAGES] * lines * line
            pairs[step, 1], pairs[step, 2] = (both - p) * groups * tiles * tile_bytes, before - both
            step, before = step + 1, both

    counts, scratch = np.empty(ROWS * CHANNELS, np.int32), np.empty(2 * ROWS * CHANNELS + ROWS, np.float32)
    job = np.empty(FIELDS, np.int64)
    job[Job.X_ROW], job[Job.Y_RUNS], job[Job.Y_STRIDE] = stride, kernel_h, table[Field.DILATION_H] * line
    job[Job.X_RUNS], job[Job.X_STRIDE], job[Job.LENGTH] = kernel_w, dilation_w * pixel, words
    if groups == 1 and dilation_w == 1:
        job[Job.X_RUNS], job[Job.LENGTH] = 1, kernel_w * words
    job[Job.COUNTS], job[Job.FACTOR_ROW], job[Job.RESIDUAL_ROW], job[Job.Y_ROW] = counts.ctypes.data, 4 * groups, 4 * outputs, 4 * outputs
    for part in range(groups * tiles):
        g, tile = part // tiles, part % tiles
        begin, size = g * channels + tile * CHANNELS, min(CHANNELS, channels - tile * CHANNELS)
        weight, mask = table[Field.WEIGHT] + part * tile_bytes, table[Field.MASK] + part * tile_bytes
        job[Job.SCALE], job[Job.BIAS] = table[Field.SCALE] + 4 * CHANNELS * part, table[Field.BIAS] + 4 * CHANNELS * part
        job[Job.ACTIVATION] = table[Field.ACTIVATION] + 20 * CHANNELS * part if table[Field.ACTIVATION] else 0
        for row in range(first, last):
            n, oy = row // rows, row % rows
            x = table[Field.IMAGE] + _STEP * ((n * lines + oy * table[Field.STRIDE_H]) * line + g * words)
            totals = table[Field.TOTALS] + table[Field.TILE_OF_TOTALS] * part + row_kinds[oy]
            for ox in range(0, columns, ROWS):
                position, positions = row * columns + ox, min(ROWS, columns - ox)
                place, kinds = 4 * (position * outputs + begin), table[Field.COLUMN_KINDS] + 8 * ox
                at_factors = factors + 4 * (position * groups + g) if factors else 0
                at_residual = residual + place if residual else 0
                for step in range(len(pairs)):
                    job[Job.WEIGHT], job[Job.MASK] = weight + pairs[step, 1], mask + pairs[step, 1]
                    job[Job.IS_FIRST], job[Job.IS_LAST], job[Job.SHIFT] = step == 0, step == len(pairs) - 1, pairs[step, 2]
                    at_x = x + pairs[step, 0] + _STEP * ox * stride
                    if size == CHANNELS and positions == ROWS:
                        _kernel(job.ctypes.data, has_mask, at_x, totals, kinds, at_factors, at_residual, y + place)
                    else:
                        _part(job, has_mask, at_x, totals, kinds, at_factors, at_residual, y + place, positions, size, scratch)


_convolve_compiled: Any = numba.njit(_convolve)


def _layer(table: Table, x: int, factors: int, residual: int, y: int, first: int, last: int) -> None:
    """Rows ``first`` to ``last`` of the outputs, counted over images and output rows, and all that is packed for them.

    Args:
        table: See ``Field``.
        x: See ``pack``; where the address is 0, the image is packed already.
        factors, residual: See ``convolve``.
        y: Address of ``[N, rows, columns, out]`` float32; with ``OUT_THRESHOLD`` of ``[N, rows, columns, words]`` int32.
        first, last: Which rows.
    """
    height, rows, columns, outputs = table[Field.HEIGHT], table[Field.ROWS], table[Field.COLUMNS], table[Field.OUTPUTS]
    reach = (table[Field.KERNEL_H] - 1) * table[Field.DILATION_H] + 1 - table[Field.TOP]
    words = (outputs + 31) // 32 if table[Field.OUT_THRESHOLD] else 0
    step = max(BLOCK // (columns * outputs), 1)
    values = np.empty(step * columns * outputs if words else 0, np.float32)
    packed = first // rows * height  # rows of inputs
    begin = first
    while begin < last:
        n = begin // rows
        end = min(begin + step, last, (n + 1) * rows)
        if x:
            needed = (end - 1 - n * rows) * table[Field.STRIDE_H] + reach
            needed = n * height + min(max(needed, 0), height)
            _pack_compiled(table, x, packed, needed)
            packed = (n + 1) * height if end == (n + 1) * rows else needed
        at = begin * columns
        out = values.ctypes.data - 4 * at * outputs if words else y
        _convolve_compiled(table, factors, residual, out, begin, end)
        if words:
            _signs_compiled(table, values.ctypes.data, (end - begin) * columns, y + 4 * at * words)
        begin = end


_INDEX, _TABLE = types.int64, types.Array(types.int64, 1, "C", aligned=True)

FOLDER = compiled.cache_folder(_target.name, [Path(__file__), Path(__file__).with_name("micro_kernel.py")])
with compiled.cached_in(FOLDER) as is_cached:
    pack = numba.njit([types.void(_TABLE, *[_INDEX] * 3)], nogil=True, cache=is_cached)(_pack)
    layer = numba.njit([types.void(_TABLE, *[_INDEX] * 6)], nogil=True, cache=is_cached)(_layer)
