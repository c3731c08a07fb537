"""A folder of pictures and a network of one's own are named once; every later command knows them."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner, Result

import lowbit
from lowbit.cli import app
from lowbit.data import Preprocessing, load_data
from lowbit.data.image_data import TensorImages
from lowbit.errors import FileFormatError, SpecError
from lowbit.models.loading import load_model
from lowbit.progress import Stage
from lowbit.provenance import Provenance
from lowbit.reading import read_yaml
from lowbit.spec import BitPolicy
from lowbit.workflows.origin import Origin, common_origin, origin_of
from lowbit.workflows.quantize import open_quantization
from lowbit.workflows.requests import EvaluateRequest
from lowbit.workflows.settings import NetworkSettings
from lowbit.workflows.train import open_training

NAMES = [f"{digit}-{word}" for digit, word in enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])]
PICTURES = Preprocessing(size=8, crop_fraction=1.0, mean=(0.1,), std=(0.7,), grey=True)
NAMED = ["--model", "net.py:build", "--weights", "net.safetensors", "--data", "photos"]
MADE = [part for setting in ("size=8", "crop_fraction=1", "grey=true") for part in ("--preprocess", setting)] + [
    "--mean",
    "0.1",
    "--std",
    "0.7",
]
CODE = """
from torch import nn

def build(classes: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))

