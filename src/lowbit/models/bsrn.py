"""BSRN: blocks of 3x3 and 1x1 convolutions without activations, made to be binary.

Source: Xin et al. 2020, "Binarized Neural Network for Single Image Super Resolution", figure 3. The sign of binary inputs is the only
non-linearity in the blocks, so this network is for binary training.
"""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.models.upsampling import check_scale, upsampler


class LocalBlock(nn.Module):
    """``a1 = conv3x3(x)``, ``a2 = conv1x1(a1)``, ``a3 = conv1x1(a1 + a2)``; the output is ``a1 + a2 + a3``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.spatial = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.pointwise1 = nn.Conv2d(width, width, 1, bias=False)
        self.pointwise2 = nn.Conv2d(width, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.spatial(x)
        both = first + self.pointwise1(first)
        out: Tensor = both + self.pointwise2(both)
        return out


class Bsrn(nn.Module):
    """Head, blocks of two ``LocalBlock`` each, upsampler. RGB pixels in 0 to 255, ``[N, 3, H, W]``, become ``scale`` times larger."""

    def __init__(self, scale: int, blocks: int, width: int) -> None:
        super().__init__()
        check_scale(scale)
        self.scale = scale
        self.head = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.blocks = nn.Sequential(*(nn.Sequential(LocalBlock(width), LocalBlock(width)) for _ in range(blocks)))
        self.tail = nn.Sequential(*upsampler(scale, width, width), nn.Conv2d(width, 3, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.tail(self.blocks(self.head(x)))
        return out


def bsrn(scale: int = 2, width: int = 48, blocks: int = 20) -> Bsrn:
    """BSRN of 20 blocks of 48 channels."""
    return Bsrn(scale, blocks, width)
