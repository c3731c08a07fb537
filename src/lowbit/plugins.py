"""Classes from outside the package: from entry points of installed packages, and from single files."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from lowbit.errors import SpecError, unknown_name

_FILE_AND_CLASS = re.compile(r"(?P<file>.+\.py)(?::(?P<name>\w*))?")


def load_entry_points(group: str) -> None:
    """Import what every installed package offers under ``group``; one that fails is named in a warning and left out."""
    for entry in entry_points(group=group):
        try:
            entry.load()
        except Exception as error:
            warnings.warn(
                f"{_package(entry)}: {entry.value!r}, its entry point in {group!r}, cannot be loaded and is left out "
                f"({type(error).__name__}: {error}). Update or uninstall the package.",
                stacklevel=2,
            )


def _package(entry: EntryPoint) -> str:
    return f"package {entry.dist.name} {entry.dist.version}" if entry.dist is not None else f"entry point {entry.name!r}"


def is_in_file(text: str) -> bool:
    """Whether ``text`` names a class in a file, ``path/to/file.py:Class``, rather than something registered."""
    return _FILE_AND_CLASS.fullmatch(text) is not None


def class_in_file(text: str, importing: Callable[[], AbstractContextManager[object]] = nullcontext) -> type:
    """The class that ``path/to/file.py:Class`` names. The file is run once, and again when its content has changed.

    Args:
        text: A path that ends in ``.py``, a colon, and the name of a class defined in that file.
        importing: Makes a context in which the file is run.

    Raises:
        SpecError: The file cannot be read, fails when it is run, or no class is named.
        UnknownNameError: The file defines no class of that name.
    """
    match = _FILE_AND_CLASS.fullmatch(text)
    assert match is not None
    path = Path(match["file"]).expanduser()
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise SpecError(f"{text!r}: cannot read {path} ({error.strerror}). Give the path of a Python file, a colon and a class.") from error
    name = f"lowbit_file_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest[:12]}"
    module = sys.modules.get(name)
    if module is None:
        spec = importlib.util.spec_from_file_location(name, path.resolve())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickles look their module up
        try:
            with importing():
                spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[name]
            raise SpecError(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    classes = {key: value for key, value in vars(module).items() if inspect.isclass(value) and value.__module__ == name}
    if not match["name"]:
        raise SpecError(f"{text!r}: say which class of the file is meant, as {path}:CLASS. It defines: {', '.join(classes) or 'none'}.")
    if match["name"] not in classes:
        raise unknown_name(f"class of {path}", match["name"], classes)
    return classes[match["name"]]


def source_digest(cls: type) -> str | None:
    """SHA-256 of the file that defines ``cls``; ``None`` for classes of lowbit itself and those made outside of a file."""
    if cls.__module__.partition(".")[0] == "lowbit":
        return None
    try:
        return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()
    except (OSError, TypeError):
        return None
