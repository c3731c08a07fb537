"""The page of orderings says what benchmarks/results/orderings.csv holds."""

from __future__ import annotations

import csv
import re
from collections import Counter
from pathlib import Path

import pytest
from scripts.docs.results import results_pages

from lowbit.comparison.orderings import Ordering
from lowbit.comparison.statistics import paired_difference, spread
from lowbit.workflows.suite import Suite

ROOT = Path(__file__).parents[2]
PAGE = results_pages()["orderings"]
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if re.match(r"\|.* at \S+ \|", line)]
Values = dict[tuple[str, str, str], dict[int, float]]


def measured() -> Values:
    found: Values = {}
    with (ROOT / "benchmarks" / "results" / "orderings.csv").open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["status"] == "done":
                key = (row["subject"], row["label"], f"{row['weight_bits']}/{row['activation_bits']}")
                found.setdefault(key, {})[int(row["seed"])] = float(row["value"])
    return found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[0]} on {row[2]}")
def test_each_row_follows_from_the_results(row: list[str]) -> None:
    claim, _, network, first, second, difference, finding = row
    ordering, values = Ordering.parse(claim), measured()
    better, worse = (values.get((network, label, ordering.bits), {}) for label in (ordering.better, ordering.worse))
    found = paired_difference(better, worse)
    if finding == "not measured":
        assert found is None
        return
    for text, seeds in ((first, better), (second, worse)):
        told = spread(list(seeds.values()))
        assert text == f"{100 * told.mean:.2f} ± {100 * (told.deviation or 0):.2f} %"
    assert found is not None and found.count >= 3
    assert difference.startswith(f"{100 * found.mean:+.2f} [")
    assert finding == ("no difference shown" if not found.is_shown else "holds" if found.low > 0 else "does not hold")


def test_every_ordering_of_the_suite_has_a_row_and_counts_are_right() -> None:
    suite = Suite.from_yaml(ROOT / "benchmarks" / "suites" / "orderings.yaml")
    assert {ordering.claim for ordering in suite.orderings} == {row[0] for row in ROWS}
    assert sum(row[-1] != "not measured" for row in ROWS) >= 12
    for finding, count in Counter(row[-1] for row in ROWS).items():
        assert f"{'once' if count == 1 else f'{count} times'} *{finding}*" in PAGE
