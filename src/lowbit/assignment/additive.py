"""The choice of bits where the losses of layers add up: the best within all limits, and the frontier of cost and loss."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from lowbit.assignment.problem import Found, Option, SearchProblem
from lowbit.assignment.solve import frontier, solve
from lowbit.spec import LayerBits

PARTS = 2**14  # combinations of the first layers that are kept before the next one is added


def choose(problem: SearchProblem, losses: Mapping[str, Mapping[LayerBits, float]], *, options: int, parts: int = PARTS) -> Found:
    """``argmin_b sum_l losses[l][b_l]`` within every limit, exactly; and the frontier along ``problem.main``, limits left out.

    Args:
        problem: Layers, their widths, costs and limits.
        losses: Loss of each searched layer at each of its widths.
        options: Most options of the frontier to give, evenly spread over it, its ends among them.
        parts: Most parts that ``frontier`` keeps between two layers. It is exact where there are no more.

    Raises:
        SpecError: The limits cannot be met together, or a loss is not finite.
        MissingExtraError: scipy is not installed.
    """
    names = list(problem.choices)

    def rows(values: Mapping[str, Mapping[LayerBits, float]]) -> list[list[float]]:
        return [[values[name][bits] for bits in problem.choices[name]] for name in names]

    def bits_of(choices: tuple[int, ...]) -> dict[str, LayerBits]:
        return {name: problem.choices[name][choice] for name, choice in zip(names, choices, strict=True)}

    costs = {kind: problem.costs[kind] for kind in problem.limits}
    best = bits_of(
        solve(
            rows(losses),
            [rows(cost.table) for cost in costs.values()],
            [problem.limits[kind] - cost.fixed for kind, cost in costs.items()],
            names=[f"{kind} of the searched layers, {cost.unit}" for kind, cost in costs.items()],
        )
    )
    line = frontier(rows(losses), rows(problem.costs[problem.main].table), points=parts)
    shown = np.linspace(0, len(line) - 1, min(options, len(line))).round().astype(int)
    found: tuple[Option, ...] = tuple(problem.option(bits_of(line[place].choices), line[place].loss) for place in shown)
    return Found(best, sum(losses[name][bits] for name, bits in best.items()), found, losses)
