"""VGG-small: six 3x3 convolutions and one classifier, the network of many low-bit papers on CIFAR-10.

Source: Zhang et al. 2018 (LQ-Nets), section 4.1; Simonyan and Zisserman 2015.
"""

from __future__ import annotations

from torch import Tensor, nn


class VggSmall(nn.Module):
    """Widths w, w, 2w, 2w, 4w, 4w with pooling after each pair; input ``[N, in_channels, 32, 32]``, output logits."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, width: int = 128) -> None:
        super().__init__()
        widths = (width, width, 2 * width, 2 * width, 4 * width, 4 * width)
        layers: list[nn.Module] = []
        for index, out_channels in enumerate(widths):
            layers += [nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
            if index % 2:
                layers.append(nn.MaxPool2d(2))
            in_channels = out_channels
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.classifier = nn.Linear(4 * width * 16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.pool(self.features(x)).flatten(1))
        return logits


def vgg_small(num_classes: int = 10, in_channels: int = 3, width: int = 128) -> VggSmall:
    """VGG-small of the given width."""
    return VggSmall(num_classes, in_channels, width)
