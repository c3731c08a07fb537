"""What commands print with: results on standard output, everything else on standard error."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lowbit.report.words import NOTHING

_WIDE = 140  # characters of a line in files and pipes, where rich would assume a terminal of 80
_NAME = 28  # characters in the first column that narrow terminals do not break, such as a method's name

results = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
errors = Console(stderr=True)


def say(text: str) -> None:
    """Print one line of results, as it is."""
    results.print(text, markup=False, highlight=False, soft_wrap=True)


def say_how_to_go_on(what: str, kept: str) -> None:
    """Tell that the run has stopped, what is kept of it, and the command that goes on with it."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--fresh")]
    errors.print(f"[bold red]{escape(what)}[/]; {escape(kept)}. Go on with:", highlight=False, soft_wrap=True)
    errors.print(f"    lowbit {shlex.join([*arguments, '--resume'])}", markup=False, highlight=False, soft_wrap=True)


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
