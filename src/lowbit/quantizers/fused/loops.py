"""Loops that numba compiles for this processor when the module is imported; later processes read them from numba's cache.

Written so that LLVM turns them into vector code: a slice is taken first and ``range(slice.size)`` runs over it, conditions are
selections, rounding is ``llvm.rint`` (half to even), and float sums of gradients may be reordered and their products fused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from numba import types
from numba.extending import intrinsic

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

T = TypeVar("T")
BLOCK = 4096  # elements whose sums are kept in float32 lanes before they go to float64


def _rint(_context: Any, value: Any) -> Any:
    if value != types.float32:
        return None

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.call(builder.module.declare_intrinsic("llvm.rint", [args[0].type]), args)

    return types.float32(types.float32), generate


rint: Any = intrinsic(_rint)  # ``llvm.rint``: one instruction, where ``np.rint`` is a call


def _forward(x: Floats, y: Floats, grid: Floats, low: np.float32, high: np.float32, first: int, last: int) -> None:
    for row in range(x.shape[0]):
        values, out = x[row, first:last], y[row, first:last]
        lower, step, scale, zero_point = grid[0, row], grid[1, row], grid[2, row], grid[3, row]
        for i in range(values.size):
            position = (values[i] - lower) / step
            position = low if position < low else position
            position = high if position > high else position
            out[i] = (rint(position) - zero_point) * scale


def _backward(
    grad: Floats,
    x: Floats,
    grad_x: Floats,
    sums: Doubles,
    grid: Floats,
    low: np.float32,
    high: np.float32,
    strength: np.float32,
    first: int,
    last: int,
) -> None:
    none = np.float32(0)
    has_ends = grid.shape[0] > 4
    for row in range(x.shape[0]):
        lower, step, scale = grid[0, row], grid[1, row], grid[2, row]
        bottom, top = (grid[4, row], grid[5, row]) if has_ends else (none, none)
        inverse = np.float32(1) / step
        for start in range(first, last, BLOCK):
            stop = min(start + BLOCK, last)
            values, above, out = x[row, start:stop], grad[row, start:stop], grad_x[row, start:stop]
            by_one, by_code, by_lower, by_position, by_bottom, by_top = none, none, none, none, none, none
            for i in range(values.size):
                position = (values[i] - lower) / step
                clipped = low if position < low else position
                clipped = high if clipped > high else clipped
                code = rint(clipped)
                g = above[i] * scale
                g = g + abs(g) * ((clipped - code) * strength)
                if has_ends:  # the same for all elements: the compiler makes two loops of it
                    by_bottom += g if values[i] <= bottom else none
                    by_top += g if values[i] >= top else none
                    passed = g if values[i] >= bottom else none
                    passed = passed if values[i] <= top else none
                else:
                    g = g if clipped == position else none
                    passed = g
                out[i] = passed * inverse
                by_one += above[i]
                by_code += above[i] * code
                by_lower += g
                by_position += g * clipped
            sums[row, 0] += by_one
            sums[row, 1] += by_code
            sums[row, 2] += by_lower
            sums[row, 3] += by_position
            sums[row, 4] += by_bottom
            sums[row, 5] += by_top


def _of_sums(sums: Doubles, grid: Floats) -> Floats:
    """Gradient to the grid from the sums of all pieces."""
    gradient = np.empty_like(grid)
    for row in range(grid.shape[1]):
        total = np.zeros(6)
        for piece in range(sums.shape[0]):
            for part in range(6):
                total[part] += sums[piece, row, part]
        step = grid[1, row]
        gradient[0, row] = -total[2] / step
        gradient[1, row] = -total[3] / step
        gradient[2, row] = total[1] - grid[3, row] * total[0]
        gradient[3, row] = -grid[2, row] * total[0]
        for end in range(4, grid.shape[0]):
            gradient[end, row] = total[end] / step
    return gradient


_MATRIX, _SUMS, _FLOAT, _INDEX = types.float32[:, ::1], types.float64[:, ::1], types.float32, types.int64
_FORWARD = types.void(_MATRIX, _MATRIX, _MATRIX, _FLOAT, _FLOAT, _INDEX, _INDEX)
_BACKWARD = types.void(_MATRIX, _MATRIX, _MATRIX, _SUMS, _MATRIX, _FLOAT, _FLOAT, _FLOAT, _INDEX, _INDEX)
_OF_SUMS = _MATRIX(types.float64[:, :, ::1], _MATRIX)


def _compiled(function: Callable[..., T], signature: Any, fastmath: bool | set[str]) -> Callable[..., T]:
    """``function`` as machine code that runs without Python's lock; from the cache folder where there is one that can be written."""
    try:
        return numba.njit([signature], nogil=True, fastmath=fastmath, cache=True)(function)
    except (OSError, RuntimeError):
        return numba.njit([signature], nogil=True, fastmath=fastmath)(function)


if getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("numba is disabled (NUMBA_DISABLE_JIT)")
forward = _compiled(_forward, _FORWARD, False)
backward = _compiled(_backward, _BACKWARD, {"reassoc", "contract"})
of_sums = _compiled(_of_sums, _OF_SUMS, False)
