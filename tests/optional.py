"""Packages that tests use when they are installed."""

from __future__ import annotations

import contextlib
import importlib
from types import ModuleType

import pytest

from lowbit.errors import LowbitError
from lowbit.models.loading import _import_vision


def require(package: str) -> ModuleType:
    """The package; skips the test when it is not installed."""
    if importlib.util.find_spec(package.partition(".")[0]) is None:
        pytest.skip(f"{package} is not installed")
    with contextlib.suppress(LowbitError):
        _import_vision("torchvision")  # which others import too, and which stops beside a torch it was not built for
    return importlib.import_module(package)
