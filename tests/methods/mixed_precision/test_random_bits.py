"""Random bits use up the budget, and never pass it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import SpecError

X = torch.rand(4, 8, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(10)))


def bits(seed: int, budget: object = "average=4") -> dict[str, int | None]:
    found = lowbit.search(network(), method="random_bits", budget=budget, calibration=X, seed=seed)  # type: ignore[arg-type]
    return {name: width.weight for name, width in found.found.bits.items() if name in found.searched}


@pytest.mark.parametrize("seed", range(5))
def test_the_budget_is_used_up_and_not_passed(seed: int) -> None:
    found = bits(seed)
    assert sum(width or 0 for width in found.values()) in (30, 32)  # of 32; where 30 are used, no layer of 2 bits is left to raise
    assert sum(width or 0 for width in found.values()) == 32 or 2 not in found.values()


def test_seeds_differ_and_repeat() -> None:
    assert bits(0) == bits(0)
    assert len({tuple(bits(seed).values()) for seed in range(5)}) > 1


def test_several_limits_hold() -> None:
    found = lowbit.search(network(), method="random_bits", budget=["average=4", "bops=3%"], calibration=X)
    assert found.cost["average"] <= 4 and found.cost["bops"] <= found.limits["bops"]


def test_it_needs_a_budget() -> None:
    data = X, torch.zeros(4, dtype=torch.long)
    with pytest.raises(SpecError, match="uses up a budget"):
        lowbit.search(network(), method="random_bits", max_drop=1.0, data=data)
