from __future__ import annotations

import io

import pytest
from rich.console import Console

from lowbit import progress
from lowbit.progress import Progress


def test_what_an_earlier_run_has_done_does_not_count_for_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    console = Console(file=io.StringIO(), width=200)
    with Progress(console=console).stage("train", total=100, done=60) as stage:
        now += 40.0
        stage.advance(10, "loss 1")  # 10 in 40 s: 30 more take 120 s; with the 60 before it would be 17 s
    assert console.file.getvalue() == "train: 70/100, 40 s, about 120 s left loss 1\n"  # type: ignore[attr-defined]
    assert stage.done == 70


def test_the_bar_starts_where_the_earlier_run_ended() -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=True)
    with Progress(console=console).stage("train", total=100, done=60) as stage:
        stage.advance(1)
    assert "61/100" in console.file.getvalue()  # type: ignore[attr-defined]


def test_quiet_progress_prints_nothing() -> None:
    console = Console(file=io.StringIO())
    quiet = Progress(quiet=True, console=console)
    quiet.say("hello")
    with quiet.stage("train", total=2) as stage:
        stage.advance()
    assert console.file.getvalue() == "" and stage.done == 1  # type: ignore[attr-defined]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("asked", "stream", "is_shown"),
    [
        (None, io.StringIO, False),
        (None, _Terminal, True),
        (False, _Terminal, False),
        (True, io.StringIO, True),
        (True, _Terminal, True),
    ],
)
def test_left_out_progress_is_shown_where_somebody_watches(
    asked: bool | None, stream: type[io.StringIO], is_shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.stderr", shown := stream())
    shown_progress = Progress.of(asked)
    shown_progress.say("hello")
    with shown_progress.stage("train", total=2) as stage:
        stage.advance(2)
    assert ("hello" in shown.getvalue()) == is_shown
    assert ("2/2" in shown.getvalue()) == (is_shown and stream is _Terminal)


@pytest.mark.parametrize("has_widgets", [True, False])
def test_a_notebook_gets_a_bar_where_it_can_draw_one(has_widgets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.progress.find_spec", lambda name: object() if has_widgets and name == "ipywidgets" else None)
    assert Progress(console=Console(file=io.StringIO(), force_jupyter=True)).has_bar is has_widgets
    assert not Progress(console=Console(file=io.StringIO(), force_terminal=False)).has_bar


def test_progress_of_ones_own_is_taken_as_it_is() -> None:
    own = Progress(quiet=True)
    assert Progress.of(own) is own
