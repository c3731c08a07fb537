"""Element-wise gradient scaling: gradients grow where an element has to travel towards the next decision point.

Paper: Lee et al. 2021, "Network Quantization with Element-wise Gradient Scaling", Eq. 4.
Symbols: delta -> delta, x_n -> position, x_q -> code.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError


class _Scale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, position: Tensor, delta: Tensor, low: float, high: float) -> Tensor:
        code = position.clamp(low, high).round_()
        ctx.save_for_backward(position, delta)
        ctx.bounds = low, high
        return code

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        position, delta = ctx.saved_tensors
        low, high = ctx.bounds
        clipped = position.detach().clamp(low, high)
        error = (clipped - clipped.round()) / (high - low)
        return grad * (1 + delta * grad.detach().sign() * error) * (position.detach() == clipped), None, None, None


class ElementwiseGradientScaling(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward: ``g * (1 + delta * sign(g) * e)`` where ``low <= position <= high``, else 0, with the rounding error
    ``e = (position - code) / (high - low)``. ``delta = 0`` is the straight-through estimator. It can be differentiated again.

    Args:
        delta: Strength, 0 or more; methods re-estimate it from the curvature of the loss.
    """

    def __init__(self, delta: float = 1e-3) -> None:
        super().__init__()
        if not delta >= 0:
            raise SpecError(f"ewgs takes a delta of 0 or more, got {delta}")
        self.register_buffer("delta", torch.tensor(float(delta)))
        self.delta: Tensor

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return _Scale.apply(position, self.delta, low, high)  # type: ignore[no-any-return]
