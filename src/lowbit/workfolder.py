"""Where a long run keeps what it needs to go on after a kill: one folder, tied to the run's exact settings; and who works in it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import cast

import torch
from torch import Tensor, nn

from lowbit.errors import OutputError, SpecError
from lowbit.files import write_text

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # not on Windows; there two runs that start in the same instant are not told apart
    fcntl = None

_SETTINGS, _DONE = "run.json", "done"
LOCK = ".lock"


class WorkFolder:
    """State of a run at ``path``.

    Attributes:
        is_resumed: An earlier run with the same settings left state to go on from.
        is_replaced: State of a run with other settings was here and has been deleted.
    """

    def __init__(self, path: Path, *, is_resumed: bool, is_replaced: bool = False) -> None:
        self.path, self.is_resumed, self.is_replaced = path, is_resumed, is_replaced

    def remove(self) -> None:
        """Delete the state; the run is done."""
        shutil.rmtree(self.path, ignore_errors=True)

    def remove_if_useless(self) -> None:
        """Delete the state where there is nothing in it to go on from."""
        if not any(self.path.rglob("*.safetensors")):
            self.remove()

    def mark_done(self) -> None:
        """The run is done; its state stays, and a run with other settings may replace it."""
        write_text(self.path / _DONE, "")


def open_work_folder(path: Path, settings: Mapping[str, object], *, resume: bool, replaces: bool = True) -> WorkFolder:
    """The folder for the run with ``settings``.

    State of a run with the same settings is kept when ``resume``; state of any other run is deleted, because going on from it
    would give a mixture of both.

    Args:
        path: The folder.
        settings: Everything that the run's result depends on.
        resume: False deletes whatever is there.
        replaces: Whether state of an unfinished run with other settings is deleted; without it that is an error.

    Raises:
        SpecError: There is state of an unfinished run with other settings that must not be deleted.
    """
    text = json.dumps(settings, sort_keys=True, indent=1, default=str)
    record = path / _SETTINGS
    if resume and record.is_file() and record.read_text(encoding="utf-8", errors="replace") == text:
        return WorkFolder(path, is_resumed=True)
    is_replaced = resume and any(path.rglob("*.safetensors"))
    if is_replaced and not (path / _DONE).exists():
        earlier = _settings_of(record)
        if not replaces or earlier.get("kind") != settings.get("kind"):
            raise SpecError(
                f"{path.parent} holds a stopped run with other settings ({_difference(earlier, json.loads(text))}). "
                "Go on with those settings, start over with --fresh (resume=False in Python), which deletes its state, or name another folder."
            )
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    write_text(record, text)
    return WorkFolder(path, is_resumed=False, is_replaced=is_replaced)


def _settings_of(record: Path) -> dict[str, object]:
    try:
        settings = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
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
def only_run_in(folder: Path) -> Iterator[None]:
    """Within the context no other run may work in ``folder``: a file there names this process.

    A file that a killed process left behind is taken over.

    Raises:
        OutputError: A living process works there, or the file cannot be written.
    """
    path = folder / LOCK
    me = {"pid": os.getpid(), "started": _start_of(os.getpid()), "host": socket.gethostname()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _guarded(path) as file:
            holder = _read_holder(file)
            if holder is not None and _is_alive(holder):
                raise OutputError(
                    f"{folder}: another run (process {holder['pid']} on {holder['host']}) is working in this folder. "
                    f"Wait for it, stop it, or name another folder. If there is no such process, delete {path}."
                )
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(me).encode(), 0)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"{folder}: cannot write there ({error.strerror}). Name another folder.") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def _guarded(path: Path) -> Iterator[int]:
    """The open file at ``path``, which nobody else reads or changes within the context."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
                try:
                    is_current = os.fstat(file).st_ino == path.stat().st_ino
                except FileNotFoundError:
                    is_current = False  # its holder has just deleted it
                if not is_current:
                    continue
            yield file
            return
        finally:
            os.close(file)


def _read_holder(file: int) -> dict[str, object] | None:
    try:
        holder = json.loads(os.pread(file, 4096, 0))
    except ValueError:
        return None
    return holder if isinstance(holder, dict) and isinstance(holder.get("pid"), int) else None


def _is_alive(holder: Mapping[str, object]) -> bool:
    if holder.get("host") != socket.gethostname():
        return True  # nobody here can tell
    pid = cast(int, holder["pid"])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # it belongs to somebody else
    return holder.get("started") in (None, _start_of(pid))  # another process may have got the number


def _start_of(pid: int) -> str | None:
    """When the process was started, in the system's own units; ``None`` where that cannot be found out, or it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state == "Z" else fields[18]
    except (OSError, ValueError, IndexError):
        return None


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
