"""Progress of long work: a bar with an estimate of the time left, or plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as RichProgress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 30.0  # how often a stage reports itself where there is no terminal


class Stage:
    """One stretch of work with a known total, of which an earlier run may have ``done`` a part."""

    def __init__(
        self, name: str, total: float, bar: RichProgress | None, task: TaskID | None, console: Console | None, done: float = 0
    ) -> None:
        self.name, self.total, self.done = name, total, done
        self._done_before = done
        self._bar, self._task, self._console = bar, task, console
        self._start = self._last_line = time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count ``amount`` more units of the total as done; ``note`` is shown behind the bar."""
        self.done += amount
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, advance=amount, note=note)
        elif self._console is not None and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._last_line = time.monotonic()
            elapsed = self._last_line - self._start
            left = elapsed * (self.total - self.done) / max(self.done - self._done_before, 1e-9)
            self._console.print(
                f"{self.name}: {self.done:.0f}/{self.total:.0f}, {elapsed:.0f} s, about {left:.0f} s left {note}", highlight=False
            )


class Progress:
    """Shows stages of work; ``Progress.silent()`` shows nothing.

    >>> with Progress.of(False).stage("calibrate", total=2) as stage:
    ...     stage.advance(2)
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet

    def __reduce__(self) -> tuple[Callable[[], Progress], tuple[()]]:
        """What is sent to another process shows nothing there: there is one display."""
        return Progress.silent, ()

    @staticmethod
    def silent() -> Progress:
        """Progress that shows nothing."""
        return Progress(quiet=True)

    @staticmethod
    def of(progress: bool | Progress | None) -> Progress:
        """Progress as callers ask for it: ``True`` shows it, ``False`` is silent, ``None`` shows it on a terminal or in a notebook."""
        if isinstance(progress, Progress):
            return progress
        shown = Progress()
        return shown if progress or (progress is None and shown.has_bar) else Progress.silent()

    @property
    def has_bar(self) -> bool:
        """Whether stages are drawn as a bar: standard error is a terminal, or this is a notebook that can draw one."""
        return self.console.is_terminal or (self.console.is_jupyter and find_spec("ipywidgets") is not None)

    def say(self, message: str) -> None:
        """Print one line, unless quiet."""
        if not self.quiet:
            self.console.print(message, highlight=False, markup=False)

    @contextmanager
    def stage(self, name: str, total: float, *, done: int = 0) -> Iterator[Stage]:
        """``with progress.stage("calibrate", total=len(batches)) as stage: ... stage.advance()``.

        ``done`` is the part of the total that an earlier run has done; it does not count for the estimate of the time left.
        """
        if self.quiet:
            yield Stage(name, total, None, None, None, done)
        elif not self.has_bar:
            yield Stage(name, total, None, None, self.console, done)
        else:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            with RichProgress(*columns, console=self.console, transient=True) as bar:
                yield Stage(name, total, bar, bar.add_task(name, total=total, completed=done, note=""), None, done)
