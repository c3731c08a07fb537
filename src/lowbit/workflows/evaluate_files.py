"""Accuracy and speed of a float network and of files made from it; the work of ``lowbit evaluate``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.errors import FileFormatError
from lowbit.files import write_text
from lowbit.formats.onnx.sessions import load_onnx, onnx_provenance
from lowbit.inputs import Inputs
from lowbit.measure import measure_agreement, measure_latency
from lowbit.network.bits import set_bits, switches_of
from lowbit.progress import Progress
from lowbit.qat.task import Meter, Scores, Task
from lowbit.report.json_text import to_json
from lowbit.spec import switch_name
from lowbit.workflows.deliver import FILES
from lowbit.workflows.evaluate import evaluate, measured_batches
from lowbit.workflows.fit import count_outputs, doubtful
from lowbit.workflows.load import load
from lowbit.workflows.origin import common_origin
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.requests import EvaluateRequest
from lowbit.workflows.settings import SampleSettings
from lowbit.workflows.source import Source, is_network_named, open_source


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate_files`` found.

    Attributes:
        source: The float network and the data.
        task: What the network is for.
        results: Figures of ``float`` and of each file, by name (``model.lowbit at 4/4`` where it holds several widths); no ``float`` where
            training started from random weights.
        path: The file with the figures, where one was asked for.
        notes: What the user should know.
    """

    source: Source
    task: Task
    results: dict[str, dict[str, object]]
    path: Path | None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """The content of ``evaluation.json``: the figures of each network by its name, and the ``notes``."""
        return {**self.results, "notes": list(self.notes)}


class OnnxModule(nn.Module):
    """An ONNX file as a module: tensors in, a dictionary of tensors out."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        self._network = load_onnx(path, threads=threads)
        self.lowbit_inputs = self._network.input_names
        self.provenance = onnx_provenance(path)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        return self._network(Inputs(args, kwargs))


def evaluate_files(request: EvaluateRequest, *, progress: Progress | None = None) -> Evaluation:
    """Measure the metrics, size and time of the float network and of exported files, and how closely these follow it.

    Raises:
        LowbitError: Something cannot be found, read or written.
    """
    progress = progress or Progress.silent()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    files = [] if request.target is None else exported_files(Path(request.target))
    networks = {path: load(path) if path.suffix == ".lowbit" else OnnxModule(path, request.threads or 1) for path in files}
    origin = common_origin({str(path): network.provenance for path, network in networks.items()}) if networks else None
    samples, opened = SampleSettings(calibration_samples=request.samples, batch_size=request.batch_size), None
    if origin is not None:
        request = origin.with_task(request)
        if origin.has_no_float_network and not is_network_named(request):
            opened = origin.place, next(iter(networks.values()))
    missing = "name some with data=: a labelled folder, or a name from 'lowbit data list'"
    if origin is None:
        source = open_source(request, samples, device=request.device, seed=request.seed, missing=missing)
    else:
        source = origin.open(request, samples, device=request.device, seed=request.seed, missing=missing, opened=opened)
    task = source.task
    out = None if request.out is None else prepare_folder(Path(request.out), needed_bytes=1_000_000)
    compared = source.calibration if source.test is None else source.test
    assert compared is not None  # without any data there is no source
    one = source.sample.take(0, 1)
    found: dict[str, dict[str, object]] = {}
    scores: dict[str, Scores | None] = {}
    if opened is None:
        scores["float"], each = _scores(source.model, source.test, task, progress)
        found["float"] = {
            **_metrics(scores["float"]),
            **each,
            "latency_ms": measure_latency(source.model, one).median_ms,
            "runtime": "torch",
        }
    for path, name, network in _each_width(networks):
        agreement = None if opened is not None else measure_agreement(source.model, network, compared, progress=progress)
        scores[name], each = _scores(network, source.test, task, progress)
        found[name] = {
            **_metrics(scores[name]),
            **each,
            "agreement": agreement.top1 if agreement is not None and task.has_classes else None,
            "sqnr_db": None if agreement is None else agreement.sqnr_db,
            "size_bytes": path.stat().st_size,
            "latency_ms": measure_latency(network, one).median_ms,
            "runtime": "torch, codes decoded to float" if path.suffix == ".lowbit" else "ONNX Runtime",
        }
    notes = (*source.notes, *doubtful(task, scores, count_outputs(source.model, source.sample)))
    evaluation = Evaluation(source, task, found, None if out is None else out / "evaluation.json", notes)
    if evaluation.path is not None:
        write_text(evaluation.path, to_json(evaluation.to_dict()) + "\n")
    return evaluation


def _each_width(networks: Mapping[Path, nn.Module]) -> Iterator[tuple[Path, str, nn.Module]]:
    """Every network under the name of its file; those of several widths at each of them in turn, which the name says."""
    for path, network in networks.items():
        switches = switches_of(network)
        for switch in switches:
            set_bits(network, switch)
            yield path, f"{path.name} at {switch_name(switch)}", network
        if not switches:
            yield path, path.name, network


def exported_files(target: Path) -> list[Path]:
    """The files that ``target`` names: itself, or those that ``lowbit quantize`` wrote into it.

    Raises:
        FileFormatError: There is no such file, or it is neither .lowbit nor .onnx.
    """
    if target.is_dir():
        files = [target / name for name in FILES if (target / name).is_file()]
        if not files:
            raise FileFormatError(
                f"{target}: there is neither {' nor '.join(FILES)} in this folder. Name a folder that 'lowbit quantize' wrote."
            )
        return files
    if not target.is_file():
        raise FileFormatError(f"{target}: there is no such file or folder")
    if target.suffix not in (".lowbit", ".onnx"):
        raise FileFormatError(f"{target}: expected a .lowbit or .onnx file, got {target.suffix or 'no suffix'}")
    return [target]


def _scores(
    network: nn.Module, test: Iterable[object] | None, task: Task, progress: Progress
) -> tuple[Scores | None, dict[str, list[dict[str, object]]]]:
    """The metrics of all samples, and where these go by names, ``pictures`` with those of each."""
    if test is None:
        return None, {}
    names = getattr(getattr(test, "dataset", None), "names", None)
    if names is None:
        return evaluate(network, test, task=task, progress=progress), {}
    meter, rows = Meter(task), []
    for name, part in zip(names, measured_batches(network, test, task, progress), strict=True):
        meter.merge(part.sums, part.samples)
        rows.append({"picture": name, **part.scores().metrics})
    return meter.scores(), {"pictures": rows}


def _metrics(scores: Scores | None) -> dict[str, object]:
    """The metrics by name; none without labelled data."""
    return {"metrics": {}, "samples": 0} if scores is None else {"metrics": dict(scores.metrics), "samples": scores.samples}
