"""``lowbit.quantize``: a trained network in, a quantized copy out; and the same by a request, delivered to files."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from lowbit.autograd import records_gradients
from lowbit.errors import CalibrationError, LowbitError
from lowbit.inputs import Calibration, Inputs
from lowbit.measure import tensor_bytes
from lowbit.network.batch import calibration_for
from lowbit.network.job import check_method_bits
from lowbit.network.layers import evaluating
from lowbit.network.record import QuantizationRecord, attach_record
from lowbit.network.surgery.fold import EXACT_NORMS
from lowbit.network.unwrap import plain_copy
from lowbit.options import choose_policy, make_method
from lowbit.plugins import source_digest
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.progress import Progress
from lowbit.provenance import Provenance, attach_provenance, class_names_of, provenance_of
from lowbit.qat.engine.curve import versions
from lowbit.qat.engine.finite import first_output_not_finite
from lowbit.registry import check_needs, find_method
from lowbit.spec import BitPolicy, Bits, LayerBits, parse_bits
from lowbit.workflows.deliver import Delivery, deliver
from lowbit.workflows.origin import WORK, require_network_of_policy, stopped_run, with_network_of_policy
from lowbit.workflows.output import check_results, prepare_folder
from lowbit.workflows.requests import QuantizeRequest
from lowbit.workflows.samples import CACHE, calibration_in, forget_samples
from lowbit.workflows.source import Source, is_network_named, open_source
from lowbit.workfolder import exclusive_run, open_work_folder, tensors_digest, weights_digest


def quantize(
    model: nn.Module,
    *,
    method: str | type[PostTrainingMethod] | PostTrainingMethod = QuantizeRequest.method,
    weight_bits: int | None = 8,
    activation_bits: int | None = 8,
    calibration: object = None,
    policy: BitPolicy | Literal["paper"] | None = None,
    merge_bits: Bits = None,
    sample: object = None,
    seed: int = QuantizeRequest.seed,
    progress: bool | Progress | None = None,
    work_dir: Path | str | None = None,
    provenance: Provenance | None = None,
    **options: object,
) -> nn.Module:
    """Quantize a trained network without training it again.

    Args:
        model: Any network; it is not changed. Layers in training mode are put in evaluation mode in the copy.
        method: Name of a post-training method (``lowbit.list_methods(kind="post_training")``), ``"path/to/file.py:Class"``, or a class or
            an object derived from ``PostTrainingMethod``.
        weight_bits: 1 to 8, or ``None`` / 32 to leave weights in float.
        activation_bits: 1 to 8, or ``None`` / 32 to leave activations in float.
        calibration: Unlabelled samples: a loader, a list of batches or a tensor. Labels in a batch are dropped. Without any data: the name of a
            synthesis method, such as ``"dsg"``, which makes as many samples as in its paper, of the shapes of ``sample`` (more choices:
            ``lowbit.synthesize``); ``"noise"``; or a folder that ``lowbit synthesize`` wrote.
        policy: Bits for each layer; overrides ``weight_bits`` and ``activation_bits``. Default: those everywhere, at least 8
            in the first and last layer. ``"paper"``: those, with the first and the last layer as in the method's paper.
        merge_bits: Bits of what meets in residual sums and concatenations, of their results, and of what is pooled, or ``"float"``;
            overrides what ``policy`` says. Where neither says anything 8, if activations are quantized and the network can be exported.
        sample: Inputs of one call, where no calibration data is given.
        seed: Seed of everything random.
        progress: ``True`` to show progress on standard error, ``False`` for silence, or a ``Progress``. Default: a bar where standard
            error is a terminal, and in a notebook.
        work_dir: Folder for caches and for resuming after a kill.
        provenance: What files of the network keep: the names of its classes, its preprocessing and so on. Default: what ``model`` carries,
            else the classes of the calibration data, where these name them.
        **options: The method's hyper-parameters.

    Returns:
        A quantized copy in evaluation mode. ``lowbit.summary`` shows what was done to each layer.

    Raises:
        UnknownNameError: No such method or option.
        SpecError: Bits, policy or an option out of range.
        CalibrationError: Calibration data missing, empty, not finite or not fitting the model.
        LayerError: Nothing to quantize, or a layer that cannot be.
        GraphError: Bits of sums and concatenations are asked for, and the network cannot be exported.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
        >>> quantized = lowbit.quantize(model, method="round_to_nearest", weight_bits=4, calibration=torch.rand(32, 8))
        >>> [(layer.name, layer.weight_bits) for layer in lowbit.summary(quantized).layers]
        [('0', 8), ('2', 8)]
    """
    bits = LayerBits(parse_bits(weight_bits, "weight_bits"), parse_bits(activation_bits, "activation_bits"))
    arguments = dict.fromkeys(set(inspect.signature(quantize).parameters) - {"options"}, "It is an argument of lowbit.quantize.")
    chosen = make_method(method, "post_training", options, arguments)
    assert isinstance(chosen, PostTrainingMethod)
    policy, shown = choose_policy(chosen, policy, bits).with_merges(merge_bits), Progress.of(progress)
    calibration, made = calibration_in(model, calibration, sample, seed=seed, progress=shown, work_dir=work_dir)
    quantized = run_job(
        model,
        chosen,
        policy,
        calibration,
        sample if made is None else None,
        seed=seed,
        progress=shown,
        work_dir=None if work_dir is None else Path(work_dir),
    ).model
    names = class_names_of(calibration)
    known = provenance or provenance_of(model) or (Provenance(classes=names) if names else None)
    if made is not None:
        known = replace(known or Provenance(), calibration=made.calibration, synthesis=made.synthesis)
    if known is not None:
        attach_provenance(quantized, known)
    return quantized


@records_gradients
def run_job(
    model: nn.Module, method: PostTrainingMethod, policy: BitPolicy, calibration: object = None, sample: object = None, **settings: Any
) -> PtqJob:
    """Do what ``quantize`` does, and return everything known afterwards; ``settings`` are those of ``PtqJob``.

    Besides ``model`` the job holds ``reference``, the float network that ``model`` follows layer by layer (batch norms folded, ranges
    equalized where the method does that), its dataflow and the table of layers.
    """
    info = find_method(method)
    data = None if calibration is None else calibration_for(model, calibration)
    check_needs(info, calibration=data is not None)
    if data is None and sample is None:
        raise CalibrationError("without calibration data pass sample=, the inputs of one call, so that shapes are known.")
    first = Inputs.of(sample, model) if sample is not None else data.sample  # type: ignore[union-attr]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.get("seed", PtqJob.seed))
        job = PtqJob(model=plain_copy(model).eval(), policy=policy, sample=first, calibration=data, **settings)
        if job.work_dir is not None:
            job.work_dir /= source_digest(type(method)) or ""
        for note in check_needs(
            info,
            graph=job.graph is not None or job.graph_error,
            batch_norm=any(isinstance(module, EXACT_NORMS) for module in job.model.modules()),
        ):
            job.table.note(note)
        check_method_bits(info, policy, job)
        try:
            method.quantize(job)
        except CalibrationError as error:
            place = _first_not_finite(model, data)
            raise error if place is None else CalibrationError(f"{place} on the calibration data: {error}") from error
        table = job.finish()
    used = method.hyper_parameter_values()
    attach_record(job.model, QuantizationRecord(info.name, used, job.policy, job.seed, table))
    return job


def _first_not_finite(model: nn.Module, data: Calibration | None) -> str | None:
    """The first layer of the float network whose output is NaN or infinite on the calibration data, in words."""
    with evaluating(model):
        for inputs in data or ():
            place = first_output_not_finite(model, lambda: model(*inputs.args, **inputs.kwargs))  # noqa: B023 - called at once
            if place is not None:
                return place
    return None


@dataclass(frozen=True)
class Quantization:
    """The plan of ``quantize_and_deliver``: the request with its network and data opened.

    Attributes:
        request: What is asked for.
        source: The network and its data.
        method: The method with its hyper-parameters.
        policy: Bits for each layer.
    """

    request: QuantizeRequest
    source: Source
    method: PostTrainingMethod
    policy: BitPolicy

    def fingerprint(self) -> dict[str, object]:
        """Everything that the resulting bits depend on."""
        tensors = (tensor for inputs in self.source.calibration or [self.source.sample] for tensor in inputs.tensors)
        return {
            "kind": "quantize",
            "version": versions()["lowbit"],
            "method": self.request.method,
            "policy": self.policy.to_dict(),
            "settings": dict(self.request.options),
            "seed": self.request.seed,
            "weights": weights_digest(self.source.model),
            "calibration": tensors_digest(tensors),
            "device": str(self.source.device),
        }


def open_quantization(request: QuantizeRequest) -> Quantization:
    """Check ``request`` and open the network and the data that it names; nothing is written.

    Raises:
        LowbitError: Something cannot be found or read, or is not allowed.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    method = cast(PostTrainingMethod, request.chosen_method())  # unknown names and wrong types fail here, before anything is loaded
    check_results(Path(request.out), find_method(method).name, resume=request.resume)
    policy = request.bit_policy()
    stopped = stopped_run(Path(request.out), "quantize") if request.resume else None
    if stopped is not None and not is_network_named(request):
        request = stopped.fill(request)
    request = with_network_of_policy(request, request.policy)
    source = open_source(request, request, device=request.device, seed=request.seed)
    require_network_of_policy(request.policy, source.provenance)
    if source.calibration is None and source.making is None and "calibration" in method.info.needs:
        raise CalibrationError(
            f"method={request.method!r} needs samples to look at: name some with calibration= (a folder of images, or see 'lowbit data list'; "
            "without data dsg, which makes samples from the network). "
            "'lowbit methods list' says which methods need none."
        )
    return Quantization(request, source, method, policy)


