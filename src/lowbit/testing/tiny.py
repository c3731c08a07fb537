"""The tiny task that the laws are held on: sixteen patterns in noise, and a small network trained on them."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES, SIZE = 16, 8


class TinyNet(nn.Module):
    """An ordinary small residual network: convolution, batch norm, ReLU, add, pooling, linear."""

    def __init__(self, channels: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)) + x)
        logits: Tensor = self.head(y.mean((2, 3)))
        return logits


def samples(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``[count, 3, 8, 8]``, each one of sixteen fixed patterns with strong noise, and their labels."""
    patterns = torch.randn(CLASSES, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns[labels] + torch.randn(count, 3, SIZE, SIZE, generator=generator), labels


@functools.cache
def trained() -> nn.Module:
    """A small residual network trained for two seconds; the scales of its hidden channels differ, as in real depthwise networks.

    It is trained in float64: in float32 each kind of processor would end with another network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = TinyNet(channels=16, classes=CLASSES).double().train()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        for step in range(150):
            images, labels = samples(64, seed=1000 + step)
            loss = F.cross_entropy(model(images.double()), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        spread = torch.exp2(torch.linspace(-3, 3, 16)[torch.randperm(16)])
    with torch.no_grad():  # ReLU is homogeneous: what the norm scales up, the next layer scales down
        assert isinstance(model, TinyNet)
        model.bn1.weight.mul_(spread)
        model.bn1.bias.mul_(spread)
        model.conv2.weight.div_(spread[:, None, None])
    return model.float().eval()


@functools.cache
def calibration() -> Tensor:
    """Unlabelled training images, shape ``[128, 3, 8, 8]``."""
    return samples(128, seed=1)[0]


@functools.cache
def held_out() -> Tensor:
    """Images that nothing was fitted to, shape ``[512, 3, 8, 8]``."""
    return samples(512, seed=2)[0]


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        logits: Tensor = model(images)
        return logits


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """``10 log10(var(reference) / mean((reference - other)**2))``."""
    error = (reference - other).double().square().mean().clamp_min(1e-30)
    return float(10 * torch.log10(reference.double().var(correction=0) / error))
