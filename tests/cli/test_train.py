from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

from lowbit import evaluate
from lowbit.cli import app
from lowbit.cli.flags import in_flags
from lowbit.data import load_data
from lowbit.errors import SpecError, UnknownNameError
from lowbit.files import read_tensors
from lowbit.models import default_weights, load_default
from lowbit.qat import OptimizerSpec, Recipe
from lowbit.spec import BitPolicy
from lowbit.workflows.load import load
from lowbit.workflows.requests import TrainRequest

ONLY_TRAIN = ["--no-onnx", "--no-packed", "--no-tensorboard"]
SHORT = ["--epochs", "1", *ONLY_TRAIN]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def fails(*arguments: str | Path) -> str:
    """What a command that is refused says: one message, no traceback, exit code 2."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and "error:" in result.output
    return " ".join(result.output.split())


def weights(out: Path) -> dict[str, torch.Tensor]:
    tensors, _ = read_tensors(out / ".work" / "last.safetensors")
    return {name: tensor for name, tensor in tensors.items() if name.startswith("model.")}


def small(num_classes: int = 4, in_channels: int = 3) -> nn.Module:
    """A network for pictures of any size."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(in_channels, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, 2, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return nn.Sequential(*layers, nn.Linear(8, num_classes))


MODEL = f"{Path(__file__)}:small"


