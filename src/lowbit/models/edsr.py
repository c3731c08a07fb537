"""EDSR: residual blocks without batch norm between a head and an upsampler.

Source: Lim et al. 2017, "Enhanced Deep Residual Networks for Single Image Super-Resolution", section 3. Layers go by the names of
the authors' program, so that its weights can be loaded; the mean colour is a constant, no layer.
"""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.models.upsampling import MeanShift, check_scale, upsampler
from lowbit.network.surgery.sums import Sum


class EdsrBlock(nn.Module):
    """``x + residual_scale * conv(relu(conv(x)))`` with 3x3 convolutions."""

    def __init__(self, width: int, residual_scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))
        self.residual_scale = residual_scale
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        residual = self.body(x)
        out: Tensor = self.sum(x, residual if self.residual_scale == 1 else self.residual_scale * residual)
        return out


class Edsr(nn.Module):
    """Head, blocks and a convolution with a skip around them, upsampler. RGB pixels in 0 to 255, ``[N, 3, H, W]``, become ``scale`` times larger."""

    def __init__(self, scale: int, blocks: int, width: int, residual_scale: float = 1.0) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        self.sub_mean = MeanShift(-1)
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.body = nn.Sequential(*(EdsrBlock(width, residual_scale) for _ in range(blocks)), nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(nn.Sequential(*upsampler(scale, width, width)), nn.Conv2d(width, 3, 3, padding=1))
        self.add_mean = MeanShift(1)
        self.sum = Sum()

    def features(self, x: Tensor) -> Tensor:
        """What the upsampler gets: ``[N, width, H, W]``, after the skip."""
        x = self.head(self.sub_mean(x))
        out: Tensor = self.sum(x, self.body(x))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.add_mean(self.tail(self.features(x)))
        return out


def edsr_small(scale: int = 2, width: int = 24, blocks: int = 4) -> Edsr:
    """EDSR of 4 blocks of 24 channels, whose trained weights for scale 2 ship with the package."""
    return Edsr(scale, blocks, width)


def edsr_baseline(scale: int = 2, width: int = 64, blocks: int = 16) -> Edsr:
    """EDSR of 16 blocks of 64 channels."""
    return Edsr(scale, blocks, width)


def edsr(scale: int = 2, width: int = 256, blocks: int = 32, residual_scale: float = 0.1) -> Edsr:
    """EDSR of 32 blocks of 256 channels, residuals scaled by 0.1."""
    return Edsr(scale, blocks, width, residual_scale)
