from __future__ import annotations

import itertools
import math
import os
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from lowbit.assignment import solve as solve_module
from lowbit.assignment.solve import frontier, solve
from lowbit.errors import MissingExtraError, SpecError

Array = NDArray[np.float64]
BITS = [2, 4, 8]


def total(table: Array, choices: tuple[int, ...]) -> float:
    return math.fsum(table[layer, choice] for layer, choice in enumerate(choices))


def brute_force(losses: Array, costs: list[Array], limits: list[float], tied: tuple[int, ...] = ()) -> float | None:
    """The least loss among all combinations within the limits."""
    found = [
        total(losses, choices)
        for choices in itertools.product(range(losses.shape[1]), repeat=len(losses))
        if len({choices[layer] for layer in tied}) <= 1
        and all(total(table, choices) <= limit * (1 + 1e-12) for table, limit in zip(costs, limits, strict=True))
    ]
    return min(found, default=None)


def random_problem(seed: int) -> tuple[Array, list[Array], list[float]]:
    """Losses over many orders of magnitude, one to three budgets of integers or real numbers."""
    random = np.random.default_rng(seed)
    layers, choices = random.integers(2, 6), random.integers(1, 5)
    losses = np.exp(random.normal(0, 3, (layers, choices))) * 10 ** random.uniform(-6, 3)
    costs = [random.integers(1, 1000, (layers, choices)) * (1.0 if seed % 2 else 1234.567) for _ in range(random.integers(1, 4))]
    limits = [float(c.min(1).sum() + random.random() * (c.max(1).sum() - c.min(1).sum())) for c in costs]
    return losses, costs, limits


@pytest.mark.parametrize("seed", range(40))
def test_the_choice_is_as_good_as_the_best_of_all_combinations(seed: int) -> None:
    losses, costs, limits = random_problem(seed)
    best = brute_force(losses, costs, limits)
    if best is None:
        with pytest.raises(SpecError, match="no choice costs less"):
            solve(losses, costs, limits)
    else:
        found = solve(losses, costs, limits)
        assert all(total(table, found) <= limit * (1 + 1e-12) for table, limit in zip(costs, limits, strict=True))
        assert total(losses, found) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_tied_layers_get_the_same_choice_and_the_best_such(seed: int) -> None:
    random = np.random.default_rng(seed)
    losses, costs = random.random((5, 3)), [random.random((5, 3))]
    limits = [float(costs[0].sum() / 3)]
    best = brute_force(losses, costs, limits, tied=(0, 3))
    if best is None:
        with pytest.raises(SpecError):
            solve(losses, costs, limits, groups=[(3, 0)])
    else:
        found = solve(losses, costs, limits, groups=[(3, 0)])
        assert found[0] == found[3]
        assert total(losses, found) == pytest.approx(best, rel=1e-12)


def test_a_larger_budget_never_loses_more() -> None:
    random = np.random.default_rng(0)
    losses, costs = random.random((12, 4)), np.sort(random.integers(1, 100, (12, 4)), axis=1).astype(float)
    limits = np.linspace(costs.min(1).sum(), costs.max(1).sum(), 15)
    found = [total(losses, solve(losses, [costs], [limit])) for limit in limits]
    assert found == sorted(found, reverse=True)
    assert found[-1] == pytest.approx(losses.min(1).sum())


def test_a_limit_that_is_met_exactly_is_met_and_one_unit_more_is_not() -> None:
    # the solver's tolerance of 1e-6 of the limit is more than one unit here
    losses, costs = [[1.0, 0.0]] * 2, [[100_000_000, 100_000_001]] * 2
    assert solve(losses, [costs], [200_000_000]) == (0, 0)
    assert sum(solve(losses, [costs], [200_000_001])) == 1
    assert solve(losses, [costs], [200_000_002]) == (1, 1)


def test_small_losses_beside_large_ones_still_decide() -> None:
    losses = [[1e6, 1e5], [2e-3, 1e-3], [0.0, 0.0]]
    assert solve(losses, [[[1, 2], [1, 2], [2, 1]]], [5]) == (1, 1, 1)


def test_layers_may_differ_in_their_number_of_choices_and_losses_may_be_negative() -> None:
    assert solve([[5.0], [1.0, -4.0, 9.0]], [[[7], [1, 2, 3]]], [9]) == (0, 1)


def test_an_infinite_limit_limits_nothing() -> None:
    assert solve([[1.0, 0.0]], [[[1, 9]], [[3, 4]]], [math.inf, math.inf]) == (1,)


