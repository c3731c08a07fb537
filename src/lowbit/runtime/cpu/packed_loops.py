"""Loops around the dot kernels of packed weights, compiled for this processor when the module is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.dot_kernel import GROUP, ROWS, make_dot_kernel
from lowbit.runtime.cpu.target import active_target, processor_features

Floats = npt.NDArray[np.float32]

if not active_target()[0].lanes or getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("there are no compiled kernels for this processor, or numba is disabled (NUMBA_DISABLE_JIT)")
_features = processor_features() if active_target()[0].name.startswith("avx") else frozenset()
_has_wide_dot = active_target()[0].name.startswith("avx512") and "avx512vnni" in _features
HAS_DOT = _has_wide_dot or {"avx512vnni", "avx512vl"} <= _features
LANES = 64 if _has_wide_dot else 32 if HAS_DOT else 16


_dot1, _dot2, _dot4, _dot8 = (make_dot_kernel(bits, LANES, has_dot=HAS_DOT) for bits in (1, 2, 4, 8))


def _multiply(
    codes: npt.NDArray[np.uint8], x: npt.NDArray[np.int8], out: npt.NDArray[np.int32], bit_width: int, first: int, last: int
) -> None:
    """``out[m, r] = sum_k codes[r, k] x[m, k]`` for rows ``ROWS * first`` to ``ROWS * last``."""
    groups = codes.shape[1] // GROUP
    for tile in range(first, last):
        start = codes[tile * ROWS].ctypes.data
        for m in range(x.shape[0]):
            inputs, outputs = x[m].ctypes.data, out[m].ctypes.data + 4 * tile * ROWS
            if bit_width == 1:
                _dot1(start, codes.shape[1], inputs, groups, outputs)
            elif bit_width == 2:
                _dot2(start, codes.shape[1], inputs, groups, outputs)
            elif bit_width == 4:
                _dot4(start, codes.shape[1], inputs, groups, outputs)
            else:
                _dot8(start, codes.shape[1], inputs, groups, outputs)


def _quantize(x: Floats, codes: npt.NDArray[np.int8], scales: Floats, sums: Floats) -> None:
    """``codes = round(x / scale)`` with ``scale = max |x| / 127`` for each row, NaN where a row is not finite, and the sums of the codes.

    Codes beyond a row of ``x`` are 0.
    """
    magic = np.float32(1.5 * 2**23)  # added to and taken from a small number, it rounds it half to even
    for m in range(x.shape[0]):
        row, out = x[m], codes[m, : x.shape[1]]
        largest, total = np.float32(0), np.float32(0)
        for k in range(row.size):
            size = abs(row[k])
            largest = largest if size <= largest else size  # NaN stays
        is_finite = largest < np.float32(np.inf)
        scale = largest / np.float32(127) if largest > 0 else np.float32(1)
        scales[m, 0] = scale if is_finite else np.float32(np.nan)
        for k in range(row.size):
            code = (row[k] / scale + magic) - magic if is_finite else np.float32(0)
            code = min(max(code, np.float32(-127)), np.float32(127))
            out[k] = np.int8(np.int32(code))
            total += code
        sums[m, 0] = total
        codes[m, x.shape[1] :] = 0


def _finish(found: npt.NDArray[np.int32], table: Floats, scales: Floats, sums: Floats, bias: Floats, y: Floats) -> None:
    """``y = (found * step + sum * lowest) * scale + bias`` with the rows ``lowest, step`` of the table; ``bias`` ``[1, out]`` or empty."""
    same = table.shape[0] == 1
    for m in range(y.shape[0]):
        scale, total = scales[m, 0], sums[m, 0]
        for r in range(y.shape[1]):
            lowest, step = table[0 if same else r, 0], table[0 if same else r, 1]
            value = (np.float32(found[m, r]) * step + total * lowest) * scale
            y[m, r] = value + bias[0, r] if bias.size else value


def _array(kind: Any) -> Any:
    return types.Array(kind, 2, "C", aligned=True)


_FLOATS, _BYTES, _SUMS = _array(types.float32), _array(types.int8), _array(types.int32)
_QUANTIZE = types.void(_FLOATS, _BYTES, _FLOATS, _FLOATS)
_MULTIPLY = types.void(_array(types.uint8), _BYTES, _SUMS, *[types.int64] * 3)
_FINISH = types.void(_SUMS, *[_FLOATS] * 5)
_SOURCES = [Path(__file__), Path(__file__).with_name("dot_kernel.py")]
FOLDER = compiled.cache_folder(f"{active_target()[0].name}-dot{LANES}{'v' if HAS_DOT else ''}", _SOURCES)
with compiled.cached_in(FOLDER) as is_cached:
    quantize = numba.njit([_QUANTIZE], nogil=True, cache=is_cached)(_quantize)
    multiply = numba.njit([_MULTIPLY], nogil=True, cache=is_cached)(_multiply)
    finish = numba.njit([_FINISH], nogil=True, cache=is_cached)(_finish)
