"""``lowbit search`` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lowbit.cli import app

QUICK = ["--method", "zeroq_pareto", "--calibration-samples", "32", "--candidates", "2,4,8"]


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["search", *map(str, arguments)])
    return found.exit_code, found.output


def test_a_search_writes_files_that_quantize_takes(tmp_path: Path) -> None:
    code, output = run("--budget", "size=15%", *QUICK, "--out", tmp_path / "found")
    assert code == 0, output
    assert "uniform 4/8" in output and "budget" in output
    content = json.loads((tmp_path / "found" / "search.json").read_text())
    assert content["found"]["cost"]["size"] <= content["limits"]["size"]
    policy = tmp_path / "found" / "policy.yaml"
    given = [
        "quantize",
        "--policy",
        policy,
        "--method",
        "round_to_nearest",
        "--calibration-samples",
        "32",
        "--no-onnx",
        "--out",
        tmp_path / "four",
    ]
    quantized = CliRunner().invoke(app, list(map(str, given)))
    assert quantized.exit_code == 0, quantized.output
    report = json.loads((tmp_path / "four" / "report.json").read_text())
    assert {layer["name"]: layer["weight_bits"] for layer in report["layers"]} == {
        name: int(bits.split("/")[0]) for name, bits in content["found"]["bits"].items()
    }


def test_json_is_all_that_is_printed_where_it_is_asked_for(tmp_path: Path) -> None:
    code, output = run("--budget", "average=4", *QUICK, "--json", "--quiet", "--out", tmp_path)
    assert code == 0, output
    assert json.loads(output)["main"] == "average"


def test_a_model_of_hardware_is_a_latency_table(tmp_path: Path) -> None:
    code, output = run("--budget", "latency=60%", "--latency-table", "bit_fusion", *QUICK, "--out", tmp_path)
    assert code == 0, output
    content = json.loads((tmp_path / "search.json").read_text())
    assert content["found"]["cost"]["latency"] <= 0.6 * content["reference"]["latency"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--budget"),
        (["--budget", "memory=4"], "unknown budget 'memory'"),
        (["--budget", "size=0"], "above 0"),
        (["--budget", "size=3furlongs"], "unknown unit"),
        (["--budget", "size=1%"], "the least that these widths cost"),
        (["--budget", "average=4", "--candidates", "0,9"], "candidates"),
        (["--budget", "latency=60%"], "latency-table"),
        (["--budget", "latency=60%", "--latency-table", "nothing.json"], "bit_serial"),
        (["--budget", "average=4", "--method", "hawk"], "hawq"),
        (["--budget", "average=4", "--then", "lsq"], "lsq"),
    ],
)
def test_bad_input_is_refused_with_what_is_allowed(arguments: list[str], said: str, tmp_path: Path) -> None:
    code, output = run(*arguments, "--calibration-samples", "32", "--out", tmp_path / "found")
    assert code == 2
    assert said in " ".join(output.split())
    assert not (tmp_path / "found" / "policy.yaml").exists()


def test_the_hint_to_retrain_names_a_procedure_alone(tmp_path: Path) -> None:
    for method, has_hint in (("hawq", True), ("hawq_v2", False)):
        code, output = run(
            "--budget", "average=4", "--method", method, "-o", "samples=16", "--calibration-samples", "16", "--out", tmp_path / method
        )
        assert code == 0, output
        assert (f"--procedure {method}" in " ".join(output.split())) is has_hint


def test_examples_of_budgets_are_no_options(tmp_path: Path) -> None:
    code, output = run("--out", tmp_path)
    assert code == 2 and "'latency=60%'" in output and "--latency 60%" not in output
