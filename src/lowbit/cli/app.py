"""The ``lowbit`` command: its subcommands, each imported when it is called, and how errors and interruptions end it."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.markup import escape
from typer.core import TyperCommand, TyperGroup

from lowbit.cli.console import SteadyStream, errors, say
from lowbit.cli.flags import in_flags
from lowbit.errors import LowbitError

EXIT_ERROR = 2  # the input was bad; nothing was written
EXIT_INTERRUPTED = 130  # what shells report for Ctrl-C
EXIT_TERMINATED = 143  # ... for SIGTERM
EXIT_READER_GONE = 141  # ... for SIGPIPE
EXIT_NOT_PRINTED = 1  # all is done, but standard output is full or broken
COMMANDS = {  # each is the variable ``app`` of the file of its name, with _ for -
    "quantize": "Quantize a trained network, check the result, and write files and a report.",
    "train": "Train a low-bit network, check the result, and write files and a report.",
    "evaluate": "Measure accuracy, size and time of the float network and of exported files.",
    "export": "Write a network to a file, check the file against the network, and time it.",
    "run": "Classify pictures with a packed network on low-bit kernels, or time it.",
    "search": "Choose bits for each layer under a budget of size, operations or time.",
    "synthesize": "Make samples for a trained network where there are no data.",
    "compare": "Compare methods on equal terms: same network, data, layers, images and seeds.",
    "latency-table": "Measure the time of each layer of a network at each pair of widths on this machine.",
    "diagnose": "Quantize, then walk the white paper's debugging chart: which layers hurt, and what helps.",
    "doctor": "Say what is installed, what the processor can do, and which kernels low-bit layers run on.",
    "methods": "Which methods there are, and what each one does and takes.",
    "data": "Which data can be named, where it is looked for, and what is in it.",
    "models": "Which networks can be named, and how to name any other.",
}


class LazyCommand(TyperCommand):
    """A subcommand that is known by its name and one line of help until it is called, or asked for help or completions."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """The context of the real command."""
        assert self.name is not None
        module = importlib.import_module(f"lowbit.cli.{self.name.replace('-', '_')}")
        return typer.main.get_command(module.app).make_context(info_name, args, parent=parent, **extra)


class LowbitGroup(TyperGroup):
    """Subcommands that are imported late; turns lowbit's errors into one readable message and an exit code."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: LazyCommand(name, help=line, callback=None, params=[]) for name, line in COMMANDS.items()}

    def invoke(self, ctx: Any) -> object:
        """Run the subcommand."""
        try:
            return super().invoke(ctx)
        except LowbitError as error:
            if os.environ.get("LOWBIT_DEBUG"):
                raise
            errors.print(f"[bold red]error:[/] {escape(in_flags(str(error)))}", soft_wrap=True)
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
        bool, typer.Option("--version", "-V", help="Print the version and stop.", callback=_show_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the Python traceback of an error. Also: LOWBIT_DEBUG=1.")] = False,
) -> None:
    """Quantize any PyTorch network to 1-8 bits, check what it cost, and write small and fast files.

    With no model and no data named, every command works on an embedded example: a small residual network for handwritten digits.
    """
    if debug:
        os.environ["LOWBIT_DEBUG"] = "1"


def main() -> None:
    """Entry point of the ``lowbit`` command.

    Output that cannot be written ends no run: its files are complete, and the exit status says that something was not printed.
    SIGTERM stops a command as Ctrl-C does, with another exit status.
    """
    sys.stdout, sys.stderr = output, messages = SteadyStream(sys.stdout), SteadyStream(sys.stderr)
    signals: list[int] = []

    def stop(number: int, _frame: object) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        app()
    except SystemExit as ended:
        code = ended.code
    if signals and code == EXIT_INTERRUPTED:
        code = EXIT_TERMINATED
    output.flush()
    messages.flush()
    if output.problem is not None and not code:
        code = EXIT_READER_GONE if output.is_reader_gone else EXIT_NOT_PRINTED
        if not output.is_reader_gone:
            errors.print(f"[bold red]error:[/] cannot write to standard output: {output.problem.strerror}", soft_wrap=True)
    sys.exit(code)


app = typer.Typer(
    name="lowbit",
    cls=LowbitGroup,
    callback=_root,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)
