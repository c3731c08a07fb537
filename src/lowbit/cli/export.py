"""``lowbit export``: a packed file or a network in another format, checked and timed."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lowbit.cli.console import SpokenProgress, say
from lowbit.cli.settings import OUTPUT, options_of
from lowbit.workflows.requests import ExportRequest

app = typer.Typer(add_completion=False)


@app.command("export")
@options_of(ExportRequest, without=("packed", "to"))
def export(
    given: dict[str, Any],
    to: Annotated[
        str, typer.Option("--to", help="The file to write; its suffix, .onnx, .lowbit or .c, is the format.", rich_help_panel=OUTPUT)
    ],
    packed: Annotated[
        str | None,
        typer.Argument(help="A .lowbit file, or a folder that 'lowbit quantize' wrote. Default: the float network.", show_default=False),
    ] = None,
) -> None:
    """Write a network to a file, check the file against the network, and time it.

    The data only provides the inputs that the check runs on: name some that fit the network.
    """
    request = ExportRequest().changed({**given, "to": to, "packed": packed})
    from lowbit.workflows.export import load_and_export

    say(str(load_and_export(request, progress=SpokenProgress(quiet=False))))
