"""A few hundred hostile cases of each kind; ``benchmarks/fuzz.py`` tries any number."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzzing import CASES, faults, try_cases


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_hostile_cases_are_computed_or_refused(kind: str, tmp_path: Path) -> None:
    outcomes = try_cases(CASES[kind], range(300), tmp_path)
    assert list(faults(outcomes)) == []
    assert {outcome.kind for outcome in outcomes} == {"computed", "refused"}
