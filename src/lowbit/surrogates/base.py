"""What a surrogate is: a rule for the backward pass of a step function.

A quantizer computes, in units of its step, ``position`` (continuous) and ``code = clamp(round(position), low, high)``. The
true derivative of ``code`` is zero almost everywhere; a surrogate returns ``code`` with a useful gradient to ``position``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor


class Surrogate(Protocol):
    """``surrogate(position, low, high)`` is ``clamp(round(position), low, high)`` with the surrogate's gradient.

    ``position`` has any shape; ``low`` and ``high`` are numbers or tensors that broadcast with it. Rounding is half to even.
    """

    def __call__(self, position: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor: ...


def clamp(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """``torch.clamp`` for numbers and tensors alike; the gradient is 1 on the closed interval, else 0."""
    if isinstance(low, Tensor) or isinstance(high, Tensor):
        return torch.clamp(x, torch.as_tensor(low, dtype=x.dtype, device=x.device), torch.as_tensor(high, dtype=x.dtype, device=x.device))
    return torch.clamp(x, low, high)


class _PassGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def pass_gradient(x: Tensor, value: Tensor) -> Tensor:
    """Exactly ``value`` in the forward pass, the identity from ``x`` in the backward pass.

    ``x + (value - x).detach()`` would round: the sum need not be ``value`` again.
    """
    if not (torch.is_grad_enabled() and x.requires_grad):
        return value
    return _PassGradient.apply(x, value.detach())  # type: ignore[no-any-return]


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """``x`` itself in the forward pass; its gradient is multiplied by ``factor``."""
    return _ScaleGradient.apply(x, factor)  # type: ignore[no-any-return]


def follow_curve(position: Tensor, low: Tensor | float, high: Tensor | float, curve: Callable[[Tensor], Tensor]) -> Tensor:
    """``clamp(round(position), low, high)`` with the gradient of a curve that stands for the sign around the nearest decision point.

    Backward: ``curve'(z)`` with ``z = 2 (position - nearest decision point)``, so that a quantizer of two levels -1 and +1, whose
    position is ``(x + 1) / 2``, has the gradient ``curve'(x)``.

    Args:
        position, low, high: As in ``Surrogate``.
        curve: Differentiable, from -1 to +1, for ``z`` of any shape.
    """
    step = clamp(position.detach().floor(), low, high - 1)
    code = clamp(position.detach(), low, high).round()
    return pass_gradient(curve(2 * (position - step) - 1) / 2, code)
