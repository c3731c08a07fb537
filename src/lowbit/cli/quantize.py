"""``lowbit quantize``: a trained network in; quantized files, checked and timed, and a report out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lowbit.cli.console import SpokenProgress, resumable, say
from lowbit.cli.flags import flag_of
from lowbit.cli.settings import DryRun, Json, PrintConfig, Quiet, RecipeFile, options_of
from lowbit.errors import SpecError
from lowbit.options import AtLeast
from lowbit.workflows.requests import QuantizeRequest

if TYPE_CHECKING:
    from lowbit.workflows.quantize import Quantization

app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Shortcuts:
    """Hyper-parameters that several methods share, as options of their own.

    Attributes:
        granularity: Weights that share a scale: per_tensor, per_channel, or group:SIZE. Default: the method's.
        weight_observer: Observer that chooses weight ranges, for example min_max or mse. Default: the method's.
        activation_observer: Observer that chooses activation ranges, for example min_max, percentile or mse. Default: the method's.
        blocks: Patterns of the modules to reconstruct as a whole, separated by commas: 'layer*.*'. Default: found in the network.
        cache: Storage of layer inputs during reconstruction: ram, or disk (less memory). Default: the method's.
        iterations: Steps of reconstruction for each layer or block; more is better and slower. Default: the paper's.
    """

    granularity: str | None = None
    weight_observer: str | None = None
    activation_observer: str | None = None
    blocks: str | None = None
    cache: str | None = None
    iterations: Annotated[int | None, AtLeast(1)] = None


@app.command("quantize")
@options_of(QuantizeRequest, kind="post_training", shortcuts=Shortcuts)
def quantize(
    given: dict[str, Any],
    file: RecipeFile = None,
    quiet: Quiet = False,
    json: Json = False,
    dry_run: DryRun = False,
    print_config: PrintConfig = False,
) -> None:
    """Quantize a trained network, check the result, and write files and a report.

    The embedded example: lowbit quantize

    Few bits: lowbit quantize --method brecq -w 4 -a 8

    Your network: lowbit quantize --model net.py:build --weights net.safetensors --calibration photos/ --data labelled/

    From a file: lowbit quantize -w 4 --print-config > recipe.yaml; lowbit quantize recipe.yaml
    """
    given = with_shortcuts(given)
    request = QuantizeRequest().changed(given) if file is None else QuantizeRequest.from_yaml(file, given)
    if print_config:
        typer.echo(request.resolved().to_yaml(), nl=False)
        return
    from lowbit.cli.show import report_delivery
    from lowbit.files import without_downloads
    from lowbit.workflows.quantize import open_quantization, quantize_and_deliver

    if dry_run:
        with without_downloads():
            plan = open_quantization(request)
        show_plan(plan, as_json=json)
        return
    with resumable():
        delivery = quantize_and_deliver(request, progress=SpokenProgress(quiet=quiet))
    report_delivery(delivery, quiet=quiet, as_json=json)


def with_shortcuts(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with the shortcuts among its options; SpecError where one is given in both ways."""
    values, options = dict(given), dict(given.get("options", {}))
    for shortcut in Shortcuts.__dataclass_fields__:
        if shortcut in values:
            name, value = {"granularity": "weight_granularity"}.get(shortcut, shortcut), values.pop(shortcut)
            if name in options:
                raise SpecError(f"--option {name}={options[name]}: {name} was given by {flag_of(shortcut)} too, with {value!r}")
            options[name] = value
    return {**values, "options": options} if options else values


def show_plan(plan: Quantization, *, as_json: bool) -> None:
    """Print what would be done, layer by layer."""
    from lowbit.cli.show import options_line, show_layer_json, show_layers
    from lowbit.workflows.deliver import files_of
    from lowbit.workflows.plan import plan_layers

    request, source = plan.request, plan.source
    layers, files = plan_layers(source.model, source.sample, plan.policy), files_of(request.packed, request.onnx)
    if as_json:
        show_layer_json(source.name, request.method, layers, Path(request.out), files)
        return
    show_layers(layers, f"{source.name} with {request.method}")
    say(options_line(request.options))
    count = "" if source.calibration is None else f"{source.calibration.samples} samples of "
    is_none = source.calibration is None and source.making is None
    say(f"calibration: {'none' if is_none else f'{count}{source.calibration_name}'}")
    say(f"metrics: {'not measured, there are no labels' if source.test is None else source.test_name}")
    say(f"would write {', '.join(files)} to {request.out}")
