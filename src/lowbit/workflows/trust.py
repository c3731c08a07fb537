"""Networks whose code the user has named on this machine: only their code runs again when a file names it.

A file that says "my network is evil.py:build" must not get that code run by whoever opens the file. So each network that was named in a
command leaves a digest of its name, its options and its place in the user's cache; a file's network that left none has to be named again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from lowbit.models import BUILT_IN


def remember_network(model: str, options: Mapping[str, object]) -> None:
    """Note that the user has named this network; where the cache cannot be written to, it has to be named again later."""
    if model not in BUILT_IN:
        with contextlib.suppress(OSError):
            path = _entry(model, options)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


def is_trusted(model: str, options: Mapping[str, object]) -> bool:
    """Whether the network may be made because a file names it: a built-in one, or one that the user has named before."""
    return model in BUILT_IN or _entry(model, options).is_file()


def _entry(model: str, options: Mapping[str, object]) -> Path:
    source, _, _ = model.rpartition(":")
    place = Path(source).resolve() if source.endswith(".py") else Path.cwd()  # modules are looked for in the current folder too
    digest = hashlib.sha256(json.dumps([str(place), model, dict(options)], sort_keys=True, default=str).encode()).hexdigest()
    return _folder() / digest


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lowbit" / "networks"
