"""SignSwish: the derivative of a curve made of two swish functions.

Paper: Darabi, Belbahri, Courbariaux, Partovi Nia 2018, "BNN+: Improved Binary Network Training", section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.surrogates.base import follow_curve


def swish_sign(x: Tensor, beta: float = 5.0) -> Tensor:
    """``2 s (1 + beta x (1 - s)) - 1`` with ``s = sigmoid(beta x)``.

    Derivative: ``beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x))``, which is below zero beyond some ``2.4 / beta``.
    """
    gate = torch.sigmoid(beta * x)
    return 2 * gate * (1 + beta * x * (1 - gate)) - 1


class SwishSign(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward: the derivative of ``swish_sign`` at ``z = 2 (position - nearest decision point)``: for the sign, at ``x``.

    Args:
        beta: Sharpness, positive; the paper has 5 and 10.
    """

    def __init__(self, beta: float = 5.0) -> None:
        super().__init__()
        if not beta > 0:
            raise SpecError(f"swish_sign takes a positive beta, got {beta}")
        self.beta = beta

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return follow_curve(position, low, high, lambda z: swish_sign(z, self.beta))
