"""Trained quantizers with evenly spaced levels: the grid is a differentiable function of their parameters.

Levels may lie elsewhere than the values they stand for: a code is found on one grid and decoded on another, as in methods that
work on normalised values.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import fake_quantize_grid as marked_fake_quantize
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, code_dtype
from lowbit.spec import Granularity
from lowbit.surrogates import Surrogate, bounded_straight_through


@dataclass(frozen=True)
class Grid:
    """Where codes come from and what they stand for; all broadcast with the values.

    ``code = clamp(round((x - lower) / step), qmin, qmax)`` and ``y = (code - zero_point) * scale``.
    """

    lower: Tensor
    step: Tensor
    scale: Tensor
    zero_point: Tensor


def fake_quantize_grid(x: Tensor, grid: Grid, qmin: int, qmax: int, surrogate: Surrogate = bounded_straight_through) -> Tensor:
    """Quantize and dequantize in float on ``grid``.

    Forward: ``(clamp(round((x - lower) / step), qmin, qmax) - zero_point) * scale``, rounding half to even.
    Backward: the surrogate's for the rounding; every part of the grid gets the gradient of this expression.

    Args:
        x: Values of any shape.
        grid: Parts that broadcast with ``x``; those that require a gradient get one.
        qmin, qmax: Integer range of the codes.
        surrogate: Backward rule of the rounding.

    Returns:
        Tensor shaped like ``x``.
    """
    return (surrogate((x - grid.lower) / grid.step, qmin, qmax) - grid.zero_point) * grid.scale


class GridQuantizer(TableQuantizer):
    """A quantizer whose ``grid`` is computed from its parameters in every pass.

    Forward: ``fake_quantize_grid(prepare(x), grid(x), qmin, qmax, surrogate)``. ``encode`` uses the same arithmetic.

    Args:
        bit_width: 1 to 8.
        qmin, qmax: Integer range of the codes, at most ``2**bit_width`` of them.
        granularity: Which elements share the parameters.
        surrogate: Backward rule of the rounding.
    """

    tables: tuple[str, ...] = ()

    def __init__(
        self,
        bit_width: int,
        qmin: int,
        qmax: int,
        *,
        granularity: Granularity | None = None,
        surrogate: Surrogate = bounded_straight_through,
    ) -> None:
        super().__init__(bit_width, granularity or Granularity.tensor())
        self.qmin, self.qmax = qmin, qmax
        self.surrogate = surrogate

    @abstractmethod
    def grid(self, x: Tensor) -> Grid:
        """The grid for ``x`` (already ``granularity.broadcast``), differentiable in the parameters."""

    def prepare(self, x: Tensor) -> Tensor:
        """What is quantized in place of ``x``; ``x`` itself unless a subclass transforms it."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        view = self.granularity.broadcast(x.float())
        prepared, grid = self.prepare(view), self.grid(view)
        if torch.compiler.is_exporting() and prepared is view and self.granularity.kind == "per_tensor":
            marked: Tensor = marked_fake_quantize(view, grid.lower, grid.step, grid.scale, grid.zero_point, self.qmin, self.qmax)
            return marked
        y = fake_quantize_grid(prepared, grid, self.qmin, self.qmax, self.surrogate)
        return self.granularity.restore(y, x.shape).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        view = self.granularity.broadcast(x.detach().float())
        grid = self.grid(view)
        codes = self.surrogate((self.prepare(view) - grid.lower) / grid.step, self.qmin, self.qmax)
        decoder = AffineDecoder(grid.scale.detach(), grid.zero_point.detach(), self.granularity)
        return QTensor(self.granularity.restore(codes, x.shape).to(code_dtype(self.qmin)), decoder, self.bit_width)

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, codes {self.qmin}..{self.qmax}, {self.granularity}"
