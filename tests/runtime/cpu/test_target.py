from __future__ import annotations

from collections.abc import Iterator

import pytest

from lowbit.errors import SpecError, install_command
from lowbit.runtime.cpu import target
from lowbit.runtime.cpu.target import REFERENCE, TARGETS, active_target


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(target.VARIABLE, raising=False)
    active_target.cache_clear()
    yield
    active_target.cache_clear()


@pytest.mark.parametrize(
    ("features", "name"),
    [
        ({"sse4.2", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512vpopcntdq"}, "avx512_vpopcntdq"),
        ({"sse4.2", "avx2", "avx512f", "avx512bw", "avx512vl"}, "avx512"),
        ({"sse4.2", "avx2", "avx512f"}, "avx2"),
        ({"neon"}, "neon"),
        ({"sse4.2"}, "sse42"),
        (set(), "reference"),
    ],
)
def test_the_widest_kernels_that_the_processor_can_run_are_chosen(features: set[str], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "processor_features", lambda: frozenset(features))
    found, why = active_target()
    assert found.name == name
    assert "processor" in why


def test_a_variable_names_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "processor_features", lambda: frozenset({"sse4.2", "avx2"}))
    monkeypatch.setenv(target.VARIABLE, "sse42")
    assert active_target()[0].name == "sse42"
    active_target.cache_clear()
    monkeypatch.setenv(target.VARIABLE, "reference")
    assert active_target() == (REFERENCE, "LOWBIT_KERNELS asks for it")


@pytest.mark.parametrize(("wanted", "told"), [("avx512", "lacks avx512bw, avx512f, avx512vl"), ("avx3", "there are no such kernels")])
def test_kernels_that_cannot_run_are_refused(wanted: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "processor_features", lambda: frozenset({"avx2"}))
    monkeypatch.setenv(target.VARIABLE, wanted)
    with pytest.raises(SpecError, match=told):
        active_target()


def test_without_numba_the_reference_is_used_and_says_how_to_get_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target.importlib.util, "find_spec", lambda name: None)
    found, why = active_target()
    assert found is REFERENCE
    assert install_command("kernels") in why


def test_a_numba_that_does_not_work_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> frozenset[str]:
        raise OSError("no LLVM here")

    monkeypatch.setattr(target, "processor_features", broken)
    with pytest.warns(UserWarning, match="no LLVM here"):
        assert active_target()[0] is REFERENCE


def test_tables_are_for_processors_that_count_no_words() -> None:
    forms = {t.name: t.form for t in TARGETS if t.lanes}
    assert forms == {"avx512_vpopcntdq": "count", "avx512": "lookup", "avx2": "lookup", "neon": "count", "sse42": "lookup"}
