"""Consoles of the commands: results go to standard output, everything else to standard error."""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from lowbit.cli.flags import in_flags
from lowbit.progress import Progress
from lowbit.report.formatting import NOTHING
from lowbit.report.json_text import to_json

_WIDE = 140  # characters of a line in files and pipes, where rich would assume a terminal of 80
_NAME = 28  # characters in the first column that narrow terminals do not break, such as a method's name
_WORDS = 8  # characters that a column of sentences needs
_PLAIN = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "×": "x", "…": "...", "·": "-", "•": "-", "→": "->", "≈": "~", "≤": "<=", "≥": ">=", "±": "+-"}
)


class SteadyStream:
    """A text stream whose failures end no command: what cannot be encoded is written in plain letters, what cannot be written is dropped.

    Attributes:
        problem: Why something was dropped; ``None`` where nothing was.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.problem: OSError | None = None
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="lowbit_plain")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write ``text``, unless writing has failed before."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush, unless writing has failed before."""
        self._try(self._stream.flush)

    def _try(self, action: Callable[[], object]) -> None:
        if self.problem is not None:
            return
        try:
            action()
        except OSError as error:
            self.problem = error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())  # what is still buffered goes there when Python ends

    @property
    def is_reader_gone(self) -> bool:
        """Whether whoever read the output wanted no more of it, as ``head`` does."""
        return self.problem is not None and self.problem.errno == errno.EPIPE


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(letter if letter.isascii() else "?" for letter in text), error.end


def _open_closed_streams() -> None:
    """Give closed standard streams something to write to; else the next file that is opened would become one of them."""
    for number, name in ((0, "stdin"), (1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
            setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115 - it stays open


codecs.register_error("lowbit_plain", _plain)
_open_closed_streams()
results = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _WIDE)
errors = Console(stderr=True)


def say(text: str) -> None:
    """Print one line of results, as it is."""
    results.print(text, markup=False, highlight=False, soft_wrap=True)


def show_json(data: object) -> None:
    """Print ``data`` as JSON, the only thing on standard output then; in ASCII, which every stream can hold."""
    typer.echo(to_json(data, ascii_only=True))


class SpokenProgress(Progress):
    """Progress whose messages name command-line options in place of settings."""

    def say(self, message: str) -> None:
        """Print one line, unless quiet."""
        super().say(in_flags(message))


def say_how_to_resume(what: str, kept: str, *, flags: Sequence[str] = ("--resume",)) -> None:
    """Say that the run has stopped, what was saved, and the command that resumes it: the same with ``flags``."""
    arguments = [argument for argument in sys.argv[1:] if argument not in ("--resume", "--fresh")]
    errors.print(f"[bold red]{escape(what)}[/]; {escape(kept)}. Resume it with:", highlight=False, soft_wrap=True)
    errors.print(f"    lowbit {shlex.join([*arguments, *flags])}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def resumable(*, is_first: bool = True, flags: Sequence[str] = ("--resume",)) -> Iterator[None]:
    """Ctrl-C ends the command with a message on how to resume it, with ``flags``, printed by the first process only."""
    try:
        yield
    except KeyboardInterrupt as error:
        if is_first:
            say_how_to_resume("stopped", "what was finished is kept", flags=flags)
        raise typer.Exit(130) from error


def show_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str | None = None) -> None:
    """Print a table; ``None`` prints as a dash. Columns whose cells are all numbers are aligned to the right.

    Nothing in the cells is read as markup.
    """
    cells = [[NOTHING if value is None else str(value) for value in row] for row in rows]
    numeric = [bool(cells) and all(_is_number(row[index]) for row in cells) for index in range(len(columns))]
    is_name = [index == 0 and all(len(row[0]) <= _NAME for row in cells) for index in range(len(columns))]
    whole = [numeric[index] or is_name[index] for index in range(len(columns))]
    if cells and _least_width(columns, cells, whole) > results.width:
        _show_records(columns, cells, title)
        return
    table = Table(title=None if title is None else Text(title), title_justify="left", box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "right" if numeric[index] else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=is_name[index])
    for row in cells:
        table.add_row(*map(Text, row))
    results.print(table)


def _least_width(columns: Sequence[str], cells: Sequence[Sequence[str]], whole: Sequence[bool]) -> int:
    """Characters that a table needs: names and figures whole, of sentences a few words."""
    width = 0
    for index, column in enumerate(columns):
        texts = [row[index] for row in cells]
        longest = max(map(len, texts))
        width += max(longest if whole[index] else min(longest, _WORDS), *(len(word) for word in column.split() or [""])) + 2
    return width - 2


def _show_records(columns: Sequence[str], cells: Sequence[Sequence[str]], title: str | None) -> None:
    """Print a table that is too wide row by row, a line for each cell."""
    if title is not None:
        say(title)
    for number, row in enumerate(cells):
        if number:
            say("")
        for column, cell in zip(columns, row, strict=True):
            say(f"{column}: {cell}" if column else cell)


def _is_number(cell: str) -> bool:
    number, _, unit = cell.partition(" ")
    return cell == NOTHING or (" " not in unit and number.replace(",", "").lstrip("+-").replace(".", "", 1).rstrip("x%").isdigit())
