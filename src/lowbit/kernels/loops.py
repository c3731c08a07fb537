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


def _forward(
    x: Floats, y: Floats, lower: Floats, step: Floats, scale: Floats, zero_point: Floats, low: np.float32, high: np.float32, a: int, b: int
) -> None:
    for row in range(x.shape[0]):
        values, out = x[row, a:b], y[row, a:b]
        origin, width, unit, zero = lower[row], step[row], scale[row], zero_point[row]
        for i in range(values.size):
            position = (values[i] - origin) / width
            position = low if position < low else position
            position = high if position > high else position
            out[i] = (rint(position) - zero) * unit


def _backward(
    grad: Floats,
    x: Floats,
    grad_x: Floats,
    sums: Doubles,
    lower: Floats,
    step: Floats,
    scale: Floats,
    low: np.float32,
    high: np.float32,
    strength: np.float32,
    a: int,
    b: int,
) -> None:
    none = np.float32(0)
    for row in range(x.shape[0]):
        origin, width, unit = lower[row], step[row], scale[row]
        inverse = np.float32(1) / width
        for start in range(a, b, BLOCK):
            stop = min(start + BLOCK, b)
            values, above, out = x[row, start:stop], grad[row, start:stop], grad_x[row, start:stop]
            by_code, by_code_code, by_position, by_position_position = none, none, none, none
            for i in range(values.size):
                position = (values[i] - origin) / width
                clipped = low if position < low else position
                clipped = high if clipped > high else clipped
                code = rint(clipped)
                g = above[i] * unit
                g = g + abs(g) * ((clipped - code) * strength)
                g = g if clipped == position else none
                out[i] = g * inverse
                by_code += above[i]
                by_code_code += above[i] * code
                by_position += g
                by_position_position += g * clipped
            sums[row, 0] += by_code
            sums[row, 1] += by_code_code
            sums[row, 2] += by_position
            sums[row, 3] += by_position_position


def _of_sums(sums: Doubles, step: Floats, scale: Floats, zero_point: Floats) -> Floats:
    """Gradients to lower, step, scale and zero point, one row each, from the sums of all pieces."""
    gradients = np.empty((4, step.size), np.float32)
    for row in range(step.size):
        total = np.zeros(4)
        for piece in range(sums.shape[0]):
            total += sums[piece, row]
        gradients[0, row] = -total[2] / step[row]
        gradients[1, row] = -total[3] / step[row]
        gradients[2, row] = total[1] - zero_point[row] * total[0]
        gradients[3, row] = -scale[row] * total[0]
    return gradients


_MATRIX, _VECTOR, _SUMS, _FLOAT, _INDEX = types.float32[:, ::1], types.float32[::1], types.float64[:, ::1], types.float32, types.int64
_FORWARD = types.void(_MATRIX, _MATRIX, _VECTOR, _VECTOR, _VECTOR, _VECTOR, _FLOAT, _FLOAT, _INDEX, _INDEX)
_BACKWARD = types.void(_MATRIX, _MATRIX, _MATRIX, _SUMS, _VECTOR, _VECTOR, _VECTOR, _FLOAT, _FLOAT, _FLOAT, _INDEX, _INDEX)
_OF_SUMS = _MATRIX(types.float64[:, :, ::1], _VECTOR, _VECTOR, _VECTOR)


def _compiled(function: Callable[..., T], signature: Any, fastmath: bool | set[str]) -> Callable[..., T]:
    """``function`` as machine code that runs without Python's lock; from the cache folder where there is one that can be written."""
    try:
        return numba.njit([signature], nogil=True, fastmath=fastmath, cache=True)(function)
    except (OSError, RuntimeError):
        return numba.njit([signature], nogil=True, fastmath=fastmath)(function)


if getattr(numba.config, "DISABLE_JIT", False):
    raise ImportError("numba is told not to compile (NUMBA_DISABLE_JIT)")
forward = _compiled(_forward, _FORWARD, False)
backward = _compiled(_backward, _BACKWARD, {"reassoc", "contract"})
of_sums = _compiled(_of_sums, _OF_SUMS, False)
