"""State of a long reconstruction on disk, so that a run can resume after a kill and end with the same bits.

Every file is complete or absent (written beside and renamed), safetensors with JSON in its header; nothing is unpickled. A
fingerprint of everything the result depends on guards it: state of another run is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from lowbit.errors import DataError, OutputError
from lowbit.files import read_tensors, write_tensors, write_text
from lowbit.reading import read_json

Facts = dict[str, float | int | str | bool]
_VERSION = 1


def fingerprint(named: Iterable[tuple[str, Tensor]], facts: object) -> str:
    """A hash of named tensors (bits, shapes and types) and of ``facts``, anything that JSON can say."""
    digest = hashlib.blake2b(json.dumps([_VERSION, facts], sort_keys=True, default=str).encode(), digest_size=16)
    for name, tensor in named:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class RunState:
    """Named pieces of state in ``folder``; with no folder nothing is kept.

    Attributes:
        is_resumed: Whether the folder holds state of this run.
        is_stale: Whether the folder held state of a different run, which has been removed.
    """

    def __init__(self, folder: Path | None, run: str) -> None:
        self.folder = folder
        self.is_resumed = self.is_stale = False
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {folder} for resuming: {error.strerror}. Name another work_dir.") from error
        marker = folder / "run.json"
        if marker.exists() and _read_marker(marker) == run:
            self.is_resumed = True
            return
        for old in folder.glob("*.safetensors"):
            self.is_stale = True
            old.unlink()
        write_text(marker, json.dumps({"run": run}))

    def save(self, name: str, tensors: dict[str, Tensor], facts: Facts) -> None:
        """Keep ``tensors`` and ``facts`` under ``name``, replacing what was there."""
        if self.folder is None:
            return
        write_tensors(self.folder / f"{name}.safetensors", tensors, facts)

    def has(self, name: str) -> bool:
        """Whether something is kept under ``name``."""
        return self.folder is not None and (self.folder / f"{name}.safetensors").exists()

    def load(self, name: str) -> tuple[dict[str, Tensor], Facts] | None:
        """What was kept under ``name``, or ``None``."""
        if self.folder is None or not self.has(name):
            return None
        tensors, facts = read_tensors(self.folder / f"{name}.safetensors")
        return tensors, cast(Facts, facts)

    def drop(self, name: str) -> None:
        """Forget ``name``."""
        if self.folder is not None:
            (self.folder / f"{name}.safetensors").unlink(missing_ok=True)


def _read_marker(path: Path) -> object:
    try:
        content = read_json(path)
    except DataError:
        return None
    return content.get("run") if isinstance(content, dict) else None
