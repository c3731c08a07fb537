from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.workflows.trust import is_trusted, remember_network


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("lowbit.workflows.trust._folder", lambda: tmp_path / "cache")
    return tmp_path / "cache"


def test_code_is_trusted_once_it_was_named() -> None:
    assert not is_trusted("net.py:build", {"width": 2})
    remember_network("net.py:build", {"width": 2})
    assert is_trusted("net.py:build", {"width": 2})
    assert not is_trusted("net.py:build", {"width": 3})
    assert not is_trusted("net.py:other", {"width": 2})
    assert not is_trusted("os:system", {"command": "true"})


def test_a_file_of_the_same_name_in_another_folder_is_another_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    remember_network("net.py:build", {})
    remember_network("package:build", {})
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert not is_trusted("net.py:build", {})
    assert not is_trusted("package:build", {})
    assert not is_trusted(str(tmp_path / "elsewhere" / "net.py:build"), {})


def test_built_in_networks_need_no_trust_and_leave_nothing(cache: Path) -> None:
    remember_network("digits", {})
    assert is_trusted("digits", {"width": 8})
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_only_means_naming_it_again(cache: Path) -> None:
    cache.write_text("in the way")
    remember_network("net.py:build", {})
    assert not is_trusted("net.py:build", {})
