"""``lowbit evaluate``: how right and how fast a network or an exported file is."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, cast

import typer
from torch import Tensor, nn

from lowbit.cli import options as shared
from lowbit.cli.console import say, show_table
from lowbit.cli.output import prepare_folder
from lowbit.cli.source import open_source
from lowbit.cli.workflow import FILES
from lowbit.errors import FileFormatError
from lowbit.files import write_text
from lowbit.formats.onnx.sessions import load_onnx
from lowbit.inputs import Inputs
from lowbit.measure import measure_agreement, measure_latency
from lowbit.progress import Progress
from lowbit.qat.task import Task
from lowbit.qat.tasks import Classification
from lowbit.report.results import to_json
from lowbit.report.words import bytes_word, db_word, percent_word
from lowbit.workflows.evaluate import evaluate as measure
from lowbit.workflows.load import load


class OnnxModule(nn.Module):
    """An ONNX file as a module: tensors in, a dictionary of tensors out."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__()
        self._network = load_onnx(path, threads=threads)
        self.lowbit_inputs = self._network.input_names

    def forward(self, *args: Tensor, **kwargs: Tensor) -> dict[str, Tensor]:
        return self._network(Inputs(args, kwargs))


def evaluate(
    target: Annotated[
        Path | None,
        typer.Argument(
            help="A .lowbit or .onnx file, or a folder that 'lowbit quantize' wrote. Default: the float network alone.", show_default=False
        ),
    ] = None,
    model: shared.Model = None,
    model_option: shared.ModelOption = None,
    weights: shared.Weights = None,
    data: shared.Data = None,
    preprocess: shared.Preprocess = None,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Samples to compare on where there are no labels, at most.")] = 256,
    seed: shared.Seed = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for evaluation.json. Default: only print.", show_default=False)] = None,
    batch_size: shared.BatchSize = 32,
    device: shared.Device = "cpu",
    threads: shared.Threads = None,
    quiet: shared.Quiet = False,
) -> None:
    """Measure the metrics, size and time of the float network and of exported files, and how closely these follow it."""
    shared.set_threads(threads)
    files = [] if target is None else exported_files(target)
    source = open_source(
        model,
        weights,
        data,
        None,
        samples,
        model_options=model_option,
        preprocess=preprocess,
        batch_size=batch_size,
        device=device,
        seed=seed,
        missing="name some with --data: a labelled folder, or a name from 'lowbit data list'",
    )
    if out is not None:
        prepare_folder(out, needed_bytes=1_000_000)
    progress = Progress(quiet=quiet)
    compared = source.calibration if source.test is None else source.test
    one, task = source.sample.take(0, 1), Classification()
    found: dict[str, dict[str, object]] = {
        "float": {
            **_metrics(source.model, source.test, task, progress),
            "latency_ms": measure_latency(source.model, one).median_ms,
            "runtime": "torch",
        }
    }
    for path in files:
        network = load(path) if path.suffix == ".lowbit" else OnnxModule(path, threads or 1)
        agreement = measure_agreement(source.model, network, compared, progress=progress)
        found[path.name] = {
            **_metrics(network, source.test, task, progress),
            "agreement": agreement.top1,
            "sqnr_db": agreement.sqnr_db,
            "size_bytes": path.stat().st_size,
            "latency_ms": measure_latency(network, one).median_ms,
            "runtime": "torch, codes decoded to float" if path.suffix == ".lowbit" else "ONNX Runtime",
        }
    if not quiet:
        names = list(cast(dict[str, float], found["float"]["metrics"]))
        say(f"{source.name} on {source.test_name or 'unlabelled samples'}")
        show_table(
            ("", *names, "same answer", "output SQNR", "size", "time, 1 sample", "run by"),
            [(name, *(task.describe(n, entry["metrics"][n]) for n in names), *_words(entry)) for name, entry in found.items()],  # type: ignore[index]
        )
    if out is not None:
        path = out / "evaluation.json"
        write_text(path, to_json(found) + "\n")
        say(f"evaluation: {path}")


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


def _metrics(network: nn.Module, test: Iterable[object] | None, task: Task, progress: Progress) -> dict[str, object]:
    """The metrics by name; none without labelled data."""
    if test is None:
        return {"metrics": {}, "samples": 0}
    scores = measure(network, test, task=task, progress=progress)
    return {"metrics": dict(scores.metrics), "samples": scores.samples}


def _words(entry: dict[str, object]) -> tuple[str, ...]:
    def number(name: str) -> float | None:
        value = entry.get(name)
        return float(value) if isinstance(value, (int, float)) else None

    return (
        percent_word(number("agreement")),
        db_word(number("sqnr_db")),
        bytes_word(number("size_bytes")),
        f"{number('latency_ms'):.2f} ms",
        str(entry["runtime"]),
    )
