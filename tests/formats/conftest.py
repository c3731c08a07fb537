from __future__ import annotations

import sys

import pytest

from lowbit.workflows.export import export


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes are the same on every processor."""
    monkeypatch.setattr(sys.modules[export.__module__], "saturates", lambda: False)
