"""``lowbit.deliver``: a quantized network measured, written to files that are checked and timed, and reported."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from lowbit.errors import GraphError, MissingExtraError, ParityError, SpecError
from lowbit.files import write_text
from lowbit.formats.packed.file import file_parts
from lowbit.inputs import Calibration, Inputs, map_tensors
from lowbit.measure import layer_noise, measure_agreement, tensor_bytes
from lowbit.measure.layer_noise import has_same_layers
from lowbit.measure.outputs import device_of
from lowbit.network.batch import calibration_for
from lowbit.network.layers import evaluating
from lowbit.network.record import QuantizationRecord, record_of
from lowbit.progress import Progress
from lowbit.provenance import Provenance, class_names_of, provenance_of
from lowbit.qat.engine.batches import evaluation_batches
from lowbit.qat.task import Criterion, Task
from lowbit.qat.tasks import as_task
from lowbit.report.facts import run_facts
from lowbit.report.histograms import activation_histograms, weight_histograms
from lowbit.report.html import write_html
from lowbit.report.pictures import Disagreement, Disagreements, PictureRow
from lowbit.report.results import LayerResult, MetricResult, ParityResult, Report, StoredPart, write_json
from lowbit.report.summary import layer_results, other_results
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.export import ExportReport, export
from lowbit.workflows.fit import count_outputs, doubtful
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.switches import measure_selection, measure_switches

FILES = ("model.lowbit", "model.onnx")
LAYER_SAMPLES = 64  # samples for the noise of each layer
RANGE_SAMPLES = 32  # samples for the ranges of activations
EXAMPLES = 4  # samples that the report shows
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
    """Names of the files that ``deliver`` writes."""
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
    task: Task | Criterion | str | None = None,
    training: Mapping[str, object] | None = None,
    notes: Sequence[str] = (),
    provenance: Provenance | None = None,
    data_names: Mapping[str, str] | None = None,
    started: float | None = None,
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
        reference: A float network that ``model`` follows layer by layer, its batch norms folded as in ``model``. Default: ``float_model`` where it
            has the same layers, else ``model`` with its quantizers off; the report says which.
        name: What the report calls the network. Default: its class.
        packed: Whether to write ``model.lowbit``.
        onnx: Whether to write ``model.onnx``.
        compare: False where ``float_model`` is not trained, so that only its size is worth comparing.
        task: What the network is for, see ``lowbit.train``. Default: classification.
        training: What ``Report.training`` holds.
        notes: More notes for the report.
        provenance: Where the network comes from, which the report and the files keep. Default: what the network carries, with the
            classes of the data (its ``classes``, as data sets of torchvision have them) and the task.
        data_names: What the report calls each data set, by what it was used for: ``{"calibration": "photos/"}``.
        started: When the run began, as returned by ``time.time``. Default: now.
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
    progress, started = progress or Progress.silent(), time.time() if started is None else started
    record = record_of(model)
    if record is None:
        raise SpecError(f"{type(model).__name__} is not quantized: deliver what lowbit.quantize or lowbit.train returns.")
    if calibration is None and sample is None:
        raise SpecError("deliver needs samples to check files with: pass calibration= or sample=.")
    data = None if calibration is None else calibration_for(model, calibration)
    test = None if test_data is None else evaluation_batches(test_data, TEST_BATCH)
    inputs = Inputs.of(sample, model) if sample is not None else data.sample  # type: ignore[union-attr]
    out = prepare_folder(Path(out), needed_bytes=3 * tensor_bytes(model))
    provenance = provenance or _described(model, (test_data, calibration), as_task(task))
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
        provenance=provenance.to_json(),
    )
    rival = float_model if compare else None
    original = layer_reference(model, reference, rival, is_trained=training is not None)
    report = _measured(report, record, model, inputs, data, original, progress)
    report, pictures = _compared(report, model, data, rival, test, as_task(task), progress)
    problems: list[str] = []
    done: set[str] = set()
    single_bytes: tuple[int, ...] = ()
    for file, wanted in zip(FILES, (packed, onnx), strict=True):
        if not wanted:
            continue
        progress.say(f"writing {file} and comparing it with the network")
        try:
            written = export(model, out / file, sample=inputs, provenance=provenance, dynamic=as_task(task).open_dimensions)
        except (GraphError, ParityError, MissingExtraError) as error:
            problems.append(f"{file}: {error}")
        else:
            report = _with_export(report, file, written)
            single_bytes = written.widths.single_bytes if written.widths is not None else single_bytes
            done.add(file)
    if len(record.switches) > 1:
        progress.say("measuring each width")
        packed_file = out / FILES[0] if FILES[0] in done else None
        switches = measure_switches(model, inputs, test, as_task(task), packed_file, single_bytes, progress)
        selection = None if test is None else measure_selection(model, test, as_task(task), progress)
        report = dataclasses.replace(
            report,
            switches=switches,
            selection=None if isinstance(selection, str) else selection,
            notes=[*report.notes, *([selection] if isinstance(selection, str) else [])],
        )
    stale = [file for file in FILES if file not in done and (out / file).exists()]
    report = dataclasses.replace(
        report,
        notes=[
            *report.notes,
            *(f"{file} in {out} is not of this run: an earlier one left it" for file in stale),
            *(f"not written: {problem}" for problem in problems),
        ],
    )
    activations = [] if data is None else activation_histograms(model, Calibration.of(data, limit=RANGE_SAMPLES))
    report = dataclasses.replace(
        report, activations=[histogram.result for histogram in activations], run=run_facts(started, data_names or {})
    )
    write_text(out / "policy.yaml", str(record.policy))
    weights = weight_histograms(model, reference)
    examples = [] if test is None else _examples(model, rival, test, as_task(task))
    write_html(report, out / "report.html", histograms=weights, activations=activations, pictures=pictures, examples=examples)
    write_json(report, out / "report.json")
    return Delivery(report, out, problems)


@dataclass(frozen=True)
class LayerReference:
    """The network that the noise of layers is measured against.

    Attributes:
        network: A float network with the same layers; ``None`` for the quantized one with its quantizers off.
        words: Its description in the report.
    """

    network: nn.Module | None
    words: str


def layer_reference(model: nn.Module, reference: nn.Module | None, float_model: nn.Module | None, *, is_trained: bool) -> LayerReference:
    """``reference`` where there is one, else ``float_model`` where it has the layers of ``model``, else ``model`` without its quantizers."""
    if reference is not None:
        return LayerReference(reference, "the float network")
    if float_model is not None and has_same_layers(model, float_model):
        return LayerReference(float_model, "the float network that training started from" if is_trained else "the float network")
    return LayerReference(None, f"the {'trained' if is_trained else 'same'} network with its quantizers off")


def _described(model: nn.Module, data: Iterable[object], task: Task) -> Provenance:
    """The network's provenance, completed from the data and the task."""
    known = provenance_of(model) or Provenance()
    names = known.classes or next(filter(None, map(class_names_of, data)), ())
    return dataclasses.replace(known, classes=names, task=known.task or type(task).__qualname__)


