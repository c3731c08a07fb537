"""Activations that are computed along with binary layers: a shift, a slope for what is negative, another shift, and a clip.

ReLU, leaky and parametric ReLU, ReLU6, hardtanh and ReActNet's RPReLU (Liu et al. 2020, section 4.2) are of this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

ROWS = 5  # of a table of activations


@dataclass(frozen=True)
class Activation:
    """``clip(z + after, low, high)`` with ``z = y + before``, times ``slope`` where it is negative.

    Attributes:
        before, slope, after, low, high: Numbers, or tensors of one for each channel; ``None`` where nothing is done.
    """

    before: Tensor | float | None = None
    slope: Tensor | float | None = None
    after: Tensor | float | None = None
    low: Tensor | float | None = None
    high: Tensor | float | None = None

    def followed_by(self, operator: str, values: Sequence[Tensor | float]) -> Activation | None:
        """This one and an operator of torch behind it, as one; ``None`` where that is none.

        Args:
            operator: ``aten.relu.default`` and the like.
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
        """What ``activated`` takes: float32 ``[5, channels]``, the rows ``before``, ``slope``, ``after``, ``low`` and ``high``."""
        nothing = {"before": 0.0, "slope": 1.0, "after": 0.0, "low": -torch.inf, "high": torch.inf}
        given = {name: getattr(self, name) for name in nothing}
        rows = (torch.as_tensor(nothing[name] if value is None else value, dtype=torch.float32) for name, value in given.items())
        return torch.stack([row.detach().flatten().expand(channels) for row in rows])


def activated(y: Tensor, activation: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """``y`` behind an activation.

    Args:
        y: Any shape.
        activation: From ``Activation.table``; nothing is done without it.
        shape: In which a row broadcasts with ``y``.
    """
    if activation is None:
        return y
    before, slope, after, low, high = (row.reshape(shape) for row in activation)
    z = y + before
    z = torch.where(z >= 0, z, z * slope) + after
    z = torch.where(z < low, low, z)
    return torch.where(z > high, high, z)
