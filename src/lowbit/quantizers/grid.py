"""Trained quantizers with evenly spaced levels: the grid is a differentiable function of their parameters.

Levels may lie elsewhere than the values they stand for: a code is found on one grid and decoded on another, as in methods that
work on normalised values. On a CPU both directions run in one fused loop each where ``lowbit.quantizers.fused`` can.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.fused import fake_quantize as fused, is_fusing
from lowbit.quantizers.ops import mark_grid
from lowbit.quantizers.qtensor import AffineDecoder, QTensor, code_dtype
from lowbit.spec import Granularity
from lowbit.surrogates import ElementwiseGradientScaling, Surrogate, bounded_straight_through, pass_gradient


@dataclass(frozen=True)
class Grid:
    """Where codes come from and what they stand for; all broadcast with the values.

    ``code = clamp(round((x - lower) / step), qmin, qmax)`` and ``y = (code - zero_point) * scale``.

    ``ends`` says where values are clipped, for methods that learn or fix the clip itself: they must be what the first and the last
    code stand for, so that they change no code. Values between them, the ends included, get a gradient, and the ends get that of
    the values at and beyond them. Without, values get one where their code is not cut off, which is the same up to the rounding
    of ``(x - lower) / step``.
    """

    lower: Tensor
    step: Tensor
    scale: Tensor
    zero_point: Tensor
    ends: tuple[Tensor, Tensor] | None = None


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
        gradients) unless ``lowbit.quantizers.fused.fused_kernels(False)`` forbids them; equal bit for bit, gradients up to rounding.
    """
    if is_fusing() and (strength := _fused_strength(surrogate)) is not None:
        parts: tuple[Tensor, ...] = (grid.lower, grid.step, grid.scale, grid.zero_point, *(grid.ends or ()))
        if any(part.shape != grid.step.shape for part in parts):
            parts = torch.broadcast_tensors(*parts)
        if _suits(x, parts):
            if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *parts)):
                return _FakeQuantizeGrid.apply((qmin, qmax, surrogate, strength), x, *parts)  # type: ignore[no-any-return]
            return fused.forward(x, torch.stack(parts), qmin, qmax)
    return _composed(x, grid, qmin, qmax, surrogate)


def _composed(x: Tensor, grid: Grid, qmin: int, qmax: int, surrogate: Surrogate) -> Tensor:
    return (surrogate(_position(x, grid, qmin, qmax), qmin, qmax) - grid.zero_point) * grid.scale


def _position(x: Tensor, grid: Grid, qmin: int, qmax: int) -> Tensor:
    if grid.ends is None or not torch.is_grad_enabled():
        return (x - grid.lower) / grid.step
    position = (_clip(x, *grid.ends) - grid.lower) / grid.step
    # rounding may put an end beyond the last code, where the surrogate would cut its gradient off
    return pass_gradient(position, position.detach().clamp(qmin, qmax))


def _clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """``clip(x, low, high)``; backward: an element at an end gives its gradient to both. Can be differentiated again."""
    inside = (x >= low) & (x <= high)
    ends = low * (x <= low) + high * (x >= high)
    # the value of either summand, never their sum
    return pass_gradient(x * inside + ends, x.detach().clamp(low.detach(), high.detach()))


def _fused_strength(surrogate: Surrogate) -> float | None:
    """The strength of element-wise gradient scaling that a fused loop gives this surrogate, ``None`` where none does."""
    if surrogate is bounded_straight_through:
        return 0.0
    if not isinstance(surrogate, ElementwiseGradientScaling) or type(surrogate) is not ElementwiseGradientScaling:
        return None
    return None if surrogate._forward_hooks or surrogate._forward_pre_hooks else float(surrogate.delta)


def _suits(x: Tensor, parts: tuple[Tensor, ...]) -> bool:
    is_plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    return is_plain and all(t.dtype == torch.float32 for t in (x, *parts)) and fused.suits(x, parts[0].shape)


class _FakeQuantizeGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rest: tuple[int, int, Surrogate, float], x: Tensor, *parts: Tensor) -> Tensor:
        ctx.rest, ctx.grid = rest, torch.stack(parts)
        ctx.save_for_backward(x, *parts)
        return fused.forward(x, ctx.grid, rest[0], rest[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        qmin, qmax, surrogate, strength = ctx.rest
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # the gradients are to be differentiated in their turn
            return None, *_differentiable_gradients(grad, ctx.saved_tensors, needed, qmin, qmax, surrogate)
        by_x, by_grid = fused.backward(grad, ctx.saved_tensors[0], ctx.grid, qmin, qmax, strength)
        return None, *(gradient if wanted else None for gradient, wanted in zip((by_x, *by_grid.unbind(0)), needed, strict=True))


def _differentiable_gradients(
    grad: Tensor, inputs: tuple[Tensor, ...], needed: tuple[bool, ...], qmin: int, qmax: int, surrogate: Surrogate
) -> list[Tensor | None]:
    """What autograd makes of the composed expression; aliases tell inputs apart that are one tensor."""
    aliases = [tensor.view_as(tensor) for tensor in inputs]
    x, lower, step, scale, zero_point, *ends = aliases
    y = _composed(x, Grid(lower, step, scale, zero_point, (ends[0], ends[1]) if ends else None), qmin, qmax, surrogate)
    wanted = [tensor for tensor, is_needed in zip(aliases, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if is_needed else None for is_needed in needed]


class GridQuantizer(TableQuantizer):
    """A quantizer whose ``grid`` is computed from its parameters in every pass.

    Forward: ``fake_quantize_grid(prepare(x), grid(x), qmin, qmax, surrogate)``. ``encode`` uses the same arithmetic.

    Args:
        bit_width: 1 to 8.
        qmin, qmax: Integer range of the codes, at most ``2**bit_width`` of them.
        granularity: Which elements share the parameters.
        surrogate: Backward rule of the rounding.

    A subclass that has several ``bit_widths`` says the ``code_range`` of each.
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

    def code_range(self, bit_width: int) -> tuple[int, int]:
        """``(qmin, qmax)`` at one of ``bit_widths``."""
        return self.qmin, self.qmax

    def resize(self) -> None:
        self.qmin, self.qmax = self.code_range(self.bit_width)

    @abstractmethod
    def grid(self, x: Tensor) -> Grid:
        """The grid for ``x`` (already ``granularity.broadcast``), differentiable in the parameters."""

    def prepare(self, x: Tensor) -> Tensor:
        """What is quantized in place of ``x``; ``x`` itself unless a subclass transforms it."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        view = self.granularity.broadcast(x.float())
        prepared, grid = self.prepare(view), self.grid(view)
        if torch.compiler.is_exporting() and prepared is view and not self.granularity.axes and not self.is_dynamic:
            marked: Tensor = mark_grid(view, grid.lower, grid.step, grid.scale, grid.zero_point, self.qmin, self.qmax)
            return marked if marked.dtype == x.dtype else marked.to(x.dtype)
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
