"""A small MobileNetV2: inverted residuals with depthwise convolutions and ReLU6, for images of about 28 to 40 pixels.

Source: Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", section 3.
"""

from __future__ import annotations

from torch import Tensor, nn


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise, linear 1x1 projection; a shortcut where input and output have the same shape."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.expand = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(hidden)
        self.relu1 = nn.ReLU6()
        self.depthwise = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden)
        self.relu2 = nn.ReLU6()
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(out_channels)
        self.has_shortcut = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.expand(x)))
        y = self.relu2(self.norm2(self.depthwise(y)))
        out: Tensor = self.norm3(self.project(y))
        return x + out if self.has_shortcut else out


class MobileNetV2Small(nn.Module):
    """Stem, inverted residuals at widths w, 1.5w, 2w, 4w, a 1x1 head and a classifier. Output logits ``[N, num_classes]``."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU6()
        blocks, channels = [], width
        for out_channels, repeats, stride in ((width, 1, 1), (width * 3 // 2, 2, 2), (width * 2, 2, 2), (width * 4, 2, 1)):
            for index in range(repeats):
                blocks.append(InvertedResidual(channels, out_channels, stride if index == 0 else 1, expansion=4))
                channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Conv2d(channels, width * 12, 1, bias=False)
        self.head_norm = nn.BatchNorm2d(width * 12)
        self.head_relu = nn.ReLU6()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width * 12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        x = self.pool(self.head_relu(self.head_norm(self.head(x))))
        logits: Tensor = self.classifier(x.flatten(1))
        return logits


def mobilenet_v2_small(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> MobileNetV2Small:
    """MobileNetV2 with seven inverted residuals."""
    return MobileNetV2Small(num_classes, in_channels, width)
