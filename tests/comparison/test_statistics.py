from __future__ import annotations

import itertools

import numpy as np
import pytest

from lowbit.comparison.statistics import paired_difference, shared_ranks, spread


def test_spread_of_one_seed_has_no_deviation() -> None:
    found = spread([0.5])
    assert (found.mean, found.deviation, found.least, found.greatest, found.count, found.is_sound) == (0.5, None, 0.5, 0.5, 1, False)


def test_spread_is_that_of_numpy() -> None:
    values = np.random.default_rng(0).normal(size=7)
    found = spread(values.tolist())
    assert found.mean == pytest.approx(values.mean()) and found.deviation == pytest.approx(values.std(ddof=1)) and found.is_sound


def test_the_interval_holds_the_resampled_means_of_pairs() -> None:
    values, baseline = {0: 0.9, 1: 0.7, 2: 0.8}, {0: 0.85, 1: 0.71, 2: 0.7, 9: 0.0}
    differences = [0.05, -0.01, 0.1]
    means = sorted(sum(differences[i] for i in chosen) / 3 for chosen in itertools.product(range(3), repeat=3))
    found = paired_difference(values, baseline)
    assert found is not None and found.count == 3 and found.mean == pytest.approx(0.14 / 3)
    assert found.low == pytest.approx(means[0]) and found.high == pytest.approx(means[-1])  # 1 of 27 is more than 2.5 %
    assert not found.is_shown


def test_pairs_show_a_difference_that_the_spread_over_seeds_hides() -> None:
    baseline = {seed: 0.1 * seed for seed in range(5)}
    found = paired_difference({seed: value + 0.01 for seed, value in baseline.items()}, baseline)
    assert found is not None and found.is_shown and found.low == pytest.approx(0.01) == found.high


def test_drawn_resamples_are_the_same_each_time_and_narrow_with_seeds() -> None:
    noise = np.random.default_rng(1).normal(size=40)
    few, many = (paired_difference(dict(enumerate(noise[:count].tolist())), dict.fromkeys(range(count), 0.0)) for count in (6, 40))
    again = paired_difference(dict(enumerate(noise.tolist())), dict.fromkeys(range(40), 0.0))
    assert few is not None and many is not None and many == again
    assert many.high - many.low < few.high - few.low
    assert many.high - many.low == pytest.approx(2 * 1.96 * noise.std() / 40**0.5, rel=0.15)


def test_two_seeds_show_nothing() -> None:
    assert paired_difference({0: 1.0, 1: 1.0}, {0: 0.0, 1: 0.0}) is None
    assert shared_ranks({"a": {0: 1.0, 1: 1.0}, "b": {0: 0.0, 1: 0.0}}, higher_is_better=True) == {"a": None, "b": None}


def test_ranks_start_anew_at_the_first_method_that_differs_from_the_leader() -> None:
    values = {
        "worst": {0: 0.1, 1: 0.1, 2: 0.1},
        "second": {0: 0.9, 1: 0.7, 2: 0.8},
        "best": {0: 0.8, 1: 0.8, 2: 0.85},
        "one seed": {0: 1.0},
    }
    assert shared_ranks(values, higher_is_better=True) == {"worst": 3, "second": 1, "best": 1, "one seed": None}
    assert shared_ranks(values, higher_is_better=False) == {"worst": 1, "second": 2, "best": 2, "one seed": None}
