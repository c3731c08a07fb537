"""The learning curve, and where it is written: a table, TensorBoard, and a record of the whole training."""

from __future__ import annotations

import csv
import io
import json
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowbit.files import write_text
from lowbit.qat.task import Task

PACKAGES = ("lowbit", "torch", "numpy", "safetensors", "lightning-fabric")


@dataclass(frozen=True)
class EpochResult:
    """One epoch.

    Attributes:
        epoch: Its number over all phases, from 1.
        phase: The name of its phase.
        step: Optimizer steps up to its end.
        loss: Mean training loss.
        metrics: The task's metrics on the test data after the epoch, by name; empty without test data.
        learning_rate: Learning rate of the weights in its last step.
        seconds: Training time up to its end, evaluation included.
        samples_per_second: In its training.
    """

    epoch: int
    phase: str
    step: int
    loss: float
    metrics: Mapping[str, float]
    learning_rate: float
    seconds: float
    samples_per_second: float


Curve = list[EpochResult]


class TrainingLog:
    """Writes ``train.json``, ``train.csv`` and, where it is installed, TensorBoard's files into a folder.

    Args:
        folder: Folder to write to.
        settings: Everything the training was started with, for ``train.json``.
        tensorboard: Whether to write files for TensorBoard; ``None`` where it is installed.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object], *, tensorboard: bool | None = None) -> None:
        self._folder, self._settings = folder, settings
        self._make_writer = _tensorboard(required=bool(tensorboard)) if tensorboard is not False else None
        self._writer: Any = None

    def start(self, step: int) -> None:
        """A run starts, or resumes after ``step`` steps; TensorBoard's entries of later steps are replaced."""
        if self._make_writer is not None:
            self._writer = self._make_writer(str(self._folder / "tensorboard"), purge_step=step + 1 if step else None)

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def epoch(self, curve: Sequence[EpochResult], task: Task, *, is_done: bool = False) -> None:
        """An epoch has ended; ``curve`` holds all of them."""
        if curve and not is_done:
            last = curve[-1]
            self.step(last.step, {"epoch/loss": last.loss, **{f"epoch/{name}": value for name, value in last.metrics.items()}})
            if self._writer is not None:
                self._writer.flush()
        write_text(self._folder / "train.csv", _table(curve))
        content = {
            "settings": self._settings,
            "versions": versions(),
            "metric": task.metric_name,
            "higher_is_better": task.higher_is_better,
            "units": dict(task.units),
            "is_done": is_done,
            "curve": [_finite(asdict(result)) for result in curve],
        }
        write_text(self._folder / "train.json", json.dumps(content, indent=1, default=str) + "\n")

    def close(self) -> None:
        """No more is written."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Of the packages that a result depends on, and of Python; ``None`` where one is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _table(curve: Sequence[EpochResult]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    metrics = list(dict.fromkeys(name for result in curve for name in result.metrics))
    plain = [field.name for field in fields(EpochResult) if field.name != "metrics"]
    writer.writerow([*plain, *metrics])
    writer.writerows([*(getattr(result, name) for name in plain), *(result.metrics.get(name) for name in metrics)] for result in curve)
    return text.getvalue()


def _finite(value: Any) -> Any:
    """With ``None`` for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: _finite(entry) for name, entry in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _tensorboard(*, required: bool) -> Callable[..., object] | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        if not required:
            return None
        from lowbit.errors import missing_extra

        raise missing_extra("tensorboard", "train", "a log for TensorBoard") from error
    writer: Callable[..., object] = SummaryWriter
    return writer
