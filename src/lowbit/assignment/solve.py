"""The choice of each layer under additive budgets, solved exactly: a multiple-choice knapsack.

Each layer takes one of its choices (bit-widths, say). A choice has a loss and, for every budget, a cost; losses and costs of layers add up.
``solve`` finds the least loss within all limits by integer linear programming, ``frontier`` all choices for which no other is both cheaper
and better.

Source: Kellerer, Pferschy, Pisinger 2004, "Knapsack Problems", chapter 11 (multiple choice), section 3.4 (dominance).
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lowbit.errors import SpecError, missing_extra

Table = Sequence[Sequence[float]]  # for each layer the values of its choices; layers may differ in their number
_SLACK = 1e-12  # share of a limit that rounding errors of a sum may take
_SPREAD = 1e4  # the solver sees losses of this size, as its tolerances are absolute ones of 1e-6


class Configuration(NamedTuple):
    """One choice for every layer, with what it costs and loses in total."""

    cost: float
    loss: float
    choices: tuple[int, ...]


def solve(
    losses: Table, costs: Sequence[Table], limits: Sequence[float], groups: Iterable[Sequence[int]] = (), *, names: Sequence[str] = ()
) -> tuple[int, ...]:
    """The choices of least total loss whose total cost meets every limit.

    ``argmin sum_i losses[i][c_i]`` subject to ``sum_i costs[k][i][c_i] <= limits[k]`` for all ``k``, and ``c_i = c_j`` within a group.

    Args:
        losses: What each choice of each layer loses, ``[layers][choices]``.
        costs: A table like ``losses`` for each limit.
        limits: Largest total costs; infinity for none.
        groups: Indices of layers that are tied to the same choice.
        names: What the limits limit, with their unit, for errors: ``("size in bytes", "BOPs")``.

    Returns:
        The index of the choice of each layer.

    Raises:
        SpecError: A limit cannot be met, alone or together with those before it (the message says the least cost that can), or tables do
            not fit each other.
        MissingExtraError: scipy is not installed.

    Example:
        >>> bits = [2, 4, 8]
        >>> losses = [[9.0, 1.0, 0.0], [2.0, 1.0, 0.0]]
        >>> solve(losses, [[bits, bits]], limits=[8])
        (1, 1)
        >>> solve(losses, [[bits, bits]], limits=[3])
        Traceback (most recent call last):
            ...
        lowbit.errors.SpecError: limit 0: at most 3 is allowed, and no choice costs less than 4. Raise the limit to 4, or allow cheaper choices.
    """
    if len(costs) != len(limits) or any(math.isnan(limit) for limit in limits):
        raise SpecError(f"each table of costs needs a limit that is a number; got {len(costs)} tables and limits {list(limits)}")
    tied = _Tied(losses, groups)
    merged, merged_costs = tied.sums(losses), [tied.sums(table) for table in costs]
    found = _least(merged, merged_costs, limits)
    if found is None:
        raise _unmet(merged_costs, limits, names)
    return tied.spread(found)


def frontier(
    losses: Table, costs: Table, groups: Iterable[Sequence[int]] = (), *, limit: float = math.inf, points: int | None = None
) -> list[Configuration]:
    """All configurations that no other beats in cost and loss at once, from the cheapest to the best.

    Layer by layer, every kept part is joined with every choice of the next layer, and what is dominated is dropped. That keeps the
    frontier exactly, because a part that is dominated stays so whatever follows.

    Args:
        losses: What each choice of each layer loses, ``[layers][choices]``.
        costs: What it costs.
        groups: Indices of layers that are tied to the same choice.
        limit: Largest total cost of interest.
        points: Keep at most this many parts, evenly spread, between two layers; the result is then near the frontier. Default: all.

    Returns:
        Configurations of increasing cost and decreasing loss; empty when none is within ``limit``.

    Example:
        >>> [(point.cost, point.loss) for point in frontier([[3.0, 0.0], [2.0, 1.0]], [[1.0, 2.0], [1.0, 4.0]])]
        [(2.0, 5.0), (3.0, 2.0), (6.0, 1.0)]
    """
    if points is not None and points < 2:
        raise SpecError(f"points must be at least 2, the two ends of a frontier; got {points}")
    tied = _Tied(losses, groups)
    rows, prices = tied.sums(losses), tied.sums(costs)
    rest = sum(price.min() for price in prices)  # what the layers to come cost at least
    loss, cost, chosen = np.zeros(1), np.zeros(1), np.zeros((1, 0), dtype=np.int64)
    for row, price in zip(rows, prices, strict=True):
        rest -= price.min()
        part, choice = (index.ravel() for index in np.meshgrid(np.arange(len(loss)), np.arange(len(row)), indexing="ij"))
        loss, cost = loss[part] + row[choice], cost[part] + price[choice]
        kept = undominated(cost, loss)
        kept = kept[cost[kept] + rest <= _with_slack(limit)]
        kept = kept if points is None else thinned(kept, points)
        loss, cost, chosen = loss[kept], cost[kept], np.column_stack([chosen[part[kept]], choice[kept]])
    return [Configuration(float(c), float(v), tied.spread(row)) for c, v, row in zip(cost, loss, chosen.tolist(), strict=True)]


def undominated(cost: NDArray[np.float64], loss: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of those that no other beats in cost and loss at once, from the cheapest to the best; of equal ones the first.

    >>> undominated(np.array([2.0, 1.0, 3.0, 4.0]), np.array([5.0, 6.0, 5.0, 1.0])).tolist()
    [1, 0, 3]
    """
    order = np.lexsort((loss, cost))
    best = np.minimum.accumulate(loss[order])
    return order[np.r_[True, best[1:] < best[:-1]]] if len(order) else order


