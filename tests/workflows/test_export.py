from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
from tests.formats.networks import quantized
from tests.networks import BranchNet, TinyNet
from torch import Tensor

from lowbit.errors import GraphError, OutputError, ParityError, SpecError
from lowbit.formats.checks.parity import Parity
from lowbit.formats.program.program import Program
from lowbit.workflows.export import export

MODULE = importlib.import_module("lowbit.workflows.export")  # the name lowbit.export is the function
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_the_report_of_an_onnx_file_holds_size_parity_speed_and_kernels(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    report = export(quantized(TinyNet(), IMAGE), path, sample=IMAGE)
    assert (report.path, report.format, report.size_bytes) == (path, "onnx", path.stat().st_size)
    assert report.parity.passed
    assert report.parity.samples >= 256
    assert report.integer is not None
    assert (report.integer.conv_total, report.integer.linear_total) == (3, 1)
    assert report.speed is not None
    assert min(report.speed.float_ms, report.speed.quantized_ms) > 0
    assert any("not faster" in note for note in report.notes) == (not report.speed.is_faster)
    lines = str(report).splitlines()
    assert lines[0] == f"{path}: {report.size_bytes:,} bytes"
    assert lines[1].startswith("parity passed: largest difference ")
    assert list(tmp_path.iterdir()) == [path]


def test_the_report_of_a_packed_file_holds_size_and_parity(tmp_path: Path) -> None:
    path = tmp_path / "m.lowbit"
    report = export(quantized(TinyNet(), IMAGE), path, sample=IMAGE)
    assert (report.path, report.format, report.size_bytes) == (path, "lowbit", path.stat().st_size)
    assert report.parity.passed
    assert report.parity.max_abs_error == 0
    assert (report.speed, report.integer) == (None, None)


@pytest.mark.parametrize("name", ["m.pt", "m", "m.ONNX"])
def test_an_unknown_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecError, match=rf"cannot tell the format from '{name}'\. Allowed suffixes: \.lowbit, \.onnx"):
        export(TinyNet(), tmp_path / name, sample=IMAGE)


@pytest.mark.parametrize("suffix", ["onnx", "lowbit"])
def test_a_file_that_fails_its_check_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    def failing(*_: object) -> Parity:
        return Parity(2, 1.0, 0.5, 3.0, passed=False, diverging="layer 'conv1'")

    monkeypatch.setattr(MODULE, "check_onnx_parity", failing)
    monkeypatch.setattr(MODULE, "check_packed_parity", failing)
    path = tmp_path / f"m.{suffix}"
    path.write_text("the file before")
    with pytest.raises(ParityError, match="first diverges at layer 'conv1'"):
        export(quantized(TinyNet(), IMAGE), path, sample=IMAGE)
    assert path.read_text() == "the file before"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", ["onnx", "lowbit"])
def test_a_folder_that_does_not_exist_is_an_output_error(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        export(quantized(TinyNet(), IMAGE), tmp_path / "absent" / f"m.{suffix}", sample=IMAGE)


@pytest.mark.parametrize("suffix", ["onnx", "lowbit"])
def test_a_network_without_one_graph_is_refused_with_the_line_that_blocks(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(GraphError, match=r"`if x\.mean\(\) > 0:`"):
        export(quantized(BranchNet(), IMAGE), tmp_path / f"m.{suffix}", sample=IMAGE)


def test_exporting_leaves_the_network_as_it_was(tmp_path: Path) -> None:
    model = quantized(TinyNet(), IMAGE).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export(model, tmp_path / "m.onnx", sample=IMAGE, measure_speed=False)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_check_runs_on_the_given_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def check(_model: object, program: Program, _path: object) -> Parity:
        seen.append(program.sample.args[0])
        return Parity(2, 0.0, 1.0, 90.0, passed=True)

    monkeypatch.setattr(MODULE, "check_onnx_parity", check)
    export(quantized(TinyNet(), IMAGE), tmp_path / "m.onnx", sample=IMAGE, measure_speed=False)
    assert torch.equal(seen[0], IMAGE)
