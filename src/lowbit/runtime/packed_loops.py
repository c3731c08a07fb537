"""Loops around the dot kernels of packed weights, compiled for this processor when the module is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lowbit.runtime import compiled
from lowbit.runtime.dot_kernel import GROUP, ROWS, make_dot_kernel
from lowbit.runtime.target import active_target, processor_features

if not active_target()[0].lanes or getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("there are no compiled kernels for this processor, or numba is told not to compile")
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
    for unit in range(first, last):
        start = codes[unit * ROWS].ctypes.data
        for m in range(x.shape[0]):
            inputs, outputs = x[m].ctypes.data, out[m].ctypes.data + 4 * unit * ROWS
            if bit_width == 1:
                _dot1(start, codes.shape[1], inputs, groups, outputs)
            elif bit_width == 2:
                _dot2(start, codes.shape[1], inputs, groups, outputs)
            elif bit_width == 4:
                _dot4(start, codes.shape[1], inputs, groups, outputs)
            else:
                _dot8(start, codes.shape[1], inputs, groups, outputs)


def _array(kind: Any) -> Any:
    return types.Array(kind, 2, "C", aligned=True)


_SIGNATURE = types.void(_array(types.uint8), _array(types.int8), _array(types.int32), *[types.int64] * 3)
_SOURCES = [Path(__file__), Path(__file__).with_name("dot_kernel.py")]
FOLDER = compiled.cache_folder(f"{active_target()[0].name}-dot{LANES}{'v' if HAS_DOT else ''}", _SOURCES)
with compiled.cached_in(FOLDER) as is_cached:
    multiply = numba.njit([_SIGNATURE], nogil=True, cache=is_cached)(_multiply)
