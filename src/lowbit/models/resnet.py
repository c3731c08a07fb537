"""Residual networks of two convolutions a block.

Source: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2 (6n + 2 layers for small images) and section 3.3
(18 layers), with 1x1 convolutions as shortcuts where the shape changes.
"""

from __future__ import annotations

from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut around them."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.downsample(x))
        return out


class SmallResNet(nn.Module):
    """``6 * blocks + 2`` layers: a stem, three stages of ``blocks`` residual blocks at widths w, 2w, 4w, and a classifier.

    Input ``[N, in_channels, H, W]`` with H and W of about 28 to 40; output logits ``[N, num_classes]``.
    """

    def __init__(self, blocks: int, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.pool(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.flatten(1))
        return logits


class ResNet18(nn.Module):
    """A stem of stride 4, four stages of two residual blocks at widths w, 2w, 4w, 8w, and a classifier.

    Input ``[N, in_channels, H, W]`` with H and W of 64 or more, usually 224; output logits ``[N, num_classes]``.
    """

    def __init__(self, num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        widths = [width * 2**index for index in range(4)]
        self.layers = nn.ModuleList(
            _stage(before, after, 2, 1 if before == after else 2) for before, after in zip((width, *widths), widths, strict=False)
        )
        self.mean = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(self.relu(self.norm(self.conv(x))))
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.fc(self.mean(x).flatten(1))
        return logits


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = ResidualBlock(in_channels, out_channels, stride)
    return nn.Sequential(first, *(ResidualBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> SmallResNet:
    """8 layers."""
    return SmallResNet(1, num_classes, in_channels, width)


def resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> SmallResNet:
    """20 layers."""
    return SmallResNet(3, num_classes, in_channels, width)


def resnet32(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> SmallResNet:
    """32 layers."""
    return SmallResNet(5, num_classes, in_channels, width)


def resnet56(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> SmallResNet:
    """56 layers."""
    return SmallResNet(9, num_classes, in_channels, width)


def resnet18(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> ResNet18:
    """18 layers, for large images."""
    return ResNet18(num_classes, in_channels, width)
