"""Statistics over seeds: spread, paired differences with bootstrap intervals, and ranks that are shared where no difference is shown."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEAST_SEEDS = 3  # below it there is no interval
CONFIDENCE = 0.95
_MOST_EXACT = 10_000  # resamples that are enumerated; above it as many are drawn


@dataclass(frozen=True)
class Spread:
    """A metric over seeds.

    Attributes:
        mean, least, greatest: Over all seeds.
        deviation: Sample standard deviation (divided by ``count - 1``); ``None`` for one seed.
        count: Number of seeds.
    """

    mean: float
    deviation: float | None
    least: float
    greatest: float
    count: int

    @property
    def is_sound(self) -> bool:
        """Whether there are enough seeds to compare with others."""
        return self.count >= LEAST_SEEDS


def spread(values: Sequence[float]) -> Spread:
    """Mean, sample standard deviation, least and greatest of ``values``.

    >>> spread([0.5, 0.75, 1.0])
    Spread(mean=0.75, deviation=0.25, least=0.5, greatest=1.0, count=3)
    """
    mean = math.fsum(values) / len(values)
    deviation = None
    if len(values) > 1:
        deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))
    return Spread(mean, deviation, min(values), max(values), len(values))


@dataclass(frozen=True)
class Difference:
    """The mean over seeds of one method's value minus another's, and a bootstrap interval of it.

    Attributes:
        mean: Mean of the paired differences.
        low, high: Ends of the interval at ``CONFIDENCE``.
        count: Number of seeds that both have.
    """

    mean: float
    low: float
    high: float
    count: int

    @property
    def is_shown(self) -> bool:
        """Whether the interval leaves 0 out. Where it does not, no difference is shown, which is a result."""
        return self.low > 0 or self.high < 0


def paired_difference(values: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """``values`` minus ``baseline``, seed by seed, with a percentile bootstrap interval of the mean.

    Resamples of the seeds are enumerated where there are at most 10,000 (five seeds), and drawn with a fixed seed above.

    Args:
        values, baseline: A value for each seed; seeds that only one of them has are left out.

    Returns:
        ``None`` with fewer than three common seeds.

    Example:
        >>> paired_difference({0: 0.9, 1: 0.8, 2: 0.85}, {0: 0.8, 1: 0.75, 2: 0.7}).is_shown
        True
        >>> paired_difference({0: 0.9, 1: 0.7, 2: 0.8}, {0: 0.8, 1: 0.8, 2: 0.8}).is_shown
        False
    """
    seeds = sorted(values.keys() & baseline.keys())
    if len(seeds) < LEAST_SEEDS:
        return None
    differences = np.array([values[seed] - baseline[seed] for seed in seeds])
    count = len(seeds)
    if count**count <= _MOST_EXACT:
        chosen = np.array(list(itertools.product(range(count), repeat=count)))
    else:
        chosen = np.random.default_rng(0).integers(count, size=(_MOST_EXACT, count))
    means, outside = differences[chosen].mean(axis=1), 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, outside, method="lower"), np.percentile(means, 100 - outside, method="higher")
    return Difference(math.fsum(differences) / count, float(low), float(high), count)


def shared_ranks(values: Mapping[str, Mapping[int, float]], *, higher_is_better: bool) -> dict[str, int | None]:
    """Ranks from 1 by the mean over seeds; a method shares the rank of the best one that it shows no difference to.

    Args:
        values: A value for each seed, by method.
        higher_is_better: Whether large values come first.

    Returns:
        ``None`` for methods with fewer than three seeds.

    Example:
        >>> values = {"a": {0: 0.9, 1: 0.9, 2: 0.8}, "b": {0: 0.9, 1: 0.8, 2: 0.9}, "c": {0: 0.5, 1: 0.5, 2: 0.5}}
        >>> shared_ranks(values, higher_is_better=True)
        {'a': 1, 'b': 1, 'c': 3}
    """
    sign = -1 if higher_is_better else 1
    sound = [name for name, found in values.items() if len(found) >= LEAST_SEEDS]
    ranks: dict[str, int | None] = {}
    leader = ""
    for place, name in enumerate(sorted(sound, key=lambda name: (sign * spread(list(values[name].values())).mean, name)), 1):
        difference = paired_difference(values[name], values[leader]) if leader else None
        if leader and (difference is None or not difference.is_shown):
            ranks[name] = ranks[leader]
        else:
            ranks[name], leader = place, name
    return {name: ranks.get(name) for name in values}