def test_the_least_possible_cost_stands_in_the_error() -> None:
    with pytest.raises(SpecError, match=r"size in bits: at most 3 is allowed, and no choice costs less than 4\. Raise the limit to 4"):
        solve([[9.0, 1.0, 0.0]] * 2, [[BITS, BITS]], [3], names=["size in bits"])


def test_limits_that_exclude_each_other_name_the_least_cost_beside_the_others() -> None:
    # cheap in bits is slow: 2 bits take 9 ms, 8 bits take 1 ms
    latency = [[9.0, 5.0, 1.0]] * 2
    with pytest.raises(SpecError, match=r"latency: at most 8 is allowed, and no choice costs less than 10 within the limits before it"):
        solve([[0.0] * 3] * 2, [[BITS, BITS], latency], [10, 8], names=["size", "latency"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0], [1.0, 2.0]], [[[1], [1]]], [9]), r"one form: choices of each layer \[1, 2\]"),
        (([[math.nan]], [[[1]]], [9]), "layer 0: losses and costs must be finite"),
        (([[1.0]], [[[1]]], []), "needs a limit"),
        (([[1.0]], [[[1]]], [math.nan]), "needs a limit"),
        (([[1.0], []], [[[1], []]], [9]), "layer 1 has no choice"),
        (([[1.0], [1.0, 2.0]], [[[1], [1, 2]]], [9], [(0, 1)]), r"tied layers \[0, 1\]: they have \[1, 2\] choices"),
        (([[1.0], [1.0]], [[[1], [1]]], [9], [(0, 1), (1,)]), "layer 1 must be one of 2 and in one group only"),
        (([[1.0], [1.0]], [[[1], [1]]], [9], [(0, 2)]), "layer 2 must be one of 2"),
    ],
)
def test_tables_that_do_not_fit_are_refused(arguments: tuple[list[object], ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        solve(*arguments)  # type: ignore[arg-type]


def test_without_scipy_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(MissingExtraError, match=r"scipy.*search"):
        solve([[1.0]], [[[1]]], [1])


@pytest.mark.parametrize("seed", range(10))
def test_the_frontier_holds_what_no_other_combination_beats(seed: int) -> None:
    random = np.random.default_rng(seed)
    losses, costs = random.integers(0, 9, (4, 3)).astype(float), random.integers(1, 9, (4, 3)).astype(float)
    every = {(total(costs, c), total(losses, c)) for c in itertools.product(range(3), repeat=4)}
    wanted = {(cost, loss) for cost, loss in every if not any(c <= cost and v <= loss and (c, v) != (cost, loss) for c, v in every)}
    found = frontier(losses, costs)
    assert [(cost, loss) for cost, loss, _ in found] == sorted(wanted)
    assert all((total(costs, point.choices), total(losses, point.choices)) == point[:2] for point in found)


def test_the_frontier_within_a_limit_ends_where_the_solver_does() -> None:
    random = np.random.default_rng(3)
    losses, costs = random.random((9, 3)), random.random((9, 3))
    limit = float(costs.sum() / 3)
    found = frontier(losses, costs, [(1, 5)], limit=limit)
    assert found[-1].loss == pytest.approx(total(losses, solve(losses, [costs], [limit], [(1, 5)])))
    assert all(point.cost <= limit and point.choices[1] == point.choices[5] for point in found)
    assert [point[:2] for point in frontier(losses, costs, [(1, 5)]) if point.cost <= limit] == [point[:2] for point in found]


def test_a_thinned_frontier_keeps_its_ends_and_is_monotone() -> None:
    random = np.random.default_rng(4)
    losses, costs = random.random((20, 4)), random.random((20, 4))
    found = frontier(losses, costs, points=50)
    assert len(found) <= 50
    assert found[0].cost == pytest.approx(costs.min(1).sum()) and found[-1].loss == pytest.approx(losses.min(1).sum())
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(found))


def test_no_configuration_within_a_limit_is_an_empty_frontier() -> None:
    assert frontier([[1.0, 0.0]], [[2.0, 3.0]], limit=1) == []
    with pytest.raises(SpecError, match="points must be at least 2"):
        frontier([[1.0]], [[2.0]], points=1)


def test_what_the_solver_prints_does_not_reach_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    def shout() -> None:
        os.write(1, b"from the solver")

    with solve_module._without_output():
        shout()
    assert capfd.readouterr().out == ""
    shout()
    assert capfd.readouterr().out == "from the solver"


def test_a_closed_standard_output_stops_no_choice() -> None:
    kept = os.dup(1)
    os.close(1)
    try:
        found = solve([[9.0, 1.0, 0.0], [2.0, 1.0, 0.0]], [[BITS, BITS]], limits=[8])
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    assert found == (1, 1)
