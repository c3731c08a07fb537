"""The error-decay estimator: a tanh that starts as a straight line and becomes the sign.

Paper: Qin et al. 2020, "Forward and Backward Information Retention for Accurate Binary Neural Networks", section 3.3, Eq. 12-15.
Symbols: t -> steepness, k -> height.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.surrogates.base import follow_curve


def error_decay(done: float, total: float, t_min: float = 0.1, t_max: float = 10.0) -> tuple[float, float]:
    """Height ``k = max(1 / t, 1)`` and steepness ``t = t_min (t_max / t_min)**(done / total)``. Source: Eq. 14."""
    t = t_min * (t_max / t_min) ** (done / total)
    return max(1 / t, 1.0), t


class ErrorDecay(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward: ``k t (1 - tanh(t z)^2)`` with ``z = 2 (position - nearest decision point)``, for the sign ``z = x``; nothing cuts it off
    outside of the range. While ``t < 1`` its largest value is 1, afterwards ``t``.

    Args:
        t_min, t_max: Steepness at the start and the end of training, positive.
    """

    def __init__(self, t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__()
        if not (0 < t_min <= t_max < math.inf):
            raise SpecError(f"ede: steepness must be positive and grow, got t_min {t_min} and t_max {t_max}")
        self.t_min, self.t_max = t_min, t_max
        self.register_buffer("height", torch.tensor(1.0))
        self.register_buffer("steepness", torch.tensor(1.0))
        self.height: Tensor
        self.steepness: Tensor
        self.set_progress(0.0)

    def set_progress(self, progress: float) -> None:
        """Set height and steepness for the fraction of training that is done."""
        self.set_curve(*error_decay(progress, 1.0, self.t_min, self.t_max))

    def set_curve(self, height: float, steepness: float) -> None:
        """Set ``k`` and ``t``."""
        self.height.fill_(height)
        self.steepness.fill_(steepness)

    def curve(self, z: Tensor) -> Tensor:
        """``k tanh(t z)``; its derivative stands for that of the sign."""
        return self.height * torch.tanh(self.steepness * z)

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return follow_curve(position, low, high, self.curve)
