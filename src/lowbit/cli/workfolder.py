"""Where a long run keeps what it needs to go on after a kill: one folder, tied to the run's exact settings."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lowbit.files import write_text

_SETTINGS = "run.json"


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


def open_work_folder(path: Path, settings: Mapping[str, object], *, resume: bool) -> WorkFolder:
    """The folder for the run with ``settings``.

    State of a run with the same settings is kept when ``resume``; state of any other run is deleted, because going on from it
    would give a mixture of both.
    """
    text = json.dumps(settings, sort_keys=True, indent=1, default=str)
    record = path / _SETTINGS
    if resume and record.is_file() and record.read_text(encoding="utf-8", errors="replace") == text:
        return WorkFolder(path, is_resumed=True)
    is_replaced = resume and any(path.rglob("*.safetensors"))
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    write_text(record, text)
    return WorkFolder(path, is_resumed=False, is_replaced=is_replaced)


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
