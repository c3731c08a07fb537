"""A sum of sigmoids that sharpens during training: the derivative of a smooth staircase.

Paper: Yang et al. 2019, "Quantization Networks", Eq. 4-6.
Symbols: T -> temperature, b_i -> the decision points ``i + 1/2`` in units of the step.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError

_NEIGHBOURS = range(-3, 4)  # sigmoids further away contribute less than exp(-3 T)


class _Stairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, temperature: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(position, temperature)
        ctx.bounds = low, high
        return position.clamp(low, high).round_()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        position, temperature = ctx.saved_tensors
        low, high = ctx.bounds
        nearest = position.clamp(low, high).floor()
        slope = torch.zeros_like(position)
        for offset in _NEIGHBOURS:
            step = nearest + offset
            sigmoid = torch.sigmoid((temperature * (position - step - 0.5)).clamp(-10, 10))
            slope += sigmoid * (1 - sigmoid) * ((step >= low) & (step <= high - 1))
        return grad * temperature * slope, None, None, None


class Sigmoids(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward: ``T * sum_i sig_i (1 - sig_i)`` with ``sig_i = sigmoid(T (position - i - 1/2))`` over the decision points of the range;
    its integral over one step is 1. ``T`` grows linearly with training from ``start`` to ``end``.

    The forward pass is hard, so a steep slope brings the gradient no closer to the network's own: most elements get none and the
    few near a decision point a large one. The mean square of the slope is about ``T / 6``, and it multiplies from quantizer to
    quantizer, so that a network of some depth stops learning far above ``T = 10``. (Soft forward passes, as in the method
    ``quantization_networks``, bear much higher temperatures.)

    Args:
        start, end: Temperature at the first and the last step of training, per step of the grid, positive.
    """

    def __init__(self, start: float = 3.0, end: float = 10.0) -> None:
        super().__init__()
        if not (start > 0 and end > 0 and math.isfinite(start) and math.isfinite(end)):
            raise SpecError(f"sigmoids: temperatures must be positive and finite, got start {start} and end {end}")
        self.start, self.end = start, end
        self.register_buffer("temperature", torch.tensor(float(start)))
        self.temperature: Tensor

    def set_progress(self, progress: float) -> None:
        """Set the temperature for the fraction of training that is done."""
        self.temperature.fill_(self.start + (self.end - self.start) * progress)

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return _Stairs.apply(position, self.temperature, low, high)  # type: ignore[no-any-return]
