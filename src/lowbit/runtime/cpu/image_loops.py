"""Codes of 8 bits in one pass over an image, compiled for this processor when the module is imported; torch takes five and a copy."""

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


def _array(kind: Any, rank: int) -> Any:
    return types.Array(kind, rank, "C", aligned=True)


_FLOAT = types.float32
_ENCODE = types.void(_array(_FLOAT, 3), _array(types.uint8, 3), *[_FLOAT] * 4)
FOLDER = compiled.cache_folder(f"{active_target()[0].name}-images", [Path(__file__)])
with compiled.cached_in(FOLDER) as is_cached:
    encode = numba.njit([_ENCODE], nogil=True, cache=is_cached, error_model="numpy")(_encode)
