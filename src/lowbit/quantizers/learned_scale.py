"""Learned step size: the scale of a uniform grid, and optionally its offset, are trained with the network.

Source: Esser et al. 2020, "Learned Step Size Quantization", section 2; Bhalgat et al. 2020, "LSQ+", for the offset.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lowbit.quantizers.affine import affine_parameters, qrange
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.ranges.scale_search import SMALLEST_SCALE
from lowbit.spec import Granularity
from lowbit.surrogates import Surrogate, bounded_straight_through, round_straight_through, scale_gradient

SMALLEST_STEP = 1e-8


class LearnedScaleQuantizer(GridQuantizer):
    """A uniform grid with a learned ``scale``, and with ``learn_offset`` a learned ``offset``.

    Forward: ``(clamp(round(x / scale + zero_point), qmin, qmax) - zero_point) * scale`` with ``zero_point = 0``, or with
    ``round(-offset / scale)`` where the offset is learned. One signed bit has the levels ``-scale`` and ``+scale``.
    Backward: 1 to ``x`` inside the range, else 0; to ``scale`` ``code - x / scale`` inside, the clipped code outside, times
    ``1 / sqrt(elements * qmax)``.
    Each bit-width has its own scale: that of a new width starts so that it covers the same range. The offset is shared.

    Args:
        bit_width: 1 to 8.
        signed: Whether codes can be negative.
        granularity: Which elements share a scale.
        learn_offset: Whether to learn a zero point too (unsigned codes).
        scale_gradient: Multiply the gradient of the scale by ``1 / sqrt(elements * qmax)``, elements of one sample where
            ``is_batched``.
        is_batched: Whether the first dimension counts samples (activations).
        surrogate: Backward rule of the rounding.
    """

    tables: tuple[str, ...] = ("scale",)
    tables_by_width: tuple[str, ...] = ("scale",)
    bit_widths = range(1, 9)

    def __init__(
        self,
        bit_width: int,
        *,
        signed: bool,
        granularity: Granularity | None = None,
        learn_offset: bool = False,
        scale_gradient: bool = True,
        is_batched: bool = False,
        surrogate: Surrogate = bounded_straight_through,
    ) -> None:
        self.signed = signed
        super().__init__(bit_width, *self.code_range(bit_width), granularity=granularity, surrogate=surrogate)
        if learn_offset:
            self.tables = ("scale", "offset")
        for name in self.tables:
            if name in self._buffers:
                del self._buffers[name]
            self.register_parameter(name, nn.Parameter(torch.tensor(float("nan"))))
        self.scale: Tensor
        self.offset: Tensor
        self.learn_offset, self.scales_gradient, self.is_batched = learn_offset, scale_gradient, is_batched

    @property
    def is_binary(self) -> bool:
        """Whether the levels are ``-scale`` and ``+scale``."""
        return self.signed and self.bit_width == 1

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return (0, 1) if self.signed and bit_width == 1 else qrange(bit_width, signed=self.signed)

    def carry_over(self, old_bits: int) -> None:
        self._set_table("scale", self.scale * self.code_range(old_bits)[1] / self.qmax)

    def initialize(self, x: Tensor) -> None:
        """``scale = 2 mean|x| / sqrt(qmax)``; with an offset the range of ``x``; one bit ``mean|x|``."""
        rows = self.granularity.flatten(x.detach().float())
        shape = self.granularity.scale_shape(x)
        if self.learn_offset:
            scale, zero_point = affine_parameters(rows.amin(1), rows.amax(1), self.qmin, self.qmax, symmetric=False)
            self._set_table("offset", (-zero_point * scale).reshape(shape))
        else:
            scale = rows.abs().mean(1) * (1 if self.is_binary else 2 / math.sqrt(max(self.qmax, 1)))
        self._set_table("scale", torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale)).reshape(shape))

    def grid(self, x: Tensor) -> Grid:
        scale = self.scale
        if self.scales_gradient and torch.is_grad_enabled():
            elements = x.numel() / max(self.scale.numel(), 1) / (x.shape[0] if self.is_batched and x.dim() else 1)
            scale = scale_gradient(scale, 1 / math.sqrt(max(elements, 1) * max(self.qmax, 1)))
        if self.is_binary:
            return Grid(-scale, 2 * scale, 2 * scale, torch.full_like(scale, 0.5))
        if not self.learn_offset:
            zero = torch.zeros_like(scale)
            return Grid(zero, scale, scale, zero)
        zero_point = round_straight_through(-self.offset / scale).clamp(self.qmin, self.qmax)
        return Grid(-zero_point * scale, scale, scale, zero_point)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the scale positive; small ones of small values stay."""
        self.scale.masked_fill_(self.scale <= 0, SMALLEST_STEP)
