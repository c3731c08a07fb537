"""The work behind ``lowbit quantize``, and what it shares with ``lowbit train``: measure, export, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import typer
from rich.markup import escape
from torch import nn

import lowbit
from lowbit.cli.console import errors, results, say, show_table
from lowbit.cli.source import Source
from lowbit.errors import GraphError, MissingExtraError, ParityError
from lowbit.files import write_text
from lowbit.inputs import Calibration, Inputs
from lowbit.measure import layer_noise, measure_agreement, tensor_bytes
from lowbit.network.layers import execution_order, layer_kind, quantizable_layers
from lowbit.network.record import record_of
from lowbit.progress import Progress
from lowbit.qat.task import Task, metric_word
from lowbit.qat.tasks import Classification
from lowbit.report.histograms import weight_histograms
from lowbit.report.html import write_html
from lowbit.report.results import MetricResult, ParityResult, Report, write_json
from lowbit.report.summary import layer_results
from lowbit.report.words import bytes_word, change_word, db_word, operand_word, percent_word, ratio_word
from lowbit.spec import BitPolicy, Position
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.export import ExportReport, export
from lowbit.workflows.quantize import run_job
from lowbit.workfolder import WorkFolder, tensors_digest, weights_digest

FILES = ("model.lowbit", "model.onnx")
LAYER_SAMPLES = 64  # samples for the noise of each layer


@dataclass(frozen=True)
class Plan:
    """What is asked for; ``settings`` are hyper-parameters of the method."""

    method: str
    policy: BitPolicy
    settings: Mapping[str, object]
    seed: int
    out: Path
    packed: bool = True
    onnx: bool = True

    @property
    def files(self) -> list[str]:
        """What is written into ``out``."""
        exported = (name for name, wanted in zip(FILES, (self.packed, self.onnx), strict=True) if wanted)
        return ["report.html", "report.json", "policy.yaml", *exported]

    def fingerprint(self, source: Source) -> dict[str, object]:
        """Everything that the resulting bits depend on."""
        return {
            "kind": "quantize",
            "version": lowbit.__version__,
            "method": self.method,
            "policy": self.policy.to_dict(),
            "settings": dict(self.settings),
            "seed": self.seed,
            "weights": weights_digest(source.model),
            "calibration": tensors_digest(tensor for inputs in source.calibration or [source.sample] for tensor in inputs.tensors),
            "device": str(source.device),
        }


@dataclass(frozen=True)
class Outcome:
    """The report, and the files that were asked for and could not be written, each with its reason."""

    report: Report
    out: Path
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """A quantized network and what it is held against.

    Attributes:
        model: The quantized network in evaluation mode.
        sample: Inputs of one call.
        reference: A float network that ``model`` follows layer by layer; ``None``: ``model`` with its quantizers off.
        has_float: Whether the network of the source is a trained one that ``model`` can be compared with.
        training: What ``Report.training`` holds.
        task: What the network is for.
        notes: More notes for the report.
    """

    model: nn.Module
    sample: Inputs
    reference: nn.Module | None = None
    has_float: bool = True
    training: Mapping[str, object] | None = None
    task: Task = field(default_factory=Classification)
    notes: Sequence[str] = ()


def run_plan(plan: Plan, source: Source, work: WorkFolder, progress: Progress) -> Outcome:
    """Quantize and measure, then write every file into ``plan.out``; see ``deliver``."""
    job = run_job(
        source.model,
        plan.method,
        plan.settings,
        policy=plan.policy,
        calibration=source.calibration,
        sample=source.sample,
        seed=plan.seed,
        progress=progress,
        work_dir=work.path,
    )
    return deliver(plan, source, Comparison(job.model, job.sample, job.reference), progress)


def deliver(plan: Plan, source: Source, result: Comparison, progress: Progress) -> Outcome:
    """Measure a quantized network, then write every file into ``plan.out``.

    A file that cannot be exported, or that does not compute what the network computes, is among the problems; everything else is
    written all the same.
    """
    report = _measured(plan, source, result, progress)
    problems: list[str] = []
    done: set[str] = set()
    for name, wanted in zip(FILES, (plan.packed, plan.onnx), strict=True):
        if not wanted:
            continue
        progress.say(f"writing {name} and comparing it with the network")
        try:
            written = export(result.model, plan.out / name, sample=result.sample)
        except (GraphError, ParityError, MissingExtraError) as error:
            problems.append(f"{name}: {error}")
        else:
            report = _with_export(report, name, written)
            done.add(name)
    stale = [name for name in FILES if name not in done and (plan.out / name).exists()]
    report = dataclasses.replace(
        report,
        notes=[
            *report.notes,
            *(f"{name} in {plan.out} is not of this run: an earlier one left it" for name in stale),
            *(f"not written: {problem}" for problem in problems),
        ],
    )
    write_text(plan.out / "policy.yaml", str(plan.policy))
    write_html(report, plan.out / "report.html", histograms=weight_histograms(result.model, result.reference))
    write_json(report, plan.out / "report.json")
    return Outcome(report, plan.out, problems)


def _measured(plan: Plan, source: Source, result: Comparison, progress: Progress) -> Report:
    model, record = result.model, record_of(result.model)
    assert record is not None
    layers = layer_results(model, sample=result.sample)
    report = Report(
        plan.method,
        common_bits(plan.policy.default.weight, (layer.weight_bits for layer in layers)),
        common_bits(plan.policy.default.activation, (layer.activation_bits for layer in layers)),
        plan.seed,
        model=source.name,
        options=record.options,
        size_float=tensor_bytes(source.model),
        layers=layers,
        training=result.training,
        metric=result.task.metric_name,
        notes=[*record.table.notes, *result.notes],
    )
    if source.calibration is None:
        return dataclasses.replace(report, notes=[*report.notes, "there was no data, so what it cost was not measured"])
    noise = layer_noise(model, Calibration.of(source.calibration, limit=LAYER_SAMPLES), reference=result.reference, progress=progress)
    report = dataclasses.replace(report, layers=layer_results(model, sample=result.sample, noise=noise))
    if result.has_float:
        data = source.calibration if source.test is None else source.test
        agreement = measure_agreement(source.model, model, data, progress=progress)
        report = dataclasses.replace(
            report, agreement=agreement.top1, sqnr_db=agreement.sqnr_db, kl=agreement.kl, max_abs_error=agreement.max_abs_error
        )
    if source.test is None:
        return report
    task = result.task
    after = evaluate(model, source.test, task=task, progress=progress)
    before = evaluate(source.model, source.test, task=task, progress=progress).metrics if result.has_float else {}
    metrics = {
        name: MetricResult(before.get(name), value, task.units.get(name, ""), task.meanings.get(name, ""))
        for name, value in after.metrics.items()
    }
    return dataclasses.replace(report, metrics=metrics, samples=after.samples)


def common_bits(default: int | None, layers: Iterable[int | None]) -> int | None:
    """The default of a policy; where that is float, the bits that all quantized layers share, if they do."""
    found = {bits for bits in layers if bits is not None}
    return found.pop() if default is None and len(found) == 1 else default


def _with_export(report: Report, name: str, written: ExportReport) -> Report:
    parity = ParityResult(written.parity.max_abs_error, written.parity.top1_agreement, written.parity.passed)
    report = dataclasses.replace(report, notes=[*report.notes, *(note for note in written.notes if note not in report.notes)])
    if name == "model.lowbit":
        return dataclasses.replace(report, size_packed=written.size_bytes, parity_packed=parity)
    report = dataclasses.replace(report, size_onnx=written.size_bytes, parity_onnx=parity)
    if written.speed is None:
        return report
    return dataclasses.replace(
        report,
        latency_float_onnx=written.speed.float_ms,
        latency_quantized_onnx=written.speed.quantized_ms,
        latency_setting=written.speed.setting,
    )


def report_outcome(outcome: Outcome, *, quiet: bool) -> None:
    """Print the outcome and where the report is; exits with 1 where a file could not be written."""
    if not quiet:
        show_outcome(outcome)
    for problem in outcome.problems:
        errors.print(f"[bold red]not written:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    say(f"report: {outcome.out / 'report.html'}")
    if outcome.problems:
        raise typer.Exit(1)


def show_layers(plan: Plan, source: Source) -> None:
    """Print the bits that each layer would get."""
    layers = quantizable_layers(source.model)
    plan.policy.check(layers)
    order = execution_order(source.model, source.sample)
    ends: dict[str, Position] = {order[0]: "first", order[-1]: "last"} if order else {}
    rows = []
    for name in [*order, *(name for name in layers if name not in order)]:
        bits = plan.policy.bits_for(name, layers[name], position=ends.get(name, "inner"))
        rows.append((name, layer_kind(layers[name]), *("float" if value is None else value for value in (bits.weight, bits.activation, bits.output))))
    show_table(("layer", "kind", "weight bits", "activation bits", "output bits"), rows, title=f"{source.name} with {plan.method}")


def show_outcome(outcome: Outcome) -> None:
    """Print what was gained and what it cost."""
    report = outcome.report
    done = sum(layer.status == "done" for layer in report.layers)
    results.print(
        f"[bold]{escape(report.model)}[/] with [bold]{report.method}[/]: {operand_word(report.weight_bits, 'weights')}, "
        f"{operand_word(report.activation_bits, 'activations')}, {done} of {len(report.layers)} layers",
        highlight=False,
    )
    rows: list[tuple[str, object, object, object]] = [
        (name, metric_word(metric.float, metric.unit), metric_word(metric.quantized, metric.unit), change_word(metric))
        for name, metric in report.metrics.items()
    ] or [(report.metric, None, None, "not measured: name labelled data with --data")]
    if report.sqnr_db is not None:
        rows.append(("same answer as float", None, percent_word(report.agreement), f"output SQNR {db_word(report.sqnr_db)}"))
    for label, size in (("stored, model.lowbit", report.size_packed), ("stored, model.onnx", report.size_onnx)):
        if size is not None:
            rows.append((label, bytes_word(report.size_float), bytes_word(size), f"{ratio_word(report.size_float, size)} smaller"))
    if report.latency_float_onnx is not None and report.latency_quantized_onnx is not None:
        before, after = report.latency_float_onnx, report.latency_quantized_onnx
        rows.append(("time per call, ONNX", f"{before:.3g} ms", f"{after:.3g} ms", f"{before / after:.2f}x as fast"))
    show_table(("", "float", "quantized", ""), rows)
    for label, parity in (("model.lowbit", report.parity_packed), ("model.onnx", report.parity_onnx)):
        if parity.passed is not None:
            agreement = "" if parity.top1_agreement is None else f", same answer {percent_word(parity.top1_agreement)}"
            results.print(
                f"{label} computes what the network computes: largest difference {parity.max_abs_error:.2g}{agreement}", highlight=False
            )
    problems = {f"not written: {problem}" for problem in outcome.problems}
    for note in report.notes:
        if note in problems:
            continue  # those go to standard error
        results.print(f"note: {note}", markup=False, highlight=False)
