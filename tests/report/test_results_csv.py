from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest
from tests.comparison.results import result, seeds

from lowbit.comparison.tables import make_tables
from lowbit.errors import DataError
from lowbit.report.comparison import markdown
from lowbit.report.results_csv import read_results, results_csv

RESULTS = [
    *seeds([0.5, 0.6, 0.7], "lsq"),
    *seeds([0.6, 0.7, 0.8], "pact"),
    *seeds([0.4, 0.4, 0.4], "lsq", bits=(2, None)),
    result(None, "ewgs", reason="<b>no & memory</b>"),
]


def test_the_csv_has_one_row_for_each_cell_done_or_not() -> None:
    rows = list(csv.DictReader(io.StringIO(results_csv(RESULTS))))
    assert len(rows) == len(RESULTS) and len({row["key"] for row in rows}) == len(RESULTS)
    row = next(row for row in rows if (row["label"], row["weight_bits"], row["seed"]) == ("lsq", "4", "1"))
    assert (float(row["value"]), float(row["float_value"]), row["size_bytes"], row["images"]) == (0.6, 0.95, "1000", "50")
    assert [row["reason"] for row in rows if row["status"] == "failed"] == ["<b>no & memory</b>"]


def test_what_is_read_makes_the_same_tables_and_is_written_the_same(tmp_path: Path) -> None:
    mixed = replace(result(0.3, "bit_mixer", bits=(None, None)), cell=replace(RESULTS[0].cell, label="bit_mixer", mixtures=5))
    path, results = tmp_path / "results.csv", [*RESULTS, mixed]
    path.write_text(results_csv(results), encoding="utf-8")
    found = read_results(path)
    assert results_csv(found) == path.read_text(encoding="utf-8")
    assert [one.cell.bits for one in found if one.cell.label == "bit_mixer"] == ["mixed"]
    read, made = (markdown(make_tables(those, baseline="lsq")).splitlines() for those in (found, results))
    assert sorted(read) == sorted(made)


@pytest.mark.parametrize("text", ["key,value\n1,2\n", "\xff\n1\n"])
def test_another_file_is_a_data_error(text: str, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"other\.csv: no results\.csv"):
        read_results(path)
