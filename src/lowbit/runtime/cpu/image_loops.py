"""Loops over images between low-bit layers, compiled for this processor when the module is imported.

Codes of 8 bits are made in one pass, where torch takes five and a copy; max pooling keeps what it has found in registers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.target import active_target

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CHUNK = 4096  # codes that stay in the nearest cache
VECTOR = 16  # channels that are pooled at once
AT_ONCE = 4  # vectors of them whose largest values are kept in registers


def _encode(x: Floats, codes: Bytes, lower: float, step: float, shift: float, top: float) -> None:
    """``codes[n, p, c] = clamp(round((x[n, c, p] - lower) / step) + shift, 0, top)``; NaN becomes 0."""
    magic = np.float32(1.5 * 2**23)  # adding it to a number below 2**22 and subtracting it again rounds half to even; others are clamped
    images, channels, count = x.shape
    chunk = min(count, CHUNK // channels + 1)
    found = np.empty((channels, chunk), np.uint8)
    for n in range(images):
        for begin in range(0, count, chunk):
            size = min(chunk, count - begin)
            for c in range(channels):
                values, out = x[n, c, begin : begin + size], found[c, :size]
                for i in range(out.size):
                    code = (((values[i] - lower) / step + magic) - magic) + shift
                    code = code if code > 0 else np.float32(0)
                    out[i] = np.uint8(np.int32(min(code, top)))
            pixels = codes[n, begin : begin + size]
            for c in range(channels):
                out = found[c, :size]
                for i in range(out.size):
                    pixels[i, c] = out[i]


def _pool_window(_context, x, row_bytes, rows, pixel_bytes, pixels, y):  # type: ignore[no-untyped-def]
    """``(x, row_bytes, rows, pixel_bytes, pixels, y)``: the largest values of ``VECTOR * AT_ONCE`` channels in a window, or NaN where there is one.

    Addresses of the window's first pixel and of the result, the bytes from one row and from one pixel of the window to the next, and how many.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, row_bytes, rows, pixel_bytes, pixels, y = arguments
        floats, bits = ir.VectorType(ir.FloatType(), VECTOR), ir.VectorType(ir.IntType(1), VECTOR)
        lowest, nan = (ir.Constant(floats, [number] * VECTOR) for number in (-np.inf, np.nan))
        largest = [cgutils.alloca_once_value(builder, lowest) for _ in range(AT_ONCE)]
        is_nan = [cgutils.alloca_once_value(builder, ir.Constant(bits, None)) for _ in range(AT_ONCE)]

        def place(base: Any, index: int) -> Any:
            address = builder.add(base, ir.Constant(ir.IntType(64), 4 * VECTOR * index))
            return builder.inttoptr(address, floats.as_pointer())

        with cgutils.for_range(builder, rows) as row, cgutils.for_range(builder, pixels) as pixel:
            offset = builder.add(builder.mul(row.index, row_bytes), builder.mul(pixel.index, pixel_bytes))
            pixel_address = builder.add(x, offset)
            for index in range(AT_ONCE):
                value, found = builder.load(place(pixel_address, index), align=4), builder.load(largest[index])
                builder.store(builder.select(builder.fcmp_ordered(">", value, found), value, found), largest[index])
                builder.store(builder.or_(builder.load(is_nan[index]), builder.fcmp_unordered("uno", value, value)), is_nan[index])
        for index in range(AT_ONCE):
            result = builder.select(builder.load(is_nan[index]), nan, builder.load(largest[index]))
            builder.store(result, place(y, index), align=4)
        return cgutils.get_null_value(ir.IntType(8).as_pointer())

    return types.void(*[types.intp] * 6), generate


_largest_in_window: Any = intrinsic(_pool_window)


def _max_pool(x: Floats, y: Floats, window: tuple[int, ...]) -> None:
    """``y[n, h, w, c]`` is the largest value of ``x`` in the window, or NaN where there is one.

    Args:
        x: ``[N, H, W, C]``; ``C`` is a multiple of ``VECTOR * AT_ONCE``.
        y: ``[N, rows, columns, C]``.
        window: Kernel size, stride, padding and dilation, each vertical and horizontal.
    """
    kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w = window
    images, height, width, channels = x.shape
    rows, columns, line, step = y.shape[1], y.shape[2], 4 * width * channels, VECTOR * AT_ONCE
    for n in range(images):
        for oy in range(rows):
            first_y = oy * stride_h - top
            skipped_y = (max(-first_y, 0) + dilation_h - 1) // dilation_h  # rows of the window above the image
            count_y = min(kernel_h, (height - 1 - first_y) // dilation_h + 1) - skipped_y
            start = x.ctypes.data + (n * height + first_y + skipped_y * dilation_h) * line
            for ox in range(columns):
                first_x = ox * stride_w - left
                skipped_x = (max(-first_x, 0) + dilation_w - 1) // dilation_w
                count_x = min(kernel_w, (width - 1 - first_x) // dilation_w + 1) - skipped_x
                at = start + 4 * channels * (first_x + skipped_x * dilation_w)
                out = y.ctypes.data + 4 * channels * ((n * rows + oy) * columns + ox)
                for c in range(0, 4 * channels, 4 * step):
                    _largest_in_window(at + c, dilation_h * line, count_y, 4 * dilation_w * channels, count_x, out + c)


def _array(kind: Any, rank: int) -> Any:
    return types.Array(kind, rank, "C", aligned=True)


_FLOAT = types.float32
_MAX_POOL = types.void(_array(_FLOAT, 4), _array(_FLOAT, 4), types.UniTuple(types.int64, 8))
_ENCODE = types.void(_array(_FLOAT, 3), _array(types.uint8, 3), *[_FLOAT] * 4)
FOLDER = compiled.cache_folder(f"{active_target()[0].name}-images", [Path(__file__)])
with compiled.cached_in(FOLDER) as is_cached:
    encode = numba.njit([_ENCODE], nogil=True, cache=is_cached, error_model="numpy")(_encode)
    max_pool = numba.njit([_MAX_POOL], nogil=True, cache=is_cached)(_max_pool)
