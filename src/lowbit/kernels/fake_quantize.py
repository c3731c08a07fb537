"""Quantizing and dequantizing on an evenly spaced grid, and its gradients, in one pass over memory each.

Composed of torch operators a quantizer reads and writes its input several times in each direction, which is what makes
quantization-aware training slow. Each function has a torch reference of the same signature beside it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowbit.kernels.switch import loops
from lowbit.kernels.threads import pieces_of, shared


class Gradients(NamedTuple):
    """Gradients of a sum of ``grad * y``: to the values, and to each part of the grid."""

    x: Tensor
    lower: Tensor
    step: Tensor
    scale: Tensor
    zero_point: Tensor


def forward(x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round((x - lower) / step), qmin, qmax) - zero_point) * scale``, rounding half to even; equal to the reference bit for bit.

    Args:
        x: float32, laid out so that ``suits(x, lower)``.
        lower, step, scale, zero_point: float32 of one shape that broadcasts with ``x``.
        qmin, qmax: Integer range of the codes.

    Returns:
        Tensor of the shape and memory layout of ``x``.
    """
    y, matrix = torch.empty_like(x), _layout(x, lower)
    rows, out = _array(x, matrix), _array(y, matrix)
    tables = _table(lower), _table(step), _table(scale), _table(zero_point)
    compiled, ends = loops(), (np.float32(qmin), np.float32(qmax))
    assert compiled is not None
    if matrix[0] == 1:
        shared(lambda first, last, _: compiled.forward(rows, out, *tables, *ends, first, last), matrix[1])
    else:
        compiled.forward(rows, out, *tables, *ends, 0, matrix[1])
    return y


def forward_reference(x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    """``forward`` in torch, for any layout."""
    return (((x - lower) / step).clamp(qmin, qmax).round() - zero_point) * scale


def backward(
    grad: Tensor, x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, strength: float = 0.0
) -> Gradients:
    """Gradients of ``forward`` with a surrogate for the rounding.

    With ``p = (x - lower) / step``, ``c = clamp(p, qmin, qmax)``, ``code = round(c)`` and ``g = grad * scale``: the gradient to ``p``
    is ``h = g + strength * |g| * (c - code) / (qmax - qmin)`` where ``c = p``, else 0. ``strength`` 0 is the straight-through
    estimator, any other element-wise gradient scaling. Then ``x`` gets ``h / step``, ``lower`` ``-sum(h) / step``, ``step``
    ``-sum(h p) / step``, ``scale`` ``sum(grad (code - zero_point))`` and ``zero_point`` ``-scale sum(grad)``.

    Args:
        grad: Shaped like ``x``.
        x, lower, step, scale, zero_point, qmin, qmax: As in ``forward``.
        strength: Of element-wise gradient scaling.
    """
    if grad.dtype != x.dtype or grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    grad_x, matrix = torch.empty_like(x), _layout(x, lower)
    rows, above, out = _array(x, matrix), _array(grad, matrix), _array(grad_x, matrix)
    tables = _table(lower), _table(step), _table(scale)
    ends = np.float32(qmin), np.float32(qmax), np.float32(strength / max(qmax - qmin, 1))
    compiled, pieces = loops(), pieces_of(matrix[1]) if matrix[0] == 1 else 1
    assert compiled is not None
    sums = np.zeros((pieces, matrix[0], 4))
    if pieces > 1:
        shared(lambda first, last, piece: compiled.backward(above, rows, out, sums[piece], *tables, *ends, first, last), matrix[1])
    else:
        compiled.backward(above, rows, out, sums[0], *tables, *ends, 0, matrix[1])
    gradients = compiled.of_sums(sums, tables[1], tables[2], _table(zero_point))
    return Gradients(grad_x, *(torch.from_numpy(row).view(lower.shape) for row in gradients))


def backward_reference(
    grad: Tensor, x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, strength: float = 0.0
) -> Gradients:
    """``backward`` in torch, for any layout."""
    position = (x - lower) / step
    clipped = position.clamp(qmin, qmax)
    code, g = clipped.round(), grad * scale
    g = torch.where(clipped == position, g + g.abs() * (clipped - code) * (strength / max(qmax - qmin, 1)), 0)
    sums = [part.double().sum_to_size(lower.shape) for part in (grad, grad * code, g, g * clipped)]
    parts = -sums[2] / step, -sums[3] / step, sums[1] - zero_point * sums[0], -scale * sums[0]
    return Gradients(g / step, *(part.to(x.dtype) for part in parts))


def suits(x: Tensor, table: Tensor) -> bool:
    """Whether memory is laid out for the loops: dense, with the axes of ``table``, which broadcasts with ``x``, the outermost ones.

    So are contiguous and channels-last tensors with one scale, one for each index of the first axis, or one for each of its groups.
    """
    return _matrix(x.shape, x.stride(), table.shape) is not None


@functools.lru_cache(maxsize=1024)
def _matrix(shape: torch.Size, strides: tuple[int, ...], table: torch.Size) -> tuple[int, int] | None:
    """Rows and columns of a tensor seen as a matrix with one row for each element of a table; ``None`` where that needs a copy."""
    if shape.numel() == 0 or len(table) > len(shape):
        return None
    sizes = (1,) * (len(shape) - len(table)) + tuple(table)
    order = sorted((axis for axis, size in enumerate(shape) if size > 1), key=lambda axis: strides[axis], reverse=True)
    dense = 1
    for axis in reversed(order):
        if strides[axis] != dense:
            return None
        dense *= shape[axis]
    tabled = [axis for axis, size in enumerate(sizes) if size > 1]
    if order[: len(tabled)] != tabled or any(sizes[axis] != shape[axis] for axis in tabled):
        return None
    return table.numel(), shape.numel() // table.numel()


def _layout(x: Tensor, table: Tensor) -> tuple[int, int]:
    matrix = _matrix(x.shape, x.stride(), table.shape)
    assert matrix is not None, "see suits()"
    return matrix


def _array(x: Tensor, matrix: tuple[int, int]) -> npt.NDArray[np.float32]:
    return x.detach().as_strided(matrix, (matrix[1], 1)).numpy()


def _table(part: Tensor) -> npt.NDArray[np.float32]:
    return part.detach().numpy().reshape(-1)
