"""Differentiable soft quantization: the derivative of a tanh in each step, whose sharpness is learned.

Paper: Gong et al. 2019, "Differentiable Soft Quantization", Eq. 3-8.
Symbols: alpha -> alpha (distance of the soft curve from the step), Delta = 1 in units of the step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError

SHARPEST, SOFTEST = 1e-3, 0.5


class _Soft(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, alpha: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(position, alpha)
        ctx.bounds = low, high
        return position.clamp(low, high).round_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        position, learned = ctx.saved_tensors
        alpha = learned.clamp(SHARPEST, SOFTEST)
        low, high = ctx.bounds
        inside = (position >= low) & (position <= high)
        index = position.clamp(low, high).floor().clamp(max=high - 1)
        centred = position - index - 0.5
        slope, scale = torch.log(2 / alpha - 1), 1 / (1 - alpha)
        t = torch.tanh(slope * centred)
        curve = 1 - t * t
        grad = grad * inside
        by_alpha = 0.5 * (scale * scale * t - scale * curve * centred * 2 / (alpha * (2 - alpha)))
        by_position = grad * 0.5 * scale * slope * curve
        if not ctx.needs_input_grad[1]:
            return by_position, None, None, None
        total = (grad * by_alpha).sum().reshape(alpha.shape)
        # an alpha that a step has carried beyond its range moves no further, but can come back
        leaves = ((learned < SHARPEST) & (total > 0)) | ((learned > SOFTEST) & (total < 0))
        return by_position, torch.where(leaves, torch.zeros_like(total), total), None, None


class SoftTanh(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward, to ``position``: ``0.5 s c (1 - t**2)`` where ``low <= position <= high``, else 0, with ``c = log(2 / alpha - 1)``,
    ``s = 1 / (1 - alpha)``, ``t = tanh(c (position - i - 0.5))`` and ``i = floor(position)``; its mean over a step is 1.
    Backward, to ``alpha``: the derivative of the soft curve ``i + (s t + 1) / 2``, 0 outside the range.

    Args:
        alpha: 0.001 to 0.5; smaller is closer to the step. Values beyond the range, which a learned alpha may reach, count as its ends.
        is_learned: Whether alpha is a parameter; else a buffer.
    """

    def __init__(self, alpha: float = 0.2, *, is_learned: bool = True) -> None:
        super().__init__()
        if not SHARPEST <= alpha <= SOFTEST:
            raise SpecError(f"dsq: alpha must be {SHARPEST} to {SOFTEST}, got {alpha}")
        self.alpha: Tensor
        start = torch.tensor(float(alpha))
        if is_learned:
            self.alpha = nn.Parameter(start)
        else:
            self.register_buffer("alpha", start)

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return _Soft.apply(position, self.alpha, low, high)  # type: ignore[no-any-return]
