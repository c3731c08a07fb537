"""Residual networks with a shortcut around each convolution, built from the plain ones by surgery that works on any residual network.

Source: Liu et al. 2018, "Bi-Real Net", section 3.2. There are no activations: the sign of binary inputs is the only one, so these networks are
for binary training.
"""

from __future__ import annotations

import torch
from torch import nn

from lowbit.inputs import Inputs
from lowbit.models.resnet import resnet18, resnet20
from lowbit.network.layers import replace_modules
from lowbit.network.surgery.shortcuts import give_shortcuts


def bireal_resnet18(num_classes: int = 1000, in_channels: int = 3, width: int = 64) -> nn.Module:
    """18 layers, for large images."""
    return _with_shortcuts(resnet18(num_classes, in_channels, width), torch.zeros(1, in_channels, 64, 64))


def bireal_resnet20(num_classes: int = 10, in_channels: int = 3, width: int = 16) -> nn.Module:
    """20 layers, for images of 28 to 40 pixels."""
    return _with_shortcuts(resnet20(num_classes, in_channels, width), torch.zeros(1, in_channels, 32, 32))


def _with_shortcuts(model: nn.Module, sample: torch.Tensor) -> nn.Module:
    give_shortcuts(model, Inputs.of(sample))
    replace_modules(model, nn.ReLU, nn.Identity)
    return model
