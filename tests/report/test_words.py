from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from lowbit.report.words import NOTHING, bits_word, bytes_word, count_word, db_word, number_word, operand_word, percent_word, ratio_word

NAN = math.nan


@pytest.mark.parametrize(
    ("word", "value", "expected"),
    [
        (bits_word, 4, "4"),
        (bits_word, None, "float"),
        (bytes_word, 0, "0 B"),
        (bytes_word, 999, "999 B"),
        (bytes_word, 1000, "1 kB"),
        (bytes_word, 86_312, "86.3 kB"),
        (bytes_word, 2_500_000, "2.5 MB"),
        (bytes_word, 3_000_000_000, "3 GB"),
        (bytes_word, None, NOTHING),
        (count_word, 555_072, "555 k"),
        (count_word, 12, "12"),
        (count_word, 1.8e9, "1.8 G"),
        (count_word, 2e15, "2 P"),
        (count_word, None, NOTHING),
        (db_word, 21.34, "21.3 dB"),
        (db_word, math.inf, "exact"),
        (db_word, -math.inf, "no signal"),
        (db_word, NAN, NOTHING),
        (db_word, None, NOTHING),
        (number_word, 0.012345, "0.0123"),
        (number_word, 0.0, "0"),
        (number_word, NAN, NOTHING),
        (number_word, None, NOTHING),
        (percent_word, 0.9725, "97.25 %"),
        (percent_word, NAN, NOTHING),
        (percent_word, None, NOTHING),
    ],
)
def test_numbers_read_as_people_write_them(word: Callable[[Any], str], value: object, expected: str) -> None:
    assert word(value) == expected


def test_operands_are_named_with_their_bits() -> None:
    assert operand_word(4, "weights") == "4-bit weights"
    assert operand_word(None, "activations") == "float activations"


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (100, 25, "4.0x"),
        (103, 100, "1.0x"),
        (100, 9, "11x"),
        (36, 100, "0.36x"),
        (None, 1, ""),
        (1, None, ""),
        (1, 0, ""),
        (0, 1, ""),
        (NAN, 1, ""),
    ],
)
def test_a_ratio_has_two_digits_and_is_empty_where_there_is_none(before: float | None, after: float | None, expected: str) -> None:
    assert ratio_word(before, after) == expected
