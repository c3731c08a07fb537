"""ApproxSign: the derivative of a parabola on either side of zero.

Paper: Liu et al. 2018, "Bi-Real Net", section 3.3 and Figure 5.
"""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.surrogates.base import follow_curve


def approx_sign(x: Tensor) -> Tensor:
    """``2x + x^2`` for x in [-1, 0), ``2x - x^2`` in [0, 1), -1 below and 1 above; derivative ``max(2 - 2|x|, 0)``."""
    clipped = x.clamp(-1, 1)
    return clipped * (2 - clipped.abs())


class ApproxSign(nn.Module):
    """Forward: ``clamp(round(position), low, high)``.

    Backward: ``max(2 - 2|z|, 0)`` with ``z = 2 (position - nearest decision point)``: for the sign ``max(2 - 2|x|, 0)``.
    """

    def forward(self, position: Tensor, low: float, high: float) -> Tensor:
        return follow_curve(position, low, high, approx_sign)
