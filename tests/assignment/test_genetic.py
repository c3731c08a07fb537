"""The genetic search on losses that do not add up."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from lowbit.assignment.genetic import Individual, evolve

COUNTS = [3, 2, 4, 3, 3]
COSTS = torch.rand(5, 4, generator=torch.Generator().manual_seed(0)).tolist()
LIMIT = 2.0


def loss(individual: Individual) -> float:
    """Every pair of neighbours interacts."""
    return sum(math.sin(17.0 * a + 5.0 * b + place) for place, (a, b) in enumerate(itertools.pairwise(individual)))


def fits(individual: Individual) -> bool:
    return sum(row[choice] for row, choice in zip(COSTS, individual, strict=True)) <= LIMIT


CHEAPEST = tuple(min(range(count), key=row.__getitem__) for row, count in zip(COSTS, COUNTS, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_it_finds_the_best_of_all_that_fit(seed: int) -> None:
    seen: list[Individual] = []

    def watched(individual: Individual) -> float:
        seen.append(individual)
        return loss(individual)

    found = evolve(
        watched,
        COUNTS,
        fits,
        CHEAPEST,
        population=10,
        generations=60,
        mutation=0.2,
        parents=6,
        generator=torch.Generator().manual_seed(seed),
    )
    everything = [individual for individual in itertools.product(*map(range, COUNTS)) if fits(individual)]
    assert len(everything) < math.prod(COUNTS)
    assert found.losses[-1] == loss(found.best) == min(map(loss, everything))
    assert all(map(fits, seen)) and len(set(seen)) == len(seen)  # what does not fit is never looked at, and nothing twice
    assert list(found.losses) == sorted(found.losses, reverse=True)


def test_the_generator_decides() -> None:
    def run(seed: int) -> tuple[Individual, tuple[float, ...]]:
        generator = torch.Generator().manual_seed(seed)
        found = evolve(loss, [9] * 8, lambda _: True, (0,) * 8, population=6, generations=4, mutation=0.3, parents=3, generator=generator)
        return found.best, found.losses

    assert run(0) == run(0) != run(1)


def test_where_only_one_fits_it_is_found() -> None:
    found = evolve(
        loss, COUNTS, lambda individual: individual == CHEAPEST, CHEAPEST, population=4, generations=3, mutation=1.0, parents=2,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert found.best == CHEAPEST and len(found.losses) == 1
