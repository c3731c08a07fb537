"""``lowbit.search``: bits for each layer of a network under a budget; and the same by a request, written to files."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch
from torch import nn

from lowbit.assignment.budget import Budget
from lowbit.assignment.costs import Assignment
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem, make_problem
from lowbit.assignment.result import Candidate, SearchResult
from lowbit.autograd import records_gradients
from lowbit.errors import CalibrationError, DataError, SpecError
from lowbit.files import write_text
from lowbit.inputs import Inputs, map_tensors
from lowbit.measure.latency_table import LatencyTable
from lowbit.measure.outputs import device_of
from lowbit.network.batch import calibration_for
from lowbit.options import make_method
from lowbit.plugins import source_digest
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.progress import Progress
from lowbit.qat.engine.batches import evaluation_batches
from lowbit.qat.engine.curve import versions
from lowbit.qat.task import Batch, Criterion, Task
from lowbit.qat.tasks import as_task
from lowbit.report.facts import run_facts
from lowbit.report.json_text import to_json
from lowbit.report.search import write_search_page
from lowbit.spec import BitPolicy, LayerBits, switch_name
from lowbit.workflows.deliver import Delivery, deliver
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.latency_table import open_latency_table
from lowbit.workflows.origin import WORK
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.quantize import quantize, run_job
from lowbit.workflows.requests import SearchRequest
from lowbit.workflows.samples import CACHE, calibration_in, forget_samples
from lowbit.workflows.source import Source, labelled_batches, open_source
from lowbit.workfolder import exclusive_run, open_work_folder, tensors_digest, weights_digest

MEASURED = 16  # networks of a frontier that are measured for max_drop, and again as many between the first that will do and the one before
FILES = ("policy.yaml", "search.json", "report.html")
QUANTIZED = "quantized"  # folder of the network that was found, where it is quantized too


@records_gradients
def search(
    model: nn.Module,
    *,
    method: str | type[SearchMethod] | SearchMethod = SearchRequest.method,
    budget: Budget | str | Sequence[str] | None = None,
    max_drop: float | None = None,
    data: object = None,
    calibration: object = None,
    test_data: object = None,
    sample: object = None,
    candidates: Sequence[int] = (2, 4, 8),
    activation_bits: int | Sequence[int | None] | None = 8,
    first_last_bits: int | None = 8,
    latency_table: LatencyTable | Path | str | None = None,
    quantizer: str = SearchRequest.quantizer,
    task: Task | Criterion | str | None = None,
    workers: int = 1,
    ray: str | None = None,
    seed: int = SearchRequest.seed,
    progress: bool | Progress | None = None,
    work_dir: Path | str | None = None,
    **options: object,
) -> SearchResult:
    """Choose bits for each layer of a trained network under a budget.

    Args:
        model: The float network; it is not changed.
        method: Name of a search method (``lowbit.list_methods(kind="search")``), ``"path/to/file.py:Class"``, or a class or an object derived
            from ``SearchMethod``.
        budget: What the network may cost: a ``Budget``, ``"size=10%"``, or a list of such texts, which hold together. Needed unless
            ``max_drop`` is given.
        max_drop: In place of a budget: the cheapest network along the method's frontier whose metric on ``test_data`` falls by at most so
            many points (hundredths where it is a share, else in its own unit). With a budget, both hold.
        data: Labelled batches that methods may learn from.
        calibration: Unlabelled samples, or what makes some, such as ``"dsg"``; see ``lowbit.quantize``. Default: the inputs of ``data``.
        test_data: Labelled data that networks are measured on for ``max_drop``. Default: ``data``.
        sample: Inputs of one call, where there are neither samples nor data.
        candidates: Widths that weights may have, 1 to 8.
        activation_bits: Bits of what the layers read; ``None``: float; several: each layer may have any of them.
        first_last_bits: Bits of the first and the last layer, which are not searched; ``None``: they are searched as all others.
        latency_table: Times of the layers at each width, for budgets of latency: a table, its file, or a model of hardware (``bit_serial``,
            ``bit_fusion``).
        quantizer: Post-training method with which networks are measured for ``max_drop``.
        task: What the network is for; default: classification.
        workers: Processes; the result does not depend on it.
        ray: Address of a Ray cluster that measures in their place: ``auto``, ``local``, or ``HOST:PORT``; the numbers are the same on the same
            kind of machine.
        seed: Seed of everything random.
        progress: ``True`` to show progress on standard error, ``False`` for silence, or a ``Progress``. Default: a bar where standard
            error is a terminal, and in a notebook.
        work_dir: Folder for what a killed search needs to go on to the same result.
        **options: The method's hyper-parameters.

    Returns:
        The policy and what it costs, the frontier, and what the method predicts for each layer.

    Raises:
        UnknownNameError: No such method, option or budget.
        SpecError: A budget that cannot be met (the message names the least possible cost), or a value out of range.
        DataError: The method, or ``max_drop``, needs samples or labels that are not there.
        LayerError: A network that is quantized already, or that has no layer to search.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> found = lowbit.search(model, budget="average=3", calibration=torch.rand(16, 8), max_probes=10)
        >>> sorted(bits.weight for bits in found.found.bits.values()), found.cost["average"]
        ([2, 4, 8, 8], 3.0)
        >>> quantized = lowbit.quantize(model, method="round_to_nearest", policy=found.policy, calibration=torch.rand(16, 8))
    """
    arguments = dict.fromkeys(set(inspect.signature(search).parameters) - {"options"}, "It is an argument of lowbit.search.")
    chosen = make_method(method, "search", options, arguments)
    assert isinstance(chosen, SearchMethod)
    if budget is None and max_drop is None:
        raise SpecError("say what the network may cost: budget='average=4', 'size=10%', 'bops=8%', 'latency=60%', or max_drop=1.0.")
    task, shown = as_task(task), Progress.of(progress)
    calibration, made = calibration_in(model, calibration, sample, seed=seed, progress=shown, work_dir=work_dir)
    batches = () if data is None else tuple(_on_device(evaluation_batches(data, 32), model))
    samples = None if calibration is None and not batches else calibration_for(model, batches if calibration is None else calibration)
    if samples is None and sample is None:
        raise CalibrationError("without samples pass sample=, the inputs of one call, so that shapes are known.")
    if max_drop is not None and test_data is None and not batches:
        raise DataError("max_drop= measures networks, which needs labels: pass test_data= or data=, batches of inputs and targets.")
    inputs = Inputs.of(sample, model) if sample is not None and made is None else samples.sample  # type: ignore[union-attr]
    table = open_latency_table(latency_table, model, inputs) if isinstance(latency_table, (str, Path)) else latency_table
    problem = make_problem(
        model,
        inputs,
        budget=Budget() if budget is None else Budget.of(budget),
        candidates=candidates,
        activation_bits=(activation_bits,) if activation_bits is None or isinstance(activation_bits, int) else activation_bits,
        first_last=first_last_bits,
        task=task,
        calibration=samples,
        batches=batches or tuple(samples or ()),
        has_labels=bool(batches),
        latency_table=table,
        seed=seed,
        progress=shown,
        workers=workers,
        ray=ray,
        work_dir=None if work_dir is None else Path(work_dir),
    )
    result = _result(problem, chosen, chosen.search(problem), table)
    if max_drop is None:
        return result
    return _within_drop(result, problem, max_drop, test_data if test_data is not None else data, quantizer)


def _on_device(batches: object, model: nn.Module) -> list[Batch]:
    device = device_of(model)
    return [map_tensors(batch, lambda tensor: tensor.to(device)) for batch in batches]  # type: ignore[attr-defined]


def _result(problem: SearchProblem, method: SearchMethod, found: Found, latency_table: LatencyTable | None) -> SearchResult:
    if found.bits.keys() != problem.choices.keys() or not problem.fits(found.bits):
        raise SpecError(
            f"{method.info.name} gave {_listed(found.bits)}, which is not within the budget or not for the layers {', '.join(problem.choices)}. "
            "This is a fault of the method."
        )
    chosen = _candidate(problem, "found", found.bits, found.loss)
    return SearchResult(
        method.info.name,
        method.hyper_parameter_values(),
        replace(chosen, policy=replace(chosen.policy, order=found.order)),
        _uniform(problem, found, latency_table),
        tuple(_candidate(problem, f"frontier {place}", option.bits, option.loss) for place, option in enumerate(found.frontier, 1)),
        found.sensitivity,
        tuple(problem.choices),
        problem.limits,
        {kind: cost.reference for kind, cost in problem.costs.items()},
        {kind: cost.unit for kind, cost in problem.costs.items()},
        problem.main,
        found.order,
        found.facts,
        problem.task.metric_name,
        problem.task.units.get(problem.task.metric_name, ""),
    )


def _uniform(problem: SearchProblem, found: Found, latency_table: LatencyTable | None) -> tuple[Candidate, ...]:
    """The network at every width from 8 to 1, not at the candidates alone, the most expensive first."""
    inputs = tuple(dict.fromkeys(bits.activation for widths in problem.choices.values() for bits in widths))
    needed = {name: tuple(LayerBits(weight, bits) for weight in range(1, 9) for bits in inputs) for name in problem.choices}
    every = make_problem(
        problem.model,
        problem.sample,
        budget=Budget(),
        candidates=range(1, 9),
        activation_bits=inputs,
        first_last=next(iter(problem.fixed.values())).weight if problem.fixed else None,
        task=problem.task,
        latency_table=latency_table if latency_table is not None and latency_table.has(needed) else None,
    )
    networks = every.uniform() if every.costs.keys() >= problem.costs.keys() else problem.uniform()
    costs = every.costs if every.costs.keys() >= problem.costs.keys() else problem.costs
    candidates = [
        Candidate(
            f"uniform {switch_name(bits)}",
            problem.policy(network),
            problem.all_bits(network),
            {kind: cost.of(network) for kind, cost in costs.items()},
            _predicted(found, network),
        )
        for bits, network in networks.items()
    ]
    return tuple(sorted(candidates, key=lambda one: -one.cost[problem.main]))


def _predicted(found: Found, bits: Assignment) -> float | None:
    """The sum of the losses of all layers, where the method has one for each and its own prediction is their sum."""

    def total(own: Assignment) -> float | None:
        losses = [found.sensitivity.get(name, {}).get(width) for name, width in own.items()]
        return None if None in losses else math.fsum(loss for loss in losses if loss is not None)

    own = total(found.bits)
    if own is None or found.loss is None or not math.isclose(own, found.loss, rel_tol=1e-6, abs_tol=1e-12):
        return None  # layers interact: a sum would not be comparable
    return total(bits)


def _candidate(problem: SearchProblem, name: str, bits: Assignment, loss: float | None) -> Candidate:
    cost = {kind: table.of(bits) for kind, table in problem.costs.items()}
    return Candidate(name, problem.policy(bits), problem.all_bits(bits), cost, loss)


def _within_drop(result: SearchResult, problem: SearchProblem, max_drop: float, test_data: object, quantizer: str) -> SearchResult:
    """The cheapest network of the frontier whose measured metric falls by at most ``max_drop``, and all that were measured on the way."""
    if not result.frontier:
        raise SpecError(
            f"max_drop: {result.method} finds one network for a budget and no frontier. Give budget=, or a method that has one: hawq_v2."
        )
    sign = 1.0 if problem.task.higher_is_better else -1.0
    unit = 100.0 if result.metric_unit == "%" else 1.0
    before = evaluate(problem.model, test_data, task=problem.task).value
    affordable = [one for one in result.frontier if all(one.cost[kind] <= limit * (1 + 1e-9) for kind, limit in result.limits.items())]
    measured: dict[str, Candidate] = {}

    def first_near(candidates: Sequence[Candidate], name: str) -> Candidate | None:
        """The first one that is near enough."""
        with problem.progress.stage(name, total=len(candidates)) as stage:
            for candidate in candidates:
                metric = measure(problem.model, candidate.policy, problem, test_data, quantizer)
                measured[candidate.name] = replace(candidate, metric=metric)
                stage.advance(note=candidate.name)
                if unit * sign * (before - metric) <= max_drop:
                    return candidate
        return None

    coarse = spread(affordable, MEASURED)
    found = first_near(coarse, "measuring the frontier")
    if found is None:
        best = max(measured.values(), key=lambda one: sign * cast(float, one.metric), default=None)
        raise SpecError(
            f"max_drop={max_drop:g}: no network of the frontier comes so near to the float network's {problem.task.metric_name}, "
            f"{before:.4g}; the best has {'none' if best is None else f'{best.metric:.4g}'}. Allow more, wider candidates=, or another "
            f"quantizer= than {quantizer}."
        )
    if found is not coarse[0]:
        start = affordable.index(coarse[coarse.index(found) - 1]) + 1
        found = first_near(spread(affordable[start : affordable.index(found)], MEASURED), "measuring below it") or found
    frontier = tuple(measured.get(one.name, one) for one in result.frontier)
    return replace(result, found=replace(measured[found.name], name="found"), frontier=frontier, float_metric=before)


def spread(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """At most ``count`` of them, evenly over the list, both ends among them.

    >>> [one for one in spread(list("abcdefg"), 3)]  # type: ignore[type-var]
    ['a', 'd', 'g']
    """
    if len(candidates) <= count:
        return list(candidates)
    places = [round(place * (len(candidates) - 1) / (count - 1)) for place in range(count)]
    return [candidates[place] for place in places]


def measure(model: nn.Module, policy: BitPolicy, problem: SearchProblem, test_data: object, quantizer: str) -> float:
    """The task's metric after quantizing by ``policy`` without training."""
    quantized = quantize(
        model, method=quantizer, policy=policy, calibration=problem.calibration, sample=problem.sample, seed=problem.seed, progress=False
    )
    return evaluate(quantized, test_data, task=problem.task, progress=False).value


