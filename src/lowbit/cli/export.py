"""``lowbit export``: a packed file or a network in another format, checked and timed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lowbit.cli import options as shared
from lowbit.cli.console import say
from lowbit.cli.output import prepare_folder
from lowbit.cli.source import open_source
from lowbit.errors import FileFormatError, SpecError
from lowbit.workflows.export import FORMATS, export as export_file
from lowbit.workflows.load import load


def export(
    to: Annotated[
        Path, typer.Option("--to", help="The file to write; its suffix, .onnx or .lowbit, is the format.", rich_help_panel=shared.OUTPUT)
    ],
    packed: Annotated[
        Path | None,
        typer.Argument(help="A .lowbit file, or a folder that 'lowbit quantize' wrote. Default: the float network.", show_default=False),
    ] = None,
    model: shared.Model = None,
    model_option: shared.ModelOption = None,
    weights: shared.Weights = None,
    data: shared.Data = None,
    preprocess: shared.Preprocess = None,
    calibration: shared.Calibration = None,
    input_shape: shared.InputShape = None,
    weight_container: Annotated[
        Literal["int8", "int4"],
        typer.Option(
            "--weight-container",
            help="What an ONNX file keeps weight codes in: int8 is fast; int4 takes half a byte for codes of up to 4 bits, "
            "but runtimes compute with them in float.",
            rich_help_panel=shared.OUTPUT,
        ),
    ] = "int8",
    runtime: Annotated[
        bool,
        typer.Option(
            "--runtime",
            help="For a .lowbit file: 'lowbit run' and lowbit.load put its layers of few bits on few-bit kernels. Each weight still takes its "
            "bits and no more.",
            rich_help_panel=shared.OUTPUT,
        ),
    ] = False,
    speed: Annotated[
        bool,
        typer.Option(
            "--speed/--no-speed", help="Time the ONNX file of a quantized network against the float one.", rich_help_panel=shared.OUTPUT
        ),
    ] = True,
    dynamic: Annotated[
        str | None,
        typer.Option(
            "--dynamic",
            help="Dimensions of the inputs that stay open besides the batch, joined by commas: H,W for pictures of any size.",
            rich_help_panel=shared.OUTPUT,
            show_default=False,
        ),
    ] = None,
    seed: shared.Seed = 0,
    batch_size: shared.BatchSize = 32,
    threads: shared.Threads = None,
) -> None:
    """Write a network to a file, check the file against the network, and time it.

    The data only gives the inputs that the check runs on: name some that fit the network.
    """
    shared.set_threads(threads)
    if to.suffix not in FORMATS:
        raise SpecError(f"--to {to}: cannot tell the format. Allowed suffixes: {', '.join(FORMATS)}.")
    if runtime and to.suffix != ".lowbit":
        raise SpecError(f"--runtime --to {to}: {to.suffix} files are run by other runtimes. Write a .lowbit file.")
    prepare_folder(to.parent, needed_bytes=0, option="--to")
    source = open_source(
        model,
        weights,
        data,
        calibration,
        batch_size,
        model_options=model_option,
        preprocess=preprocess,
        input_shape=input_shape,
        batch_size=batch_size,
        seed=seed,
    )
    network = source.model if packed is None else load(packed_file(packed))
    is_quantized = packed is not None  # the float network would be timed against itself
    report = export_file(
        network,
        to,
        sample=source.sample,
        weight_container=weight_container,
        measure_speed=speed and is_quantized,
        kernels=runtime,
        dynamic=[name for name in (dynamic or "").split(",") if name],
    )
    say(str(report))


def packed_file(path: Path) -> Path:
    """``path`` itself, or the packed file in that folder; FileFormatError when there is none."""
    found = path / "model.lowbit" if path.is_dir() else path
    if not found.is_file():
        raise FileFormatError(f"{found}: there is no such file. Name a .lowbit file or a folder that 'lowbit quantize' wrote.")
    if found.suffix != ".lowbit":
        raise FileFormatError(f"{found}: expected a .lowbit file, got {found.suffix or 'no suffix'}")
    return found
