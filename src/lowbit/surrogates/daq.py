"""Distance-aware rounding: the gradient of a soft assignment to the two neighbouring levels, equally sharp everywhere.

Paper: Kim et al. 2021, "Distance-aware Quantization", section 3.
Symbols: gamma -> gamma (sharpness of the assignment), sigma -> sigma (width of the kernel).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError

LARGEST_GAMMA = 80.0  # beyond it the gradient vanishes in float32


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, low: float, high: float, gamma: float, sigma: float) -> Tensor:
        ctx.save_for_backward(position)
        ctx.constants = low, high, gamma, sigma
        return position.clamp(low, high).round_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (position,) = ctx.saved_tensors
        low, high, gamma, sigma = ctx.constants
        inside = (position >= low) & (position <= high)
        distance = (position - position.floor() - 0.5).abs()
        factor = gamma / (2 * math.sinh(gamma)) / torch.tanh(distance + 1 / (2 * sigma**2))
        return grad * factor * inside, None, None, None, None


class DistanceAwareRounding(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward: ``gamma / (2 sinh gamma) * coth(|z - 1/2| + 1 / (2 sigma**2))`` where ``low <= position <= high``, else 0, with
    ``z = position - floor(position)``: largest at the decision points. It equals the gradient of the kernel soft argmax.

    Args:
        gamma: Sharpness of the assignment, above 0 and at most 80; the gradient falls with it.
        sigma: Width of the kernel in steps, positive.
    """

    def __init__(self, gamma: float = 2.0, sigma: float = 1.0) -> None:
        super().__init__()
        if not (0 < gamma <= LARGEST_GAMMA and sigma > 0):
            raise SpecError(f"daq takes gamma above 0 and at most {LARGEST_GAMMA:g} and a positive sigma, got {gamma} and {sigma}")
        self.gamma, self.sigma = gamma, sigma

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return _Round.apply(position, low, high, self.gamma, self.sigma)  # type: ignore[no-any-return]
