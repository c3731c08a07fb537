from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import typer
import yaml
from torch import nn
from typer.testing import CliRunner, Result

import lowbit
from lowbit.cli import app
from lowbit.cli.app import COMMANDS
from lowbit.models import load_default
from lowbit.network.layers import quantizable_layers
from lowbit.progress import Stage
from lowbit.registry import list_methods
from lowbit.workflows.deliver import Delivery
from lowbit.workfolder import exclusive_run

FAST = ["--calibration-samples", "32", "--batch-size", "16"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def fails(*arguments: str | Path) -> str:
    """What a command that is refused says: one message, no traceback, exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.output.startswith("error:")
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def quantized_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``lowbit quantize`` writes for the embedded network at 4 bits."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = run("quantize", "--method", "round_to_nearest", "-w", "4", "--out", out, *FAST)
    assert result.exit_code == 0, result.output
    assert result.output.strip().splitlines()[-1] == f"report: {out / 'report.html'}"
    return out


def test_the_version_is_the_installed_one() -> None:
    assert run("--version").output.strip() == f"lowbit {version('lowbit')}"


def test_the_module_runs_as_the_command_does() -> None:
    done = subprocess.run([sys.executable, "-m", "lowbit", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"lowbit {version('lowbit')}"


@pytest.mark.parametrize("command", list(COMMANDS))
def test_every_command_and_every_option_has_help(command: str) -> None:
    assert run(command, "--help").exit_code == 0
    real = typer.main.get_command(importlib.import_module(f"lowbit.cli.{command.replace('-', '_')}").app)
    for each in [*getattr(real, "commands", {}).values()] or [real]:
        assert each.help
        assert [parameter.name for parameter in each.params if not getattr(parameter, "help", None)] == []


@pytest.mark.parametrize(("active", "shown"), [(True, "triton: it works"), (False, "reference: it does not")])
def test_doctor_says_what_layers_on_cuda_run_on(active: bool, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowbit.runtime.cuda.target.cuda_target", lambda: (active, shown.split(": ")[1]))
    output = run("doctor").output
    assert shown in next(line for line in output.splitlines() if line.startswith("on CUDA"))


def test_methods_list_shows_every_registered_method() -> None:
    output = run("methods", "list").output
    assert all(info.name in output for info in list_methods())


def test_methods_show_draws_what_a_method_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("webbrowser.open", lambda address: False)
    result = run("methods", "show", "binary_connect", "--plot", str(tmp_path / "a.svg"), "--open")
    assert result.exit_code == 0 and "There is no browser" in result.output and f"picture: {tmp_path / 'a.svg'}" in result.output
    assert "weights: gradient" in (tmp_path / "a.svg").read_text()


def test_methods_show_refuses_other_kinds_of_pictures_before_it_runs(tmp_path: Path) -> None:
    assert "a picture is written as .svg or .png, got '.pdf'" in fails("methods", "show", "binary_connect", "--plot", tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def test_methods_show_asks_for_the_kind_where_there_are_several() -> None:
    result = run("methods", "show", "integer_only")
    assert result.exit_code == 2
    assert "--kind post_training or --kind training" in " ".join(result.output.split())


@pytest.mark.parametrize("info", list_methods(), ids=lambda info: info.name)
def test_methods_show_explains_every_hyper_parameter(info: lowbit.registry.MethodInfo) -> None:
    from lowbit.options import option_rows

    result = run("methods", "show", info.name, "--kind", info.kind)
    assert result.exit_code == 0
    for name, _, _, _, meaning in option_rows(info):
        assert name in result.output
        assert meaning, f"{info.name}.{name} is not described under Attributes in its class's docstring"


def test_an_unknown_method_names_the_nearest() -> None:
    assert "Did you mean 'round_to_nearest'?" in fails("quantize", "--method", "round_to_nearst")
    assert "Did you mean 'round_to_nearest'?" in fails("methods", "show", "round_to_nearst")


def test_a_dry_run_shows_every_layer_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", "--method", "round_to_nearest", "-w", "3", "--keep", "fc", "--out", out, "--dry-run", *FAST)
    assert result.exit_code == 0, result.output
    rows = {line.split()[0]: line.split()[2:4] for line in result.output.splitlines() if line.strip()}
    names = list(quantizable_layers(load_default()))
    assert rows[names[0]] == ["8", "8"]
    assert rows["fc"] == ["float", "float"]
    assert all(rows[name] == ["3", "8"] for name in names[1:] if name != "fc")
    assert not out.exists()


def test_quantize_writes_a_report_with_the_fixed_names(quantized_folder: Path) -> None:
    assert {path.name for path in quantized_folder.iterdir()} == {"report.json", "report.html", "policy.yaml", "model.lowbit", "model.onnx"}
    report = json.loads((quantized_folder / "report.json").read_text())
    assert (report["method"], report["weight_bits"], report["activation_bits"], report["seed"]) == ("round_to_nearest", 4, 8, 0)
    assert report["metrics"]["accuracy"]["float"] > 0.95
    assert report["metrics"]["accuracy"]["quantized"] > 0.9
    assert report["quantized"]["agreement"] > 0.9
    assert report["quantized"]["sqnr_db"] > 8
    assert report["size_bytes"]["packed"] == (quantized_folder / "model.lowbit").stat().st_size
    assert report["size_bytes"]["onnx"] == (quantized_folder / "model.onnx").stat().st_size
    assert report["size_bytes"]["float"] == sum(t.numel() * t.element_size() for t in load_default().state_dict().values())
    for kind in ("onnx", "packed"):
        assert report["parity"][kind]["passed"] is True
        assert report["parity"][kind]["top1_agreement"] >= 0.95
    assert report["latency_ms"]["float_onnx"] > 0
    assert report["latency_ms"]["quantized_onnx"] > 0
    assert [layer["name"] for layer in report["layers"]] == list(quantizable_layers(load_default()))
    for layer in report["layers"]:
        assert set(layer) >= {"name", "kind", "weight_bits", "activation_bits", "sqnr_db", "status", "reason"}
        assert layer["status"] == "done"
        assert layer["sqnr_db"] > 5


def test_the_written_policy_gives_the_same_bits_again(quantized_folder: Path, tmp_path: Path) -> None:
    policy = quantized_folder / "policy.yaml"
    result = run("quantize", "--method", "round_to_nearest", "--policy", policy, "--no-onnx", "--quiet", "--out", tmp_path / "out", *FAST)
    assert result.exit_code == 0, result.output
    first, second = (json.loads((folder / "report.json").read_text()) for folder in (quantized_folder, tmp_path / "out"))
    assert first["quantized"] == second["quantized"]
    assert (quantized_folder / "model.lowbit").read_bytes() == (tmp_path / "out" / "model.lowbit").read_bytes()
    assert not (tmp_path / "out" / "model.onnx").exists()


def test_evaluate_agrees_with_the_report(quantized_folder: Path, tmp_path: Path) -> None:
    result = run("evaluate", quantized_folder, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "evaluation.json").read_text())
    report = json.loads((quantized_folder / "report.json").read_text())
    assert found["float"]["metrics"]["accuracy"] == report["metrics"]["accuracy"]["float"]
    assert found["model.lowbit"]["metrics"]["accuracy"] == pytest.approx(report["metrics"]["accuracy"]["quantized"], abs=0.003)
    assert found["model.onnx"]["metrics"]["accuracy"] == pytest.approx(report["metrics"]["accuracy"]["quantized"], abs=0.01)
    assert found["model.lowbit"]["sqnr_db"] == pytest.approx(report["quantized"]["sqnr_db"], abs=0.5)


def test_a_packed_file_is_exported_to_onnx(quantized_folder: Path, tmp_path: Path) -> None:
    result = run("export", quantized_folder, "--to", tmp_path / "again.onnx", "--no-speed")
    assert result.exit_code == 0, result.output
    found = run("evaluate", tmp_path / "again.onnx", "--out", tmp_path)
    assert found.exit_code == 0, found.output
    report = json.loads((quantized_folder / "report.json").read_text())
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    assert evaluation["again.onnx"]["metrics"]["accuracy"] == pytest.approx(report["metrics"]["accuracy"]["quantized"], abs=0.01)


def test_diagnose_names_the_layer_that_hurts(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    lowbit.BitPolicy.uniform(8, 8).with_rule(match="separable.pointwise", weight=2).to_yaml(policy)
    result = run("diagnose", "--policy", policy, "--samples", "8", "--remedies", "0", "--out", tmp_path, *FAST)
    assert result.exit_code == 0, result.output
    worst = json.loads((tmp_path / "diagnosis.json").read_text())["suspects"][0]
    assert (worst["name"], worst["kind"]) == ("separable.pointwise", "weight")
    assert worst["share"] > 0.9
    assert "separable.pointwise" in result.output


def test_bad_options_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out", "--method", "round_to_nearest"]
    assert "--weight-bits" in fails("quantize", "-w", "9", *out)
    assert "matches no layer" in fails("quantize", "--keep", "nothing*", *out, "--dry-run")
    assert "Did you mean 'weight_observer'?" in fails("quantize", "--option", "weight_observr=mse", *out)
    assert "Methods that have it" in fails("quantize", "--iterations", "5", *out)
    assert "--device" in fails("quantize", "--device", "nowhere", *out)
    assert "no data for the network" in fails("quantize", "--model", "resnet8", *out)
    assert "belong to a network" in fails("quantize", "--weights", "w.safetensors", *out)
    assert not (tmp_path / "out").exists()


def test_a_pickle_given_as_weights_is_refused_and_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Hostile()))
    assert str(path) in fails("quantize", "--model", "resnet8", "--weights", path, "--data", "digits", "--out", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_file_in_place_of_the_output_folder_is_refused_and_stays(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    assert "there is a file of this name" in fails("quantize", "--method", "round_to_nearest", "--out", tmp_path / "out", *FAST)
    assert (tmp_path / "out").read_text() == "mine"


def test_truncated_and_foreign_files_are_refused(quantized_folder: Path, tmp_path: Path) -> None:
    whole = (quantized_folder / "model.lowbit").read_bytes()
    (tmp_path / "half.lowbit").write_bytes(whole[: len(whole) // 2])
    assert "half.lowbit" in fails("evaluate", tmp_path / "half.lowbit")
    assert "expected a .lowbit or .onnx file" in fails("evaluate", quantized_folder / "report.json")
    assert "there is no such file" in fails("evaluate", tmp_path / "missing.lowbit")
    assert "in this folder" in fails("evaluate", tmp_path)


class Branching(nn.Module):
    """Takes another way for black images, so it has no single graph to export."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Linear(4, 10)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x) if x.max() > 0 else self.conv(-x)
        return self.head(y.relu().mean((2, 3)))


def test_a_network_that_cannot_be_exported_is_reported_with_the_line_that_blocks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        "quantize", "--model", f"{Path(__file__)}:Branching", "--data", "digits", "--method", "round_to_nearest", "--out", out, *FAST
    )
    assert result.exit_code == 1, result.output
    assert "not written: model.onnx" in " ".join(result.output.split())
    report = json.loads((out / "report.json").read_text())
    assert report["size_bytes"]["onnx"] is None
    assert report["parity"]["onnx"]["passed"] is None
    assert report["quantized"]["sqnr_db"] > 25
    assert report["size_bytes"]["packed"] is None
    assert any("test_cli.py" in note for note in report["notes"])


