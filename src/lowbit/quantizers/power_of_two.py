"""Power-of-two quantization: zero and ``+-scale * 2**-k``, so that a product is a shift."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.qtensor import PowerOfTwoDecoder, QTensor
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient


class PowerOfTwoQuantizer(TableQuantizer):
    """``2**(bit_width - 1) - 1`` magnitudes ``scale, scale / 2, scale / 4, ...`` of either sign, and zero.

    Forward: the nearest level. With ``m = |x| / scale``: magnitude ``2**-k`` covers ``m`` from ``0.75 * 2**-k`` (midway to the
    level below) to ``1.5 * 2**-k``; below half of the smallest level ``x`` becomes 0. Backward: 1 (straight-through).
    All bit-widths share the scale, and so the largest magnitudes.

    Args:
        bit_width: 2 to 8.
        granularity: Which elements share the scale, their largest magnitude rounded to a power of two.
    """

    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, granularity: Granularity | None = None) -> None:
        super().__init__(bit_width, granularity or Granularity.tensor())
        if bit_width < 2:
            raise SpecError("powers of two need at least 2 bits (zero and one magnitude of either sign)")
        self.scale: Tensor
        self.resize()

    def resize(self) -> None:
        self.magnitudes = 2 ** (self.bit_width - 1) - 1

    def initialize(self, x: Tensor) -> None:
        """``scale = 2**floor(log2(4/3 * max |x|))``: the largest magnitude is nearest to the top level."""
        largest = self.granularity.flatten(x.detach().float().abs()).amax(1)
        scale = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest.clamp(min=1e-38) * 4 / 3))), torch.ones_like(largest))
        self._set_table("scale", scale.reshape(self.granularity.scale_shape(x)))

    def forward(self, x: Tensor) -> Tensor:
        return pass_gradient(x, self.encode(x).decode().to(x.dtype))

    def encode(self, x: Tensor) -> QTensor:
        view = self.granularity.broadcast(x.detach())
        magnitude = view.abs() / self.scale
        # ceil makes the midpoint 0.75 * 2**-k belong to the level below it
        exponent = torch.ceil(torch.log2((magnitude / 1.5).clamp(min=1e-38))).clamp(max=0)
        index = 1 - exponent
        smallest = torch.exp2(torch.tensor(1.0 - self.magnitudes, device=x.device))
        index = torch.where(magnitude <= smallest / 2, 0, index.clamp(max=self.magnitudes))
        codes = self.granularity.restore(torch.sign(view) * index, x.shape).to(torch.int8)
        return QTensor(codes, PowerOfTwoDecoder(self.scale.detach(), self.granularity), self.bit_width)
