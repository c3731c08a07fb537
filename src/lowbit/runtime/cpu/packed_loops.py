"""Loops around the dot kernels of packed weights, compiled for this processor when the module is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba import types

from lowbit.runtime.cpu import compiled
from lowbit.runtime.cpu.dot_kernel import UNIT, VECTORS, make_dot_kernel
from lowbit.runtime.cpu.target import active_target, processor_features

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Codes = npt.NDArray[np.int8]
Sums = npt.NDArray[np.int32]

_target = active_target()[0]
if not _target.lanes or getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("there are no compiled kernels for this processor, or numba is disabled (NUMBA_DISABLE_JIT)")
_features = processor_features() if _target.name.startswith("avx") else frozenset()
_has_wide_dot = _target.name.startswith("avx512") and "avx512vnni" in _features
HAS_DOT = _has_wide_dot or {"avx512vnni", "avx512vl"} <= _features
LANES = 64 if _has_wide_dot else 32 if HAS_DOT else 4 * _target.floats
OUTPUTS = VECTORS * LANES // 4  # outputs in a tile
ROWS = 4  # rows of inputs whose sums are kept in registers
TILES_AT_ONCE = 4  # tiles that are finished together
INPUTS_AT_ONCE = 64  # rows of inputs that stay in the cache while the weight is read

_dot_one, _dot_some = (make_dot_kernel(rows, LANES, has_dot=HAS_DOT) for rows in (1, ROWS))


def _finish(found: Sums, table: Floats, scales: Floats, sums: Floats, bias: Floats, y: Floats, begin: int, end: int) -> None:
    """``y = (found * step + sum * lowest) * scale + bias`` for outputs ``begin`` to ``end`` with the sums ``found``."""
    lowest, step = np.empty(end - begin, np.float32), np.empty(end - begin, np.float32)
    for r in range(end - begin):
        row = 0 if table.shape[0] == 1 else begin + r
        lowest[r], step[r] = table[row, 0], table[row, 1]
    for m in range(y.shape[0]):
        scale, total, products, out = scales[m, 0], sums[m, 0], found[m], y[m, begin:end]
        for r in range(out.size):
            out[r] = (np.float32(products[r]) * step[r] + total * lowest[r]) * scale
        if bias.size:
            added = bias[0, begin:end]
            for r in range(out.size):
                out[r] += added[r]


_finish_compiled: Any = numba.njit(_finish)


def _multiply(
    codes: Bytes,
    x: Codes,
    table: Floats,
    scales: Floats,
    sums: Floats,
    bias: Floats,
    y: Floats,
    bit_width: int,
    first: int,
    last: int,
) -> None:
    """``y[m, r] = (sum_k codes[r, k] x[m, k] * step + sums[m] * lowest) * scales[m] + bias[r]`` for tiles ``first`` to ``last`` of outputs.

    Args:
        codes: Packed codes ``[units, groups, 4 * UNIT]``.
        x: Input codes ``[rows, codes]``, padded to a multiple of ``ROWS`` rows.
        table: ``[out or 1, 2]``: ``lowest, step``.
        scales, sums: Scale and sum of the codes of each row of ``x``, ``[rows, 1]``.
        bias: ``[1, out]`` or empty.
        y: The result, ``[rows, out]``.
        bit_width: Bits of the packed codes: 1, 2, 4 or 8.
        first, last: Range of tiles of ``OUTPUTS`` outputs.
    """
    width, groups, line = TILES_AT_ONCE * OUTPUTS, codes.shape[1], x.shape[1]
    found = np.empty((INPUTS_AT_ONCE, width), np.int32)
    for m in range(0, y.shape[0], INPUTS_AT_ONCE):
        end_m = min(m + INPUTS_AT_ONCE, y.shape[0])
        for begin in range(first * OUTPUTS, last * OUTPUTS, width):
            end = min(begin + width, last * OUTPUTS, y.shape[1])
            for r in range(begin, end, OUTPUTS):
                unit = r // UNIT
                start = codes.ctypes.data + unit * groups * 4 * UNIT
                row = m
                while row < end_m:
                    inputs, here = x.ctypes.data + row * line, found.ctypes.data + 4 * ((row - m) * width + r - begin)
                    if end_m - row == 1:
                        _dot_one(start, bit_width, codes.shape[0] - unit, groups, inputs, line, here, 4 * width)
                    else:
                        _dot_some(start, bit_width, codes.shape[0] - unit, groups, inputs, line, here, 4 * width)
                    row += ROWS
            _finish_compiled(found, table, scales[m:end_m], sums[m:end_m], bias, y[m:end_m], begin, end)


def _quantize(x: Floats, codes: Codes, scales: Floats, sums: Floats) -> None:
    """Compute ``codes = round(x / scale)`` with ``scale = max |x| / 127`` for each row, and the sums of the codes.

    The scale of a row that is not finite is NaN. Codes beyond ``x`` are 0.
    """
    magic = np.float32(1.5 * 2**23)  # adding it to a small number and subtracting it again rounds half to even
    peak = np.empty(1, np.int32)
    for m in range(x.shape[0]):
        row, bits, out = x[m], x[m].view(np.int32), codes[m, : x.shape[1]]
        most = np.int32(0)
        for k in range(bits.size):  # the bits of magnitudes are ordered like the floats, with infinity and NaN last
            most = max(most, bits[k] & np.int32(0x7FFFFFFF))
        peak[0] = most
        largest, total = peak.view(np.float32)[0], np.int32(0)
        if most >= np.int32(0x7F800000):
            scales[m, 0] = np.nan
            out[:] = 0
        else:
            scale = largest / np.float32(127) if largest > 0 else np.float32(1)
            scales[m, 0] = scale
            for k in range(row.size):
                code = (row[k] / scale + magic) - magic
                code = min(max(code, np.float32(-127)), np.float32(127))
                out[k] = np.int8(np.int32(code))
                total += np.int32(code)
        sums[m, 0] = total
        codes[m, x.shape[1] :] = 0
    codes[x.shape[0] :] = 0


def _array(kind: Any) -> Any:
    return types.Array(kind, 2, "C", aligned=True)


_FLOATS, _CODES = _array(types.float32), _array(types.int8)
_QUANTIZE = types.void(_FLOATS, _CODES, _FLOATS, _FLOATS)
_MULTIPLY = types.void(types.Array(types.uint8, 3, "C", aligned=True), _CODES, *[_FLOATS] * 5, *[types.int64] * 3)
_SOURCES = [Path(__file__), Path(__file__).with_name("dot_kernel.py")]
FOLDER = compiled.cache_folder(f"{_target.name}-dot{LANES}{'v' if HAS_DOT else ''}", _SOURCES)
with compiled.cached_in(FOLDER) as is_cached:
    quantize = numba.njit([_QUANTIZE], nogil=True, cache=is_cached)(_quantize)
    multiply = numba.njit([_MULTIPLY], nogil=True, cache=is_cached)(_multiply)
