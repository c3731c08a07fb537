"""``lowbit synthesize``: samples for a trained network where there are no data."""

from __future__ import annotations

from typing import Any

import typer

from lowbit.cli.console import SpokenProgress, resumable, say, show_json, show_table
from lowbit.cli.settings import Json, PrintConfig, Quiet, RecipeFile, options_of
from lowbit.workflows.requests import SynthesizeRequest

app = typer.Typer(add_completion=False)


@app.command("synthesize")
@options_of(SynthesizeRequest, kind="synthesis")
def synthesize(
    given: dict[str, Any], file: RecipeFile = None, quiet: Quiet = False, json: Json = False, print_config: PrintConfig = False
) -> None:
    """Make samples from what a network has learned; write samples.safetensors, samples.png, synthesis.json and report.html.

    The embedded example: lowbit synthesize --method zeroq --count 64 --out samples/

    A network of your own, without any data: lowbit synthesize --model net.py:build --weights net.pt --input-shape 3x224x224

    What comes of it, in Python: lowbit.SynthesizedData.load("samples/samples.safetensors")
    """
    request = SynthesizeRequest().changed(given) if file is None else SynthesizeRequest.from_yaml(file, given)
    if print_config:
        typer.echo(request.to_yaml(), nl=False)
        return
    from lowbit.report.synthesis import match_heads, match_rows
    from lowbit.workflows.synthesize import synthesize_and_write

    with resumable():
        written = synthesize_and_write(request, progress=SpokenProgress(quiet=quiet))
    data = written.data
    if json:
        show_json({**data.to_dict(), "out": str(written.out), "files": list(written.files)})
        return
    if not quiet:
        show_table(match_heads(data), match_rows(data), title=f"distance from the statistics of norms, {data.method}")
        say(f"loss {data.losses[0]:.4g} at the start, {data.losses[-1]:.4g} after {len(data.losses)} iterations")
        for note in written.notes:
            say(note)
    say(f"written to {written.out}: {', '.join(written.files)}")
