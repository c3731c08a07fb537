"""With ``--json`` standard output holds one JSON text and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from lowbit.cli import app
from lowbit.data import SUITES, UPSCALING_SUITES
from lowbit.models import BUILT_IN, load_default
from lowbit.network.layers import quantizable_layers
from lowbit.registry import get_method, list_methods

FAST = ["--method", "round_to_nearest", "--calibration-samples", "32", "--batch-size", "16"]


def printed(*arguments: str | Path) -> Any:
    """What a command prints to standard output, read as JSON."""
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_lists_are_lists_of_facts() -> None:
    found = {entry["name"]: entry for entry in printed("methods", "list")}
    assert list(found) == list(dict.fromkeys(info.name for info in list_methods()))
    assert found["twn"]["weight_bits"] == [2] and found["twn"]["activation_bits"] is None
    assert list(printed("models", "list")) == list(BUILT_IN)
    assert list(printed("data", "list")) == [*SUITES, *UPSCALING_SUITES]


def test_a_method_comes_with_its_hyper_parameters() -> None:
    found = printed("methods", "show", "pact")
    assert (found["paper"], found["needs"]) == (get_method("pact").paper, ["labels"])
    option = next(option for option in found["options"] if option["name"] == "clip_decay")
    assert option["type"] == "float" and option["allowed"] == "0 or more"


def test_data_are_shown_by_split() -> None:
    pytest.importorskip("sklearn")
    found = printed("data", "show", "digits")
    assert (found["train"]["samples"], found["test"]["samples"], found["test"]["shape"]) == (1197, 600, [1, 8, 8])


def test_quantize_and_evaluate_print_what_they_write(tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = printed("quantize", *FAST, "-w", "4", "--out", out)
    written = json.loads((out / "report.json").read_text())
    assert {name: report[name] for name in written} == written
    assert (report["out"], report["not_written"]) == (str(out), [])
    found = printed("evaluate", out, "--out", tmp_path)
    assert found == json.loads((tmp_path / "evaluation.json").read_text())
    assert found["model.lowbit"]["metrics"]["accuracy"] == pytest.approx(report["metrics"]["accuracy"]["quantized"], abs=0.003)


@pytest.mark.parametrize("command", [["quantize", *FAST], ["train", "--no-packed"]], ids=lambda command: command[0])
def test_a_dry_run_prints_the_bits_of_each_layer(command: list[str], tmp_path: Path) -> None:
    found = printed(*command, "-w", "3", "--out", tmp_path / "out", "--dry-run")
    bits = {layer["name"]: layer["weight_bits"] for layer in found["layers"]}
    first, *inner, last = quantizable_layers(load_default())
    assert bits == {first: 8, **dict.fromkeys(inner, 3), last: 8}
    assert str(tmp_path / "out" / "model.onnx") in found["would_write"]
    assert (str(tmp_path / "out" / "model.lowbit") in found["would_write"]) == (command[0] == "quantize")
    assert not (tmp_path / "out").exists()


def test_run_prints_classes_and_times(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    picture = tmp_path / "grey.png"
    Image.new("L", (8, 8), 128).save(picture)
    printed("quantize", *FAST, "-w", "4", "--out", tmp_path / "out", "--no-onnx")  # 4 bits run on kernels of every processor
    found = printed("run", tmp_path / "out", picture, "--top", "2", "--benchmark", "--runs", "2")
    assert found["notes"] == [] and "8 x 8, grey" in found["inputs"]
    (row,) = found["pictures"]
    assert row["picture"] == str(picture) and [set(entry) for entry in row["classes"]] == [{"class", "share"}] * 2
    assert row["classes"][0]["share"] >= row["classes"][1]["share"] > 0
    assert set(found["milliseconds"]) == {"low-bit kernels", "decoded to float"} and min(found["milliseconds"].values()) > 0
    assert found["where_the_time_goes"] and "layers" in found["kernels"][0]


def test_evaluate_says_what_is_doubtful(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    chance = printed(
        "evaluate", "--model", "resnet8", "--model-option", "in_channels=1", "--model-option", "num_classes=12", "--data", "digits", "--out", tmp_path
    )  # fmt: skip
    assert any("12 outputs" in note for note in chance["notes"])
    assert json.loads((tmp_path / "evaluation.json").read_text())["notes"] == chance["notes"]
    assert printed("evaluate")["notes"] == []
