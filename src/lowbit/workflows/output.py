"""The output folder, checked before the long work starts."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

from lowbit.errors import DataError, OutputError, SpecError
from lowbit.reading import read_json


def prepare_folder(path: Path, needed_bytes: int, name: str = "out") -> Path:
    """Make the folder ``path`` of the setting ``name`` if it does not exist, and check that it is writable and has ``needed_bytes`` free.

    Raises:
        OutputError: It is a file, cannot be written to, or its disk is too full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=".write-test-"):
            pass
    except FileExistsError as error:
        raise OutputError(f"{name}={str(path)!r}: there is a file of this name. Name a folder.") from error
    except OSError as error:
        raise OutputError(f"{name}={str(path)!r}: cannot write there ({error.strerror}). Name another folder with {name}=.") from error
    free = shutil.disk_usage(path).free
    if free < needed_bytes:
        raise OutputError(
            f"{name}={str(path)!r}: {free / 1e6:.1f} MB are free, about {needed_bytes / 1e6:.1f} MB are needed. "
            "Make room or name a folder on another disk."
        )
    return path


def check_results(path: Path, method: str, *, resume: bool) -> None:
    """SpecError where the folder ``path`` holds results of another method, which only ``resume=False`` replaces."""
    for name in ("report.json", "train.json"):
        found = _method_in(path / name)
        if resume and found not in (None, method):
            raise SpecError(
                f"out={str(path)!r}: {name} there holds results of {found}, this is {method}. Name another folder with out=, "
                "or replace them with resume=False."
            )


def _method_in(file: Path) -> object:
    """The method of the finished run that wrote ``file``; ``None`` where there is none."""
    try:
        content: Any = read_json(file)
        return content["method"] if "method" in content else content["settings"]["method"] if content["is_done"] else None
    except (DataError, KeyError, TypeError):
        return None
