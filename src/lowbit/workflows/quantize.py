"""``lowbit.quantize``: a trained network in, a quantized copy out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from lowbit.errors import CalibrationError
from lowbit.inputs import Calibration, Inputs
from lowbit.network.job import check_method_bits
from lowbit.network.layers import evaluating
from lowbit.network.record import QuantizationRecord, attach_record
from lowbit.network.surgery.fold import EXACT_NORMS
from lowbit.network.unwrap import plain_copy
from lowbit.options import choose_policy, make_method
from lowbit.plugins import source_digest
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.progress import Progress
from lowbit.qat.engine.finite import first_output_not_finite
from lowbit.registry import check_needs, find_method
from lowbit.spec import BitPolicy, Bits, LayerBits, parse_bits


def quantize(
    model: nn.Module,
    *,
    method: str | type[PostTrainingMethod] | PostTrainingMethod = "white_paper",
    weight_bits: int | None = 8,
    activation_bits: int | None = 8,
    calibration: object = None,
    policy: BitPolicy | Literal["paper"] | None = None,
    merge_bits: Bits = None,
    sample: object = None,
    seed: int = 0,
    progress: Progress | None = None,
    work_dir: Path | str | None = None,
    **options: object,
) -> nn.Module:
    """Quantize a trained network without training it again.

    Args:
        model: Any network; it is not changed. Layers in training mode are put in evaluation mode in the copy.
        method: Name of a post-training method (``lowbit.list_methods(kind="post_training")``), ``"path/to/file.py:Class"``, or a class or
            an object derived from ``PostTrainingMethod``.
        weight_bits: 1 to 8, or ``None`` / 32 to leave weights in float.
        activation_bits: 1 to 8, or ``None`` / 32 to leave activations in float.
        calibration: Unlabelled samples: a loader, a list of batches or a tensor. Labels in a batch are dropped.
        policy: Bits for each layer; overrides ``weight_bits`` and ``activation_bits``. Left out: those everywhere, at least 8
            in the first and last layer. ``"paper"``: those, with the first and the last layer as in the method's paper.
        merge_bits: Bits of what meets in residual sums and concatenations, of their results, and of what is pooled, or ``"float"``;
            overrides what ``policy`` says. Where neither says anything 8, if activations are quantized and the network can be exported.
        sample: Inputs of one call, where no calibration data is given.
        seed: Makes the result reproducible.
        progress: Where to show progress; silent when left out.
        work_dir: Folder for caches and for resuming after a kill.
        **options: The method's hyper-parameters.

    Returns:
        A quantized copy in evaluation mode. ``lowbit.summary`` shows what was done to each layer.

    Raises:
        UnknownNameError: No such method or option.
        SpecError: Bits, policy or an option out of range.
        CalibrationError: Calibration data missing, empty, not finite or not fitting the model.
        LayerError: Nothing to quantize, or a layer that cannot be.
        GraphError: Bits of sums and concatenations are asked for, and the network cannot be exported.
    """
    bits = LayerBits(parse_bits(weight_bits, "weight_bits"), parse_bits(activation_bits, "activation_bits"))
    chosen = make_method(method, "post_training", options)
    return run_job(
        model,
        chosen,
        {},
        policy=choose_policy(chosen, policy, bits).with_merges(merge_bits),
        calibration=calibration,
        sample=sample,
        seed=seed,
        progress=progress,
        work_dir=work_dir,
    ).model


def run_job(
    model: nn.Module,
    method: object,
    options: Mapping[str, object],
    *,
    policy: BitPolicy,
    calibration: object = None,
    sample: object = None,
    seed: int = 0,
    progress: Progress | None = None,
    work_dir: Path | str | None = None,
) -> PtqJob:
    """What ``quantize`` does, with everything known afterwards.

    Besides ``model`` the job holds ``reference``, the float network that ``model`` follows layer by layer (batch norms folded, ranges
    equalized where the method does that), its dataflow and the table of layers. Arguments and errors are those of ``quantize``.
    """
    info = find_method(method, "post_training")
    chosen = make_method(method, "post_training", options)
    assert isinstance(chosen, PostTrainingMethod)
    data = None if calibration is None else Calibration.of(calibration, model)
    check_needs(info, calibration=data is not None)
    if data is None and sample is None:
        raise CalibrationError("without calibration data pass sample=, the inputs of one call, so that shapes are known.")
    first = Inputs.of(sample, model) if sample is not None else data.sample  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        job = PtqJob(
            model=plain_copy(model).eval(),
            policy=policy,
            sample=first,
            calibration=data,
            seed=seed,
            progress=progress or Progress.silent(),
            work_dir=None if work_dir is None else Path(work_dir) / (source_digest(type(chosen)) or ""),
        )
        for note in check_needs(
            info,
            graph=job.graph is not None or job.graph_error,
            batch_norm=any(isinstance(module, EXACT_NORMS) for module in job.model.modules()),
        ):
            job.table.note(note)
        check_method_bits(info, policy, job)
        try:
            chosen.quantize(job)
        except CalibrationError as error:
            place = _first_not_finite(model, data)
            raise error if place is None else CalibrationError(f"{place} on the calibration data: {error}") from error
        table = job.finish()
    used = {f.name: getattr(chosen, f.name) for f in dataclasses.fields(chosen)}
    attach_record(job.model, QuantizationRecord(info.name, used, policy, seed, table))
    return job


def _first_not_finite(model: nn.Module, data: Calibration | None) -> str | None:
    """The first layer of the float network whose output is NaN or infinite on the calibration data, in words."""
    with evaluating(model):
        for inputs in data or ():
            place = first_output_not_finite(model, lambda: model(*inputs.args, **inputs.kwargs))  # noqa: B023 - called at once
            if place is not None:
                return place
    return None
