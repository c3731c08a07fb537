"""Quantize a network and walk the white paper's debugging chart; what ``lowbit diagnose`` does."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch

from lowbit.files import write_text
from lowbit.measure.diagnose import diagnose
from lowbit.measure.diagnosis import Diagnosis
from lowbit.post_training.pipeline import PostTrainingMethod
from lowbit.progress import Progress
from lowbit.report.json_text import to_json
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.origin import origin_of, require_network_of_policy, with_network_of_policy
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.quantize import run_job
from lowbit.workflows.requests import DiagnoseRequest
from lowbit.workflows.samples import CACHE, forget_samples
from lowbit.workflows.source import open_source


def quantize_and_diagnose(request: DiagnoseRequest, *, progress: Progress | None = None) -> Diagnosis:
    """Quantize the network that ``request`` names, and find the layers that hurt and what helps; ``diagnosis.json`` goes to ``request.out``.

    Raises:
        LowbitError: Something cannot be found, read or written, or is not allowed.
    """
    progress = progress or Progress.silent()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    method = cast(PostTrainingMethod, request.chosen_method())
    policy = request.bit_policy()
    missing = (
        "name some with calibration=: a folder of images, a name from 'lowbit data list', or dsg, which makes samples from the network"
    )
    if request.target is None:
        request = with_network_of_policy(request, request.policy)
        source = open_source(request, request, device=request.device, seed=request.seed, missing=missing)
    else:
        origin = origin_of(Path(request.target))
        source = origin.open(request, request, device=request.device, seed=request.seed, missing=missing)
    require_network_of_policy(request.policy, source.provenance)
    out = None if request.out is None else prepare_folder(Path(request.out), needed_bytes=1_000_000)
    for line in (str(source.provenance), *source.notes):
        progress.say(line)
    source = source.with_samples(progress, None if out is None else out / CACHE)
    job = run_job(source.model, method, policy, source.calibration, source.sample, seed=request.seed, progress=progress)
    test = source.test
    found = diagnose(
        job.model,
        calibration=source.calibration,
        reference=source.model,
        evaluate=None if test is None else lambda network: evaluate(network, test, task=source.task).value,
        samples=request.samples,
        remedies=request.remedies,
        progress=progress,
    )
    if out is not None:
        write_text(out / "diagnosis.json", to_json(found.to_dict()) + "\n")
        forget_samples(out)
    return found