@pytest.fixture(scope="module")
def trained_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``lowbit train`` writes when nothing is named, for fewer epochs."""
    out = tmp_path_factory.mktemp("run") / "out"
    result = run("--epochs", "3", "--out", out)
    assert result.exit_code == 0, result.output
    assert result.output.strip().splitlines()[-1] == f"report: {out / 'report.html'}"
    return out


def test_the_embedded_network_is_trained_at_four_bits_and_checked(trained_folder: Path) -> None:
    names = {path.name for path in trained_folder.iterdir()}
    assert names >= {"report.json", "report.html", "policy.yaml", "model.lowbit", "model.onnx", "train.json", "train.csv", ".work"}
    assert {path.name for path in (trained_folder / ".work").iterdir()} == {"best.safetensors", "done", "last.safetensors", "run.json"}
    report = json.loads((trained_folder / "report.json").read_text())
    assert (report["method"], report["weight_bits"], report["activation_bits"], report["seed"]) == ("lsq", 4, 4, 0)
    assert report["metrics"]["accuracy"]["float"] > 0.98 and report["metrics"]["accuracy"]["quantized"] > 0.97
    assert report["quantized"]["agreement"] > 0.97
    assert report["parity"]["packed"]["passed"] is True and report["parity"]["onnx"]["passed"] is True
    assert report["size_bytes"]["packed"] == (trained_folder / "model.lowbit").stat().st_size
    curve = report["training"]["curve"]
    assert [result["epoch"] for result in curve] == [1, 2, 3]
    assert curve[-1]["metrics"]["accuracy"] == report["metrics"]["accuracy"]["quantized"]
    assert report["training"]["metric"] == "accuracy" and report["training"]["recipe"]["epochs"] == 3
    assert curve == json.loads((trained_folder / "train.json").read_text())["curve"]
    page = (trained_folder / "report.html").read_text()
    assert "<h2>Training</h2>" in page and "Training loss" in page and "Test accuracy" in page
    assert f"epoch 3 (train), test accuracy: {100 * curve[-1]['metrics']['accuracy']:.2f} %" in page
    assert report["noise_reference"] == "the float network that training started from"
    assert sum(part["total_bytes"] for part in report["stored"]) == report["size_bytes"]["packed"]
    assert set(report["run"]["data"]) == {"training", "calibration", "test"}


def test_the_packed_file_computes_what_was_trained(trained_folder: Path) -> None:
    from lowbit.data import load_data, loader

    report = json.loads((trained_folder / "report.json").read_text())
    accuracy = evaluate(load(trained_folder / "model.lowbit"), loader(load_data("digits", split="test"), 100))
    assert accuracy["accuracy"] == pytest.approx(report["metrics"]["accuracy"]["quantized"], abs=0.002)


def test_a_finished_training_is_not_repeated_and_its_files_are_written_again(trained_folder: Path) -> None:
    before = weights(trained_folder)
    (trained_folder / "report.json").unlink()
    result = run("--epochs", "3", "--out", trained_folder, *ONLY_TRAIN)
    assert result.exit_code == 0, result.output
    assert "epoch 1/3" not in result.output
    assert (trained_folder / "report.json").exists()
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(trained_folder).items())
    report = json.loads((trained_folder / "report.json").read_text())
    assert any("model.onnx" in note and "not of this run" in note for note in report["notes"])


def test_one_network_of_several_widths_is_trained_run_exported_and_evaluated_at_each(tmp_path: Path) -> None:
    out = tmp_path / "widths"
    trained = run("--method", "adabits", "--bits", "4,2", "--epochs", "1", "--no-onnx", "--no-tensorboard", "--out", out)
    assert trained.exit_code == 0, trained.output
    report = json.loads((out / "report.json").read_text())
    assert [one["weight_bits"] for one in report["switches"]] == [4, 2]
    assert f"model.lowbit holds all widths in {report['size_bytes']['packed']:,} bytes" in trained.output
    two = CliRunner().invoke(app, ["run", str(out), "--bits", "2", "--benchmark", "--runs", "1", "--json"])
    assert two.exit_code == 0 and any(
        "block1.conv1: planes" in line or "block1.conv1: int8" in line for line in json.loads(two.output)["kernels"]
    )
    other = CliRunner().invoke(app, ["run", str(out), "--bits", "3", "--benchmark"])
    assert other.exit_code == 2 and "was trained for the widths 4/4, 2/2, got 3" in " ".join(other.output.split())
    single = CliRunner().invoke(app, ["export", str(out), "--bits", "2", "--to", str(tmp_path / "two.lowbit")])
    assert single.exit_code == 0 and load(tmp_path / "two.lowbit").layer_widths()["block1.conv1"].bits.weight == 2
    figures = CliRunner().invoke(app, ["evaluate", str(out), "--json", "--quiet"])
    found = json.loads(figures.output)
    assert [name for name in found if name != "notes"] == ["float", "model.lowbit at 4/4", "model.lowbit at 2/2"]
    for one in report["switches"]:
        name = f"model.lowbit at {one['weight_bits']}/{one['weight_bits']}"
        assert found[name]["metrics"]["accuracy"] == pytest.approx(one["accuracy"], abs=0.01)


def test_recipe_and_policy_of_the_paper_are_printed_as_they_will_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    printed = yaml.safe_load(run("-m", "pact", "-w", "2", "--recipe", "paper", "--policy", "paper", "--lr", "0.3", "--print-config").output)
    assert (printed["policy"], printed["weight_bits"], printed["optimizer"]["learning_rate"]) == ("paper", 2, 0.3)
    assert (printed["epochs"], printed["optimizer"]["schedule"]) == (200, "step")
    (tmp_path / "paper").write_text("epochs: 7")
    assert yaml.safe_load(run("--recipe", "./paper", "--print-config").output)["epochs"] == 7
    assert yaml.safe_load(run("paper", "--recipe", "paper", "--print-config").output)["epochs"] == 7
    assert "Give one of them" in fails("paper", "--recipe", "./paper")


def test_the_printed_recipe_gives_itself_back_and_options_override_it(tmp_path: Path) -> None:
    arguments = [
        "--data",
        "fashion-mnist",
        "--model",
        "resnet20",
        "--method",
        "ewgs",
        "-w",
        "2",
        "-a",
        "2",
        "--epochs",
        "7",
        "--lr",
        "0.05",
    ]
    arguments += ["--optimizer", "adamw", "--weight-decay", "0", "--keep", "fc", "--model-option", "width=8", "--label-smoothing", "0.1"]
    arguments += ["--teacher", "self", "--average-weights", "0.99", "--clip-norm", "2", "--precision", "bf16", "--select", "best"]
    printed = run(*arguments, "--print-config")
    assert printed.exit_code == 0, printed.output
    path = tmp_path / "recipe.yaml"
    path.write_text(printed.output)
    assert run(path, "--print-config").output == printed.output
    content = yaml.safe_load(printed.output)
    assert (content["method"], content["weight_bits"], content["model_options"], content["keep"]) == ("ewgs", 2, {"width": 8}, ["fc"])
    assert content["optimizer"] | {"kind": "adamw", "learning_rate": 0.05, "weight_decay": 0.0} == content["optimizer"]

    changed = yaml.safe_load(run(path, "--lr", "0.01", "-w", "3", "--print-config").output)
    assert changed["optimizer"] == content["optimizer"] | {"learning_rate": 0.01}
    assert changed["weight_bits"] == 3
    asked = TrainRequest.from_yaml(path)
    assert asked.recipe == Recipe(7, 128, OptimizerSpec("adamw", 0.05, weight_decay=0.0), clip_norm=2.0, average_weights=0.99)
    assert asked.label_smoothing == 0.1


def test_every_setting_of_a_recipe_is_read_back(tmp_path: Path) -> None:
    policy = BitPolicy.uniform(3, None).keep_float("fc")
    asked = TrainRequest().changed(
        {"policy": policy.to_dict(), "options": {"quantizer_learning_rate": 0.5}, "preprocess": {"size": 32, "grey": True}, "seed": 5,
         "teacher_options": {"width": 4}, "only": None, "merge_bits": 8, "augment": "crop", "optimizer": {"schedule": "step", "milestones": [0.2, 0.9]}},
        "here",
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(asked.to_yaml())
    assert TrainRequest.from_yaml(path) == asked
    assert asked.bit_policy() == policy.with_merges(8)


def test_bits_that_are_not_given_are_four_or_what_the_method_supports() -> None:
    assert TrainRequest().bit_policy() == BitPolicy.uniform(4, 4)
    assert TrainRequest(method="xnor_net").bit_policy() == BitPolicy.uniform(1, 1)
    assert TrainRequest(method="twn").bit_policy() == BitPolicy.uniform(2, None)
    assert TrainRequest(weight_bits=2, first_last_bits="same").bit_policy() == BitPolicy.uniform(2, 4, first_last=None)
    assert TrainRequest(activation_bits="float").bit_policy() == BitPolicy.uniform(4, None)


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        ("epoch: 3", UnknownNameError, "Did you mean 'epochs'"),
        ("optimizer: {lr: 1}", UnknownNameError, "entry of optimizer"),
        ("optimizer: adam", SpecError, "learning_rate: 0.02"),
        ("epochs: many", SpecError, "epochs must be int, got 'many'"),
        ("weight_bits: 9", SpecError, "weight_bits: bit_width must be"),
        ("augment: cut", SpecError, "augment must be one of"),
        ("keep: fc", SpecError, "keep must be a list"),
        ("options: 3", SpecError, "options must hold names and values"),
        ("- a", SpecError, "expected names and values"),
        ("a: [", SpecError, "recipe.yaml, line 1: expected the node content"),
        ("policy: {default: {weight: 4}}\nweight_bits: 3", SpecError, "leave out weight_bits"),
        ("method: brecq", SpecError, "brecq' is a post_training method. To train use one of"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_place(content: str, error: type[Exception], told: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(content)
    with pytest.raises(error, match=re.escape(told)):
        TrainRequest.from_yaml(path).bit_policy()
    shown = fails(path, "--out", tmp_path / "out")
    assert told in shown or in_flags(told) in shown
    assert not (tmp_path / "out").exists()


def test_a_folder_in_place_of_a_recipe_is_refused_with_the_way_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=re.escape(f"pass out={str(tmp_path)!r} and resume=True")):
        TrainRequest.from_yaml(tmp_path)


def test_a_dry_run_shows_layers_phases_and_data_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("--model", "resnet8", "--data", "digits", "-w", "2", "--epochs", "4", "--out", out, "--dry-run")
    assert result.exit_code == 0, result.output
    assert re.search(r"layer1.0.conv1 +conv2d +2 +4", result.output)
    assert "phases: train 4 epochs" in result.output
    assert "training: digits, 1197 samples" in result.output
    assert "starts from random weights" in result.output
    assert not out.exists()


def test_bad_options_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "out"]
    assert "Did you mean 'lsq'" in fails("--method", "lqs", *out)
    assert "Did you mean 'quantizer_weight_decay'" in fails("--option", "quantizer_weight_decy=1", *out)
    assert "unknown surrogate" in fails("--surrogate", "nothing", *out)
    assert "Did you mean 'qkd'" in fails("--procedure", "qdk", *out)
    assert "unknown option of the procedure qkd 'tau'" in fails("--procedure", "qkd", "--procedure-option", "tau=1", *out)
    assert "trains a network for one width: give --weight-bits" in fails("--method", "lsq", "--bits", "8,4", *out)
    assert "leave out --weight-bits" in fails("--bits", "8,4", "-w", "4", *out)
    assert "expected a time such as 300s" in fails("--save-every", "often", *out)
    assert "there is no data to train resnet8 on" in fails("--model", "resnet8", *out)
    assert "has random weights" in fails("--teacher", "resnet8", *out)
    assert "belong to a teacher" in fails("--teacher-weights", "x.safetensors", *out)
    assert "there is no such file" in fails("--model", "digits", "--weights", tmp_path / "no.safetensors", *out)
    assert "precision must be one of" in fails("--precision", "12", *out)
    assert "fp16 needs a GPU" in fails("--precision", "fp16", "--device", "cpu", *out)
    assert "epochs must be 1 or more" in fails("--epochs", "0", *out)
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").iterdir()) == []


def test_a_method_that_makes_its_own_samples_never_opens_training_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def load(name: str, *, split: str, **rest: object) -> object:
        opened.append(split)
        assert split == "test", "training data were opened"
        return load_data(name, split=split, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr("lowbit.workflows.domain.load_data", load)
    few = ["--method", "zaq", "-o", "rounds=2", "-o", "width=4", "--batch-size", "8", *SHORT]
    result = run(*few, "--out", tmp_path / "digits")
    assert result.exit_code == 0, result.output
    assert opened == ["test"] and "accuracy" in result.output
    report = json.loads((tmp_path / "digits" / "report.json").read_text())
    assert report["run"]["data"]["training"] == "samples that the method makes"
    assert report["metrics"]["accuracy"]["float"] > 0.9


def test_no_data_at_all_need_a_shape(tmp_path: Path) -> None:
    save_file(small().state_dict(), tmp_path / "small.safetensors")
    code = "from tests.cli.test_train import small"
    (tmp_path / "net.py").write_text(f"import sys\nsys.path.insert(0, {str(Path.cwd())!r})\n{code}\n\n\ndef net():\n    return small()\n")
    network = ["--model", f"{tmp_path / 'net.py'}:net", "--weights", tmp_path / "small.safetensors"]
    few = ["--method", "zaq", "-o", "rounds=2", "-o", "width=4", "--batch-size", "8", *SHORT, "--out", tmp_path / "out"]
    assert "nothing says in which shape: give that of one input, --input-shape" in fails(*network, *few)
    assert "lsq takes those of its data" in fails("--input-shape", "1x8x8", "--out", tmp_path / "out")
    assert "zaq" in fails(*network, "--out", tmp_path / "out")  # what does without data
    assert "expected whole numbers joined by x" in fails(*network, *few, "--input-shape", "square")
    result = run(*network, *few, "--input-shape", "3x8x6")
    assert result.exit_code == 0, result.output
    assert "training: samples that the method makes, 8 at a time" in run(*network, *few, "--input-shape", "3x8x6", "--dry-run").output


def test_a_teacher_may_be_the_network_itself_or_a_file_of_weights(tmp_path: Path) -> None:
    for name, teacher in (("self", "self"), ("file", str(default_weights()))):
        result = run("--teacher", teacher, "--distillation", "1", "--out", tmp_path / name, *SHORT)
        assert result.exit_code == 0, result.output
    first, second = (weights(tmp_path / name) for name in ("self", "file"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    plain = run("--out", tmp_path / "plain", *SHORT)
    assert plain.exit_code == 0
    assert any(not torch.equal(tensor, first[name]) for name, tensor in weights(tmp_path / "plain").items())


def test_training_starts_from_the_weights_that_are_given(tmp_path: Path) -> None:
    state = {name: tensor + 0.01 if name == "fc.bias" else tensor for name, tensor in load_default().state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, tmp_path / "float.safetensors")
    command = ["--lr", "0", "--weight-decay", "0", *SHORT]
    assert run("--model", "digits", "--weights", tmp_path / "float.safetensors", "--out", tmp_path / "out", *command).exit_code == 0
    found = weights(tmp_path / "out")
    bias = next(tensor for name, tensor in found.items() if name.endswith("fc.bias"))
    assert torch.equal(bias, load_file(tmp_path / "float.safetensors")["fc.bias"])


def pictures(folder: Path, classes: int = 4, per_class: int = 6) -> None:
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(classes):
            (folder / part / f"class{label}").mkdir(parents=True)
            for index in range(per_class):
                pixels = (generator.random((20, 24, 3)) * 60 + 45 * label).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class{label}" / f"{index}.png")


def test_a_folder_of_pictures_is_trained_on_and_broken_ones_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    pictures(folder)
    broken = folder / "train" / "class1" / "0.png"
    broken.write_bytes(broken.read_bytes()[:40])
    command = ["--model", MODEL, "--data", folder, "--preprocess", "size=16", "--batch-size", "8", *SHORT]
    result = run(*command, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "1 pictures of" in result.output and "are left out" in " ".join(result.output.split())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("cannot be decoded and are left out" in note for note in report["notes"])
    assert report["samples"] == 24
    assert json.loads((tmp_path / "out" / "train.json").read_text())["settings"]["data"]["samples"] == 23
    assert "0.png" in fails(*command, "--strict", "--out", tmp_path / "strict")


def test_labels_beyond_the_outputs_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    pictures(folder, classes=5, per_class=2)
    told = fails("--model", MODEL, "--data", folder, "--preprocess", "size=16", "--out", tmp_path / "out", *SHORT)
    assert re.search(r"the data has the label 4, but the network has 4 outputs", told)
    assert not (tmp_path / "out" / ".work").exists()


def test_samples_without_a_test_part_are_told_apart(tmp_path: Path) -> None:
    labels = np.arange(16) % 4
    np.savez(tmp_path / "data.npz", images=np.random.default_rng(0).random((16, 3, 8, 8)).astype(np.float32), labels=labels)
    result = run("--model", MODEL, "--data", tmp_path / "data.npz", "--batch-size", "8", "--out", tmp_path / "out", *SHORT)
    assert result.exit_code == 0, result.output
    assert "has no test part: metrics are measured on the training samples" in " ".join(result.output.split())
    np.savez(tmp_path / "unlabelled.npz", images=np.zeros((4, 3, 8, 8), np.float32))
    assert "there are no labels to train with" in fails("--model", MODEL, "--data", tmp_path / "unlabelled.npz", *SHORT)


def test_weights_that_become_infinite_are_an_error_that_names_the_layer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    told = fails("--lr", "1e30", "--out", out, *ONLY_TRAIN)
    assert re.search(r"training diverged at step \d+: .*lower learning rate", told)
    assert re.search(r"'[\w.]+' \(\w+\)", told)


class Live:
    """A ``lowbit train`` in a process of its own."""

    def __init__(self, out: Path, *arguments: str) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        self.arguments = ["--epochs", "4", "--batch-size", "16", "--save-every", "5", "--out", str(out), *ONLY_TRAIN, *arguments]
        self.out = out
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lowbit", "train", *self.arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for_steps(self, count: int) -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            path = self.out / ".work" / "last.safetensors"
            if path.exists() and read_tensors(path)[1]["position"]["step"] >= count:  # type: ignore[index]
                return
            time.sleep(0.02)
        self.process.kill()
        raise AssertionError(self.process.communicate()[0])

    def end(self) -> str:
        return self.process.communicate(timeout=120)[0]


@pytest.mark.slow
def test_a_killed_and_then_terminated_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    out = tmp_path / "out"
    live = Live(out)
    live.wait_for_steps(20)
    live.process.send_signal(signal.SIGSTOP)
    assert "another run" in fails("--epochs", "4", "--batch-size", "16", "--out", out, *ONLY_TRAIN)
    live.process.send_signal(signal.SIGKILL)
    live.end()
    assert live.process.returncode == -signal.SIGKILL
    assert (out / ".lock").exists()  # a dead process cannot remove it

    killed_at = read_tensors(out / ".work" / "last.safetensors")[1]["position"]["step"]  # type: ignore[index]

    live = Live(out)
    live.wait_for_steps(killed_at + 20)
    live.process.send_signal(signal.SIGTERM)
    told = " ".join(live.end().split())
    assert live.process.returncode == 143, told
    assert "resuming the run" in told
    assert "stopped by SIGTERM after step" in told and "Resume it with: lowbit train --epochs 4" in told and told.endswith("--resume")
    assert "Traceback" not in told
    assert not (out / ".lock").exists()
    stopped = read_tensors(out / ".work" / "last.safetensors")[1]["position"]["step"]  # type: ignore[index]
    assert killed_at + 20 <= stopped < 4 * 75

    quick = ["--epochs", "4", "--batch-size", "16", *ONLY_TRAIN]
    done = [run(*quick, "--out", folder) for folder in (out, tmp_path / "whole")]
    assert [result.exit_code for result in done] == [0, 0], done[0].output
    first, second = (weights(folder) for folder in (out, tmp_path / "whole"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name].nan_to_num(7.0), second[name].nan_to_num(7.0)) for name in first)


def test_a_stopped_run_with_other_settings_is_not_deleted_by_train_or_quantize(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run("--out", out, *SHORT).exit_code == 0
    for name in (".work/done", "report.json", "train.json"):  # as if it had been stopped
        (out / name).unlink()
    assert "epochs: 1, now 2" in fails("--out", out, "--epochs", "2", *ONLY_TRAIN)
    quantize = CliRunner().invoke(app, ["quantize", "--method", "round_to_nearest", "--calibration-samples", "32", "--out", str(out)])
    assert quantize.exit_code == 2 and "holds a stopped run with other settings" in " ".join(quantize.output.split())
    assert (out / ".work" / "last.safetensors").exists()
    assert run("--out", out, "--fresh", *SHORT).exit_code == 0
