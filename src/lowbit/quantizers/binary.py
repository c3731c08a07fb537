"""One-bit quantization: the sign times a scale.

Source: Rastegari et al. 2016, "XNOR-Net", section 3.1: ``scale = mean |x|`` minimises ``|| x - scale * sign(x) ||^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers.base import Quantizer, TableQuantizer
from lowbit.quantizers.ops import mark_codebook
from lowbit.quantizers.qtensor import BinaryDecoder, QTensor
from lowbit.spec import Granularity
from lowbit.surrogates import Surrogate, pass_gradient

# the largest number below zero: the codebook operator compares with ">", and "> this number" means ">= 0"
_BELOW_ZERO = -(2.0**-149)


class BinaryQuantizer(TableQuantizer):
    """Two levels ``-scale`` and ``+scale``; zero counts as positive. One bit is the only width.

    Forward: ``scale`` where ``x >= 0``, else ``-scale``. Backward: 1 (straight-through).
    """

    def __init__(self, *, granularity: Granularity | None = None) -> None:
        super().__init__(1, granularity or Granularity.tensor())
        self.scale: Tensor

    def initialize(self, x: Tensor) -> None:
        mean = self.granularity.flatten(x.detach().abs()).mean(1)
        self._set_table("scale", mean.reshape(self.granularity.scale_shape(x)))

    def forward(self, x: Tensor) -> Tensor:
        return pass_gradient(x, self.encode(x).decode().to(x.dtype))

    def encode(self, x: Tensor) -> QTensor:
        return QTensor((x.detach() >= 0).to(torch.uint8), BinaryDecoder(self.scale.detach(), self.granularity), 1)


class ScaledSignQuantizer(Quantizer):
    """Two levels ``-scale`` and ``+scale`` with the scale taken from the values of each pass; zero counts as positive.

    Forward: ``scale`` where ``x >= 0``, else ``-scale``. Backward: 1 (straight-through), nothing through the scale; a subclass
    changes ``proxy``.

    Args:
        granularity: Which elements share a scale.
        has_scale: Whether the scale is ``mean |x|``; else 1.
    """

    def __init__(self, *, granularity: Granularity | None = None, has_scale: bool = True) -> None:
        super().__init__(1, granularity or Granularity.tensor())
        self.has_scale = has_scale

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def scale(self, x: Tensor) -> Tensor:
        """``mean |x|`` for each scale of the granularity, shaped to broadcast with ``granularity.broadcast(x)``; differentiable."""
        shape = self.granularity.scale_shape(x)
        return self.granularity.flatten(x.abs()).mean(1).reshape(shape) if self.has_scale else x.new_ones(shape)

    def proxy(self, x: Tensor) -> Tensor:
        """An expression whose gradient is the quantizer's; its value is not used."""
        return x

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        return pass_gradient(self.proxy(values), self.encode(values).decode()).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        values = x.detach().float()
        return QTensor((values >= 0).to(torch.uint8), BinaryDecoder(self.scale(values), self.granularity), 1)


class SignQuantizer(Quantizer):
    """The two levels -1 and +1; zero counts as positive.

    Forward: 1 where ``x >= 0``, else -1. Backward: 1 where ``|x| < 1``, with ``is_closed`` also at ``|x| = 1``, else 0; with a
    ``surrogate`` that of rounding ``(x + 1) / 2`` to 0 or 1, times 2.

    Args:
        is_closed: Whether the gradient passes at exactly -1 and 1.
    """

    def __init__(self, *, is_closed: bool = False) -> None:
        super().__init__(1, Granularity.tensor())
        self.is_closed = is_closed
        self.surrogate: Surrogate | None = None

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def proxy(self, x: Tensor) -> Tensor:
        """An expression whose gradient is the quantizer's; its value is not used."""
        if self.surrogate is not None:
            return 2 * self.surrogate((x + 1) / 2, 0, 1) - 1
        size = x.detach().abs()
        return x * (size <= 1 if self.is_closed else size < 1)

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if torch.compiler.is_exporting():
            marked: Tensor = mark_codebook(values, values.new_tensor([_BELOW_ZERO]), values.new_tensor([-1.0, 1.0]))
            return marked.to(x.dtype)
        return pass_gradient(self.proxy(values), self.encode(values).decode()).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        return QTensor((x.detach() >= 0).to(torch.uint8), BinaryDecoder(x.detach().new_ones((), dtype=torch.float32), self.granularity), 1)
