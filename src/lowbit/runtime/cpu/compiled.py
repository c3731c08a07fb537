"""Machine code of the kernels in a folder of lowbit's own, checked before it is used.

numba writes what it compiled to a folder and reads it in later processes. Its key is the file of the function alone, so the folder is
named by all that the code depends on; what it reads it trusts, so every file is compared with a checksum first. A folder is filled
aside and then renamed: processes that start at the same time do not see half of it. If none can be written, each process compiles again.
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
    """Where machine code is kept: ``LOWBIT_CACHE``, else the user's cache folder."""
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
    """The folder for ``target`` and ``sources``, their text, place and time, with the versions that the code depends on.

    numba reads what it wrote only for a source of the same place and time: installations that shared a folder would overwrite one another's.
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
    """Whether the files in ``folder`` are those that were put there."""
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        return bool(expected) and expected == _checksums(folder)
    except (OSError, ValueError):
        return False


@contextmanager
def cached_in(folder: Path) -> Iterator[bool]:
    """Within the context numba reads from ``folder`` and writes to it; false where it cannot.

    What is compiled within it is kept when the context ends.
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
        return  # the disk is full, or another process was first
    finally:
        config.CACHE_DIR = before
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _replace(folder: Path, fresh: Path) -> None:
    if is_sound(folder):
        return  # another process was first
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def _checksums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