def _measured(
    report: Report,
    record: QuantizationRecord,
    model: nn.Module,
    sample: Inputs,
    calibration: Calibration | None,
    original: LayerReference,
    progress: Progress,
) -> Report:
    """``report`` with the network's layers and their noise."""
    layers = layer_results(model, sample=sample)
    report = dataclasses.replace(
        report,
        layers=layers,
        others=other_results(model),
        weight_bits=common_bits(record.policy.default.weight, (layer.weight_bits for layer in layers)),
        activation_bits=common_bits(record.policy.default.activation, (layer.activation_bits for layer in layers)),
    )
    if calibration is None:
        return dataclasses.replace(report, notes=[*report.notes, "there was no data, so what it cost was not measured"])
    noise = layer_noise(model, Calibration.of(calibration, limit=LAYER_SAMPLES), reference=original.network, progress=progress)
    return dataclasses.replace(report, layers=layer_results(model, sample=sample, noise=noise), noise_reference=original.words)


def _compared(
    report: Report,
    model: nn.Module,
    calibration: Calibration | None,
    rival: nn.Module | None,
    test_data: Iterable[object] | None,
    task: Task,
    progress: Progress,
) -> tuple[Report, list[Disagreement]]:
    """``report`` with agreement and metrics, and the pictures that ``rival``, the float network, classifies differently."""
    pictures: list[Disagreement] = []
    if rival is not None and calibration is not None:
        seen = Disagreements(calibration if test_data is None else test_data)
        watch = seen.watch if task.has_classes else None
        agreement = measure_agreement(rival, model, seen, watch=watch, progress=progress)
        pictures = seen.found() if task.has_classes else []
        report = dataclasses.replace(
            report,
            agreement=agreement.top1 if task.has_classes else None,
            sqnr_db=agreement.sqnr_db,
            kl=agreement.kl if task.has_classes else None,
            max_abs_error=agreement.max_abs_error,
            disagreements=[picture.facts for picture in pictures],
        )
    if test_data is None or calibration is None:
        return report, pictures
    after = evaluate(model, test_data, task=task, progress=progress)
    before = None if rival is None else evaluate(rival, test_data, task=task, progress=progress)
    doubts = doubtful(task, {"the float network": before, "the quantized network": after}, count_outputs(model, calibration.sample))
    metrics = {
        name: MetricResult(
            None if before is None else before.metrics.get(name), value, task.units.get(name, ""), task.meanings.get(name, "")
        )
        for name, value in after.metrics.items()
    }
    return dataclasses.replace(report, metrics=metrics, samples=after.samples, notes=[*report.notes, *doubts]), pictures


