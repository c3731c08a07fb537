"""ReActNet-A: a MobileNet whose depthwise and pointwise convolutions are ordinary ones with shortcuts, made to be binary.

Source: Liu, Shen, Savvides, Cheng 2020, "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions", ECCV,
section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowbit.network.surgery.shortcuts import ShiftedPReLU, ShortcutUnit

WIDTHS = (2, 4, 4, 8, 8, 16, 16, 16, 16, 16, 16, 32, 32)  # of the blocks, in units of the stem's


class ReactBlock(nn.Module):
    """A 3x3 convolution that keeps the width, then a 1x1 convolution, each with norm, shortcut and ``ShiftedPReLU``.

    Where the width doubles, two 1x1 convolutions of the same input each have the shortcut, and their results lie side by side.

    Args:
        in_channels: Number of input channels.
        out_channels: As many, or twice as many.
        stride: Stride of the 3x3 convolution, whose shortcut averages.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        spatial = nn.Conv2d(in_channels, in_channels, 3, stride, 1, bias=False)
        pool = nn.AvgPool2d(2, 2) if stride > 1 else None
        self.spatial = ShortcutUnit(spatial, nn.BatchNorm2d(in_channels), pool, ShiftedPReLU(in_channels))
        self.pointwise = nn.ModuleList(
            ShortcutUnit(nn.Conv2d(in_channels, in_channels, 1, bias=False), nn.BatchNorm2d(in_channels))
            for _ in range(out_channels // in_channels)
        )
        self.activation = ShiftedPReLU(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spatial(x)
        out: Tensor = self.activation(torch.cat([unit(x) for unit in self.pointwise], 1))
        return out


class ReactNet(nn.Module):
    """Float stem of stride 2, thirteen blocks, a float classifier. Input ``[N, in_channels, H, W]``, output ``[N, num_classes]``."""

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        after = [width * factor for factor in WIDTHS]
        before = [width, *after[:-1]]
        strides = [2 if wide != narrow and index else 1 for index, (narrow, wide) in enumerate(zip(before, after, strict=True))]
        self.blocks = nn.Sequential(*(ReactBlock(*sizes) for sizes in zip(before, after, strides, strict=True)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(after[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))
        return out


def reactnet_a(num_classes: int = 1000, in_channels: int = 3, width: int = 32) -> ReactNet:
    """ReActNet-A, for large images; ``width`` is the stem's."""
    return ReactNet(num_classes, in_channels, width)
