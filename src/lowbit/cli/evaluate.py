"""``lowbit evaluate``: accuracy and speed of a network or an exported file."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer

from lowbit.cli.console import SpokenProgress, say, show_json, show_table
from lowbit.cli.flags import in_flags
from lowbit.cli.settings import Json, Quiet, options_of
from lowbit.report.formatting import format_bytes, format_db, format_percent
from lowbit.workflows.requests import EvaluateRequest

app = typer.Typer(add_completion=False)


@app.command("evaluate")
@options_of(EvaluateRequest, without=("target",))
def evaluate(
    given: dict[str, Any],
    target: Annotated[
        str | None,
        typer.Argument(
            help="A .lowbit or .onnx file, or a folder that 'lowbit quantize' wrote. Default: the float network alone.", show_default=False
        ),
    ] = None,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Measure the metrics, size and time of the float network and of exported files, and how closely these follow it."""
    request = EvaluateRequest().changed({**given, "target": target})
    from lowbit.workflows.evaluate_files import evaluate_files

    found = evaluate_files(request, progress=SpokenProgress(quiet=quiet))
    if json:
        show_json(found.to_dict())
        return
    if not quiet:
        rows = [(name, entry, cast(dict[str, float], entry["metrics"])) for name, entry in found.results.items()]
        names = list(rows[0][2])
        say(str(found.source.provenance))
        say(f"{found.source.name} on {found.source.test_name or 'unlabelled samples'}")
        show_table(
            ("", *names, "same answer", "output SQNR", "size", "time, 1 sample", "run by"),
            [(name, *(found.task.describe(n, metrics[n]) for n in names), *_words(entry)) for name, entry, metrics in rows],
        )
        pictures = [(row, name) for name, entry in found.results.items() for row in cast(list[dict[str, Any]], entry.get("pictures", []))]
        if pictures:
            say("")
            show_table(
                ("picture", "", *names),
                [(row["picture"], name, *(found.task.describe(n, row[n]) for n in names)) for row, name in pictures],
            )
        for note in found.notes:
            say(f"note: {in_flags(note)}")
    if found.path is not None:
        say(f"evaluation: {found.path}")


def _words(entry: dict[str, object]) -> tuple[str, ...]:
    def number(name: str) -> float | None:
        value = entry.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    return (
        format_percent(number("agreement")),
        format_db(number("sqnr_db")),
        format_bytes(number("size_bytes")),
        f"{number('latency_ms'):.2f} ms",
        str(entry["runtime"]),
    )
