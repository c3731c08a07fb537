"""VDSR: a plain network of 3x3 convolutions that corrects the bicubically enlarged picture.

Source: Kim et al. 2016, "Accurate Image Super-Resolution Using Very Deep Convolutional Networks", section 3, for RGB in place of luma.
"""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.models.upsampling import Bicubic, check_scale
from lowbit.network.surgery.sums import Sum


class Vdsr(nn.Module):
    """RGB pixels in 0 to 255, ``[N, 3, H, W]``, become ``scale`` times larger: bicubically, and the convolutions' output is added."""

    def __init__(self, scale: int, depth: int, width: int) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        self.enlarge = Bicubic(scale)
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.body = nn.Sequential(*(layer for _ in range(depth - 2) for layer in (nn.Conv2d(width, width, 3, padding=1), nn.ReLU())))
        self.tail = nn.Conv2d(width, 3, 3, padding=1)
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        x = self.enlarge(x)
        out: Tensor = self.sum(x, self.tail(self.body(self.head(x))))
        return out


def vdsr(scale: int = 2, width: int = 64, depth: int = 20) -> Vdsr:
    """VDSR of 20 convolutions."""
    return Vdsr(scale, depth, width)
