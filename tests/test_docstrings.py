"""Examples in docstrings run and give what they show; what is public at the top has one."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import lowbit
from lowbit import registry
from tests.test_rooms import SOURCE, modules

WITH_EXAMPLES = sorted(name for name, path in modules(SOURCE).items() if ">>> " in path.read_text())
DATA = frozenset({"errors"})  # public names that are neither functions nor classes


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_examples_give_what_they_show(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # examples may write files
    lowbit.list_methods()  # all methods are registered before the registry is copied
    monkeypatch.setattr(registry, "_methods", dict(registry._methods))  # methods that examples register are forgotten
    module = importlib.import_module(f"lowbit.{name}".rstrip("."))
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("name", sorted(set(lowbit.__all__) - DATA))
def test_public_names_have_an_example(name: str) -> None:
    assert ">>> " in (inspect.getdoc(getattr(lowbit, name)) or ""), f"lowbit.{name}"
