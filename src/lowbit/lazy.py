"""Packages that import what they offer when it is first used, so that importing the package costs nothing (PEP 562)."""

from __future__ import annotations

import ast
import gc
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path


def lazy_imports(package: str) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` for a package whose imports stand under ``if TYPE_CHECKING:``, where type checkers read them.

    Submodules are found too: ``import lowbit; lowbit.data``.

    >>> import lowbit
    >>> "quantize" in dir(lowbit)
    True
    """
    module = sys.modules[package]

    @cache
    def origins() -> dict[str, tuple[str, str]]:
        return imports_for_type_checkers(Path(module.__file__ or "").read_text(encoding="utf-8"))

    def get(name: str) -> object:
        if name in origins():
            source, attribute = origins()[name]
            value = getattr(importlib.import_module(source), attribute)
            setattr(module, name, value)
            return value
        if not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get, lambda: sorted({*vars(module), *origins()})


def imports_for_type_checkers(text: str) -> dict[str, tuple[str, str]]:
    """Where each name comes from, as module and attribute, in the ``if TYPE_CHECKING:`` block of a file.

    >>> imports_for_type_checkers("if TYPE_CHECKING:\\n    from a.b import c, d as e")
    {'c': ('a.b', 'c'), 'e': ('a.b', 'd')}
    """
    blocks = [node for node in ast.parse(text).body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname or alias.name: (node.module or "", alias.name) for node in imports for alias in node.names}


@contextmanager
def without_collection() -> Iterator[None]:
    """Within the context, no garbage is collected.

    Importing numba and reading its kernels makes many objects that stay. Looking for garbage among them and torch's would take a third of
    that time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
