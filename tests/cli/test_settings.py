from __future__ import annotations

import pytest

from lowbit.cli.settings import key_values
from lowbit.errors import SpecError


def test_pairs_are_split_at_the_first_equals_sign() -> None:
    assert key_values(["a=1", "b=x=y", "c="], "--option") == {"a": "1", "b": "x=y", "c": ""}


@pytest.mark.parametrize("bad", ["iterations", "=3", ""])
def test_what_is_no_pair_is_an_error_with_an_example(bad: str) -> None:
    with pytest.raises(SpecError, match="expected NAME=VALUE"):
        key_values([bad], "--option")


def test_a_name_given_twice_is_an_error() -> None:
    with pytest.raises(SpecError, match="a was given twice, also as '1'"):
        key_values(["a=1", "a=2"], "--option")
