"""SRResNet: residual blocks with batch norm between 9x9 convolutions.

Source: Ledig et al. 2017, "Photo-Realistic Single Image Super-Resolution Using a Generative Adversarial Network", section 2.1 and figure 4.
"""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor, nn

from lowbit.models.upsampling import check_scale, stages
from lowbit.network.surgery.sums import Sum

BlockActivation = Literal["relu", "prelu"]


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)


class SrResNetBlock(nn.Module):
    """``x + bn(conv(act(bn(conv(x)))))`` with 3x3 convolutions."""

    def __init__(self, width: int, activation: BlockActivation) -> None:
        super().__init__()
        self.conv1 = _conv(width, width, 3)
        self.norm1 = nn.BatchNorm2d(width)
        self.activation = nn.ReLU() if activation == "relu" else nn.PReLU()
        self.conv2 = _conv(width, width, 3)
        self.norm2 = nn.BatchNorm2d(width)
        self.sum = Sum()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.sum(x, self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x))))))
        return out


class SrResNet(nn.Module):
    """Head, blocks and a convolution with a skip around them, upsampler. RGB pixels in 0 to 255, ``[N, 3, H, W]``, become ``scale`` times larger."""

    def __init__(self, scale: int, blocks: int, width: int, activation: BlockActivation) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        self.head = nn.Sequential(_conv(3, width, 9), nn.PReLU())
        self.blocks = nn.Sequential(*(SrResNetBlock(width, activation) for _ in range(blocks)))
        self.conv = _conv(width, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.sum = Sum()
        parts = ((_conv(width, width * factor**2, 3), nn.PixelShuffle(factor), nn.PReLU()) for factor in stages(scale))
        self.upsampler = nn.Sequential(*(layer for part in parts for layer in part))
        self.tail = _conv(width, 3, 9)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels)))

    def features(self, x: Tensor) -> Tensor:
        """What the upsampler gets: ``[N, width, H, W]``, after the skip."""
        x = self.head(x)
        out: Tensor = self.sum(x, self.norm(self.conv(self.blocks(x))))
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.upsampler(self.features(x)))
        return out


def srresnet(scale: int = 4, width: int = 64, blocks: int = 16, activation: BlockActivation = "relu") -> SrResNet:
    """SRResNet of 16 blocks of 64 channels; ``activation="prelu"`` in the blocks is the paper's own choice."""
    return SrResNet(scale, blocks, width, activation)
