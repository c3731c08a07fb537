"""``lowbit quantize``: a trained network in; quantized files, checked and timed, and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import options as shared
from lowbit.cli.console import errors, say, say_how_to_go_on
from lowbit.cli.output import prepare_folder
from lowbit.cli.request import make_policy, make_settings
from lowbit.cli.source import Source, open_source
from lowbit.cli.workflow import Plan, report_outcome, run_plan, show_layers
from lowbit.errors import CalibrationError, LowbitError
from lowbit.measure import tensor_bytes
from lowbit.progress import Progress
from lowbit.registry import find_method
from lowbit.workfolder import open_work_folder


def quantize(
    model: shared.Model = None,
    model_option: shared.ModelOption = None,
    weights: shared.Weights = None,
    data: shared.Data = None,
    preprocess: shared.Preprocess = None,
    calibration: shared.Calibration = None,
    input_shape: shared.InputShape = None,
    calibration_samples: shared.CalibrationSamples = 256,
    method: shared.Method = "white_paper",
    weight_bits: shared.WeightBits = None,
    activation_bits: shared.ActivationBits = None,
    first_last_bits: shared.FirstLastBits = None,
    policy: shared.Policy = None,
    merge_bits: shared.MergeBits = None,
    keep: shared.Keep = None,
    only: shared.Only = None,
    granularity: Annotated[
        str | None,
        typer.Option(
            "--granularity",
            rich_help_panel=shared.METHOD,
            help="Which weights share a scale: per_tensor, per_channel, or group:SIZE. Default: the method's.",
            show_default=False,
        ),
    ] = None,
    weight_observer: Annotated[
        str | None,
        typer.Option(
            "--weight-observer",
            rich_help_panel=shared.METHOD,
            help="How weight ranges are chosen, for example min_max or mse. Default: the method's.",
            show_default=False,
        ),
    ] = None,
    activation_observer: Annotated[
        str | None,
        typer.Option(
            "--activation-observer",
            rich_help_panel=shared.METHOD,
            help="How activation ranges are chosen, for example min_max, percentile or mse. Default: the method's.",
            show_default=False,
        ),
    ] = None,
    blocks: Annotated[
        str | None,
        typer.Option(
            "--blocks",
            rich_help_panel=shared.METHOD,
            help="Patterns of the modules to reconstruct as a whole, separated by commas: 'layer*.*'. Default: found in the network.",
            show_default=False,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            rich_help_panel=shared.METHOD,
            help="Where reconstruction keeps layer inputs: ram, or disk (less memory). Default: the method's.",
            show_default=False,
        ),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            "--iterations",
            rich_help_panel=shared.METHOD,
            min=1,
            help="Steps of reconstruction for each layer or block; more is better and slower. Default: the paper's.",
            show_default=False,
        ),
    ] = None,
    option: shared.MethodOption = None,
    seed: shared.Seed = 0,
    out: Annotated[
        Path,
        typer.Option(
            "--out", rich_help_panel=shared.OUTPUT, help="Folder for report.html, report.json, policy.yaml, model.lowbit and model.onnx."
        ),
    ] = Path("lowbit-out"),
    resume: shared.Resume = True,
    packed: shared.Packed = True,
    onnx: shared.Onnx = True,
    batch_size: shared.BatchSize = 32,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
    dry_run: shared.DryRun = False,
) -> None:
    """Quantize a trained network, check the result, and write files and a report.

    The embedded example: lowbit quantize

    Few bits: lowbit quantize --method brecq -w 4 -a 8

    Your network: lowbit quantize --model net.py:build --weights net.safetensors --calibration photos/ --data labelled/
    """
    shared.set_threads(threads)
    shortcuts = {
        "weight_granularity": granularity, "weight_observer": weight_observer, "activation_observer": activation_observer,
        "blocks": blocks, "cache": cache, "iterations": iterations,
    }  # fmt: skip
    settings = make_settings(method, shortcuts, option)
    bits = make_policy(policy, weight_bits, activation_bits, first_last=first_last_bits, keep=keep, only=only)
    bits = bits.with_merges(merge_bits)
    source = open_source(
        model,
        weights,
        data,
        calibration,
        calibration_samples,
        model_options=model_option,
        preprocess=preprocess,
        input_shape=input_shape,
        batch_size=batch_size,
        device=device,
        seed=seed,
    )
    if source.calibration is None and "calibration" in find_method(method, "post_training").needs:
        raise CalibrationError(
            f"--method {method} needs samples to look at: name some with --calibration (a folder of images, or see 'lowbit data list'). "
            "'lowbit methods list' says which methods need none."
        )
    plan = Plan(method, bits, settings, seed, out, packed=packed, onnx=onnx)
    if dry_run:
        show_plan(plan, source)
        return

    prepare_folder(out, needed_bytes=3 * tensor_bytes(source.model))
    work = open_work_folder(out / ".work", plan.fingerprint(source), resume=resume)
    if work.is_replaced:
        errors.print(f"{out} held a stopped run with other settings; its state is deleted", markup=False, highlight=False, soft_wrap=True)
    if work.is_resumed and not quiet:
        errors.print("going on with the run that was stopped")
    try:
        outcome = run_plan(plan, source, work, Progress(quiet=quiet))
    except KeyboardInterrupt as error:
        say_how_to_go_on("stopped", "what was finished is kept")
        raise typer.Exit(130) from error
    except LowbitError:
        work.remove_if_useless()
        raise
    work.remove()
    report_outcome(outcome, quiet=quiet)


def show_plan(plan: Plan, source: Source) -> None:
    """Print what would be done, layer by layer."""
    show_layers(plan, source)
    say(f"\nhyper-parameters: {', '.join(f'{key}={value}' for key, value in plan.settings.items()) or 'the defaults of the method'}")
    say(f"calibration: {'none' if source.calibration is None else f'{source.calibration.samples} samples of {source.calibration_name}'}")
    say(f"metrics: {'not measured, there are no labels' if source.test is None else source.test_name}")
    say(f"would write {', '.join(plan.files)} to {plan.out}")
