"""Consoles of the commands: results go to standard output, everything else to standard error."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lowbit.cli.flags import in_flags
from lowbit.progress import Progress
from lowbit.report.formatting import NOTHING

_WIDE = 140  # characters of a line in files and pipes, where rich would assume a terminal of 80
_NAME = 28  # characters in the first column that narrow terminals do not break, such as a method's name

results = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
errors = Console(stderr=True)


def say(text: str) -> None:
    """Print one line of results, as it is."""
    results.print(text, markup=False, highlight=False, soft_wrap=True)


class SpokenProgress(Progress):
    """Progress that speaks of options where the library speaks of settings."""

    def say(self, message: str) -> None:
        """Print one line, unless quiet."""
        super().say(in_flags(message))


def say_how_to_resume(what: str, kept: str) -> None:
    """Tell that the run has stopped, what is kept of it, and the command that resumes it."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--fresh")]
    errors.print(f"[bold red]{escape(what)}[/]; {escape(kept)}. Resume it with:", highlight=False, soft_wrap=True)
    errors.print(f"    lowbit {shlex.join([*arguments, '--resume'])}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def resumable(*, is_first: bool = True) -> Iterator[None]:
    """Ctrl-C ends the command with the one that resumes it; only the first of several processes says so."""
    try:
        yield
    except KeyboardInterrupt as error:
        if is_first:
            say_how_to_resume("stopped", "what was finished is kept")
        raise typer.Exit(130) from error


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table; ``None`` prints as a dash. Columns whose cells are all numbers are aligned to the right.

    Nothing in the cells is read as markup.
    """
    cells = [[NOTHING if value is None else str(value) for value in row] for row in rows]
    table = Table(title=None if title is None else Text(title), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        numeric = bool(cells) and all(_is_number(row[index]) for row in cells)
        is_name = index == 0 and all(len(row[0]) <= _NAME for row in cells)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=is_name)
    for row in cells:
        table.add_row(*map(Text, row))
    results.print(table)


def _is_number(cell: str) -> bool:
    number, _, unit = cell.partition(" ")
    return cell == NOTHING or (" " not in unit and number.replace(",", "").lstrip("+-").replace(".", "", 1).rstrip("x%").isdigit())
