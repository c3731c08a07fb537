"""A training run on disk: enough to resume bit for bit after a kill at any moment.

``last.safetensors`` is the whole run, ``best.safetensors`` the network that did best on the test data. Each is one file of tensors
with JSON in its header, replaced only by a complete one; nothing is unpickled.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from lowbit.errors import FileFormatError, OutputError
from lowbit.files import read_tensors, write_tensors
from lowbit.qat.engine.constants import Constants
from lowbit.qat.engine.curve import Curve, EpochResult
from lowbit.qat.engine.snapshot import Restoration, Snapshot
from lowbit.qat.run import TrainRun

FORMAT_VERSION = 2
LAST, BEST = "last", "best"


@dataclass
class RunState:
    """State of a run beyond its ``TrainRun``.

    Attributes:
        curve: Results of the epochs that are finished.
        loss_sum, loss_count: Sum and number of the batch losses of the current epoch.
        seconds: Training time so far.
        average: Averages of the weights by name, or none.
        scaler: State of the gradient scaler, or none.
        best: Epoch of the best network so far, and its metric.
        is_done: Whether training has finished.
    """

    curve: Curve
    loss_sum: float = 0.0
    loss_count: int = 0
    seconds: float = 0.0
    average: dict[str, Tensor] | None = None
    scaler: dict[str, float] | None = None
    best: tuple[int, float] | None = None
    is_done: bool = False


class Checkpoints:
    """The checkpoints in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._constants = Constants()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(".*.safetensors"):
                left.unlink()  # half a file of a run that was killed while it wrote
        except OSError as error:
            raise OutputError(f"cannot use the folder {folder} for checkpoints: {error.strerror}. Name another folder.") from error

    def has(self, name: str) -> bool:
        """Whether there is a checkpoint called ``name``."""
        return self._path(name).is_file()

    def check(self, run: TrainRun) -> None:
        """Look at a new run before hours are spent on it.

        Raises:
            StateError: It holds something that cannot be saved.
        """
        snapshot = Snapshot(run.not_saved(), self._constants)
        for name, value in run.objects().items():
            snapshot.take(value, name)

    def save(self, run: TrainRun, state: RunState, random_states: Sequence[Tensor]) -> None:
        """Keep the whole run; ``random_states`` are those of torch in every process.

        Raises:
            OutputError: It cannot be written; the checkpoint before it is still there.
            StateError: It holds something that cannot be saved.
        """
        snapshot = Snapshot(run.not_saved(), self._constants)
        facts: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "position": {"phase_index": run.phase_index, "epoch": run.epoch, "step": run.step},
            "state": {**{key: value for key, value in vars(state).items() if key != "average"}, "curve": [asdict(r) for r in state.curve]},
            "has_average": state.average is not None,
            "python_random": _plain(random.getstate()),
            "objects": {name: snapshot.take(value, name) for name, value in run.objects().items()},
            "optimizers": [snapshot.take(optimizer, f"optimizer.{i}") for i, optimizer in enumerate(run.optimizers)],
        }
        tensors = {
            **snapshot.tensors,
            **{f"average.{name}": tensor for name, tensor in (state.average or {}).items()},
            **{f"random.{rank}": value for rank, value in enumerate(random_states)},
        }
        if torch.cuda.is_initialized():
            tensors |= {f"random.cuda.{index}": value for index, value in enumerate(torch.cuda.get_rng_state_all())}
        write_tensors(self._path(LAST), tensors, facts)

    def load(self, run: TrainRun, rank: int = 0) -> RunState:
        """Bring a new run of the same settings, and torch's random numbers, to where the saved one stood.

        Raises:
            FileFormatError: The file is damaged, of another version of lowbit, or of another network.
        """
        tensors, facts = self._read(LAST)
        try:
            return self._put(run, rank, tensors, facts)
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise FileFormatError(f"{self._path(LAST)} does not fit this run ({error}). Start over with resume=False.") from error

    def _put(self, run: TrainRun, rank: int, tensors: dict[str, Tensor], facts: dict[str, Any]) -> RunState:
        # twice: what a method does to a network's structure at the start of a phase may depend on its state, and changes it
        lenient = Restoration(tensors, strict=False)
        self._put_objects(run, facts, lenient)
        run.return_to(**facts["position"])
        restoration = Restoration(tensors)
        self._put_objects(run, facts, restoration)
        run.set_trainable()
        if len(run.optimizers) != len(facts["optimizers"]):
            raise FileFormatError(
                f"{self._path(LAST)} holds {len(facts['optimizers'])} optimizers, the phase {run.phase.name!r} has {len(run.optimizers)}. "
                "Start over with resume=False."
            )
        for index, (optimizer, tree) in enumerate(zip(run.optimizers, facts["optimizers"], strict=True)):
            restoration.put(tree, optimizer, f"optimizer.{index}")
        random.setstate(_tuples(facts["python_random"]))
        torch.set_rng_state(tensors[f"random.{rank}"])
        if torch.cuda.is_initialized() and "random.cuda.0" in tensors:
            count = min(torch.cuda.device_count(), sum(name.startswith("random.cuda.") for name in tensors))
            torch.cuda.set_rng_state_all([tensors[f"random.cuda.{index}"] for index in range(count)])
        saved = facts["state"]
        average = {name.removeprefix("average."): t for name, t in tensors.items() if name.startswith("average.")}
        return RunState(
            **{
                **saved,
                "curve": [EpochResult(**result) for result in saved["curve"]],
                "best": None if saved["best"] is None else tuple(saved["best"]),
                "average": average if facts["has_average"] else None,
            }
        )

    @staticmethod
    def _put_objects(run: TrainRun, facts: dict[str, Any], restoration: Restoration) -> None:
        objects = run.objects()
        if set(objects) != set(facts["objects"]):
            raise FileFormatError(
                f"the saved run has {', '.join(facts['objects'])}, this one {', '.join(objects)}. Start over with resume=False."
            )
        for name, value in objects.items():
            restoration.put(facts["objects"][name], value, name)

    def save_model(self, name: str, model: nn.Module, facts: dict[str, object]) -> None:
        """Keep the network alone."""
        snapshot = Snapshot()
        tree = snapshot.take(model, "model")
        write_tensors(self._path(name), snapshot.tensors, {"version": FORMAT_VERSION, "model": tree, **facts})

    def load_model(self, name: str, model: nn.Module) -> dict[str, Any]:
        """Put what ``save_model`` kept into a network of the same kind; gives the facts beside it."""
        tensors, facts = self._read(name)
        Restoration(tensors).put(facts["model"], model, "model")
        return facts

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, content = read_tensors(self._path(name))
        facts = cast(dict[str, Any], content if isinstance(content, dict) else {})
        if facts.get("version") != FORMAT_VERSION:
            raise FileFormatError(f"{self._path(name)} is of another version of lowbit. Start over with resume=False.")
        return tensors, facts

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def _plain(value: object) -> object:
    return [_plain(entry) for entry in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value
