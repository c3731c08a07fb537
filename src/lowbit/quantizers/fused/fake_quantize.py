"""Fake quantization on an evenly spaced grid and its gradients, each in one pass over memory.

A quantizer composed of torch operators reads and writes its input several times in each direction, which is what makes
quantization-aware training slow. Each function has a torch reference of the same signature beside it.

A grid is one table ``[4, ...]``: lower, step, scale and zero point, each of a shape that broadcasts with the values; or ``[6, ...]``
with the ends of the range in which values get a gradient, where that is not simply the range of the codes.
"""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lowbit.quantizers.fused.switch import loops
from lowbit.quantizers.fused.threads import pieces_of, shared


def forward(x: Tensor, grid: Tensor, qmin: int, qmax: int) -> Tensor:
    """``(clamp(round((x - lower) / step), qmin, qmax) - zero_point) * scale``, rounding half to even; equal to the reference bit for bit.

    Args:
        x: float32 on the CPU, laid out so that ``suits(x, grid.shape[1:])``.
        grid: float32 ``[4, ...]`` or ``[6, ...]``; the ends change nothing here.
        qmin, qmax: Integer range of the codes.

    Returns:
        Tensor of the shape and memory layout of ``x``.
    """
    y, matrix = torch.empty_like(x), _layout(x, grid)
    rows, out, table = _array(x, matrix), _array(y, matrix), _table(grid, matrix)
    compiled, ends = loops(), (np.float32(qmin), np.float32(qmax))
    assert compiled is not None
    if pieces_of(*matrix) > 1:
        shared(lambda first, last, _: compiled.forward(rows, out, table, *ends, first, last), *matrix)
    else:
        compiled.forward(rows, out, table, *ends, 0, matrix[1])
    return y


def forward_reference(x: Tensor, grid: Tensor, qmin: int, qmax: int) -> Tensor:
    """``forward`` in torch, for any layout."""
    lower, step, scale, zero_point = grid[:4].unbind(0)
    return (((x - lower) / step).clamp(qmin, qmax).round() - zero_point) * scale


def backward(grad: Tensor, x: Tensor, grid: Tensor, qmin: int, qmax: int, strength: float = 0.0) -> tuple[Tensor, Tensor]:
    """Gradients of ``forward`` with a surrogate for the rounding.

    With ``p = (x - lower) / step``, ``c = clamp(p, qmin, qmax)``, ``code = round(c)`` and ``g = grad * scale``: the gradient to ``p``
    is ``h = g + strength * |g| * (c - code) / (qmax - qmin)`` where ``c = p``, else 0. ``strength`` 0 is the straight-through
    estimator, any other element-wise gradient scaling. With ends, ``h`` is not cut off; ``x`` gets it where it lies between them,
    the ends included.

    Args:
        grad: Shaped like ``x``, of any layout.
        x, grid, qmin, qmax: As in ``forward``.
        strength: Strength of the element-wise gradient scaling.

    Returns:
        The gradient to ``x``, ``h / step``, and that to ``grid``: lower ``-sum(h) / step``, step ``-sum(h p) / step``, scale
        ``sum(grad (code - zero_point))``, zero point ``-scale sum(grad)``, ends ``sum(h) / step`` at and beyond them.
    """
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    grad_x, matrix = torch.empty_like(x), _layout(x, grid)
    rows, above, out, table = _array(x, matrix), _array(grad, matrix), _array(grad_x, matrix), _table(grid, matrix)
    ends = np.float32(qmin), np.float32(qmax), np.float32(strength / max(qmax - qmin, 1))
    compiled, pieces = loops(), pieces_of(*matrix)
    assert compiled is not None
    sums = np.zeros((pieces, matrix[0], 6))
    if pieces > 1:
        shared(lambda first, last, piece: compiled.backward(above, rows, out, sums[piece], table, *ends, first, last), *matrix)
    else:
        compiled.backward(above, rows, out, sums[0], table, *ends, 0, matrix[1])
    return grad_x, torch.from_numpy(compiled.of_sums(sums, table)).view(grid.shape)


def backward_reference(grad: Tensor, x: Tensor, grid: Tensor, qmin: int, qmax: int, strength: float = 0.0) -> tuple[Tensor, Tensor]:
    """``backward`` in torch, for any layout."""
    lower, step, scale, zero_point = grid[:4].unbind(0)
    position = (x - lower) / step
    clipped = position.clamp(qmin, qmax)
    code, g = clipped.round(), grad * scale
    g = g + g.abs() * (clipped - code) * (strength / max(qmax - qmin, 1))
    if len(grid) == 4:
        g = passed = torch.where(clipped == position, g, 0)
        ends = []
    else:
        passed = torch.where((x >= grid[4]) & (x <= grid[5]), g, 0)
        ends = [g * (x <= grid[4]), g * (x >= grid[5])]
    sums = [part.double().sum_to_size(lower.shape) for part in (grad, grad * code, g, g * clipped, *ends)]
    by_grid = [-sums[2] / step, -sums[3] / step, sums[1] - zero_point * sums[0], -scale * sums[0], *(end / step for end in sums[4:])]
    return passed / step, torch.stack(by_grid).to(x.dtype)


def suits(x: Tensor, table: torch.Size) -> bool:
    """Whether ``x`` is laid out for the loops: dense, with the axes of a table of this shape, which broadcasts with it, the outermost ones.

    So are contiguous and channels-last tensors with one scale, one for each index of the first axis, or one for each of its groups.
    """
    return _matrix(x.shape, x.stride(), table) is not None


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


def _layout(x: Tensor, grid: Tensor) -> tuple[int, int]:
    matrix = _matrix(x.shape, x.stride(), grid.shape[1:])
    assert matrix is not None, "see suits()"
    return matrix


def _array(x: Tensor, matrix: tuple[int, int]) -> npt.NDArray[np.float32]:
    return x.detach().as_strided(matrix, (matrix[1], 1)).numpy()


def _table(grid: Tensor, matrix: tuple[int, int]) -> npt.NDArray[np.float32]:
    return grid.detach().numpy().reshape(len(grid), matrix[0])
