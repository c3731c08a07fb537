"""Small networks that are awkward to quantize, each in one way, and one that is awkward in every way that can be exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.testing.tiny import TinyNet as TinyNet


class BranchNet(nn.Module):
    """Takes one of two convolutions by the values of its input: cannot be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.bright = nn.Conv2d(3, 4, 3, padding=1)
        self.dark = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            y = self.bright(x)
        else:
            y = self.dark(x)
        return self.head(F.relu(y).mean((2, 3)))


class LoopNet(nn.Module):
    """Runs a list of layers in a loop, the last of them several times."""

    def __init__(self, repeats: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.repeats = repeats

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = F.relu(layer(x))
        for _ in range(self.repeats):
            x = x + self.layers[-1](x)
        return x


class ReusedNet(nn.Module):
    """One convolution and one block are called twice, on tensors of different size and range."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.block(F.max_pool2d(x, 2))
        return self.head(x.mean((2, 3)))


class FunctionalNet(nn.Module):
    """Calls convolutions as functions, with the weight of a layer and with a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.kernel = nn.Parameter(torch.randn(4, 4, 3, 3) * 0.2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.conv2d(x, self.conv.weight, self.conv.bias, padding=1)
        x = F.relu(x + F.conv2d(x, self.kernel, padding=1))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class SharedWeightNet(nn.Module):
    """Two linear layers hold the same weight tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(6, 6)
        self.decode = nn.Linear(6, 6)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(F.relu(self.encode(x)))


class TwoInputNet(nn.Module):
    """Joins an image and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.embed = nn.Linear(5, 4)
        self.head = nn.Linear(8, 3)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        seen = F.relu(self.conv(image)).mean((2, 3))
        return self.head(torch.cat([seen, F.relu(self.embed(vector))], 1))


class DictOutputNet(nn.Module):
    """Returns a dictionary of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)
        self.side = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.body(x)).mean((2, 3))
        return {"logits": self.head(features), "side": self.side(features)}


class Torture(nn.Module):
    """Loop, module used twice, functional calls, shared weights, two inputs and a dictionary as output, all in one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1))
        self.mix = nn.ModuleList([nn.Conv2d(8, 8, 1) for _ in range(2)])
        self.mix[1].weight = self.mix[0].weight
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1) * 0.2)
        self.embed = nn.Linear(5, 8)
        self.head = nn.Linear(16, 4)
        self.side = nn.Linear(16, 2)

    def forward(self, image: Tensor, vector: Tensor) -> dict[str, Tensor]:
        x = F.relu(self.norm(self.stem(image)))
        for _ in range(2):
            x = F.relu(x + self.block(x))
        x = F.max_pool2d(x, 2)
        for layer in self.mix:
            x = F.relu(layer(x))
        x = F.relu(F.conv2d(x, self.kernel)).mean((2, 3))
        joint = torch.cat([x, F.relu(self.embed(vector))], 1)
        return {"logits": self.head(joint), "side": self.side(joint)}


def settled(model: nn.Module, *inputs: Tensor, seed: int = 0) -> nn.Module:
    """``model`` in evaluation mode with random batch norms that match its activations, so that nothing vanishes or explodes."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for norm in (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
        norm.momentum = None  # the plain average
        norm.reset_running_stats()
        if norm.affine:
            norm.weight.data.uniform_(0.5, 1.5, generator=generator)
            norm.bias.data.uniform_(-0.3, 0.3, generator=generator)
    with torch.no_grad():
        model(*inputs)
    return model.eval()
