"""A cache of the kernels' machine code, verified before it is used.

numba writes compiled code to a folder and reads it in later processes. It keys the code by the function's file alone, so the folder's name
covers everything that the code depends on; and it trusts what it reads, so every file is compared with its checksum first. A folder is
filled under a temporary name and then renamed, so that processes that start at the same time never see a partial one. If no folder can be
written, each process compiles again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VARIABLE = "LOWBIT_CACHE"
CHECKSUMS = "checksums.json"


def cache_root() -> Path:
    """Folder of the cache: ``LOWBIT_CACHE``, else the user's cache folder."""
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lowbit"


def cache_folder(target: str, sources: list[Path]) -> Path:
    """The folder for ``target``, the text, path and time of ``sources``, and the versions that the code depends on.

    numba reads its code only for a source with the same path and time, so installations that shared a folder would overwrite each other's.
    """
    import llvmlite
    import numba

    digest = hashlib.sha256()
    for part in (target, platform.machine(), sys.version, numba.__version__, llvmlite.__version__):
        digest.update(part.encode())
    for path in sources:
        digest.update(f"{path.resolve()} {path.stat().st_mtime_ns}\n{path.read_text()}".encode())
    return cache_root() / f"{target}-{digest.hexdigest()[:16]}"


def is_sound(folder: Path) -> bool:
    """Whether the files in ``folder`` match their checksums."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        return bool(expected) and expected == _checksums(folder)
    except (OSError, ValueError):
        return False


@contextmanager
def cached_in(folder: Path) -> Iterator[bool]:
    """Within the context, let numba read from ``folder`` and write to it; yields False where that is not possible.

    Code that is compiled within the context is kept when it ends.
    """
    import numba

    config: Any = numba.config
    before = config.CACHE_DIR
    aside = None
    if not is_sound(folder):
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            aside = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
        except OSError:
            yield False
            return
    try:
        config.CACHE_DIR = str(aside or folder)
        yield True
        if aside is not None:
            (aside / CHECKSUMS).write_text(json.dumps(_checksums(aside)))
            _replace(folder, aside)
    except OSError:
        return  # the disk is full, or another process was faster
    finally:
        config.CACHE_DIR = before
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _replace(folder: Path, fresh: Path) -> None:
    if is_sound(folder):
        return  # another process was faster
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
