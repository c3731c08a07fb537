"""``lowbit.deliver``: a quantized network measured, written to files that are checked and timed, and reported."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lowbit.errors import GraphError, MissingExtraError, ParityError, SpecError
from lowbit.files import write_text
from lowbit.inputs import Calibration, Inputs
from lowbit.measure import layer_noise, measure_agreement, tensor_bytes
from lowbit.network.record import QuantizationRecord, record_of
from lowbit.progress import Progress
from lowbit.qat.engine.batches import evaluation_batches
from lowbit.qat.task import Criterion, Task
from lowbit.qat.tasks import as_task
from lowbit.report.histograms import weight_histograms
from lowbit.report.html import write_html
from lowbit.report.results import MetricResult, ParityResult, Report, write_json
from lowbit.report.summary import layer_results
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.export import ExportReport, export
from lowbit.workflows.output import prepare_folder

FILES = ("model.lowbit", "model.onnx")
LAYER_SAMPLES = 64  # samples for the noise of each layer
TEST_BATCH = 128  # samples of a call where the test data are no batches yet


@dataclass(frozen=True)
class Delivery:
    """The result of ``deliver``.

    Attributes:
        report: Everything that was measured.
        out: The folder with the files.
        problems: The requested files that could not be written, each with its reason.

    Example:
        >>> import lowbit, tempfile, torch
        >>> images = torch.randn(64, 8)
        >>> small = lowbit.quantize(torch.nn.Linear(8, 4), weight_bits=4, calibration=images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     delivery = lowbit.deliver(small, folder, calibration=images, onnx=False)
        >>> delivery.report.parity_packed.passed, delivery.problems
        (True, [])
    """

    report: Report
    out: Path
    problems: list[str] = field(default_factory=list)


def files_of(packed: bool, onnx: bool) -> list[str]:
    """What ``deliver`` writes."""
    exported = (name for name, wanted in zip(FILES, (packed, onnx), strict=True) if wanted)
    return ["report.html", "report.json", "policy.yaml", *exported]


def deliver(
    model: nn.Module,
    out: Path | str,
    *,
    calibration: object = None,
    sample: object = None,
    float_model: nn.Module | None = None,
    test_data: object = None,
    reference: nn.Module | None = None,
    name: str = "",
    packed: bool = True,
    onnx: bool = True,
    compare: bool = True,
    task: Task | Criterion | None = None,
    training: Mapping[str, object] | None = None,
    notes: Sequence[str] = (),
    progress: Progress | None = None,
) -> Delivery:
    """Measure a quantized network, write it to files, check and time them, and report.

    The folder gets ``report.html``, ``report.json``, ``policy.yaml``, ``model.lowbit`` and ``model.onnx``. A file that cannot be exported, or
    that does not compute what the network computes, is not written and named among the problems; everything else is written all the same.

    Args:
        model: The network, as ``lowbit.quantize`` or ``lowbit.train`` returns it.
        out: The folder; it is made where it does not exist.
        calibration: Samples that the noise of each layer is measured on: a loader, a list of batches or a tensor. Labels are dropped.
        sample: Inputs of one call, which files are checked and timed with. Default: the first batch of ``calibration``.
        float_model: The network before it was quantized: its size and its answers are compared.
        test_data: Labelled data of the kinds that ``lowbit.train`` takes; the task's metrics are measured on it.
        reference: A float network that ``model`` follows layer by layer. Default: ``model`` with its quantizers off.
        name: What the report calls the network. Default: its class.
        packed: Whether to write ``model.lowbit``.
        onnx: Whether to write ``model.onnx``.
        compare: False where ``float_model`` is not trained, so that only its size is worth comparing.
        task: What the network is for, see ``lowbit.train``. Default: classification.
        training: What ``Report.training`` holds.
        notes: More notes for the report.
        progress: Progress display; default: silent.

    Raises:
        SpecError: The network is not quantized, or there is neither ``calibration`` nor ``sample``.
        OutputError: The folder cannot be written to.

    Example:
        >>> import lowbit, tempfile, torch
        >>> net, images = torch.nn.Sequential(torch.nn.Linear(8, 4)), torch.randn(64, 8)
        >>> small = lowbit.quantize(net, weight_bits=4, calibration=images)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     delivery = lowbit.deliver(small, folder, calibration=images, float_model=net, onnx=False)
        >>> delivery.report.parity_packed.passed, delivery.report.size_float, delivery.problems
        (True, 144, [])
    """
    progress = progress or Progress.silent()
    record = record_of(model)
    if record is None:
        raise SpecError(f"{type(model).__name__} is not quantized: deliver what lowbit.quantize or lowbit.train returns.")
    if calibration is None and sample is None:
        raise SpecError("deliver needs samples to check files with: pass calibration= or sample=.")
    data = None if calibration is None else Calibration.of(calibration, model)
    test = None if test_data is None else evaluation_batches(test_data, TEST_BATCH)
    inputs = Inputs.of(sample, model) if sample is not None else data.sample  # type: ignore[union-attr]
    out = prepare_folder(Path(out), needed_bytes=3 * tensor_bytes(model))
    report = Report(
        record.method,
        None,
        None,
        record.seed,
        model=name or type(model).__name__,
        options=record.options,
        size_float=None if float_model is None else tensor_bytes(float_model),
        training=training,
        metric=as_task(task).metric_name,
        notes=[*record.table.notes, *notes],
    )
    rival = float_model if compare else None
    report = _measured(report, record, model, inputs, data, rival, test, as_task(task), reference, progress)
    problems: list[str] = []
    done: set[str] = set()
    for file, wanted in zip(FILES, (packed, onnx), strict=True):
        if not wanted:
            continue
        progress.say(f"writing {file} and comparing it with the network")
        try:
            written = export(model, out / file, sample=inputs)
        except (GraphError, ParityError, MissingExtraError) as error:
            problems.append(f"{file}: {error}")
        else:
            report = _with_export(report, file, written)
            done.add(file)
    stale = [file for file in FILES if file not in done and (out / file).exists()]
    report = dataclasses.replace(
        report,
        notes=[
            *report.notes,
            *(f"{file} in {out} is not of this run: an earlier one left it" for file in stale),
            *(f"not written: {problem}" for problem in problems),
        ],
    )
    write_text(out / "policy.yaml", str(record.policy))
    write_html(report, out / "report.html", histograms=weight_histograms(model, reference))
    write_json(report, out / "report.json")
    return Delivery(report, out, problems)


def _measured(
    report: Report,
    record: QuantizationRecord,
    model: nn.Module,
    sample: Inputs,
    calibration: Calibration | None,
    rival: nn.Module | None,
    test_data: Iterable[object] | None,
    task: Task,
    reference: nn.Module | None,
    progress: Progress,
) -> Report:
    """``report`` with what the network's layers, answers and metrics are; ``rival`` is the float network to compare with."""
    layers = layer_results(model, sample=sample)
    report = dataclasses.replace(
        report,
        layers=layers,
        weight_bits=common_bits(record.policy.default.weight, (layer.weight_bits for layer in layers)),
        activation_bits=common_bits(record.policy.default.activation, (layer.activation_bits for layer in layers)),
    )
    if calibration is None:
        return dataclasses.replace(report, notes=[*report.notes, "there was no data, so what it cost was not measured"])
    noise = layer_noise(model, Calibration.of(calibration, limit=LAYER_SAMPLES), reference=reference, progress=progress)
    report = dataclasses.replace(report, layers=layer_results(model, sample=sample, noise=noise))
    if rival is not None:
        agreement = measure_agreement(rival, model, calibration if test_data is None else test_data, progress=progress)
        report = dataclasses.replace(
            report, agreement=agreement.top1, sqnr_db=agreement.sqnr_db, kl=agreement.kl, max_abs_error=agreement.max_abs_error
        )
    if test_data is None:
        return report
    after = evaluate(model, test_data, task=task, progress=progress)
    before = {} if rival is None else evaluate(rival, test_data, task=task, progress=progress).metrics
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
    parity = ParityResult(
        written.parity.max_abs_error,
        written.parity.top1_agreement,
        written.parity.passed,
        written.parity.samples,
        None if math.isinf(written.parity.sqnr_db) else written.parity.sqnr_db,
    )
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
