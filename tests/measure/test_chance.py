from __future__ import annotations

import math

import pytest

from lowbit.measure.chance import guessing_bound


def tail(samples: int, classes: int, hits: int) -> float:
    """``P(X >= hits)``, summed as the definition says."""
    share = 1 / classes
    return sum(math.comb(samples, k) * share**k * (1 - share) ** (samples - k) for k in range(hits, samples + 1))


@pytest.mark.parametrize(("samples", "classes"), [(20, 2), (50, 3), (100, 10), (600, 10), (64, 1000)])
def test_the_bound_is_the_least_count_that_guessing_hardly_reaches(samples: int, classes: int) -> None:
    hits = round(guessing_bound(samples, classes) * samples)
    assert tail(samples, classes, hits) <= 1e-3 < tail(samples, classes, hits - 1)


def test_a_few_samples_tell_nothing() -> None:
    assert guessing_bound(9, 2) == math.inf  # 2**-9 is more than a thousandth
    assert guessing_bound(10, 2) == 1.0


def test_many_samples_come_close_to_the_share_of_a_class() -> None:
    assert guessing_bound(100_000, 10) == pytest.approx(0.1 + 3.09 * math.sqrt(0.09 / 100_000), abs=1e-4)
