from __future__ import annotations

import io
import subprocess
import sys

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


def test_a_table_wider_than_the_terminal_is_printed_row_by_row_with_whole_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [("model.onnx", "99.33 %", "1,234.5 kB"), ("model.lowbit", "98.00 %", None)]
    lines = [line.rstrip() for line in printed(monkeypatch, 20, ("file", "accuracy", "size"), rows, title="files")]
    assert lines == [
        "files", "file: model.onnx", "accuracy: 99.33 %", "size: 1,234.5 kB", "", "file: model.lowbit", "accuracy: 98.00 %", "size: –",
    ]  # fmt: skip


def test_letters_that_a_stream_does_not_have_are_written_plainly() -> None:
    raw = io.BytesIO()
    stream = console.SteadyStream(io.TextIOWrapper(raw, encoding="ascii"))
    stream.write("3 × 4 – 5 ≤ é…")
    stream.flush()
    assert raw.getvalue() == b"3 x 4 - 5 <= ?..."
    assert stream.problem is None


def test_a_full_stream_drops_what_follows_and_says_why() -> None:
    with open("/dev/full", "w") as full:
        stream = console.SteadyStream(full)
        stream.write("a")
        stream.flush()
        stream.write("b")
        stream.flush()
    assert stream.problem is not None
    assert stream.problem.strerror == "No space left on device"
    assert not stream.is_reader_gone


@pytest.mark.parametrize(("redirect", "status"), [(">&-", 0), ("2>&-", 0), ("> /dev/full", 1), ("| true; exit ${PIPESTATUS[0]}", 141)])
def test_output_that_cannot_be_written_is_no_traceback(redirect: str, status: int) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m lowbit methods list {redirect}'], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stdout + done.stderr
    assert done.returncode == status
