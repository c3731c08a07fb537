"""The page of commands, made from the options that ``lowbit COMMAND --help`` prints."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import typer
from rich.text import Text

from lowbit.cli.app import COMMANDS

_HEAD = """# Commands

`lowbit COMMAND --help` prints the same. Errors end with status 2 and write nothing; Ctrl-C ends with 130, and the same command resumes.
"""


def commands_page() -> str:
    """All commands with their arguments and options."""
    parts = [_HEAD]
    for name, line in COMMANDS.items():
        command = typer.main.get_command(importlib.import_module(f"lowbit.cli.{name.replace('-', '_')}").app)
        parts += _section(f"lowbit {name}", command, line, level=2)
    return "\n".join(parts)


def _section(name: str, command: Any, line: str, level: int) -> Iterator[str]:
    yield f"{'#' * level} {name}\n\n{_plain(command.help or line)}\n"
    for sub, inner in getattr(command, "commands", {}).items():
        yield from _section(f"{name} {sub}", inner, inner.short_help or "", level + 1)
    rows = [row for parameter in command.params if (row := _row(parameter))]
    if rows and not hasattr(command, "commands"):
        yield "\n".join(["| option | meaning |", "| --- | --- |", *rows]) + "\n"


def _row(parameter: Any) -> str | None:
    if getattr(parameter, "hidden", False) or "--help" in parameter.opts:
        return None
    is_argument = parameter.param_type_name == "argument"
    words = [parameter.metavar or parameter.name.upper()] if is_argument else [*parameter.opts, *parameter.secondary_opts]
    flags = ", ".join(f"`{word}`" for word in words)
    return f"| {flags} | {_plain(getattr(parameter, 'help', '') or '').replace('|', chr(92) + '|')} |"


def _plain(text: str) -> str:
    """Help without Rich's markup, and without what Markdown would take as markup."""
    plain = Text.from_markup(inspect.cleandoc(text)).plain
    return plain.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_").replace("[", "\\[")
