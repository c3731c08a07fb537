from __future__ import annotations

import io

import pytest
from rich.console import Console

from lowbit.cli import console


def printed(monkeypatch: pytest.MonkeyPatch, width: int, *args: object, **kwargs: object) -> list[str]:
    output = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(console, "results", output)
    console.show_table(*args, **kwargs)  # type: ignore[arg-type]
    return output.file.getvalue().splitlines()  # type: ignore[attr-defined, no-any-return]


def test_numbers_stand_right_and_what_is_missing_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, 60, ("layer", "size"), [("a", "12.5 kB"), ("bb", None), ("c", "3 kB")])
    assert [line.rstrip() for line in lines] == ["layer     size", "a      12.5 kB", "bb           –", "c         3 kB"]


def test_names_are_printed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, 60, ("layer",), [("[bold]x[/]",)], title="[red]title")
    assert [line.rstrip() for line in lines] == ["[red]title", "layer", "[bold]x[/]"]


def test_a_narrow_terminal_breaks_sentences_and_no_names(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(monkeypatch, 50, ("method", "kind", "what it does"), [("round_to_nearest", "post_training", "a baseline " * 20)])
    assert lines[1].startswith("round_to_nearest ")
    assert all(len(line) <= 50 for line in lines)
    assert "".join(lines).count("baseline") == 20
