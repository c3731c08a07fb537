"""The page of Python's names, made from what ``lowbit`` exports and from its docstrings."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import lowbit

_HEAD = """# Python

`import lowbit` has all of these. Every example is run by the tests. Errors derive from `lowbit.errors.LowbitError` and from a built-in error.
"""


def api_page() -> str:
    """All public names: functions, classes, errors."""
    values = {name: getattr(lowbit, name) for name in lowbit.__all__}
    functions = [name for name, value in values.items() if inspect.isroutine(value)]
    classes = [name for name, value in values.items() if inspect.isclass(value)]
    errors = [name for name, value in vars(lowbit.errors).items() if inspect.isclass(value) and value.__module__ == "lowbit.errors"]
    parts = [
        _HEAD,
        _section("Functions", (f".. autofunction:: lowbit.{name}" for name in functions)),
        _section("Classes", (f".. autoclass:: lowbit.{name}\n   :members:" for name in classes)),
        _section("Errors", (f".. autoexception:: lowbit.errors.{name}" for name in errors)),
    ]
    return "\n".join(parts)


def _section(title: str, directives: Iterable[str]) -> str:
    return f"## {title}\n\n" + "\n\n".join(f"```{{eval-rst}}\n{directive}\n```" for directive in directives) + "\n"
