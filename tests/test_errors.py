from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from lowbit import errors


def test_a_clone_is_told_to_install_into_itself_and_a_package_from_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clone = tmp_path / "a clone"
    monkeypatch.setattr(errors, "_CLONE", clone)
    assert errors.install_command("onnx") == 'pip install "lowbit[onnx]"'
    clone.mkdir()
    (clone / "constraints.txt").touch()
    command = shlex.split(errors.install_command("onnx"))
    assert command == [sys.executable, "-m", "pip", "install", "-c", str(clone / "constraints.txt"), "-e", f"{clone}[onnx]"]
    assert errors.install_command("onnx") in str(errors.missing_extra("onnx", "onnx", "the ONNX format"))
