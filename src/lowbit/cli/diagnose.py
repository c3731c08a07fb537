"""``lowbit diagnose``: which layers hurt, and what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.console import SpokenProgress, results, say
from lowbit.cli.settings import Quiet, options_of
from lowbit.workflows.requests import DiagnoseRequest

app = typer.Typer(add_completion=False)


@app.command("diagnose")
@options_of(DiagnoseRequest, kind="post_training", without=("input_shape", "target"))
def diagnose(
    given: dict[str, Any],
    target: Annotated[
        str | None,
        typer.Argument(
            help="A .lowbit or .onnx file, or a folder that 'lowbit quantize' wrote: its network and data. Default: what the options name.",
            show_default=False,
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Quantize, then walk the white paper's debugging chart: weights or activations, which layers, and what helps.

    Nothing is exported. Each remedy that is listed was tried, and its gain on the network's output measured.
    """
    request = DiagnoseRequest().changed({**given, "target": target})
    from lowbit.workflows.diagnose import quantize_and_diagnose

    found = quantize_and_diagnose(request, progress=SpokenProgress(quiet=quiet))
    if not quiet:
        results.print(found)
    if request.out is not None:
        say(f"diagnosis: {Path(request.out) / 'diagnosis.json'}")
