from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from lowbit.report.formatting import (
    NOTHING,
    format_bits,
    format_bytes,
    format_count,
    format_db,
    format_number,
    format_operand,
    format_percent,
    format_ratio,
    format_seconds,
)

NAN = math.nan


@pytest.mark.parametrize(
    ("word", "value", "expected"),
    [
        (format_bits, 4, "4"),
        (format_bits, None, "float"),
        (format_bytes, 0, "0 B"),
        (format_bytes, 999, "999 B"),
        (format_bytes, 1000, "1 kB"),
        (format_bytes, 86_312, "86.3 kB"),
        (format_bytes, 2_500_000, "2.5 MB"),
        (format_bytes, 3_000_000_000, "3 GB"),
        (format_bytes, None, NOTHING),
        (format_count, 555_072, "555 k"),
        (format_count, 12, "12"),
        (format_db, -0.04, "0.0 dB"),
        (format_seconds, 16.74, "16.7 s"),
        (format_seconds, 192.4, "3 min 12 s"),
        (format_seconds, 3900, "1 h 5 min"),
        (format_count, 1.8e9, "1.8 G"),
        (format_count, 2e15, "2 P"),
        (format_count, None, NOTHING),
        (format_db, 21.34, "21.3 dB"),
        (format_db, math.inf, "exact"),
        (format_db, -math.inf, "no signal"),
        (format_db, NAN, NOTHING),
        (format_db, None, NOTHING),
        (format_number, 0.012345, "0.0123"),
        (format_number, 0.0, "0"),
        (format_number, NAN, NOTHING),
        (format_number, None, NOTHING),
        (format_percent, 0.9725, "97.25 %"),
        (format_percent, NAN, NOTHING),
        (format_percent, None, NOTHING),
    ],
)
def test_numbers_read_as_people_write_them(word: Callable[[Any], str], value: object, expected: str) -> None:
    assert word(value) == expected


def test_operands_are_named_with_their_bits() -> None:
    assert format_operand(4, "weights") == "4-bit weights"
    assert format_operand(None, "activations") == "float activations"


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
    assert format_ratio(before, after) == expected
