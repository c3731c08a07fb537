"""A small residual network with two blocks, and problems of searching its bits."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.assignment.budget import Budget
from lowbit.assignment.problem import SearchProblem, make_problem
from lowbit.inputs import Calibration, Inputs
from lowbit.spec import LayerBits

X = torch.randn(24, 3, 6, 6, generator=torch.Generator().manual_seed(5))


class Residual(nn.Module):
    """Two convolutions with batch norms, and what came in added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + x, inplace=True)


class ResidualNet(nn.Module):
    """Six layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1 = Residual(4)
        self.block2 = Residual(4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(self.stem(x))).mean((2, 3)))


def network() -> nn.Module:
    """With weights and statistics of norms drawn at random, logits of the size of a trained network's."""
    torch.manual_seed(0)
    model = ResidualNet()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.2, 2.0)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.weight, 0.5, 2.0)
    nn.init.normal_(model.head.weight)
    return model.eval()


def problem(budget: object = (), **given: object) -> SearchProblem:
    """All six layers are searched."""
    model = network()
    calibration = Calibration.of(X, model)
    settings = {
        "candidates": (2, 4, 8), "activation_bits": (8,), "first_last": None, "task": lowbit.Classification(), "calibration": calibration,
        "batches": (X[:16], X[16:]), **given,
    }  # fmt: skip
    return make_problem(model, Inputs.of(X, model), budget=Budget.of(budget), **settings)  # type: ignore[arg-type]


def combinations(problem: SearchProblem) -> Iterator[Mapping[str, LayerBits]]:
    """Every choice of bits within the budget."""
    for chosen in itertools.product(*problem.choices.values()):
        bits = dict(zip(problem.choices, chosen, strict=True))
        if problem.fits(bits):
            yield bits
