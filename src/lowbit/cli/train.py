"""``lowbit train``: a network and data in; a trained low-bit network as quantized files, checked and timed, and a report out."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import typer

from lowbit.cli.console import SpokenProgress, resumable, say, say_how_to_resume
from lowbit.cli.flags import in_flags
from lowbit.cli.settings import DryRun, Json, PrintConfig, Quiet, RecipeFile, options_of
from lowbit.errors import SpecError
from lowbit.workflows.request import PAPER
from lowbit.workflows.requests import TrainRequest

app = typer.Typer(add_completion=False)
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        help="'paper': epochs, batch size, optimizer and schedule of the method's paper, which other options override; or a YAML file.",
        rich_help_panel="Training",
        metavar="paper|FILE",
        show_default=False,
    ),
]


@app.command("train")
@options_of(TrainRequest, kind="training")
def train(
    given: dict[str, Any],
    file: RecipeFile = None,
    recipe: RecipeName = None,
    quiet: Quiet = False,
    json: Json = False,
    dry_run: DryRun = False,
    print_config: PrintConfig = False,
) -> None:
    """Train a low-bit network, check the result, and write files and a report.

    The embedded example: lowbit train

    A method and bits: lowbit train --data fashion-mnist --model resnet20 --weights float.safetensors --method ewgs -w 2 -a 2 --epochs 10

    As in the method's paper: lowbit train --method pact -w 2 -a 2 --recipe paper --policy paper

    From a file: lowbit train --method lsq -w 3 -a 3 --print-config > recipe.yaml; lowbit train recipe.yaml
    """
    if recipe == PAPER:
        given = {**given, "recipe": PAPER}
    elif recipe is not None:
        if file is not None:
            raise SpecError(f"--recipe {recipe}: the recipe file {file} was given too. Give one of them.")
        file = recipe
    request = TrainRequest().changed(given) if file is None else TrainRequest.from_yaml(file, given)
    if print_config:
        typer.echo(request.resolved().to_yaml(), nl=False)
        return
    from lowbit.cli.show import report_delivery
    from lowbit.files import without_downloads
    from lowbit.workflows.train import train_and_deliver

    if dry_run:
        with without_downloads():
            show_plan(request, as_json=json)
        return
    with _noticing_termination(), resumable(is_first=_is_first_process()):
        delivery = train_and_deliver(request, progress=SpokenProgress(quiet=quiet))
    if delivery is not None:
        report_delivery(delivery, quiet=quiet, as_json=json)


def show_plan(request: TrainRequest, *, as_json: bool) -> None:
    """Print what would be done, layer by layer and phase by phase."""
    from lowbit.cli.show import options_line, show_layer_json, show_layers
    from lowbit.qat import TrainingMethod
    from lowbit.workflows.deliver import files_of
    from lowbit.workflows.plan import plan_layers
    from lowbit.workflows.train import open_training

    start = open_training(request)
    source = start.source
    layers = plan_layers(source.model, source.sample, request.bit_policy())
    files = [*files_of(request.packed, request.onnx), "train.json", "train.csv"]
    if as_json:
        show_layer_json(source.name, request.method, layers, Path(request.out), files)
        return
    show_layers(layers, f"{source.name} with {request.method}")
    method = request.chosen_method()
    assert isinstance(method, TrainingMethod)
    say(options_line(request.options))
    say(f"phases: {', '.join(f'{phase.name} {phase.epochs} epochs' for phase in method.phases(request.recipe))}")
    say(f"training: {start.train_name}, {request.recipe.batch_size} at a time")
    say(f"metrics: {'not measured' if start.test is None else f'{len(start.test)} samples of {start.test.name}'}")
    for note in start.notes:
        say(f"note: {in_flags(note)}")
    say(f"would write {', '.join(files)} to {request.out}")


@contextlib.contextmanager
def _noticing_termination() -> Iterator[None]:
    """SIGTERM ends the command with a message and the command that resumes it."""
    from lowbit.qat.engine.stopping import Terminated

    def terminate(_number: int, _frame: FrameType | None) -> None:
        raise Terminated("stopped by SIGTERM; what was saved is kept")

    before = signal.signal(signal.SIGTERM, terminate) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    except Terminated as stopped:
        what, _, kept = stopped.message.partition("; ")
        if _is_first_process():
            say_how_to_resume(what, kept)
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _is_first_process() -> bool:
    """Whether this is no process that another one, or torchrun, started beside the first."""
    return all(os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK"))
