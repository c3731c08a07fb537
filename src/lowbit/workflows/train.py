"""``lowbit.train``: a float network and data in, a trained low-bit network out; and the same by a request, delivered to files."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import itertools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

import torch
import yaml
from torch import nn

from lowbit.autograd import records_gradients
from lowbit.errors import DataError, LowbitError, SpecError
from lowbit.inputs import Inputs
from lowbit.measure import tensor_bytes
from lowbit.measure.outputs import device_of
from lowbit.network.record import record_of
from lowbit.network.unwrap import plain_copy
from lowbit.options import settings_of
from lowbit.plugins import source_digest
from lowbit.progress import Progress
from lowbit.provenance import Provenance, attach_provenance, class_names_of, provenance_of
from lowbit.qat.engine.batches import BatchSource, EmptySource, evaluation_batches, make_source
from lowbit.qat.engine.checkpoint import Checkpoints
from lowbit.qat.engine.curve import Curve, TrainingLog, versions
from lowbit.qat.engine.trainer import Trainer
from lowbit.qat.method import TrainingMethod, generates_samples, without_data
from lowbit.qat.networks import GivenNetworks
from lowbit.qat.prepare import Widths, method_of, prepare, training_policy
from lowbit.qat.procedure import Procedure, training_method
from lowbit.qat.recipe import AugmentName, OptimizerSpec, Recipe, Selection
from lowbit.qat.run import TrainRun
from lowbit.qat.task import Criterion, Task
from lowbit.qat.tasks import SoftTargets, as_task
from lowbit.registry import check_needs, find_method
from lowbit.spec import BitPolicy, Bits, switch_name
from lowbit.surrogates import make_surrogate
from lowbit.workflows.deliver import Delivery, deliver
from lowbit.workflows.origin import WORK, require_network_of_policy, stopped_run, with_network_of_policy
from lowbit.workflows.output import check_results, prepare_folder
from lowbit.workflows.requests import TrainRequest, TrainSettings
from lowbit.workflows.samples import CACHE, forget_samples, has_no_labels, is_made, samples_in, training_data_of
from lowbit.workflows.source import is_network_named, open_device
from lowbit.workflows.start import SELF, Start, open_start
from lowbit.workfolder import exclusive_run, open_work_folder, tensors_digest, weights_digest


@dataclass(frozen=True)
class Trained:
    """The result of a training.

    Attributes:
        model: The low-bit network in evaluation mode.
        curve: One result for each epoch.
        sample: The inputs that quantizers were initialized from.
        recipe: The recipe that was used.
        task: The task that was used.
        is_main: Whether this is the process that handles the result; the others have the same network.
    """

    model: nn.Module
    curve: Curve
    sample: Inputs
    recipe: Recipe
    task: Task
    is_main: bool = True


def train(
    model: nn.Module,
    train_data: object,
    *,
    method: str | type[TrainingMethod] | TrainingMethod = TrainRequest.method,
    weight_bits: int | None = 4,
    activation_bits: int | None = 4,
    bits: Widths = None,
    test_data: object = None,
    recipe: Recipe | Literal["paper"] | None = None,
    out: Path | str | None = None,
    policy: BitPolicy | Literal["paper"] | None = None,
    surrogate: str | None = TrainSettings.surrogate,
    procedure: str | type[Procedure] | Procedure | None = None,
    procedure_options: Mapping[str, object] = MappingProxyType({}),
    merge_bits: Bits = None,
    teacher: nn.Module | Literal["self"] | None = None,
    synthesized_samples: int = TrainRequest.synthesized_samples,
    task: Task | Criterion | str | None = None,
    augment: AugmentName = TrainSettings.augment,
    steps_per_epoch: int | None = None,
    sample: object = None,
    workers: int = TrainSettings.workers,
    device: str | None = None,
    devices: int | None = TrainSettings.devices,
    nodes: int | None = TrainSettings.nodes,
    strategy: str = TrainSettings.strategy,
    precision: str | int = TrainSettings.precision,
    save_every: str | float = TrainSettings.save_every,
    select: Selection = TrainSettings.select,
    resume: bool = TrainSettings.resume,
    tensorboard: bool | None = TrainSettings.tensorboard,
    progress: bool | Progress | None = None,
    provenance: Provenance | None = None,
    **options: object,
) -> nn.Module:
    """Train a low-bit copy of ``model``.

    Args:
        model: Any network; it is not changed. Its weights are where training starts.
        train_data: ``ImageData`` of ``lowbit.data``, a data set of torch, tensors such as ``(inputs, targets)`` or a dict, a list of samples, or
            a loader (its data set is used, shuffled in every epoch; a loader with its own sampler, a stream, or other batches are used as
            they come). Targets are whatever the task takes. ``None`` for a method that makes its own samples (``method="zaq"``); from data it
            takes nothing but the shape of an input, where ``sample`` does not give that. Samples without labels, such as one tensor, those of
            ``lowbit.synthesize``, or the name of what makes them, ``"dsg"``: with a ``teacher``, whose outputs are learned in place of labels.
        method: Name of a training method (``lowbit.list_methods(kind="training")``), ``"path/to/file.py:Class"``, or a class or an object
            derived from ``TrainingMethod``.
        weight_bits: 1 to 8, or ``None`` / 32 to leave weights in float.
        activation_bits: 1 to 8, or ``None`` / 32 to leave activations in float.
        bits: Widths that one network is to have, for methods that train several; see ``lowbit.prepare``.
        test_data: Data of the same kinds on which the task's metrics are measured after every epoch.
        recipe: Epochs, batch size, optimizer and so on; ``"paper"``: those of the method's paper. Default: that of the task, with the batch
            size of a loader.
        out: Folder for ``train.json``, ``train.csv``, TensorBoard's files and checkpoints (``.work``). Default: nothing is written.
        policy: Bits for each layer; overrides ``weight_bits`` and ``activation_bits``. ``"paper"``: these bits, with the first and the
            last layer as in the method's paper.
        surrogate: Gradient surrogate to use in place of the method's.
        procedure: Procedure to train with in place of the method's own, such as ``"qkd"``; see ``lowbit.prepare``.
        procedure_options: Hyper-parameters of that procedure.
        merge_bits: Bits of residual sums, concatenations and what is pooled; see ``lowbit.prepare``.
        teacher: A float network whose outputs are soft targets, see ``Recipe.distillation``; ``"self"``: ``model``. A copy is used. Where
            samples have no labels, its outputs are all that is learned.
        synthesized_samples: Samples that are made where ``train_data`` names what makes them, of the shapes of ``sample``.
        task: Task of the network: ``Classification()`` (the default), ``Segmentation()``, ``MultiLabel()``, ``Regression()``, a ``Task``
            of your own, or a function ``criterion(output, target)``.
        steps_per_epoch: Optimizer steps of an epoch, for batches that are used as they come. Default: one pass.
        augment: ``auto`` (shift and mirror pictures of 28 pixels and more), ``none``, ``crop`` or ``crop_flip``.
        sample: Inputs that quantizers are initialized from. Default: the first batch in a fixed random order.
        workers: Processes that fetch samples.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``. Default: where ``model`` is.
        devices: Processes on this machine, one for each device; the script is run again for each.
        nodes: Number of machines.
        strategy: How processes are started, see ``Trainer``.
        precision: ``32``, or ``bf16`` / ``fp16`` for mixed precision.
        save_every: Interval between saves of the state within an epoch: ``300s``, ``10m``, or a number of steps.
        select: The network to return: of the ``last`` epoch, or the ``best`` on the test data.
        resume: Whether to resume a stopped run with the same settings in ``out``; False starts over.
        tensorboard: Whether to write files for TensorBoard. Default: where it is installed.
        progress: ``True`` to show progress on standard error, ``False`` for silence, or a ``Progress``. Default: a bar where standard
            error is a terminal, and in a notebook.
        **options: The method's hyper-parameters.

    Returns:
        The trained network in evaluation mode, for ``lowbit.export`` and ``lowbit.summary``.

    Raises:
        UnknownNameError: No such method, option or surrogate.
        SpecError: Something out of range, or a stopped run with other settings in ``out``.
        DataError: No data where the method needs them, data without targets, or targets that do not fit the network.
        LayerError: A layer that cannot be quantized.
        DivergedError: The loss or a weight became NaN or infinite.
        OutputError: Files cannot be written, or another run works in ``out``.
        MissingExtraError: Lightning Fabric is not installed.

    Example:
        >>> import torch, lowbit
        >>> inputs = torch.randn(64, 2)
        >>> labels = (inputs.sum(1) > 0).long()
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> recipe = lowbit.Recipe(epochs=10, batch_size=16, optimizer=lowbit.OptimizerSpec(learning_rate=0.2))
        >>> trained = lowbit.train(model, (inputs, labels), method="lsq", recipe=recipe)
        >>> lowbit.evaluate(trained, (inputs, labels))["accuracy"] > 0.8
        True
    """
    chosen = training_method(method, options, procedure, procedure_options, _other_settings())
    if isinstance(recipe, str):
        recipe = paper_recipe(chosen, recipe)
    elif recipe is None:
        batch_size = getattr(train_data, "batch_size", None)
        own = as_task(task).recipe
        recipe = dataclasses.replace(own, batch_size=batch_size) if isinstance(batch_size, int) else own
    settings = TrainSettings(
        recipe=recipe,
        surrogate=surrogate,
        augment=augment,
        select=select,
        precision=precision,  # type: ignore[arg-type]
        resume=resume,
        device=device or str(device_of(model)),
        devices=devices,
        nodes=nodes,
        strategy=strategy,
        workers=workers,
        save_every=save_every,
        tensorboard=tensorboard,
    )
    shown, folder = Progress.of(progress), None if out is None else Path(out)
    cache = None if folder is None else folder / CACHE
    named, train_data = (
        train_data,
        samples_in(model, train_data, sample, count=synthesized_samples, seed=recipe.seed, progress=shown, cache=cache),
    )
    job = TrainingJob(
        model,
        train_data,
        chosen,
        training_policy(chosen, weight_bits, activation_bits, policy=policy, merge_bits=merge_bits),
        test_data=test_data,
        teacher=model if teacher == SELF else cast("nn.Module | None", teacher),
        task=task,
        sample=sample if generates_samples(chosen.info) or not is_made(named) else None,
        steps_per_epoch=steps_per_epoch,
        bits=bits,
        provenance=provenance,
    )
    trained = train_network(job, settings, trainer_for(settings, shown), out=folder)
    if folder is not None:
        forget_samples(folder)
    return trained.model


@dataclass(frozen=True)
class TrainingJob:
    """The network and data of one training, as objects where a request has names.

    Attributes:
        model: The float network.
        train_data, test_data: Data of the kinds that ``train`` takes.
        method: The method.
        policy: Bits for each layer.
        teacher, task, sample, steps_per_epoch, bits: As ``train`` takes them.
        provenance: Where the network comes from. Default: what it carries, else the classes of the data, where it names them.
    """

    model: nn.Module
    train_data: object
    method: TrainingMethod
    policy: BitPolicy
    test_data: object = None
    teacher: nn.Module | None = None
    task: Task | Criterion | str | None = None
    sample: object = None
    steps_per_epoch: int | None = None
    bits: Widths = None
    provenance: Provenance | None = None


@records_gradients
def train_network(
    job: TrainingJob, settings: TrainSettings, trainer: Trainer, *, out: Path | None = None, facts: Mapping[str, object] | None = None
) -> Trained:
    """Do what ``train`` does, and return everything known afterwards; ``facts`` are more entries for ``train.json``."""
    model, recipe = job.model, settings.recipe
    if out is not None:
        check_results(out, find_method(job.method).name, resume=settings.resume)
    trainer.launch()
    source, inputs = _source_and_sample(job, settings, trainer)
    own = model if device_of(model).type == "cpu" else copy.deepcopy(model).cpu()
    teacher = None if job.teacher is None else plain_copy(job.teacher)
    quantized = prepare(
        own,
        method=job.method,
        sample=inputs.to("cpu"),
        policy=job.policy,
        bits=job.bits,
        surrogate=settings.surrogate,
        seed=recipe.seed,
    )
    provenance = job.provenance or provenance_of(model) or _of_data(job)
    if provenance is not None:
        attach_provenance(quantized, provenance)
    for note in check_needs(method_of(quantized).info, teacher=teacher is not None):
        trainer.progress.say(note)
    task, needs_teacher = as_task(job.task), "teacher" in method_of(quantized).info.needs
    learned = SoftTargets(task, plain_copy(teacher)) if teacher is not None and has_no_labels(job.train_data) else task
    run = TrainRun(
        quantized,
        method_of(quantized),
        learned,
        recipe,
        source.steps,
        given=GivenNetworks(teacher if needs_teacher or learned is task else None, own),
        batches=lambda count: [trainer.fabric.to_device(batch) for batch in itertools.islice(source.first(count), count)],
    )
    if run.epochs > recipe.epochs:
        raise SpecError(
            f"{run.method.info.name!r} has {len(run.phases)} phases, which take {run.epochs} epochs or more; got epochs={recipe.epochs}"
        )
    test = None if job.test_data is None else evaluation_batches(job.test_data, recipe.batch_size)
    if out is None:
        return Trained(quantized, trainer.fit(run, source, test), inputs, recipe, task, trainer.is_main)
    used = run_settings(run, source, trainer, settings)
    with exclusive_run(out) if trainer.is_main else contextlib.nullcontext():
        if trainer.is_main:
            fingerprint = {**used, "weights": weights_digest(own), "sample": tensors_digest(inputs.tensors)}
            fingerprint["teacher"] = None if teacher is None else weights_digest(teacher)
            known = None if provenance is None else provenance.to_json()
            work = open_work_folder(out / WORK, fingerprint, resume=settings.resume, facts=known)
            if work.is_resumed:
                trainer.progress.say("resuming the run that is in this folder")
        trainer.fabric.barrier()
        facts = {**(facts or {}), **used, "threads": torch.get_num_threads()}
        log = TrainingLog(out, facts, tensorboard=settings.tensorboard) if trainer.is_main else None
        try:
            curve = trainer.fit(run, source, test, checkpoints=Checkpoints(out / WORK), log=log)
        except LowbitError:
            if trainer.is_main:
                work.remove_if_useless()
            raise
        if trainer.is_main:
            work.mark_done()
        trainer.fabric.barrier()
    return Trained(quantized, curve, inputs, recipe, task, trainer.is_main)


def _of_data(job: TrainingJob) -> Provenance | None:
    """The classes that the training data name; ``None`` where they name none."""
    names = class_names_of(job.train_data)
    return Provenance(classes=names, task=type(as_task(job.task)).__qualname__) if names else None


def _source_and_sample(job: TrainingJob, settings: TrainSettings, trainer: Trainer) -> tuple[BatchSource, Inputs]:
    """The training batches, and the inputs that quantizers are initialized from."""
    generated = job.method.generated_steps()
    if job.train_data is None:
        _check_needs_no_data(job, generated)
    sample = None if job.sample is None else Inputs.of(job.sample, job.model)
    if generated is not None and sample is not None:
        return EmptySource(job.steps_per_epoch or generated, settings.recipe), sample
    if generated is None and has_no_labels(job.train_data) and job.teacher is None:
        raise DataError(
            "the training data hold no labels. Pass pairs of inputs and labels, or a teacher whose outputs are learned in their place: "
            "teacher='self', the float network that training starts from."
        )
    source = make_source(
        job.train_data,
        settings.recipe,
        augment=settings.augment,
        rank=trainer.fabric.global_rank,
        processes=trainer.fabric.world_size,
        workers=settings.workers,
        steps=None if generated is not None else job.steps_per_epoch,
        needs_labels=job.teacher is None,
    )
    if generated is None:
        return source, sample or _first_inputs(source, trainer.fabric.world_size, job.model)
    trainer.progress.say(
        f"{find_method(job.method).name} makes its own samples: it takes the shape of an input from the data, and nothing else"
    )
    generator = torch.Generator().manual_seed(settings.recipe.seed)
    shape = _first_inputs(source, 1, job.model)
    sample = shape.map(lambda x: torch.randn(x.shape, generator=generator).to(x) if x.is_floating_point() else x)
    return EmptySource(job.steps_per_epoch or generated, settings.recipe), sample


def _check_needs_no_data(job: TrainingJob, generated: int | None) -> None:
    """DataError where there are no training data and they are needed, be it for the shape of an input."""
    name = find_method(job.method).name
    if generated is None:
        raise DataError(f"{name!r} is trained on data, and there are none: pass train_data=, or {without_data()}.")
    if job.sample is None:
        raise DataError(
            f"{name!r} makes its own samples, and nothing says in which shape: pass sample=, for example torch.randn(8, 3, 32, 32)."
        )


def _first_inputs(source: BatchSource, count: int, model: nn.Module) -> Inputs:
    """The inputs in the first ``count`` batches, joined into one: as many samples as the processes take in a step."""
    found = [Inputs.of(batch, model) for batch in source.first(count)]
    if not found:
        raise DataError("the training data hold no batch")
    first = found[0]
    return Inputs(
        tuple(torch.cat([inputs.args[index] for inputs in found]) for index in range(len(first.args))),
        {key: torch.cat([inputs.kwargs[key] for inputs in found]) for key in first.kwargs},
    )


def _other_settings() -> dict[str, str]:
    """Named arguments of ``train`` besides hyper-parameters, each with the way to pass it."""
    in_optimizer = "It belongs to the recipe's optimizer: recipe=lowbit.Recipe(optimizer=lowbit.OptimizerSpec({}=...))."
    ways = {
        **dict.fromkeys(inspect.signature(train).parameters, "It is an argument of lowbit.train."),
        **{name: f"It belongs to the task: task=lowbit.Classification({name}=...)." for name in ("label_smoothing", "temperature")},
        **{name: in_optimizer.format(name) for name in settings_of(OptimizerSpec)},
        **{name: f"It belongs to the recipe: recipe=lowbit.Recipe({name}=...)." for name in settings_of(Recipe)},
        "lr": in_optimizer.format("learning_rate"),
    }
    return {name: way for name, way in ways.items() if name != "options"}


def paper_recipe(method: TrainingMethod, asked: str) -> Recipe:
    """The recipe of the method's paper; SpecError for another word than ``"paper"``."""
    if asked != "paper":
        raise SpecError(f"recipe must be a Recipe or 'paper', got {asked!r}")
    return method.default_recipe()


