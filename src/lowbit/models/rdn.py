"""RDN: dense blocks whose outputs are all put together before the upsampler.

Source: Zhang et al. 2018, "Residual Dense Network for Image Super-Resolution", section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.models.upsampling import check_scale, upsampler
from lowbit.network.surgery.sums import Sum


class DenseLayer(nn.Module):
    """A 3x3 convolution with ReLU, its output beside its input: ``[N, in_channels + growth, H, W]``."""

    def __init__(self, in_channels: int, growth: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, growth, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.relu(self.conv(x))), 1)


class DenseBlock(nn.Module):
    """Dense layers, a 1x1 convolution of all they give, and a skip around them."""

    def __init__(self, width: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(DenseLayer(width + index * growth, growth) for index in range(layers)))
        self.fusion = nn.Conv2d(width + layers * growth, width, 1)
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.sum(x, self.fusion(self.layers(x)))
        return out


class Rdn(nn.Module):
    """Two shallow convolutions, dense blocks, fusion, upsampler. RGB pixels in 0 to 255, ``[N, 3, H, W]``, become ``scale`` times larger."""

    def __init__(self, scale: int, blocks: int, layers: int, growth: int, width: int) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        self.shallow1 = nn.Conv2d(3, width, 3, padding=1)
        self.shallow2 = nn.Conv2d(width, width, 3, padding=1)
        self.blocks = nn.ModuleList(DenseBlock(width, growth, layers) for _ in range(blocks))
        self.fusion = nn.Sequential(nn.Conv2d(blocks * width, width, 1), nn.Conv2d(width, width, 3, padding=1))
        self.tail = nn.Sequential(*upsampler(scale, width, growth), nn.Conv2d(growth, 3, 3, padding=1))
        self.sum = Sum()

    def features(self, x: Tensor) -> Tensor:
        """What the upsampler gets: ``[N, width, H, W]``, after the skip."""
        shallow = self.shallow1(x)
        x = self.shallow2(shallow)
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        out: Tensor = self.sum(shallow, self.fusion(torch.cat(found, 1)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.features(x))
        return out


def rdn_a(scale: int = 2, width: int = 64, blocks: int = 20, layers: int = 6, growth: int = 32) -> Rdn:
    """RDN of 20 blocks of 6 layers that add 32 channels each."""
    return Rdn(scale, blocks, layers, growth, width)


def rdn_b(scale: int = 2, width: int = 64, blocks: int = 16, layers: int = 8, growth: int = 64) -> Rdn:
    """RDN of 16 blocks of 8 layers that add 64 channels each."""
    return Rdn(scale, blocks, layers, growth, width)
