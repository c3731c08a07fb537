"""The ``lowbit`` command: its subcommands, and how errors and interruptions end it."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperGroup

from lowbit.cli import data, diagnose, doctor, evaluate, export, methods, models, quantize, run, train
from lowbit.cli.console import errors, say
from lowbit.errors import LowbitError

EXIT_ERROR = 2  # the input was bad; nothing was written
EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C


class LowbitGroup(TyperGroup):
    """Turns lowbit's errors into one readable message and an exit code."""

    def invoke(self, ctx: Any) -> object:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except LowbitError as error:
            if os.environ.get("LOWBIT_DEBUG"):
                raise
            errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
            raise typer.Exit(EXIT_ERROR) from error
        except KeyboardInterrupt as error:
            errors.print("[bold red]stopped[/]")
            raise typer.Exit(EXIT_INTERRUPTED) from error


def _show_version(asked: bool) -> None:
    if asked:
        say(f"lowbit {version('lowbit')}")
        raise typer.Exit


def _root(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error. Also: LOWBIT_DEBUG=1.")] = False,
) -> None:
    """Quantize any PyTorch network to 1-8 bits, check what it cost, and write small and fast files.

    With no model and no data named, every command works on an embedded example: a small residual network for handwritten digits.
    """
    if debug:
        os.environ["LOWBIT_DEBUG"] = "1"


def main() -> None:
    """Entry point of the ``lowbit`` command."""
    app()


app = typer.Typer(
    name="lowbit",
    cls=LowbitGroup,
    callback=_root,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
app.command("quantize")(quantize.quantize)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("export")(export.export)
app.command("run")(run.run)
app.command("diagnose")(diagnose.diagnose)
app.command("doctor")(doctor.doctor)
app.add_typer(methods.app, name="methods")
app.add_typer(data.app, name="data")
app.add_typer(models.app, name="models")
