"""Latency tables on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import SpecError
from lowbit.measure.latency_table import LatencyTable
from lowbit.spec import LayerBits


def test_a_saved_table_is_read_as_it_was(tmp_path: Path) -> None:
    table = LatencyTable("ms", {"a": {"4/8": 0.5, "float/float": 2.0}}, {"a": {"4/8": "packed"}}, {"machine": "here"})
    table.save(tmp_path / "table.json")
    found = LatencyTable.load(tmp_path / "table.json")
    assert found == table
    assert found.time("a", LayerBits(4, 8)) == 0.5
    assert found.time("a", LayerBits(None, None)) == 2.0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "no JSON"),
        ("[]", "is no latency table"),
        ('{"format": "lowbit latency table", "times": {"a": {"4/8": -1}}}', "a number above 0"),
        ('{"format": "lowbit latency table", "times": {"a": 3}}', "a number above 0"),
    ],
)
def test_another_file_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "table.json").write_text(text)
    with pytest.raises(SpecError, match=said):
        LatencyTable.load(tmp_path / "table.json")
