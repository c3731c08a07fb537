"""The choice under limits against all combinations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import lowbit
from lowbit.assignment.additive import choose
from lowbit.assignment.budget import Budget
from lowbit.assignment.problem import SearchProblem, make_problem
from lowbit.inputs import Inputs
from lowbit.spec import LayerBits


def problem(budget: object) -> SearchProblem:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in ((3, 4), (4, 8), (8, 4), (4, 6), (6, 2)))).eval()
    return make_problem(
        model, Inputs.of(torch.rand(2, 3, 8, 8), model), budget=Budget.of(budget), candidates=(2, 4, 8), activation_bits=(8, 4), first_last=8,
        task=lowbit.Classification(),
    )  # fmt: skip


def random_losses(problem: SearchProblem) -> dict[str, dict[LayerBits, float]]:
    generator = torch.Generator().manual_seed(3)
    return {name: {bits: float(torch.rand((), generator=generator)) for bits in widths} for name, widths in problem.choices.items()}


@pytest.mark.parametrize("budget", ["average=3.7", "average=3.7,bops=6%", "size=25%,bops=5%,average=4"])
def test_no_combination_within_all_limits_loses_less(budget: str) -> None:
    asked = problem(budget)
    table = random_losses(asked)
    combinations = [dict(zip(asked.choices, bits, strict=True)) for bits in itertools.product(*asked.choices.values())]
    best = min(sum(table[name][width] for name, width in bits.items()) for bits in combinations if asked.fits(bits))
    found = choose(asked, table, options=100)
    assert asked.fits(found.bits)
    assert found.loss == pytest.approx(best)
    assert found.sensitivity == table


def test_the_frontier_is_that_of_all_combinations_and_thinned_with_its_ends() -> None:
    asked = problem("size=50%")
    table = random_losses(asked)
    points = sorted((asked.costs["size"].of(bits), sum(table[n][b] for n, b in bits.items())) for bits in (
        dict(zip(asked.choices, chosen, strict=True)) for chosen in itertools.product(*asked.choices.values())
    ))  # fmt: skip
    expected: list[tuple[float, float]] = []
    for cost, loss in points:
        if not expected or loss < expected[-1][1]:
            expected.append((cost, loss))
    line = choose(asked, table, options=1000).frontier
    assert [(option.cost, option.loss) for option in line] == [(cost, pytest.approx(loss)) for cost, loss in expected]
    assert all(option.cost == asked.costs["size"].of(option.bits) for option in line)
    few = choose(asked, table, options=3).frontier
    assert [option.cost for option in (few[0], few[-1])] == [line[0].cost, line[-1].cost] and len(few) == 3


def test_without_a_limit_every_layer_has_the_width_that_loses_least() -> None:
    asked = problem(())
    table = random_losses(asked)
    assert choose(asked, table, options=10).bits == {name: min(widths, key=widths.__getitem__) for name, widths in table.items()}
