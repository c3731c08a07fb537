"""Differentiable soft quantization: the derivative of a tanh in each step, whose sharpness is learned.

Paper: Gong et al. 2019, "Differentiable Soft Quantization", Eq. 3-8.
Symbols: alpha -> alpha (distance of the soft curve from the step), Delta = 1 in units of the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, alpha: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(position, alpha)
        ctx.bounds = low, high
        return position.clamp(low, high).round_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        position, alpha = ctx.saved_tensors
        low, high = ctx.bounds
        inside = (position >= low) & (position <= high)
        index = position.clamp(low, high).floor().clamp(max=high - 1)
        centred = position - index - 0.5
        slope, scale = torch.log(2 / alpha - 1), 1 / (1 - alpha)
        t = torch.tanh(slope * centred)
        curve = 1 - t * t
        grad = grad * inside
        by_alpha = 0.5 * (scale * scale * t - scale * curve * centred * 2 / (alpha * (2 - alpha)))
        return grad * 0.5 * scale * slope * curve, (grad * by_alpha).sum().reshape(alpha.shape), None, None


class SoftTanh(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward, to ``position``: ``0.5 s c (1 - t**2)`` where ``low <= position <= high``, else 0, with ``c = log(2 / alpha - 1)``,
    ``s = 1 / (1 - alpha)``, ``t = tanh(c (position - i - 0.5))`` and ``i = floor(position)``; its mean over a step is 1.
    Backward, to ``alpha``: the derivative of the soft curve ``i + (s t + 1) / 2``.

    Args:
        alpha: 0 to 0.5; small is close to the step. Learned, and kept in ``0.001 .. 0.5``.
    """

    def __init__(self, alpha: float = 0.2) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return _Soft.apply(position, self.alpha.clamp(1e-3, 0.5), low, high)  # type: ignore[no-any-return]