def test_a_stopped_run_says_how_to_go_on_and_gives_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [
        "quantize",
        "--method",
        "brecq",
        "-w",
        "3",
        "--iterations",
        "12",
        "-o",
        "activation_iterations=12",
        "--no-onnx",
        "--quiet",
        *FAST,
        "--out",
    ]
    monkeypatch.setattr(sys, "argv", ["lowbit", *command, str(tmp_path / "stopped")])
    assert run(*command, tmp_path / "whole").exit_code == 0

    advance, left = Stage.advance, 14  # behind the weights, among the activations

    def stop(stage: Stage, amount: float = 1, note: str = "") -> None:
        nonlocal left
        advance(stage, amount, note)
        left -= stage.name.startswith("reconstruct")
        if left == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "advance", stop)
        result = run(*command, tmp_path / "stopped")
    assert result.exit_code == 130, result.output
    assert f"lowbit {' '.join(command)} {tmp_path / 'stopped'} --resume" in " ".join(result.output.split())
    assert (tmp_path / "stopped" / ".work" / "run.json").exists()
    assert not (tmp_path / "stopped" / "model.lowbit").exists()

    assert run(*command, tmp_path / "stopped").exit_code == 0
    assert (tmp_path / "stopped" / "model.lowbit").read_bytes() == (tmp_path / "whole" / "model.lowbit").read_bytes()
    assert not (tmp_path / "stopped" / ".work").exists()