def quantize_and_deliver(request: QuantizeRequest, *, progress: Progress | None = None) -> Delivery:
    """Quantize the network that ``request`` names and write every file into ``request.out``; what ``lowbit quantize`` does.

    A run that was stopped is resumed where the request is the same, to the same bits.

    Raises:
        LowbitError: Something cannot be found, read or written, is not allowed, or another run works in the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     request = QuantizeRequest(method="round_to_nearest", weight_bits=4, calibration_samples=32, onnx=False, out=folder)
        ...     delivery = quantize_and_deliver(request)
        >>> delivery.report.model, delivery.report.weight_bits, delivery.report.parity_packed.passed
        ('digits', 4, True)
    """
    progress, started = progress or Progress.silent(), time.time()
    plan = open_quantization(request)
    request = plan.request
    out = prepare_folder(Path(request.out), needed_bytes=3 * tensor_bytes(plan.source.model))
    with exclusive_run(out):
        if not request.resume:
            forget_samples(out)
        source = plan.source.with_samples(progress, out / CACHE)
        plan = replace(plan, source=source)
        work = open_work_folder(out / WORK, plan.fingerprint(), resume=request.resume, facts=source.provenance.to_json())
        if work.is_resumed:
            progress.say("resuming the run that was stopped")
        try:
            job = run_job(
                source.model,
                plan.method,
                plan.policy,
                source.calibration,
                source.sample,
                seed=request.seed,
                progress=progress,
                work_dir=work.path,
            )
            delivery = deliver(
                job.model,
                out,
                calibration=source.calibration,
                sample=job.sample,
                float_model=source.model,
                test_data=source.test,
                task=source.task,
                reference=job.reference,
                name=source.name,
                packed=request.packed,
                onnx=request.onnx,
                provenance=source.provenance,
                notes=source.notes,
                data_names=source.data_names,
                started=started,
                progress=progress,
            )
        except LowbitError:
            work.remove_if_useless()
            raise
        work.remove()
        forget_samples(out)
    return delivery
