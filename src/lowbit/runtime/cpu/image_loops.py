"""Loops over images between low-bit layers, compiled for this processor when the module is imported: codes of 8 bits, and max pooling.

Torch makes the codes of an image in five passes and a copy, and pools a position at a time; what is read here is read once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.target import active_target

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

CHUNK = 4096  # codes that stay in the nearest cache


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


def _max_pool(x: Floats, y: Floats, window: tuple[int, ...]) -> None:
    """``y[n, h, w, c]`` is the largest of ``x`` in the window, or NaN where there is one: first of its rows, then of its columns.

    Args:
        x: ``[N, H, W, C]``.
        y: ``[N, rows, columns, C]``.
        window: Kernel size, stride, padding and dilation, each vertical and horizontal.
    """
    kernel_h, kernel_w, stride_h, stride_w, top, left, dilation_h, dilation_w = window
    images, height, width, channels = x.shape
    line = np.empty(width * channels, np.float32)
    for n in range(images):
        for oy in range(y.shape[1]):
            line[:] = -np.inf
            for ky in range(kernel_h):
                iy = oy * stride_h - top + ky * dilation_h
                if 0 <= iy < height:
                    _keep_larger(line, x[n, iy].reshape(width * channels))
            for ox in range(y.shape[2]):
                out = y[n, oy, ox]
                out[:] = -np.inf
                for kx in range(kernel_w):
                    ix = ox * stride_w - left + kx * dilation_w
                    if 0 <= ix < width:
                        _keep_larger(out, line[ix * channels : (ix + 1) * channels])


def _larger(found: Floats, values: Floats) -> None:
    for i in range(found.size):
        value, largest = values[i], found[i]
        found[i] = value if value > largest or value != value else largest  # noqa: PLR0124 (NaN alone differs from itself)


_keep_larger: Any = numba.njit(_larger)


def _array(kind: Any, rank: int) -> Any:
    return types.Array(kind, rank, "C", aligned=True)


_FLOAT, _INDEX = types.float32, types.int64
_ENCODE = types.void(_array(_FLOAT, 3), _array(types.uint8, 3), *[_FLOAT] * 4)
_MAX_POOL = types.void(_array(_FLOAT, 4), _array(_FLOAT, 4), types.UniTuple(_INDEX, 8))
FOLDER = compiled.cache_folder(f"{active_target()[0].name}-images", [Path(__file__)])
with compiled.cached_in(FOLDER) as is_cached:
    encode = numba.njit([_ENCODE], nogil=True, cache=is_cached, error_model="numpy")(_encode)
    max_pool = numba.njit([_MAX_POOL], nogil=True, cache=is_cached)(_max_pool)