def run_settings(run: TrainRun, source: BatchSource, trainer: Trainer, settings: TrainSettings) -> dict[str, object]:
    """Everything that the resulting weights depend on, but for the weights and data themselves."""
    record = record_of(run.model)
    assert record is not None
    return {
        "kind": "train",
        "version": versions()["lowbit"],
        "method": record.method,
        "method_source": source_digest(type(run.method)),
        **({"base_source": source_digest(type(run.method.base))} if isinstance(run.method, Procedure) else {}),
        "options": dict(record.options),
        "surrogate": settings.surrogate,
        "policy": record.policy.to_dict(),
        **({"switches": [switch_name(switch) for switch in record.switches]} if record.switches else {}),
        "recipe": dataclasses.asdict(run.recipe),
        "task": run.task.facts(),
        "seed": run.recipe.seed,
        "data": source.facts(),
        "augment": settings.augment,
        "precision": trainer.precision,
        "device": trainer.fabric.device.type,
        "processes": trainer.fabric.world_size,
        "select": trainer.select,
    }


def open_training(request: TrainRequest) -> Start:
    """Check ``request`` and open the network, the data and the teacher that it names; nothing is written.

    Raises:
        LowbitError: Something cannot be found or read, or is not allowed.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    if request.device != "auto":
        open_device(request.device)
    trainer_for(request)
    check_results(Path(request.out), request.method_info.name, resume=request.resume)
    if request.surrogate is not None:
        make_surrogate(request.surrogate)  # an unknown name fails here, before anything is loaded
    request.bit_policy()
    stopped = stopped_run(Path(request.out), "train") if request.resume else None
    if stopped is not None and not is_network_named(request):
        request = stopped.fill(request)
    request = with_network_of_policy(request, request.policy)
    start = open_start(request)
    require_network_of_policy(request.policy, start.source.provenance)
    return start


def trainer_for(settings: TrainSettings, progress: Progress | None = None) -> Trainer:
    """The trainer that ``settings`` ask for, not launched."""
    own = {entry.name: getattr(settings, entry.name) for entry in dataclasses.fields(Trainer) if entry.name != "progress"}
    return Trainer(**own, progress=progress or Progress.silent())


def train_and_deliver(request: TrainRequest, *, progress: Progress | None = None) -> Delivery | None:
    """Train the network that ``request`` names and write every file into ``request.out``; what ``lowbit train`` does.

    A run that was stopped is resumed where the request is the same, to the same weights.

    Returns:
        The report and what could not be written; ``None`` in all processes but the first.

    Raises:
        LowbitError: Something cannot be found, read or written, is not allowed, or another run works in the folder.
        DivergedError: The loss or a weight became NaN or infinite.

    Example:
        >>> import lowbit, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     request = lowbit.TrainRequest(method="lsq", packed=False, onnx=False, device="cpu", out=folder).changed({"epochs": 1})
        ...     delivery = lowbit.train_and_deliver(request)
        >>> delivery.report.metrics["accuracy"].quantized > 0.9
        True
    """
    started = time.time()
    start, trainer, out = open_training(request), trainer_for(request, progress), Path(request.out)
    trainer.launch()
    if trainer.is_main:
        prepare_folder(out, needed_bytes=12 * tensor_bytes(start.source.model))
        for note in start.notes:
            trainer.progress.say(note)
    start = start.with_samples(trainer.progress, out / CACHE)
    job = TrainingJob(
        start.source.model,
        start.train if start.made is None else training_data_of(start.made),
        cast(TrainingMethod, request.chosen_method()),
        request.bit_policy(),
        test_data=start.test,
        teacher=start.teacher,
        task=start.source.task,
        sample=start.initial,
        provenance=start.source.provenance,
        bits=request.bits,
    )
    facts = {"recipe_file": yaml.safe_load(request.resolved().to_yaml())}
    trained = train_network(job, request, trainer, out=out, facts=facts)
    if not trained.is_main:
        return None
    forget_samples(out)
    training: dict[str, object] = {
        "metric": trained.task.metric_name,
        "task": trained.task.facts(),
        "recipe": dataclasses.asdict(trained.recipe),
        "curve": [dataclasses.asdict(result) for result in trained.curve],
    }
    model = trained.model.cpu()  # where files are checked
    record = record_of(model)
    assert record is not None
    training["measured"] = record.measured
    delivery = deliver(
        model,
        out,
        calibration=start.source.calibration,
        sample=start.source.sample,
        float_model=start.source.model,
        test_data=start.source.test,
        name=start.source.name,
        packed=request.packed,
        onnx=request.onnx,
        compare=start.is_trained,
        task=trained.task,
        training=training,
        notes=start.notes,
        provenance=start.source.provenance,
        data_names={"training": start.train_name, **start.source.data_names},
        started=started,
        progress=trainer.progress,
    )
    before, after = delivery.report.latency_float_onnx, delivery.report.latency_quantized_onnx
    if record.policy.merges is None and before is not None and after is not None and after >= before:
        trainer.progress.say("to let residual sums run in integers too, which makes model.onnx faster, train with merge_bits=8")
    return delivery
