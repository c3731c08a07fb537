"""``lowbit diagnose``: which layers hurt, and what to try."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli import options as shared
from lowbit.cli.console import results, say
from lowbit.cli.output import prepare_folder
from lowbit.cli.request import make_policy, make_settings
from lowbit.cli.source import open_source
from lowbit.files import write_text
from lowbit.measure.diagnose import diagnose as walk_chart
from lowbit.progress import Progress
from lowbit.report.results import to_json
from lowbit.workflows.evaluate import evaluate as score
from lowbit.workflows.quantize import run_job


def diagnose(
    model: shared.Model = None,
    model_option: shared.ModelOption = None,
    weights: shared.Weights = None,
    data: shared.Data = None,
    preprocess: shared.Preprocess = None,
    calibration: shared.Calibration = None,
    calibration_samples: shared.CalibrationSamples = 256,
    method: shared.Method = "round_to_nearest",
    weight_bits: shared.WeightBits = None,
    activation_bits: shared.ActivationBits = None,
    first_last_bits: shared.FirstLastBits = None,
    policy: shared.Policy = None,
    keep: shared.Keep = None,
    only: shared.Only = None,
    option: shared.MethodOption = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to look at; time grows with samples x layers.")] = 32,
    remedies: Annotated[int, typer.Option("--remedies", min=0, help="For how many of the worst quantizers remedies are tried.")] = 3,
    seed: shared.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for diagnosis.json. Default: only print.", show_default=False)] = None,
    batch_size: shared.BatchSize = 32,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Quantize, then walk the white paper's debugging chart: weights or activations, which layers, and what helps.

    Nothing is exported. Each remedy that is listed was tried, and its gain on the network's output measured.
    """
    shared.set_threads(threads)
    settings = make_settings(method, {}, option)
    bits = make_policy(policy, weight_bits, activation_bits, first_last=first_last_bits, keep=keep, only=only)
    source = open_source(
        model,
        weights,
        data,
        calibration,
        calibration_samples,
        model_options=model_option,
        preprocess=preprocess,
        batch_size=batch_size,
        device=device,
        seed=seed,
        missing="name some with --calibration: a folder of images, or a name from 'lowbit data list'",
    )
    if out is not None:
        prepare_folder(out, needed_bytes=1_000_000)
    progress = Progress(quiet=quiet)
    job = run_job(source.model, method, settings, policy=bits, calibration=source.calibration, seed=seed, progress=progress)
    test = source.test
    found = walk_chart(
        job.model,
        calibration=source.calibration,
        reference=source.model,
        evaluate=None if test is None else lambda network: score(network, test).value,
        samples=samples,
        remedies=remedies,
        progress=progress,
    )
    if not quiet:
        results.print(found)
    if out is not None:
        path = out / "diagnosis.json"
        write_text(path, to_json(found.to_dict()) + "\n")
        say(f"diagnosis: {path}")