def _listed(bits: Assignment) -> str:
    return ", ".join(f"{name}: {width.weight}" for name, width in bits.items())


@dataclass(frozen=True)
class Searched:
    """The result of ``search_and_write``.

    Attributes:
        result: What was found.
        out: The folder with the files.
        delivery: The quantized network, where the request asked for one.
    """

    result: SearchResult
    out: Path
    delivery: Delivery | None = None


def search_and_write(request: SearchRequest, *, progress: Progress | None = None) -> Searched:
    """Search bits for the network that ``request`` names and write ``policy.yaml``, ``search.json`` and ``report.html``; what ``lowbit search`` does.

    A search that was stopped goes on where the request is the same, to the same result.

    Raises:
        LowbitError: Something cannot be found, read or written, is not allowed, or another run works in the folder.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     request = SearchRequest(budget=("average=4",), calibration_samples=32, options={"max_probes": 10}, out=folder)
        ...     searched = search_and_write(request)
        >>> round(searched.result.cost["average"], 1) <= 4
        True
    """
    progress, started = progress or Progress.silent(), time.time()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    method = make_method(request.method, "search", request.options)
    assert isinstance(method, SearchMethod)
    if not request.budget and request.max_drop is None:
        raise SpecError(
            "say what the network may cost with budget= ('average=4', 'size=10%', 'bops=8%', 'latency=60%'), or how much it may lose with max_drop=."
        )
    if request.then is not None:
        make_method(request.then, "post_training", request.then_options)
    budget = Budget.of(request.budget)
    source = open_source(request, request, device=request.device, seed=request.seed)
    for line in (str(source.provenance), *source.notes):
        progress.say(line)
    candidates, activations = request.candidate_bits(), request.input_bits()
    table = None
    if request.latency_table is not None:
        table = open_latency_table(request.latency_table, source.model, source.sample)
    batches = labelled_batches(request, request, source)
    if request.max_drop is not None and source.test is None:
        raise DataError("max_drop= measures networks, which needs labelled data: name some with data=.")
    out = prepare_folder(Path(request.out), needed_bytes=10_000_000)
    with exclusive_run(out):
        if not request.resume:
            forget_samples(out)
        source = source.with_samples(progress, out / CACHE)
        work = open_work_folder(out / WORK, _fingerprint(request, method, source), resume=request.resume, facts=source.provenance.to_json())
        if work.is_resumed:
            progress.say("resuming the search that was stopped")
        result = search(
            source.model,
            method=method,
            budget=budget if budget.limits else None,
            max_drop=request.max_drop,
            data=batches or None,
            task=source.task,
            calibration=source.calibration,
            test_data=source.test,
            sample=source.sample,
            candidates=candidates,
            activation_bits=activations,
            first_last_bits=request.ends,
            latency_table=table,
            quantizer=request.then or request.quantizer,
            workers=request.workers,
            ray=request.ray,
            seed=request.seed,
            progress=progress,
            work_dir=work.path,
        )
        delivery = None
        if request.then is not None:
            result, delivery = _quantized(result, request, source, out, work.path, progress)
        provenance = source.provenance.to_json()
        replace(result.policy, network=provenance).to_yaml(out / FILES[0])
        write_text(
            out / FILES[1], to_json({**result.to_dict(), "provenance": provenance, "run": run_facts(started, source.data_names)}) + "\n"
        )
        write_search_page(result, source.name, run_facts(started, source.data_names), out / FILES[2])
        work.remove()
        forget_samples(out)
    return Searched(result, out, delivery)