def test_a_failed_run_leaves_earlier_results_alone(quantized_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in quantized_folder.iterdir()}

    def full_disk(*_: object, **__: object) -> Delivery:
        raise lowbit.errors.OutputError("cannot write: the disk is full")

    monkeypatch.setattr("lowbit.workflows.quantize.deliver", full_disk)
    assert "the disk is full" in fails("quantize", "--method", "round_to_nearest", "--out", quantized_folder, *FAST)
    after = {path.name: path.read_bytes() for path in quantized_folder.iterdir() if path.is_file()}
    assert after == before


def test_a_pattern_that_matches_no_method_is_an_error_that_lists_them() -> None:
    known = ", ".join(info.name for info in list_methods())
    assert f"Known: {known}" in fails("methods", "list", "zz*")


def test_a_method_that_needs_samples_says_how_to_name_some(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    told = fails("quantize", "--method", "lbq", "--model", "resnet8", "--input-shape", "3x32x32", *out)
    assert "--calibration" in told and "calibration=" not in told
    assert "name some with --data" in fails("evaluate", "--model", "resnet8")
    assert "--input-shape" not in fails("diagnose", "--model", "resnet8")
    assert not (tmp_path / "out").exists()


def test_export_refuses_targets_and_sources_before_it_works(quantized_folder: Path, tmp_path: Path) -> None:
    assert "Allowed suffixes: .lowbit, .onnx" in fails("export", "--to", tmp_path / "x.foo")
    assert "expected a .lowbit file, got .onnx" in fails("export", quantized_folder / "model.onnx", "--to", tmp_path / "x.onnx")
    (tmp_path / "file").write_text("mine")
    assert "--to" in fails("export", "--to", tmp_path / "file" / "x.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_float_network_is_not_timed_against_itself(tmp_path: Path) -> None:
    result = run("export", "--to", tmp_path / "float.onnx")
    assert result.exit_code == 0, result.output
    assert "parity passed" in result.output and "faster" not in result.output.lower()


def test_only_some_layers_are_reported_with_the_bits_asked_for_and_older_files_are_told_apart(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.onnx").write_bytes(b"of an earlier run")
    result = run("quantize", "-m", "round_to_nearest", "-w", "4", "--only", "block*", "--no-onnx", "--out", out, *FAST)
    assert result.exit_code == 0, result.output
    assert "4-bit weights, 8-bit activations, 5 of 9 layers" in result.output
    report = json.loads((out / "report.json").read_text())
    assert (report["weight_bits"], report["activation_bits"]) == (4, 8)
    assert any("model.onnx" in note and "not of this run" in note for note in report["notes"])
    assert (out / "model.onnx").read_bytes() == b"of an earlier run"


def test_an_error_during_the_work_leaves_no_state_behind(tmp_path: Path) -> None:
    assert "unknown observer" in fails("quantize", "-m", "round_to_nearest", "--weight-observer", "msee", "--out", tmp_path / "out", *FAST)
    assert list((tmp_path / "out").iterdir()) == []


def test_quantize_reads_the_recipe_that_it_prints_and_options_override_it(tmp_path: Path) -> None:
    arguments = [
        "-m",
        "brecq",
        "-w",
        "3",
        "--iterations",
        "7",
        "-o",
        "activation_iterations=5",
        "--keep",
        "fc",
        "--calibration-samples",
        "32",
    ]
    printed = run("quantize", *arguments, "--print-config")
    assert printed.exit_code == 0, printed.output
    content = yaml.safe_load(printed.output)
    assert (content["method"], content["weight_bits"], content["activation_bits"], content["keep"]) == ("brecq", 3, 8, ["fc"])
    assert content["options"] == {"iterations": "7", "activation_iterations": "5"}
    path = tmp_path / "recipe.yaml"
    path.write_text(printed.output)
    assert run("quantize", path, "--print-config").output == printed.output
    assert yaml.safe_load(run("quantize", path, "-w", "2", "--print-config").output)["weight_bits"] == 2
    dry = run("quantize", path, "--dry-run", "--out", tmp_path / "out")
    assert "activation_iterations=5, iterations=7" in dry.output and "32 samples of digits" in dry.output
    path.write_text("weight_bit: 3")
    assert "Did you mean 'weight_bits'" in fails("quantize", path)


def test_a_hyper_parameter_given_in_two_ways_is_an_error(tmp_path: Path) -> None:
    told = fails(
        "quantize", "-m", "round_to_nearest", "--weight-observer", "mse", "-o", "weight_observer=min_max", "--out", tmp_path / "out"
    )
    assert "weight_observer was given by --weight-observer too" in told


def test_quantize_refuses_a_folder_that_another_run_works_in(tmp_path: Path) -> None:
    with exclusive_run(tmp_path):
        assert "another run is working in this folder" in fails("quantize", "-m", "round_to_nearest", "--out", tmp_path, *FAST)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
