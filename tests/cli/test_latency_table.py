"""``lowbit latency-table``: the file, what is shown, and errors in options' terms."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import lowbit
from lowbit.cli import app

SOURCE = """
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
"""
FAST = ("--runtime", "lowbit", "--runs", "1", "-w", "2,8", "-a", "8")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["latency-table", *map(str, arguments)])


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "latency_net.py"
    path.write_text(SOURCE)
    return path


def test_the_file_holds_every_layer_and_nothing_else_is_left(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "tables" / "table.json"
    result = run("--model", net, "--input-shape", "3x6x6", "--out", out, *FAST)
    assert result.exit_code == 0, result.output
    table = lowbit.LatencyTable.load(out)
    assert {name: list(times) for name, times in table.times.items()} == {name: ["2/8", "8/8", "float/float"] for name in "03"}
    assert table.facts["network"] == f"{net}:build"
    assert [path.name for path in out.parent.iterdir()] == ["table.json"]
    assert "lowbit int8" in result.output and str(out) in "".join(result.output.split("\n"))


def test_the_embedded_network_is_measured_where_none_is_named(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    result = run("--out", tmp_path / "table.json", *FAST, "--quiet")
    assert result.exit_code == 0, result.output
    assert lowbit.LatencyTable.load(tmp_path / "table.json").facts["network"] == "digits"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["-w", "2,9"], "--weight-bits"), (["-a", "x"], "--activation-bits"), (["--runtime", "tflite"], "runtime"), (["--runs", "0"], "runs")],
)
def test_a_wrong_setting_is_an_error_before_anything_is_measured(arguments: list[str], said: str, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "table.json", *arguments)
    assert result.exit_code == 2
    assert said in result.output
    assert not list(tmp_path.iterdir())
