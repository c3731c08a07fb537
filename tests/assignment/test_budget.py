"""Budgets as users write them."""

from __future__ import annotations

import pytest

from lowbit.assignment.budget import Budget, Limit
from lowbit.errors import SpecError, UnknownNameError


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("average=4", Limit("average", 4.0)),
        ("size=2.5MB", Limit("size", 2.5e6)),
        ("size=512KiB", Limit("size", 512 * 1024)),
        ("size=10%", Limit("size", 0.1, is_share=True)),
        ("bops=1.2G", Limit("bops", 1.2e9)),
        ("bops=1.2e9", Limit("bops", 1.2e9)),
        ("latency=60%", Limit("latency", 0.6, is_share=True)),
        ("latency=250us", Limit("latency", 0.25)),
    ],
)
def test_text_becomes_a_limit_in_plain_units(text: str, limit: Limit) -> None:
    (found,) = Budget.of(text).limits
    assert found.kind == limit.kind and found.is_share is limit.is_share
    assert found.value == pytest.approx(limit.value, rel=1e-12)


def test_several_limits_hold_together_however_they_are_given() -> None:
    wanted = Budget(average=4, bops="8%").limits
    assert Budget.of("average=4,bops=8%").limits == Budget.of(["average=4", "bops=8%"]).limits == wanted
    assert [limit.kind for limit in wanted] == ["average", "bops"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("size", "expected a name and a value"),
        ("size=3XB", "unknown unit 'XB'"),
        ("size=0", "above 0"),
        ("size=-2MB", "above 0"),
        ("bops=nan", "expected a number"),
        ("average=10%", "nothing that it is a share of"),
        ("size=1MB,size=2MB", "twice"),
    ],
)
def test_a_value_that_is_no_budget_is_refused_with_what_is_allowed(text: str, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        Budget.of(text)


def test_an_unknown_budget_lists_those_that_there_are() -> None:
    with pytest.raises(UnknownNameError, match="average, bops, latency, size"):
        Budget.of("memory=4")