def _fingerprint(request: SearchRequest, method: SearchMethod, source: Source) -> dict[str, object]:
    """Everything that the result of a search depends on."""
    return {
        "kind": "search", "version": versions()["lowbit"], "method": request.method, "source": source_digest(type(method)),
        "settings": request.deciding_settings(), "weights": weights_digest(source.model), "device": str(source.device),
        "samples": tensors_digest(t for inputs in source.calibration or [source.sample] for t in inputs.tensors),
    }  # fmt: skip


def _quantized(
    result: SearchResult, request: SearchRequest, source: Source, out: Path, work: Path, progress: Progress
) -> tuple[SearchResult, Delivery]:
    """The network that was found and the uniform one that costs as much or less, both quantized and, with labels, measured."""
    uniform = uniform_at_cost(result)
    found = _job(result.found, request, source, work, progress)
    delivery = deliver(
        found.model,
        out / QUANTIZED,
        calibration=source.calibration,
        sample=found.sample,
        float_model=source.model,
        test_data=source.test,
        task=source.task,
        reference=found.reference,
        name=source.name,
        provenance=source.provenance,
        notes=source.notes,
        data_names=source.data_names,
        progress=progress,
    )
    if source.test is None:
        return result, delivery

    def measured(candidate: Candidate, job: PtqJob) -> Candidate:
        return replace(candidate, metric=evaluate(job.model, source.test, task=source.task, progress=progress).value)

    others = (measured(one, _job(one, request, source, work, progress)) if one is uniform else one for one in result.uniform)
    float_metric = evaluate(source.model, source.test, task=source.task, progress=progress).value
    return replace(result, found=measured(result.found, found), uniform=tuple(others), float_metric=float_metric), delivery


def _job(candidate: Candidate, request: SearchRequest, source: Source, work: Path, progress: Progress) -> PtqJob:
    """The network quantized by the method that the request names, with the bits of ``candidate``."""
    method = cast(PostTrainingMethod, make_method(request.then, "post_training", request.then_options))
    folder = work / "then" / candidate.name.replace(" ", "_").replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    return run_job(
        source.model, method, candidate.policy, source.calibration, source.sample, seed=request.seed, progress=progress, work_dir=folder
    )


def uniform_at_cost(result: SearchResult) -> Candidate | None:
    """The uniform network of the most bits that costs no more than the one that was found, or than the budget allows."""
    most = max(result.cost[result.main], result.limits.get(result.main, 0.0))
    return next((one for one in result.uniform if one.cost[result.main] <= most * (1 + 1e-9)), None)