def _examples(model: nn.Module, rival: nn.Module | None, test: Iterable[object], task: Task) -> list[PictureRow]:
    """What the task shows of the first test samples."""
    rows: list[PictureRow] = []
    if type(task).examples is Task.examples:
        return rows

    def output(network: nn.Module, batch: object) -> object:
        place = device_of(network)
        with evaluating(network):
            return task.predict(network, map_tensors(batch, lambda tensor: tensor.to(place)))

    for batch in itertools.islice(test, EXAMPLES):
        found = task.examples(batch, output(model, batch), None if rival is None else output(rival, batch))
        rows += [PictureRow.of(example.words, example.pictures) for example in found]
    return rows[:EXAMPLES]


def common_bits(default: int | None, layers: Iterable[int | None]) -> int | None:
    """The default of a policy; where that is float, the bits that all quantized layers share, if they do."""
    found = {bits for bits in layers if bits is not None}
    return found.pop() if default is None and len(found) == 1 else default


def stored_parts(path: Path, layers: Sequence[LayerResult]) -> list[StoredPart]:
    """The parts of a packed file, each with the bytes of the same tensors in float32."""
    floats = {layer.name: layer.float_bytes for layer in layers}
    return [
        StoredPart(
            part.name,
            part.code_bytes,
            part.table_bytes,
            part.float_bytes,
            part.header_bytes,
            floats.get(part.name, part.float_bytes or None),
        )
        for part in file_parts(path)
    ]


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
        parts = stored_parts(written.path, report.layers)
        sizes = {part.name: part.total_bytes for part in parts}
        layers = [dataclasses.replace(layer, stored_bytes=sizes.get(layer.name, 0)) for layer in report.layers]
        return dataclasses.replace(report, size_packed=written.size_bytes, parity_packed=parity, stored=parts, layers=layers)
    report = dataclasses.replace(report, size_onnx=written.size_bytes, parity_onnx=parity)
    if written.speed is None:
        return report
    return dataclasses.replace(
        report,
        latency_float_onnx=written.speed.float_ms,
        latency_quantized_onnx=written.speed.quantized_ms,
        latency_setting=written.speed.setting,
    )
