"""The embedded default: a small residual network for 8x8 digits, with trained weights in the package."""

from __future__ import annotations

from torch import Tensor, nn

from lowbit.models.resnet import ResidualBlock


class SeparableBlock(nn.Module):
    """A depthwise and a 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.norm1(self.depthwise(x)))
        out: Tensor = self.relu2(self.norm2(self.pointwise(x)))
        return out


class DigitsNet(nn.Module):
    """Stem, two residual blocks, a depthwise-separable block, a classifier. Input ``[N, 1, 8, 8]``, output logits ``[N, 10]``."""

    def __init__(self, num_classes: int = 10, in_channels: int = 1, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.block1 = ResidualBlock(width, width, 1)
        self.block2 = ResidualBlock(width, 2 * width, 2)
        self.separable = SeparableBlock(2 * width, 2 * width)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(2 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.pool(self.separable(self.block2(self.block1(x))))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


def digits_net(num_classes: int = 10, in_channels: int = 1, width: int = 16) -> DigitsNet:
    """The network whose trained weights ship with the package."""
    return DigitsNet(num_classes, in_channels, width)
