from __future__ import annotations

from tests.comparison.results import seeds

from lowbit.comparison.orderings import Ordering
from lowbit.comparison.verdicts import judge
from lowbit.report.orderings import ordering_cells, orderings_page


def test_a_row_tells_claim_source_values_and_finding() -> None:
    results = [*seeds([0.80, 0.82, 0.84], "lsq"), *seeds([0.70, 0.72, 0.74], "dorefa")]
    (verdict,) = judge([Ordering("lsq > dorefa at 4/4", "LSQ", "three epochs")], results)
    assert ordering_cells(verdict) == [
        "lsq > dorefa at 4/4", "LSQ", "digits", "82.00 ± 2.00 %", "72.00 ± 2.00 %", "+10.00 [+10.00, +10.00]", "holds",
    ]  # fmt: skip
    page = orderings_page([verdict])
    assert "compare suite.yaml`: once *holds*." in page and "- lsq > dorefa at 4/4: three epochs" in page
    assert "| lsq > dorefa at 4/4 | LSQ | digits |" in page


def test_what_is_not_measured_has_dashes() -> None:
    (verdict,) = judge([Ordering("lsq > a|b at 4/4")], seeds([0.5], "lsq"))
    assert ordering_cells(verdict)[4:] == ["\N{EN DASH}", "\N{EN DASH}", "not measured"]
    assert "lsq > a\\|b at 4/4" in orderings_page([verdict])
