"""Networks whose norms have seen data."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def seen(model: nn.Module, *inputs: Tensor) -> nn.Module:
    """``model`` after a few passes in training mode, in evaluation mode."""
    model.train()
    with torch.no_grad():
        for _ in range(8):
            model(*inputs)
    return model.eval()


def small(channels: int = 2) -> nn.Module:
    """Two convolutions with norms for pictures of 6 x 6 pixels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    return seen(nn.Sequential(*layers, nn.Flatten(), nn.Linear(64, 3)), 2 * torch.randn(64, channels, 6, 6) + 0.5)


class TwoInputs(nn.Module):
    """A picture, a vector, integers that choose a row, and a mask for all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.linear, self.norm1 = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.rows = nn.Embedding(7, 4)

    def forward(self, picture: Tensor, vector: Tensor, row: Tensor, mask: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(picture * mask))).mean((2, 3))
        return x + F.relu(self.norm1(self.linear(vector) + self.rows(row)))


def two_inputs() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The network and inputs of three samples."""
    torch.manual_seed(0)
    model, row = TwoInputs(), torch.arange(32) % 7
    mask = torch.ones(5, 6)
    seen(model, torch.randn(32, 1, 5, 6), torch.randn(32, 5), row, mask)
    return model, (torch.randn(3, 1, 5, 6), torch.randn(3, 5), row[:3], mask)
