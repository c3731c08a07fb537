"""One-bit quantization: the sign times a scale.

Source: Rastegari et al. 2016, "XNOR-Net", section 3.1: ``scale = mean |x|`` minimises ``|| x - scale * sign(x) ||^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.qtensor import BinaryDecoder, QTensor
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient


class BinaryQuantizer(TableQuantizer):
    """Two levels ``-scale`` and ``+scale``; zero counts as positive.

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
