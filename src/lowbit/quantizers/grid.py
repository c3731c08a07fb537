"""Trained quantizers with evenly spaced levels: the grid is a differentiable function of their parameters.

Levels may lie elsewhere than the values they stand for: a code is found on one grid and decoded on another, as in methods that
work on normalised values. On a CPU both directions run in one fused loop each where ``lowbit.kernels`` can.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.kernels import fake_quantize as fused, is_fusing
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import fake_quantize_grid as marked_fake_quantize
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, code_dtype
from lowbit.spec import Granularity
from lowbit.surrogates import ElementwiseGradientScaling, Surrogate, bounded_straight_through


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
        Tensor shaped like ``x``. It is computed by fused loops (float32 on a CPU, clipped straight-through or element-wise scaled
        gradients) unless ``lowbit.kernels.fused_kernels(False)`` forbids them; equal bit for bit, gradients up to rounding.
    """
    if is_fusing() and (strength := _fused_strength(surrogate)) is not None:
        parts = grid.lower, grid.step, grid.scale, grid.zero_point
        if any(part.shape != grid.step.shape for part in parts):
            parts = torch.broadcast_tensors(*parts)
        lower, step, scale, zero_point = parts
        if _suits(x, parts):
            if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parts)):
                return _FakeQuantizeGrid.apply(x, *parts, qmin, qmax, surrogate, strength)  # type: ignore[no-any-return]
            return fused.forward(x, lower, step, scale, zero_point, qmin, qmax)
    return _composed(x, grid, qmin, qmax, surrogate)


def _composed(x: Tensor, grid: Grid, qmin: int, qmax: int, surrogate: Surrogate) -> Tensor:
    return (surrogate((x - grid.lower) / grid.step, qmin, qmax) - grid.zero_point) * grid.scale


def _fused_strength(surrogate: Surrogate) -> float | None:
    """The strength of element-wise gradient scaling that a fused loop gives this surrogate, ``None`` where none does."""
    if surrogate is bounded_straight_through:
        return 0.0
    if not isinstance(surrogate, ElementwiseGradientScaling) or type(surrogate) is not ElementwiseGradientScaling:
        return None
    return None if surrogate._forward_hooks or surrogate._forward_pre_hooks else float(surrogate.delta)


def _suits(x: Tensor, parts: tuple[Tensor, ...]) -> bool:
    is_plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    return is_plain and all(t.dtype == torch.float32 for t in (x, *parts)) and fused.suits(x, parts[0])


class _FakeQuantizeGrid(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, lower: Tensor, step: Tensor, scale: Tensor, zero_point: Tensor,
        qmin: int, qmax: int, surrogate: Surrogate, strength: float,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, lower, step, scale, zero_point)
        ctx.rest = qmin, qmax, surrogate, strength
        return fused.forward(x, lower, step, scale, zero_point, qmin, qmax)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qmin, qmax, _, strength = ctx.rest
        if torch.is_grad_enabled():  # the gradients are to be differentiated in their turn
            return (*_differentiable_gradients(ctx, grad), None, None, None, None)
        x, lower, step, scale, zero_point = ctx.saved_tensors
        gradients = fused.backward(grad, x, lower, step, scale, zero_point, qmin, qmax, strength)
        wanted = (gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False))
        return (*wanted, None, None, None, None)


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """What autograd makes of the composed expression; aliases tell inputs apart that are one tensor."""
    qmin, qmax, surrogate, _ = ctx.rest
    x, *parts = (tensor.view_as(tensor) for tensor in ctx.saved_tensors)
    y = _composed(x, Grid(*parts), qmin, qmax, surrogate)
    wanted = [tensor for tensor, needed in zip((x, *parts), ctx.needs_input_grad, strict=False) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]


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
