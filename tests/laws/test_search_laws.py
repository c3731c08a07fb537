"""What every search keeps to: budgets, its own choices, the same result for the same seed, and a frontier without a point that another beats."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import lowbit
from lowbit.assignment.result import SearchResult

METHODS = [info.name for info in lowbit.list_methods(kind="search")]
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(48, 2, 6, 6, generator=GENERATOR)
LABELS = torch.randint(3, (48,), generator=GENERATOR)


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU()]
    layers += [nn.Conv2d(8, 12, 1), nn.ReLU(), nn.Conv2d(12, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)]
    return nn.Sequential(*layers).eval()


def found(name: str, budget: object, **given: object) -> SearchResult:
    method = lowbit.get_method(name, "search").method
    assert method is not None
    settings = {"data": [(X[:24], LABELS[:24]), (X[24:], LABELS[24:])], **method.trial, **given}  # type: ignore[attr-defined]
    return lowbit.search(network(), method=name, budget=budget, progress=False, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", ["size=33%", "average=4", ["bops=5.5%", "average=5"]], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_budgets_are_kept_and_each_layer_has_one_of_its_widths(name: str, budget: object) -> None:
    result = found(name, budget)
    assert result.searched == ("3", "5", "7")
    assert all(result.cost[kind] <= limit * (1 + 1e-9) for kind, limit in result.limits.items())
    assert all(result.found.bits[layer] in [lowbit.LayerBits(bits, 8) for bits in (2, 4, 8)] for layer in result.searched)
    assert result.found.bits["0"] == result.found.bits["11"] == lowbit.LayerBits(8, 8)
    quantized = lowbit.quantize(network(), method="round_to_nearest", policy=result.policy, calibration=X)
    assert {layer: bits for layer, bits in lowbit.get_bits(quantized).items() if layer in result.found.bits} == result.found.bits


@pytest.mark.parametrize("name", METHODS)
def test_the_same_seed_finds_the_same_and_leaves_the_network_as_it_was(name: str) -> None:
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    method = lowbit.get_method(name, "search").method
    assert method is not None
    first = lowbit.search(model, method=name, budget="average=4", data=[(X, LABELS)], progress=False, **method.trial)  # type: ignore[attr-defined]
    torch.rand(7)  # random numbers of others
    second = lowbit.search(model, method=name, budget="average=4", data=[(X, LABELS)], progress=False, **method.trial)  # type: ignore[attr-defined]
    assert first == second
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", METHODS)
def test_no_point_of_the_frontier_beats_another(name: str) -> None:
    result = found(name, "average=4")
    costs, losses = [one.cost["average"] for one in result.frontier], [one.loss for one in result.frontier]
    assert costs == sorted(costs) and len(set(costs)) == len(costs)
    assert all(after < before for before, after in itertools.pairwise(losses))  # type: ignore[operator]
    for layer, sensitivity in result.sensitivity.items():
        assert set(sensitivity) == {lowbit.LayerBits(bits, 8) for bits in (2, 4, 8)}, layer


@pytest.mark.parametrize("name", METHODS)
def test_a_tighter_budget_never_predicts_less_loss(name: str) -> None:
    losses = [found(name, f"average={bits}").found.loss for bits in (8, 5, 3)]
    if None in losses or not found(name, "average=4").sensitivity:
        pytest.skip("it predicts no loss, or measures with chance in it")
    assert losses == sorted(losses)  # type: ignore[type-var]
