"""Activations that are fused with binary layers: a shift, a slope for negative values, another shift, and a clip.

ReLU, leaky and parametric ReLU, ReLU6, hardtanh and ReActNet's RPReLU (Liu et al. 2020, section 4.2) are of this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROWS = 5  # rows of an activation's table


@dataclass(frozen=True)
class Activation:
    """``clip(z + after, low, high)`` with ``z = y + before``, times ``slope`` where it is negative.

    Attributes:
        before, slope, after, low, high: A number, or a tensor with one for each channel; ``None`` skips the step.
    """

    before: Tensor | float | None = None
    slope: Tensor | float | None = None
    after: Tensor | float | None = None
    low: Tensor | float | None = None
    high: Tensor | float | None = None

    def followed_by(self, operator: str, values: Sequence[Tensor | float]) -> Activation | None:
        """This activation and a torch operator behind it, merged into one; ``None`` if the result is not of this form.

        Args:
            operator: Name of the operator, such as ``aten.relu.default``.
            values: Its arguments after the first.
        """
        is_clipped = self.low is not None or self.high is not None
        if is_clipped:
            return None
        if operator in ("aten.add.Tensor", "aten.sub.Tensor") and len(values) == 1:
            shift = values[0] if operator == "aten.add.Tensor" else -values[0]
            if self.after is None and self.slope is not None:
                return replace(self, after=shift)
            return replace(self, before=shift) if self.before is None and self.slope is None else None
        if operator in ("aten.prelu.default", "aten.leaky_relu.default") and self.slope is None:
            return replace(self, slope=values[0] if values else 0.01)
        limits = {"aten.relu.default": (0.0, None), "aten.relu6.default": (0.0, 6.0), "aten.hardtanh.default": (-1.0, 1.0)}
        if operator in limits or operator == "aten.clamp.default":
            defaults = limits.get(operator, (None, None))
            return replace(self, low=values[0] if values else defaults[0], high=values[1] if len(values) > 1 else defaults[1])
        return None

    def table(self, channels: int) -> Tensor:
        """The table that ``activated`` expects: float32 ``[5, channels]``, the rows ``before``, ``slope``, ``after``, ``low`` and ``high``."""
        nothing = {"before": 0.0, "slope": 1.0, "after": 0.0, "low": -torch.inf, "high": torch.inf}
        given = {name: getattr(self, name) for name in nothing}
        rows = (torch.as_tensor(nothing[name] if value is None else value, dtype=torch.float32) for name, value in given.items())
        return torch.stack([row.detach().flatten().expand(channels) for row in rows])


def activated(y: Tensor, activation: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """Apply an activation to ``y``.

    Args:
        y: Any shape.
        activation: Table from ``Activation.table``; ``None`` returns ``y`` unchanged.
        shape: Shape in which a row of the table broadcasts with ``y``.
    """
    if activation is None:
        return y
    before, slope, after, low, high = (row.reshape(shape) for row in activation)
    z = y + before
    z = torch.where(z >= 0, z, z * slope) + after
    z = torch.where(z < low, low, z)
    return torch.where(z > high, high, z)