def deep() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
"""


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def done(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def fails(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output and "error:" in result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: digits as PNG files, a network in a file, its weights, and what ``lowbit quantize`` made of them."""
    home = tmp_path_factory.mktemp("home")
    found = load_data("digits", split="train").dataset
    assert isinstance(found, TensorImages) and found.labels is not None
    for part, first in (("train", 0), ("val", 300)):
        for index in range(first, first + 300):
            folder = home / "photos" / part / NAMES[int(found.labels[index])]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((found.images[index, 0].numpy().astype(int) * 255 // 16).astype(np.uint8)).save(folder / f"{index}.png")
    (home / "net.py").write_text(CODE)
    train = load_data(str(home / "photos"), split="train", preprocessing=PICTURES)
    inputs, labels = zip(*(train.dataset[index] for index in range(len(train))), strict=True)
    means = torch.stack([torch.stack(inputs).flatten(1)[torch.tensor(labels) == label].mean(0) for label in range(10)])
    save_file({"1.weight": means, "1.bias": -means.square().sum(1) / 2}, home / "net.safetensors")  # the nearest class mean
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(home)
        done("quantize", *NAMED, *MADE, "-m", "round_to_nearest", "-w", "4", "--first-last-bits", "same", "--out", "out")
    return home


@pytest.fixture
def here(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it that a test may change; code in it has been named."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr("lowbit.workflows.origin.is_trusted", lambda model, _options: model in ("net.py:build", "digits"))
    return tmp_path / "home"


def report_of(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    content: dict[str, dict[str, dict[str, float]]] = json.loads((folder / "report.json").read_text())
    return content


def test_report_and_files_say_where_the_network_comes_from(home: Path) -> None:
    report = report_of(home / "out")
    facts = report["provenance"]
    assert (facts["model"], facts["weights"], facts["data"], facts["task"]) == (
        "net.py:build",
        "net.safetensors",
        "photos",
        "Classification",
    )
    assert facts["classes"] == NAMES and facts["preprocessing"]["mean"] == [0.1] and facts["preprocessing"]["grey"] is True
    for name in ("report.json", "model.lowbit", "model.onnx"):
        known = origin_of(home / "out" / name).provenance
        assert known is not None and known.to_json() == facts
    assert lowbit.load(home / "out" / "model.lowbit", kernels=True).provenance == known
    assert report["metrics"]["accuracy"]["float"] > 0.8  # so that what follows means something


def test_evaluate_needs_nothing_named_again(here: Path) -> None:
    output = done("evaluate", "out", "--out", ".")
    assert "inputs 8 x 8, grey, mean 0.1, std 0.7" in output and "10 classes: 0-zero, 1-one" in output
    found, accuracy = json.loads((here / "evaluation.json").read_text()), report_of(here / "out")["metrics"]["accuracy"]
    assert found["float"]["metrics"]["accuracy"] == accuracy["float"]
    assert found["model.lowbit"]["metrics"]["accuracy"] == accuracy["quantized"]
    assert found["model.onnx"]["metrics"]["accuracy"] == pytest.approx(accuracy["quantized"], abs=0.01)


def test_an_exported_file_knows_as_much(here: Path) -> None:
    done("export", "out", "--to", "deep/again.onnx", "--no-speed")
    done("export", "out", "--to", "deep/again.lowbit")
    for name in ("again.onnx", "again.lowbit"):
        assert origin_of(here / "deep" / name).provenance == origin_of(here / "out").provenance
        done("evaluate", f"deep/{name}", "--out", ".")
        accuracy = json.loads((here / "evaluation.json").read_text())[name]["metrics"]["accuracy"]
        assert accuracy == pytest.approx(report_of(here / "out")["metrics"]["accuracy"]["quantized"], abs=0.01)


def test_a_float_network_that_is_exported_says_it_too(here: Path) -> None:
    done("export", *NAMED, *MADE, "--to", "float.lowbit")
    assert origin_of(here / "float.lowbit").provenance == origin_of(here / "out").provenance


def test_run_names_the_classes_and_is_as_good_as_the_report(here: Path) -> None:
    output = done("run", "out", "photos/val", "--batch-size", "300", "--top", "2", "--out", "classes.csv")
    assert "inputs: 8 x 8, grey, mean 0.1, std 0.7" in output
    assert re.search(r"3-three/\d+\.png 3-three \d+\.\d%", output)
    rows = [line.split(",") for line in (here / "classes.csv").read_text().splitlines()[1:]]
    right = sum(Path(path).parent.name == name for path, name, *_ in rows) / len(rows)
    assert right == pytest.approx(report_of(here / "out")["metrics"]["accuracy"]["quantized"], abs=0.01)


def test_diagnose_takes_network_and_data_from_a_folder(here: Path) -> None:
    done("diagnose", "out", "--samples", "8", "--remedies", "0", "--out", ".")
    names = {suspect["name"] for suspect in json.loads((here / "diagnosis.json").read_text())["suspects"]}
    assert names == {"1", "0.input"}  # what the flattening reads, which hands it on


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (["--preprocess", "mean=0.5"], r"made with the preprocessing 8 x 8, grey, mean 0\.1.* asked for is 8 x 8, grey, mean 0\.5.*mean \(0\.1,\) and"),
        (["--data", "digits"], r"mean 0\.1, .*that of digits is 8 x 8, grey, mean 0\.3058"),
        (["--model", "digits"], r"made from net\.py:build with the weights net\.safetensors .*do not fit digits, which you name"),
        (["--weights", "other.safetensors"], r"weights net\.safetensors \(SHA-256 \w{12}\), but this is .*other\.safetensors \(SHA-256 \w{12}\)"),
        (["--data", "fewer"], r"knows 10 classes \('0-zero, 1-one.*fewer.* has 3 \('0-zero, 1-one, 2-two'\).*--classes"),
        (["--classes", ",".join("abcdefghij")], r"knows 10 classes \('0-zero.*has 10 \('a, b"),
        (["--classes", "a,b"], r"--classes gives 2 names .*has 10 classes"),
    ],
)  # fmt: skip
def test_what_does_not_belong_together_is_an_error_that_names_both_sides(asked: list[str], told: str, here: Path) -> None:
    state = load_file(here / "net.safetensors")
    save_file({name: tensor + 0.001 for name, tensor in state.items()}, here / "other.safetensors")
    for name in NAMES[:3]:
        shutil.copytree(here / "photos" / "val" / name, here / "fewer" / name)
    message = fails("evaluate", "out", *asked)
    assert re.search(told, message), message
    assert "out/model.lowbit" in message or "gives 2 names" in message


def test_mean_and_std_are_given_once() -> None:
    assert "--preprocess mean=0.2: mean was given by --mean too, with '0.1'" in fails("evaluate", *MADE, "--preprocess", "mean=0.2")


def test_run_holds_to_what_the_file_says(here: Path) -> None:
    assert "they differ in mean (0.1,) and (0.3,)" in fails("run", "out", "photos/val", "--preprocess", "mean=0.3")
    assert "that of digits is" in fails("run", "out", "photos/val", "--data", "digits")
    assert "knows 10 classes" in fails("run", "out", "photos/val", "--classes", "a,b,c")


@pytest.mark.parametrize(
    ("path", "option"), [("net.py", "--model"), ("net.safetensors", "--weights"), ("photos", "--data")]
)  # fmt: skip
def test_what_was_moved_is_named_with_the_option_that_finds_it_again(path: str, option: str, here: Path) -> None:
    (here / path).rename(here / f"moved-{path}")
    message = fails("evaluate", "out")
    assert f"but there is no {path} here" in message and f"say where it is with {option}" in message
    place = f"moved-{path}:build" if path == "net.py" else f"moved-{path}"
    done("evaluate", "out", option, place, "--out", ".")
    found, accuracy = json.loads((here / "evaluation.json").read_text()), report_of(here / "out")["metrics"]["accuracy"]
    assert found["float"]["metrics"]["accuracy"] == accuracy["float"]


def test_code_that_only_a_file_names_does_not_run(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(here)
    (here / "net.py").write_text(f"open({str(here / 'ran')!r}, 'w')\n{CODE}")
    message = fails("evaluate", "out")
    assert "net.py:build, whose code was not named on this machine before" in message and "--model net.py:build" in message
    assert not (here / "ran").exists()
    done("run", "out", "photos/val/1-one")  # needs no code
    done("evaluate", "out", "--model", "net.py:build")
    assert (here / "ran").exists()
    done("evaluate", "out")  # now it was named


def test_files_of_before_load_and_say_that_they_do_not_know(here: Path) -> None:
    path = Path(__file__).parents[1] / "formats" / "packed" / "files" / "lsq.lowbit"
    assert lowbit.load(path).provenance is None
    message = fails("evaluate", path)
    assert "lsq.lowbit does not say where its network comes from" in message and "--model" in message
    assert "lsq.lowbit does not say where its network comes from: name its data with --data" in fails("export", path, "--to", "x.onnx")


def test_pictures_for_a_file_that_does_not_know_are_made_as_told_or_with_a_note(here: Path) -> None:
    loaded = lowbit.load(here / "out" / "model.lowbit")
    lowbit.export(loaded, here / "bare.lowbit", sample=torch.zeros(2, 1, 8, 8), provenance=Provenance(task="Classification"))
    output = done("run", "bare.lowbit", "photos/val/1-one")
    assert "note: bare.lowbit does not say how pictures become inputs; they are made 8 x 8, grey, mean 0.5, std 0.5" in output
    assert " 1 " in output and "1-one 9" not in output  # classes go by their numbers
    (here / "names.txt").write_text("\n".join(NAMES))
    output = done("run", "bare.lowbit", "photos/val/1-one", "--preprocess", "mean=0.1", "--preprocess", "std=0.7", "--classes", "names.txt")
    assert "does not say" not in output and re.search(r"\.png 1-one \d", output)


@pytest.mark.slow
def test_a_training_from_random_weights_leaves_no_float_network_to_compare_with(here: Path) -> None:
    start = ["train", "--model", "resnet8", "--data", "photos", *MADE, "--epochs", "1", "--no-onnx", "--no-tensorboard", "--device", "cpu"]
    done(*start, "--out", "trained")
    facts = report_of(here / "trained")["provenance"]
    assert facts["model"] == "resnet8" and facts["classes"] == NAMES and "weights_sha256" not in facts
    done("evaluate", "trained", "--out", ".")
    found = json.loads((here / "evaluation.json").read_text())
    assert list(found) == ["model.lowbit", "notes"] and found["model.lowbit"]["agreement"] is None
    assert found["model.lowbit"]["metrics"]["accuracy"] == report_of(here / "trained")["metrics"]["accuracy"]["quantized"]


@pytest.mark.slow
def test_a_stopped_quantization_is_resumed_without_naming_its_network(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ["--model", "net.py:deep", "--data", "photos", *MADE]
    rest = [
        "-m",
        "brecq",
        "-w",
        "2",
        "--first-last-bits",
        "same",
        "--iterations",
        "12",
        "-o",
        "activation_iterations=12",
        "--calibration-samples",
        "64",
        "--no-onnx",
        "--out",
    ]
    done("quantize", *named, *rest, "whole")
    advance = Stage.advance

    def stop(stage: Stage, amount: float = 1, note: str = "") -> None:
        advance(stage, amount, note)
        if any((here / "stopped" / ".work").rglob("*.safetensors")):
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "advance", stop)
        assert run("quantize", *named, *rest, "stopped").exit_code == 130
    assert "net.py:deep, whose code was not named" in fails("quantize", *rest, "stopped")
    monkeypatch.setattr("lowbit.workflows.origin.is_trusted", lambda _model, _options: True)
    assert "resuming the run that was stopped" in done("quantize", *rest, "stopped")
    assert (here / "stopped" / "model.lowbit").read_bytes() == (here / "whole" / "model.lowbit").read_bytes()


def test_a_stopped_training_is_resumed_without_naming_its_network(here: Path) -> None:
    rest = ["--epochs", "1", "--no-onnx", "--no-packed", "--no-tensorboard", "--device", "cpu", "--out", "trained"]
    done("train", *NAMED, *MADE, *rest)
    (here / "trained" / ".work" / "done").unlink()  # as if it had been stopped
    assert "resuming the run that is in this folder" in done("train", *rest)
    (here / "trained" / ".work" / "done").unlink()
    assert "holds a stopped run with other settings" in fails("train", "--model", "digits", "--data", "digits", *rest)


def test_files_of_different_networks_in_a_folder_are_told_apart(here: Path) -> None:
    done("quantize", "-m", "round_to_nearest", "--no-onnx", "--calibration-samples", "32", "--out", "digits-out")
    shutil.copy(here / "digits-out" / "model.lowbit", here / "out" / "model.lowbit")
    message = fails("evaluate", "out")
    assert "out/model.lowbit and out/model.onnx do not belong together" in message and "network digits" in message


def test_a_network_for_another_task_is_not_measured_as_a_classifier() -> None:
    with pytest.raises(SpecError, match=r"a\.lowbit was made for the task Regression, this measures classification"):
        Origin("a.lowbit", Provenance(task="Regression")).with_task(NetworkSettings())


def test_files_that_say_nothing_take_what_another_says() -> None:
    known = Provenance(model="digits")
    assert common_origin({"a": None, "b": known}) == Origin("b", known)
    assert common_origin({"a": None, "b": None}) == Origin("a", None)


def test_what_the_user_names_wins_where_nothing_contradicts(tmp_path: Path) -> None:
    known = Provenance(model="digits", weights_sha256="0" * 64, data="digits", classes=("a", "b"))
    filled = Origin("x", known).fill(EvaluateRequest(data="fashion-mnist"))
    assert (filled.model, filled.data, dict(filled.preprocess)) == ("digits", "fashion-mnist", {})
    assert Origin("x", known).fill(EvaluateRequest()).data == "digits"
    numbered = Origin("x", Provenance(classes=("0", "1")))
    numbered.require_classes(("cat", "dog"), "photos")  # numbers are no names: only how many there are counts
    with pytest.raises(SpecError, match="x knows 2 classes"):
        numbered.require_classes(("cat", "dog", "cow"), "photos")


@pytest.mark.parametrize(
    ("text", "told"), [("{", "it is no report"), ('{"provenance": {"model": 3}}', "model must be printable"), ("[" * 100_000, "it is no report")]
)  # fmt: skip
def test_a_damaged_report_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(FileFormatError, match=told):
        origin_of(tmp_path)
    (tmp_path / "report.json").unlink()
    with pytest.raises(FileFormatError, match=r"there is no report\.json in this folder"):
        origin_of(tmp_path)


def test_a_factory_with_random_weights_gives_the_same_ones_for_the_same_seed(here: Path) -> None:
    named = ["--model", "net.py:build", "--data", "photos", *MADE]
    done("quantize", *named, "-m", "round_to_nearest", "--no-onnx", "--out", "random")
    done("evaluate", "random")
    message = fails("evaluate", "random", "--seed", "1")
    assert "the weights that it comes with" in message
    assert isinstance(load_model("net.py:build"), nn.Sequential)


def test_a_policy_knows_the_network_that_it_was_found_for(tmp_path: Path) -> None:
    """A command that takes it and names no network works with that one; one that names another is refused by both names."""
    asked = {"out": str(tmp_path / "s"), "budget": ("average=4",), "calibration_samples": 16}
    lowbit.search_and_write(
        lowbit.SearchRequest(model="resnet8", model_options={"in_channels": 1}, data="digits", method="random_bits").changed(asked)
    )
    policy = str(tmp_path / "s" / "policy.yaml")
    known = read_yaml(policy)["network"]  # type: ignore[index]
    assert known == json.loads((tmp_path / "s" / "search.json").read_text())["provenance"]
    assert (known["model"], known["data"]) == ("resnet8", "digits")
    request = lowbit.QuantizeRequest(method="round_to_nearest", policy=policy, out=str(tmp_path / "q"))
    plan = open_quantization(request)
    assert plan.source.name == "resnet8" and plan.source.provenance.data == "digits"
    assert plan.policy.network == {}
    train = lowbit.TrainRequest(policy=policy, out=str(tmp_path / "t"), device="cpu")
    assert open_training(train).source.name == "resnet8"
    with pytest.raises(SpecError, match=r"the policy was made from resnet8 .*but this is digits .*delete 'network' from the policy"):
        open_quantization(request.changed({"model": "digits"}))
    with pytest.raises(SpecError, match=r"the policy was made from resnet8 .*but this is digits"):
        open_training(train.changed({"model": "digits"}))
    assert "resnet8" in train.to_yaml()
    replace(BitPolicy.from_yaml(policy), network={}).to_yaml(tmp_path / "any.yaml")
    assert open_quantization(request.changed({"model": "digits", "policy": str(tmp_path / "any.yaml")})).source.name == "digits"


@pytest.mark.parametrize("network", [{"model": 7}, {"nothing": "x"}])
def test_a_policy_of_no_known_network_is_named(network: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="policy: network: "):
        open_quantization(lowbit.QuantizeRequest(policy={"network": network}, out=str(tmp_path)))
