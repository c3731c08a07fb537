"""State that somebody replaced by a pipe, or by JSON of other kinds, is read as none, and never waited for."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.errors import DataError, FileFormatError
from lowbit.files import read_tensors
from lowbit.reading import read_json
from lowbit.workflows.output import check_results
from lowbit.workfolder import unfinished_facts

HOSTILE: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": os.mkdir,
    "deep": lambda path: path.write_text("[" * 100_000),
    "list": lambda path: path.write_text("[1, 2]"),
    "number": lambda path: path.write_text("1" + "0" * 5000),
    "bytes": lambda path: path.write_bytes(b"\xff\xfe"),
    "empty": lambda path: path.write_text(""),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_state_of_another_kind_is_none(kind: str, tmp_path: Path) -> None:
    for name in ("report.json", "run.json"):
        HOSTILE[kind](tmp_path / name)
    check_results(tmp_path, "lsq", resume=True)
    assert unfinished_facts(tmp_path, "train") is None


@pytest.mark.parametrize("kind", [kind for kind in HOSTILE if kind != "list"])
def test_what_is_no_json_is_named(kind: str, tmp_path: Path) -> None:
    HOSTILE[kind](tmp_path / "a.json")
    with pytest.raises(DataError, match=r"a\.json: "):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("kind", HOSTILE)
def test_tensors_in_something_else_are_damaged(kind: str, tmp_path: Path) -> None:
    HOSTILE[kind](tmp_path / "a.safetensors")
    with pytest.raises(FileFormatError, match="is damaged"):
        read_tensors(tmp_path / "a.safetensors")
