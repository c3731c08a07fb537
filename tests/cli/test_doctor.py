from __future__ import annotations

import importlib.metadata
import json
import subprocess
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from lowbit.cli import app, doctor
from lowbit.errors import install_command


def test_every_optional_part_is_listed_with_its_version() -> None:
    found = {part.name: part for part in doctor.parts()}
    assert {found[name].extra for name in ("lowbit", "torch", "numpy")} == {""}
    extras = {"onnx", "openvino", "data", "kernels", "search", "cuda", "train", "models", "plot", "lightning", "ray", "huggingface"}
    assert {part.extra for part in found.values()} == {"", *extras}
    assert found["onnxruntime"].extra == "onnx" and found["accelerate"].extra == "huggingface"
    assert found["torch"].version == importlib.metadata.version("torch")
    assert not {"pytest", "ruff", "mypy"} & set(found)


def test_a_torchvision_that_does_not_import_is_found_and_the_remedy_fits_the_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], **_: object) -> SimpleNamespace:
        assert command[-1] == "import torchvision"
        return SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: operator torchvision::nms does not exist\n")

    monkeypatch.setattr(subprocess, "run", broken)
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13.0+cpu", "torchvision": "0.28.0"}.get)
    problem = next(part.problem for part in doctor.parts() if part.name == "torchvision")
    assert "operator torchvision::nms does not exist" in problem
    assert problem.endswith("--index-url https://download.pytorch.org/whl/cpu torchvision==0.28.0")
    monkeypatch.setattr(doctor, "_version", {"torch": "2.13.0+cu130", "torchvision": "0.28.0"}.get)
    assert "--index-url" not in next(part.problem for part in doctor.parts() if part.name == "torchvision")


def test_a_torchvision_that_imports_or_is_missing_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stderr=""))
    assert [part.problem for part in doctor.parts() if part.problem] == []
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    assert [part.problem for part in doctor.parts() if part.problem] == []


def test_what_is_missing_is_said_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [doctor.Part("torch", "", "2.13.0"), doctor.Part("numba", "kernels", None)]
    monkeypatch.setattr(doctor, "parts", lambda: parts)
    monkeypatch.setattr(doctor, "_kernels", lambda: iter([("active", "reference: for this test")]))
    assert install_command("kernels") in " ".join(CliRunner().invoke(app, ["doctor"]).stdout.split())
    found = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)
    assert found["packages"]["numba"] == {"version": None, "extra": "kernels", "problem": None}
    assert found["install"] == {"kernels": install_command("kernels")}
    assert found["kernels"] == {"active": "reference: for this test"}
