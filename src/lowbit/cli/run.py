"""``lowbit run``: run a packed file on this machine's low-bit kernels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import SpokenProgress, say, show_json, show_table
from lowbit.cli.flags import in_flags
from lowbit.cli.settings import Json, Quiet, options_of
from lowbit.errors import SpecError
from lowbit.workflows.requests import RunRequest

if TYPE_CHECKING:
    from lowbit.workflows.run import LoadedNetwork, Timing

app = typer.Typer(add_completion=False)


@app.command("run")
@options_of(RunRequest)
def run(
    given: dict[str, Any],
    packed: Annotated[str, typer.Argument(help="A .lowbit file, or a folder that 'lowbit train' or 'lowbit quantize' wrote.")],
    pictures: Annotated[
        str | None,
        typer.Argument(help="A picture, or a folder of pictures, sub-folders included, to classify or to enlarge.", show_default=False),
    ] = None,
    benchmark: Annotated[
        bool, typer.Option("--benchmark", help="Time the network instead, on noise of its input shape, and show where the time goes.")
    ] = False,
    quiet: Quiet = False,
    json: Json = False,
) -> None:
    """Classify or enlarge pictures with a packed network on low-bit kernels, or time it.

    Layers whose weights and inputs are signs run on XOR and popcount, those of up to 8 bits on 8-bit kernels, the others in float; it says
    which do. Answers are those of the network that was trained, up to the rounding of floats.
    """
    request = RunRequest().changed(given)
    if not benchmark and pictures is None:
        raise SpecError("name a picture or a folder of pictures to classify, or ask for --benchmark")
    import torch

    from lowbit.workflows.domain import name_of_task
    from lowbit.workflows.export import packed_file
    from lowbit.workflows.run import Labels, classify, find_pictures, load_on_kernels, prepare_table, time_network, write_classes

    if request.threads is not None:
        torch.set_num_threads(request.threads)
    path = packed_file(Path(packed))
    loaded = load_on_kernels(path, weight_only=request.weight_only, bits=request.bits)
    is_upscaling = loaded.plain.provenance is not None and name_of_task(loaded.plain.provenance.task) == "super-resolution"
    labels = (
        None
        if pictures is None or is_upscaling
        else Labels.of(loaded.plain, request.data, request.preprocess, request.classes, place=str(path))
    )
    paths = [] if pictures is None else find_pictures(Path(pictures))
    notes = [] if labels is None or not labels.note else [labels.note]
    facts: dict[str, object] = {"kernels": loaded.summary.splitlines(), "notes": notes}
    is_shown = not (quiet or json)
    if is_shown:
        say(loaded.summary)
        if labels is not None:
            say(f"inputs: {labels.preprocessing}" if not labels.note else f"note: {in_flags(labels.note)}")
    if labels is not None:
        if request.out is not None:
            prepare_table(Path(request.out))
        progress = SpokenProgress(quiet=quiet)
        rows = classify(loaded.network, paths, labels, top=request.top, batch_size=request.batch_size, progress=progress)
        facts["inputs"] = str(labels.preprocessing)
        facts["pictures"] = [
            {"picture": path, "classes": [{"class": name, "share": share} for name, share in found]} for path, found in rows
        ]
        if is_shown:
            show_table(
                ("picture", *(f"class {index + 1}" for index in range(len(rows[0][1])))),
                ((path, *(f"{name} {share:.1%}" for name, share in found)) for path, found in rows),
            )
        if request.out is not None:
            write_classes(rows, Path(request.out))
            if not json:
                say(f"classes: {request.out}")
    if is_upscaling and pictures is not None:
        facts["pictures"] = _enlarge(loaded, str(path), Path(pictures), paths, request, is_shown=is_shown)
    if benchmark:
        timing = time_network(loaded, batch_size=request.batch_size, runs=request.runs)
        facts["milliseconds"] = timing.medians
        facts["where_the_time_goes"] = timing.profile.shares()
        if not json:
            say(f"{torch.get_num_threads()} thread(s), batch {request.batch_size}, medians of {request.runs} calls turn by turn")
            _show_timing(timing)
    if json:
        show_json(facts)


def _enlarge(
    loaded: LoadedNetwork, place: str, pictures: Path, paths: list[Path], request: RunRequest, *, is_shown: bool
) -> list[dict[str, object]]:
    """Write each picture enlarged; what was written."""
    from lowbit.workflows.enlarge import Tiling, enlarge_files, enlarging_scale, result_paths

    if request.out is None:
        raise SpecError("name the file for the enlarged picture, or the folder for several, with --out")
    results, scale = result_paths(pictures, paths, Path(request.out)), enlarging_scale(loaded.plain, place)
    tiling, note = Tiling.of(loaded.plain, request.tile, request.overlap)
    sizes = enlarge_files(loaded.network, scale, paths, results, tiling, SpokenProgress(quiet=not is_shown))
    if is_shown:
        say(f"tiles of {tiling.tile} x {tiling.tile} pixels, {tiling.overlap} pixels around them")
        if note:
            say(f"note: {note}")
        show_table(
            ("picture", "enlarged", "pixels"), ((path, to, f"{w} x {h}") for path, to, (w, h) in zip(paths, results, sizes, strict=True))
        )
    return [{"picture": str(a), "enlarged": str(b), "size": list(size)} for a, b, size in zip(paths, results, sizes, strict=True)]


def _show_timing(timing: Timing) -> None:
    slowest = timing.medians["decoded to float"]
    show_table(("run by", "ms", "speed-up"), ((name, f"{value:.3f}", f"{slowest / value:.2f}x") for name, value in timing.medians.items()))
    shares = timing.profile.shares()
    total = sum(shares.values())
    show_table(
        ("\nwhere the time goes", "calls", "ms", "share"),
        (
            (name, sum(entry.operator == name for entry in timing.profile.operators) or None, f"{value:.3f}", f"{value / total:.1%}")
            for name, value in shares.items()
        ),
    )