def thinned(indices: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """At most so many of the indices, evenly spread, both ends among them.

    >>> thinned(np.arange(10), 4).tolist()
    [0, 3, 6, 9]
    """
    return indices if len(indices) <= most else indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]


class _Tied:
    """Layers as the solver sees them: those of a group are one, with the sum of their losses and costs."""

    def __init__(self, table: Table, groups: Iterable[Sequence[int]]) -> None:
        self.counts = [len(row) for row in table]
        owner: dict[int, Sequence[int]] = {}
        for group in groups:
            for layer in group:
                if not 0 <= layer < len(self.counts) or layer in owner:
                    raise SpecError(f"tied layers {list(group)}: layer {layer} must be one of {len(self.counts)} and in one group only")
                if self.counts[layer] != self.counts[group[0]]:
                    raise SpecError(
                        f"tied layers {list(group)}: they have {[self.counts[i] for i in group]} choices, and need equally many"
                    )
                owner[layer] = group
        self.members = [sorted(owner.get(i, [i])) for i in range(len(self.counts)) if i == min(owner.get(i, [i]))]
        if not all(self.counts):
            raise SpecError(f"layer {self.counts.index(0)} has no choice; each layer needs one or more")

    def sums(self, table: Table) -> list[NDArray[np.float64]]:
        """Values of each group's choices; SpecError where the table has another form or holds what is no number."""
        rows = [np.asarray(row, dtype=np.float64) for row in table]
        if [row.shape for row in rows] != [(count,) for count in self.counts]:
            raise SpecError(f"tables must have one form: choices of each layer {self.counts}, got shapes {[row.shape for row in rows]}")
        for layer, row in enumerate(rows):
            if not np.isfinite(row).all():
                raise SpecError(f"layer {layer}: losses and costs must be finite, got {row.tolist()}")
        return [np.sum([rows[layer] for layer in group], axis=0) for group in self.members]

    def spread(self, choices: Sequence[int]) -> tuple[int, ...]:
        """The choice of every layer from those of the groups."""
        found = {layer: int(choice) for group, choice in zip(self.members, choices, strict=True) for layer in group}
        return tuple(found[layer] for layer in range(len(self.counts)))


def _least(losses: list[NDArray[np.float64]], costs: list[list[NDArray[np.float64]]], limits: Sequence[float]) -> list[int] | None:
    """Choices of least loss within the limits; ``None`` where there are none."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array
    except ImportError as error:
        raise missing_extra("scipy", "search", "choosing bits under a budget") from error

    starts = np.cumsum([0, *(len(row) for row in losses)])
    total, layer_of = int(starts[-1]), np.repeat(np.arange(len(losses)), np.diff(starts))
    one_each = csr_array((np.ones(total), (layer_of, np.arange(total))), shape=(len(losses), total))
    # what a layer loses in any case does not count, and neither does the unit
    loss = np.concatenate([row - row.min() for row in losses])
    loss *= _SPREAD / (loss.max() or 1.0)
    constraints = [LinearConstraint(one_each, 1, 1)]
    for table, limit in zip(costs, limits, strict=True):
        if limit < math.inf:
            row = np.concatenate(table)
            unit = np.abs(row).max() or 1.0
            constraints.append(LinearConstraint(row[None] / unit, -np.inf, limit / unit))
    while True:
        with _without_output():
            found = milp(loss, integrality=np.ones(total), bounds=Bounds(0, 1), constraints=constraints, options={"mip_rel_gap": 0})
        if found.x is None:
            return None
        chosen = [int(part.argmax()) for part in np.split(found.x, starts[1:-1])]
        if all(_total(table, chosen) <= _with_slack(limit) for table, limit in zip(costs, limits, strict=True)):
            return chosen
        # the solver lets limits be passed by its tolerance: these choices are no answer, so the next best
        cut = np.zeros((1, total))
        cut[0, starts[:-1] + chosen] = 1
        constraints.append(LinearConstraint(cut, -np.inf, len(losses) - 1))


@contextmanager
def _without_output() -> Iterator[None]:
    """The solver prints now and then, past Python's streams, what would stand in the midst of JSON."""
    with suppress(OSError, ValueError, AttributeError):  # there may be no stream
        sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # standard output is closed, so that nothing can stand in it
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _unmet(costs: list[list[NDArray[np.float64]]], limits: Sequence[float], names: Sequence[str]) -> SpecError:
    """The error for limits that cannot be met: the first that fails beside those before it, with the least cost there."""
    for k, (table, limit) in enumerate(zip(costs, limits, strict=True)):
        cheapest = _least(table, costs[:k], limits[:k])
        assert cheapest is not None  # or one before would have failed
        least = _total(table, cheapest)
        if least > _with_slack(limit):
            beside = " within the limits before it" if k else ""
            return SpecError(
                f"{names[k] if names else f'limit {k}'}: at most {limit:.12g} is allowed, and no choice costs less than {least:.12g}{beside}. "
                f"Raise the limit to {least:.12g}, or allow cheaper choices."
            )
    raise AssertionError("limits that can be met one beside the other can be met together")


def _total(table: list[NDArray[np.float64]], choices: Sequence[int]) -> float:
    return math.fsum(float(row[choice]) for row, choice in zip(table, choices, strict=True))


def _with_slack(limit: float) -> float:
    """``limit`` and what rounding errors of a sum may add to a cost that equals it."""
    return limit + _SLACK * abs(limit) if math.isfinite(limit) else limit
