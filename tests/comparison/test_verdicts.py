from __future__ import annotations

from dataclasses import replace

import pytest
from tests.comparison.results import seeds

from lowbit.comparison.orderings import Ordering
from lowbit.comparison.verdicts import judge

CLAIM = Ordering("lsq > dorefa at 4/4")


@pytest.mark.parametrize(
    ("better", "worse", "finding"),
    [
        ([0.8, 0.7, 0.9], [0.7, 0.65, 0.8], "holds"),
        ([0.7, 0.65, 0.8], [0.8, 0.7, 0.9], "does not hold"),
        ([0.8, 0.7, 0.9], [0.9, 0.6, 0.9], "no difference shown"),
        ([0.8, 0.7], [0.7, 0.6], "not measured"),
        ([0.8, 0.7, 0.9], [], "not measured"),
    ],
)
def test_the_interval_of_paired_differences_decides(better: list[float], worse: list[float], finding: str) -> None:
    (verdict,) = judge([CLAIM], [*seeds(better, "lsq"), *seeds(worse, "dorefa")])
    assert verdict.finding == finding and (verdict.subject, verdict.track) == ("digits", "aligned")
    if verdict.difference is not None:
        means = [sum(values) / len(values) for values in (better, worse)]
        assert verdict.difference.mean == pytest.approx(means[0] - means[1])


def test_where_less_is_better_the_difference_turns() -> None:
    results = [replace(one, higher_is_better=False) for one in [*seeds([0.5] * 3, "lsq"), *seeds([0.6] * 3, "dorefa")]]
    (verdict,) = judge([CLAIM], results)
    assert verdict.finding == "holds" and verdict.difference is not None and verdict.difference.mean == pytest.approx(0.1)


def test_each_network_has_its_own_verdict_and_other_bits_do_not_count() -> None:
    results = [*seeds([0.8] * 3, "lsq"), *seeds([0.7] * 3, "dorefa")]
    elsewhere = [replace(one, cell=replace(one.cell, subject="other")) for one in results]
    turned = [replace(one, metrics={"accuracy": 1 - one.metrics["accuracy"]}) for one in elsewhere]
    other_bits = seeds([0.1] * 3, "lsq", (2, 2))
    assert [(v.subject, v.finding) for v in judge([CLAIM], [*results, *turned, *other_bits])] == [
        ("digits", "holds"),
        ("other", "does not hold"),
    ]


def test_terms_that_the_two_do_not_share_are_told() -> None:
    (verdict,) = judge([CLAIM], [*seeds([0.8] * 3, "lsq"), *seeds([0.7] * 3, "dorefa", terms={"float_share": 0.2})])
    assert verdict.unequal == ("float share",) and verdict.finding == "holds"


def test_what_has_no_results_is_told_too() -> None:
    (verdict,) = judge([CLAIM], [])
    assert (verdict.finding, verdict.subject, verdict.better) == ("not measured", "", None)
