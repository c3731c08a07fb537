from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lowbit.errors import OutputError
from lowbit.report.json_text import to_json
from lowbit.report.results import LayerResult, MetricResult, ParityResult, Report, write_json

REPORT = Report(
    method="brecq",
    weight_bits=4,
    activation_bits=8,
    seed=3,
    metric="accuracy",
    metrics={"accuracy": MetricResult(0.9, 0.89, "%"), "RMSE": MetricResult(0.25, 0.5)},
    agreement=0.97,
    sqnr_db=21.5,
    size_float=1000,
    size_packed=150,
    size_onnx=300,
    parity_onnx=ParityResult(1e-4, 1.0, True, 256, 50.0),
    parity_packed=ParityResult(0.0, 1.0, True, 256, 50.0),
    latency_float_onnx=10.0,
    latency_quantized_onnx=4.0,
    layers=[LayerResult("conv1", "conv2d", 4, 8, 25.0)],
)


def test_the_file_has_the_names_that_scripts_rely_on(tmp_path: Path) -> None:
    write_json(REPORT, tmp_path / "report.json")
    data = json.loads((tmp_path / "report.json").read_text())
    assert (data["method"], data["weight_bits"], data["activation_bits"], data["seed"]) == ("brecq", 4, 8, 3)
    assert data["metric"] == "accuracy"
    assert data["metrics"]["accuracy"] == {"float": 0.9, "quantized": 0.89, "unit": "%"}
    assert data["metrics"]["RMSE"] == {"float": 0.25, "quantized": 0.5, "unit": ""}
    assert {k: data["quantized"][k] for k in ("agreement", "sqnr_db")} == {"agreement": 0.97, "sqnr_db": 21.5}
    assert data["size_bytes"] == {"float": 1000, "packed": 150, "onnx": 300, "packed_singly": None}
    assert data["parity"]["onnx"] == {"max_abs_error": 1e-4, "top1_agreement": 1.0, "passed": True, "samples": 256, "sqnr_db": 50.0}
    assert data["parity"]["packed"] == {"max_abs_error": 0.0, "top1_agreement": 1.0, "passed": True, "samples": 256, "sqnr_db": 50.0}
    assert (data["latency_ms"]["float_onnx"], data["latency_ms"]["quantized_onnx"]) == (10.0, 4.0)
    layer = data["layers"][0]
    fixed = ("name", "kind", "weight_bits", "activation_bits", "sqnr_db", "status", "reason")
    assert [layer[key] for key in fixed] == ["conv1", "conv2d", 4, 8, 25.0, "done", ""]


def test_what_was_not_measured_is_null_and_still_there() -> None:
    data = json.loads(to_json(Report("dfq", None, 8, 0).to_dict()))
    assert data["weight_bits"] is None
    assert data["metric"] is None and data["metrics"] == {}
    assert data["parity"]["onnx"] == {"max_abs_error": None, "top1_agreement": None, "passed": None, "samples": None, "sqnr_db": None}
    assert data["size_bytes"] == {"float": None, "packed": None, "onnx": None, "packed_singly": None}
    assert data["latency_ms"]["float_onnx"] is None


def test_numbers_that_json_does_not_know_become_null() -> None:
    text = to_json({"a": float("nan"), "b": [float("inf"), -float("inf"), 1.5], "c": Path("x")})
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"a": None, "b": [None, None, 1.5], "c": "x"}


def test_extra_entries_stay_beside_the_fixed_ones() -> None:
    data = Report("dfq", 8, 8, 0, extra={"command": "lowbit quantize"}).to_dict()
    assert data["command"] == "lowbit quantize" and data["method"] == "dfq"
    with pytest.raises(ValueError, match="method"):
        Report("dfq", 8, 8, 0, extra={"method": "other"}).to_dict()


def test_a_missing_folder_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere"):
        write_json(REPORT, tmp_path / "nowhere" / "report.json")


def test_a_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        write_json(REPORT, path)
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]
