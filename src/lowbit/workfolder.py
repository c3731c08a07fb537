"""The folder in which a long run keeps the state to resume from, tied to its exact settings and locked while it works."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from lowbit.errors import DataError, OutputError, SpecError
from lowbit.files import write_text
from lowbit.reading import read_json

_SETTINGS, _DONE, _FACTS = "run.json", "done", "provenance"
LOCK = ".lock"


class WorkFolder:
    """State of a run at ``path``.

    Attributes:
        is_resumed: Whether an earlier run with the same settings left state to resume from.
    """

    def __init__(self, path: Path, *, is_resumed: bool) -> None:
        self.path, self.is_resumed = path, is_resumed

    def remove(self) -> None:
        """Delete the state; the run is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_useless(self) -> None:
        """Delete the state if it contains nothing to resume from."""
        if not _has_state(self.path):
            self.remove()

    def mark_done(self) -> None:
        """The run is done; its state stays, and a run with other settings may replace it."""
        write_text(self.path / _DONE, "")


def open_work_folder(path: Path, settings: Mapping[str, object], *, resume: bool, facts: Mapping[str, object] | None = None) -> WorkFolder:
    """The folder for the run with ``settings``.

    State of a run with the same settings is kept when ``resume``, state of a finished run with others is deleted. Files of tensors
    (``.safetensors``) and of measurements (``.json``) are state; caches are not.

    Args:
        path: The folder.
        settings: Everything that the run's result depends on.
        resume: False deletes whatever is there.
        facts: What ``unfinished_facts`` returns while the run is not done; they may differ in a run that resumes it.

    Raises:
        SpecError: There is state of an unfinished run with other settings, which only ``resume=False`` deletes.
    """
    settings = json.loads(json.dumps(settings, default=str))
    record = path / _SETTINGS
    earlier = _settings_of(record)
    earlier.pop(_FACTS, None)
    if resume and record.is_file() and earlier == settings:
        return WorkFolder(path, is_resumed=True)
    if resume and _has_state(path) and not (path / _DONE).exists():
        raise SpecError(
            f"{path.parent} holds a stopped run with other settings ({_difference(earlier, settings)}). "
            "Resume it with those settings, start over with resume=False, which deletes its state, or name another folder."
        )
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    write_text(record, json.dumps({**settings, **({} if facts is None else {_FACTS: facts})}, sort_keys=True, indent=1, default=str))
    return WorkFolder(path, is_resumed=False)


def unfinished_facts(path: Path, kind: str) -> object:
    """The facts of the stopped run of that kind whose state is in the folder; ``None`` where there is none."""
    found = _settings_of(path / _SETTINGS)
    is_unfinished = found.get("kind") == kind and not (path / _DONE).exists() and _has_state(path)
    return found.get(_FACTS) if is_unfinished else None


def _has_state(path: Path) -> bool:
    """Whether a folder holds anything to resume from: tensors, or what was measured, as JSON."""
    return any(file.suffix == ".safetensors" or (file.suffix == ".json" and file.name != _SETTINGS) for file in path.rglob("*"))


def _settings_of(record: Path) -> dict[str, object]:
    try:
        settings = read_json(record)
    except DataError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _difference(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """The first settings that differ, as ``name: before, now it is this``."""
    first, second = _flat(before), _flat(now)
    names = [name for name in {**first, **second} if first.get(name) != second.get(name)]
    shown = [f"{name}: {first.get(name)}, now {second.get(name)}" for name in names[:3]]
    return "; ".join([*shown, *(["..."] if len(names) > 3 else [])])


def _flat(settings: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in settings.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else {f"{prefix}{name}": value}
    return found


@contextlib.contextmanager
def exclusive_run(folder: Path) -> Iterator[None]:
    """Within the context no other run may work in ``folder``. The lock of a process that was killed is taken over.

    Raises:
        OutputError: Another run works there, or the folder cannot be written to.
    """
    path = folder / LOCK
    lock = FileLock(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"{folder}: another run is working in this folder. Wait for it, stop it, or name another folder.") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot write there ({error.strerror}). Name another folder.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows deletes it on release
            path.unlink()  # while it is held: whoever gets the lock of a deleted file tries again with a new one
        lock.release()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of all parameters and buffers with their names."""
    state = dict(sorted(model.state_dict().items()))
    return hashlib.sha256(f"{list(state)} {tensors_digest(state.values())}".encode()).hexdigest()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of tensors: their shapes, types and values."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data if tensor.numel() else b"")
    return digest.hexdigest()
