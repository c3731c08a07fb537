from __future__ import annotations

import pytest

from lowbit.comparison.orderings import Ordering
from lowbit.errors import SpecError, UnknownNameError


@pytest.mark.parametrize(
    ("claim", "parts"),
    [
        ("lsq > dorefa at 2/2", ("lsq", "dorefa", "2/2", True)),
        (
            "brecq (iterations=200) >= adaround (iterations=200) at 4/8",
            ("brecq (iterations=200)", "adaround (iterations=200)", "4/8", False),
        ),
        ("a method at work > b at 1/float", ("a method at work", "b", "1/float", True)),
    ],
)
def test_a_claim_is_two_labels_and_bits(claim: str, parts: tuple[object, ...]) -> None:
    ordering = Ordering.parse(claim)
    assert (ordering.better, ordering.worse, ordering.bits, ordering.is_strict) == parts
    assert Ordering.parse(ordering) is ordering
    assert Ordering.parse({"claim": claim, "source": "s", "note": "n"}) == Ordering(claim, "s", "n")


@pytest.mark.parametrize("claim", ["lsq > dorefa", "lsq < dorefa at 2/2", "lsq at 2/2", ""])
def test_what_is_no_claim_is_told_with_the_form(claim: str) -> None:
    with pytest.raises(SpecError, match=r"suite: orderings: '.*' is no claim\. Write METHOD > METHOD at BITS"):
        Ordering.parse(claim, "suite: orderings")


def test_unknown_fields_are_told_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match=r"'sourse'.*Did you mean 'source'"):
        Ordering.parse({"claim": "a > b at 2/2", "sourse": "x"}, "orderings")
