"""A genetic search over one choice for each layer: the fittest are crossed and mutated, and what breaks a limit is thrown away.

Source: Li et al. 2021 (BRECQ), section 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Individual = tuple[int, ...]  # the choice of each layer
TRIES = 10  # children that are drawn for each that is wanted, before a generation makes do with fewer


@dataclass(frozen=True)
class Evolution:
    """The best that was found, and the loss of the best after each generation, the first entry that of the initial population."""

    best: Individual
    losses: tuple[float, ...]


def evolve(
    loss: Callable[[Individual], float],
    counts: Sequence[int],
    fits: Callable[[Individual], bool],
    feasible: Individual,
    *,
    population: int,
    generations: int,
    mutation: float,
    parents: int,
    generator: torch.Generator,
) -> Evolution:
    """The least ``loss`` that a genetic search finds among the individuals that fit.

    Each generation has ``population`` individuals: half are crossed (each layer's choice from one of two parents), half are mutated (each layer's
    choice replaced at random with probability ``mutation``). Parents are the ``parents`` best found so far, in any generation. Children that
    do not fit, or were there before, are drawn again.

    Args:
        loss: What to minimise.
        counts: Number of choices of each layer.
        fits: Whether an individual is within the limits.
        feasible: One that is; the first population is grown from it.
        population, generations, mutation, parents: See above.
        generator: Source of all random numbers.

    Example:
        >>> weights = [3, 1, 2]
        >>> found = evolve(
        ...     lambda choices: -sum(w * c for w, c in zip(weights, choices)), [3, 3, 3], lambda choices: sum(choices) <= 3, (0, 0, 0),
        ...     population=10, generations=20, mutation=0.3, parents=4, generator=torch.Generator().manual_seed(0),
        ... )
        >>> found.best, found.losses[-1]
        ((2, 0, 1), -8)
    """

    def uniform(size: int) -> list[float]:
        return torch.rand(size, generator=generator).tolist()

    def index(size: int) -> int:
        return int(torch.randint(size, (), generator=generator))

    def grown() -> Individual:
        """An individual of random choices, each layer in a random turn taking the first that fits with what the others have."""
        made = list(feasible)
        for layer in torch.randperm(len(counts), generator=generator).tolist():
            for choice in torch.randperm(counts[layer], generator=generator).tolist():
                changed = (*made[:layer], choice, *made[layer + 1 :])
                if fits(changed):
                    made[layer] = choice
                    break
        return tuple(made)

    def crossed(best: Sequence[Individual]) -> Individual:
        first, second = best[index(len(best))], best[index(len(best))]
        return tuple(a if drawn < 0.5 else b for a, b, drawn in zip(first, second, uniform(len(counts)), strict=True))

    def mutated(best: Sequence[Individual]) -> Individual:
        parent, drawn, news = best[index(len(best))], uniform(len(counts)), uniform(len(counts))
        return tuple(
            int(new * count) if draw < mutation else old for old, count, draw, new in zip(parent, counts, drawn, news, strict=True)
        )

    def children(make: Callable[[Sequence[Individual]], Individual], best: Sequence[Individual], wanted: int) -> list[Individual]:
        found: dict[Individual, None] = {}
        for _ in range(TRIES * wanted):
            child = make(best)
            if child not in known and fits(child):
                found[child] = None
                if len(found) == wanted:
                    break
        return list(found)

    known: dict[Individual, float] = {}
    best: list[Individual] = []
    losses: list[float] = []
    current = list(dict.fromkeys([feasible, *(grown() for _ in range(population - 1))]))
    for generation in range(generations + 1):
        known |= {individual: loss(individual) for individual in current if individual not in known}
        best = sorted(dict.fromkeys([*best, *current]), key=lambda individual: (known[individual], individual))[:parents]
        losses.append(known[best[0]])
        if generation < generations:
            current = children(crossed, best, population // 2)
            current = list(dict.fromkeys([*current, *children(mutated, best, population - len(current))]))
            if not current:  # everything within reach has been looked at
                break
    return Evolution(best[0], tuple(losses))
