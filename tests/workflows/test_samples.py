"""Samples that a name asks for in place of data, wherever calibration or training data may be named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import lowbit
from lowbit.data import SUITES, ImageData
from lowbit.data.loading import DataSuite
from lowbit.errors import CalibrationError, DataError, FileFormatError, LayerError, LowbitError, SpecError, UnknownNameError
from lowbit.inputs import Inputs
from lowbit.methods.zero_shot.zeroq import ZeroqSamples
from lowbit.models import load_default
from lowbit.progress import Progress
from lowbit.provenance import Provenance, provenance_from_json, provenance_of
from lowbit.synthesis import descent
from lowbit.synthesis.samples import SynthesizedData
from lowbit.workflows.diagnose import quantize_and_diagnose
from lowbit.workflows.export import load_and_export
from lowbit.workflows.origin import origin_of
from lowbit.workflows.quantize import open_quantization
from lowbit.workflows.requests import DiagnoseRequest, ExportRequest, SearchRequest
from lowbit.workflows.samples import CACHE, Making, has_no_labels, is_made, samples_file, training_data_of

SILENT = Progress.silent()
QUICK = {"iterations": 8}
ZEROQ: dict[str, Any] = {"calibration": "zeroq", "calibration_options": QUICK, "calibration_samples": 12}


def normed() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    model(torch.randn(64, 1, 6, 6) * 2 + 1)
    return model.eval()


def shape() -> Inputs:
    return Inputs((torch.zeros(1, 1, 6, 6),))


@pytest.fixture
def without_training_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits, of which only the test part can be read."""

    def load(root: Path | None, split: str) -> ImageData:
        if split != "test":
            raise AssertionError(f"the {split} part was read")
        return known.load(root, split)

    known = SUITES["digits"]
    monkeypatch.setitem(SUITES, "digits", DataSuite(known.summary, known.places, load))


def test_the_samples_of_a_name_are_those_of_synthesize() -> None:
    made = Making("zeroq", QUICK, 5, seed=3).make(normed(), shape(), progress=SILENT)
    expected = lowbit.synthesize(normed(), method="zeroq", shape=(1, 6, 6), count=5, seed=3, iterations=8)
    assert torch.equal(made.args[0], expected.inputs.args[0])
    other = Making("zeroq", QUICK, 5, seed=4).make(normed(), shape(), progress=SILENT)
    assert not torch.equal(made.args[0], other.args[0])


def test_noise_is_normal_of_the_shape_and_needs_no_norms() -> None:
    model = nn.Linear(16, 2)
    made = Making("noise", count=4000).make(model, Inputs((torch.zeros(1, 16),)), progress=SILENT).args[0]
    assert made.shape == (4000, 16) and abs(float(made.mean())) < 0.02 and abs(float(made.std()) - 1) < 0.02
    assert Making("noise").make(model, Inputs((torch.zeros(1, 16),)), progress=SILENT).batch_size == 64


def test_what_was_made_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    making = Making("zeroq", QUICK, 4)
    first = making.make(normed(), shape(), progress=SILENT, cache=tmp_path)
    monkeypatch.setattr(ZeroqSamples, "synthesize", lambda *_: pytest.fail("made again"))
    assert torch.equal(making.make(normed(), shape(), progress=SILENT, cache=tmp_path).args[0], first.args[0])
    with pytest.raises(pytest.fail.Exception):
        Making("zeroq", QUICK, 4, seed=1).make(normed(), shape(), progress=SILENT, cache=tmp_path)


def test_a_run_that_is_killed_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = lowbit.QuantizeRequest(method="round_to_nearest", onnx=False, out=str(tmp_path / "whole"), **ZEROQ)
    whole = lowbit.quantize_and_deliver(request)
    saved, save = [], descent.RunState.save

    def dying(self: descent.RunState, name: str, *rest: Any) -> None:
        save(self, name, *rest)
        saved.append(name)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(descent, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(descent.RunState, "save", dying)
    request = request.changed({"out": str(tmp_path / "killed")})
    with pytest.raises(KeyboardInterrupt):
        lowbit.quantize_and_deliver(request)
    assert (tmp_path / "killed" / CACHE).is_dir()
    resumed = lowbit.quantize_and_deliver(request)
    assert len(saved) == 5 + 3 + 1  # three steps were left; and all samples at the end
    packed = [lowbit.load(tmp_path / name / "model.lowbit").state_dict() for name in ("whole", "killed")]
    assert all(torch.equal(one, other) for one, other in zip(*(held.values() for held in packed), strict=True))
    assert resumed.report.metrics == whole.report.metrics
    assert not (tmp_path / "killed" / CACHE).exists()


@pytest.mark.usefixtures("without_training_images")
def test_no_training_image_is_touched(tmp_path: Path) -> None:
    request = lowbit.QuantizeRequest(method="round_to_nearest", packed=False, onnx=False, out=str(tmp_path / "q"), **ZEROQ)
    report = lowbit.quantize_and_deliver(request).report
    assert report.metrics["accuracy"].quantized > 0.9
    known = origin_of(tmp_path / "q").provenance
    assert known is not None and known.data == "digits" and known.synthesis["method"] == "zeroq" and known.synthesis["samples"] == 12
    with pytest.raises(AssertionError, match="the calibration part was read"):
        lowbit.quantize_and_deliver(request.changed({"calibration": None, "calibration_options": {}}))
    search = SearchRequest(method="zeroq_pareto", budget=("average=4",), out=str(tmp_path / "s"), **ZEROQ)
    assert lowbit.search_and_write(search).result.cost["average"] <= 4
    quantize_and_diagnose(DiagnoseRequest(samples=4, remedies=0, weight_bits=3, out=str(tmp_path / "d"), **ZEROQ))
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["diagnosis.json"]


@pytest.mark.usefixtures("without_training_images")
def test_a_network_is_trained_on_samples_without_labels(tmp_path: Path) -> None:
    given: dict[str, Any] = {"data": "zeroq", "data_options": QUICK, "synthesized_samples": 32, "test_data": "digits", "teacher": "self"}
    request = lowbit.TrainRequest(method="lsq", packed=False, onnx=False, device="cpu", out=str(tmp_path), **given)
    delivery = lowbit.train_and_deliver(request.changed({"epochs": 1, "batch_size": 16}))
    assert delivery is not None and delivery.report.metrics["accuracy"].quantized > 0.9
    assert delivery.report.run["data"]["training"] == "zeroq (no data: samples made with seed 0), 32 samples"
    with pytest.raises(DataError, match="have no labels"):
        lowbit.train_and_deliver(request.changed({"teacher": None}))
    with pytest.raises(SpecError, match="zaq makes its own samples"):
        lowbit.train_and_deliver(request.changed({"method": "zaq", "out": str(tmp_path / "zaq")}))


@pytest.mark.parametrize("method", ["lsq", "pact", "qkd", "effective_lowbit", "bit_mixer"])
def test_every_training_method_learns_from_a_teacher_alone(method: str) -> None:
    options: dict[str, Any] = {"bits": "8,4"} if method == "bit_mixer" else {}
    torch.manual_seed(1)
    data, start = torch.randn(64, 1, 6, 6) * 2 + 1, normed()
    nn.init.normal_(start[4].weight, std=0.3)  # type: ignore[arg-type]
    teacher = normed()
    recipe = lowbit.Recipe(epochs=12, batch_size=16, optimizer=lowbit.OptimizerSpec(learning_rate=0.05))
    trained = lowbit.train(start, data, method=method, teacher=teacher, recipe=recipe, progress=False, **options)
    before, after = ((network(data).argmax(1) == teacher(data).argmax(1)).float().mean() for network in (start, trained))
    assert before < 0.6 and after > 0.8


def test_a_method_that_needs_labels_says_so() -> None:
    with pytest.raises(SpecError, match="squared_hinge needs class labels"):
        lowbit.train(
            normed(),
            torch.randn(32, 1, 6, 6),
            method="binary_connect",
            weight_bits=1,
            activation_bits=None,
            teacher="self",
            squared_hinge=True,
        )
    with pytest.raises(DataError, match="hold no labels"):
        lowbit.train(normed(), torch.randn(32, 1, 6, 6))


def test_python_takes_a_name_as_data() -> None:
    model, sample = normed(), torch.zeros(1, 1, 6, 6)
    method = ZeroqSamples(iterations=8)
    quantized = lowbit.quantize(model, method="round_to_nearest", calibration=method, sample=sample, seed=2)
    same = lowbit.quantize(
        model, method="round_to_nearest", calibration=lowbit.synthesize(model, method=method, sample=sample, seed=2), seed=2
    )
    x = torch.randn(8, 1, 6, 6)
    assert torch.equal(quantized(x), same(x))
    known = provenance_of(quantized)
    assert known is not None and known.synthesis == {
        "method": "zeroq", "seed": 2, "samples": 64, "shapes": [[1, 6, 6]], "options": method.hyper_parameter_values(),
    }  # fmt: skip
    assert provenance_from_json(known.to_json()) == known
    found = lowbit.search(model, method="zeroq_pareto", budget="average=4", calibration="noise", sample=sample, first_last_bits=None)
    assert found.cost["average"] <= 4
    trained = lowbit.train(
        model, "noise", teacher="self", sample=sample, synthesized_samples=32, recipe=lowbit.Recipe(epochs=1, batch_size=16)
    )
    assert trained(x).shape == (8, 3)


def test_the_folder_of_lowbit_synthesize_is_data(tmp_path: Path) -> None:
    made = lowbit.synthesize(load_default(), method="zeroq", shape=(1, 8, 8), count=32, **QUICK)
    made.save(tmp_path / "samples.safetensors")
    request = lowbit.QuantizeRequest(method="round_to_nearest", calibration=str(tmp_path), calibration_samples=20)
    source = open_quantization(request.changed({"out": str(tmp_path / "q")})).source
    assert source.calibration is not None and source.calibration.samples == 20
    assert torch.equal(source.calibration.sample.args[0], made.inputs.args[0][:20])
    assert source.provenance.synthesis["seed"] == 0 and source.provenance.calibration == str(tmp_path)
    quantized = lowbit.quantize(load_default(), method="round_to_nearest", calibration=tmp_path)
    assert quantized(made.inputs.args[0]).shape == (32, 10)
    train = lowbit.TrainRequest(data=str(tmp_path), teacher="self", packed=False, onnx=False, device="cpu", out=str(tmp_path / "t"))
    delivery = lowbit.train_and_deliver(train.changed({"epochs": 1, "batch_size": 16}))
    assert delivery is not None and delivery.report.run["data"]["training"] == f"{tmp_path}, 32 samples"


def test_data_that_is_called_as_a_method_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dsg").mkdir()
    for place in range(3):
        Image.fromarray(np.full((8, 8), 40 * place, dtype=np.uint8)).save(tmp_path / "dsg" / f"{place}.png")
    plan = open_quantization(lowbit.QuantizeRequest(method="round_to_nearest", calibration="./dsg"))
    assert plan.source.making is None and plan.source.calibration is not None and plan.source.calibration.samples == 3
    plan = open_quantization(lowbit.QuantizeRequest(method="round_to_nearest", calibration="dsg"))
    assert plan.source.making is not None and any("./dsg" in note for note in plan.source.notes)


def test_files_of_a_network_say_how_its_samples_were_made_and_are_measured_the_same_way(tmp_path: Path) -> None:
    request = lowbit.QuantizeRequest(method="round_to_nearest", onnx=False, out=str(tmp_path / "q"), **ZEROQ)
    lowbit.quantize_and_deliver(request)
    origin = origin_of(tmp_path / "q" / "model.lowbit")
    assert origin.provenance is not None and "12 samples made by zeroq with seed 0" in str(origin.provenance)
    filled = origin.fill(DiagnoseRequest())
    assert (filled.calibration, filled.input_shape, filled.calibration_samples) == ("zeroq", "1x8x8", 12) and filled.calibration_options[
        "iterations"
    ] == 8
    report = load_and_export(ExportRequest(to=str(tmp_path / "float.onnx"), **{**ZEROQ, "calibration_samples": 4}))
    assert report.parity.passed


@pytest.mark.parametrize(
    ("run", "error", "told"),
    [
        (lambda: Making("noise", {"iterations": 3}), SpecError, "noise has no hyper-parameters"),
        (lambda: Making("zeroq", {"iteration": 3}), UnknownNameError, "'iteration'. Did you mean 'iterations'"),
        (lambda: open_quantization(lowbit.QuantizeRequest(calibration="digits", calibration_options=QUICK)), SpecError, "noise, dsg, zeroq"),
        (lambda: open_quantization(lowbit.QuantizeRequest(model="resnet20", calibration="dsg")), CalibrationError, "nothing says in which shape"),
        (lambda: lowbit.quantize(normed(), calibration="dsq", sample=torch.zeros(1, 1, 6, 6)), UnknownNameError, "Did you mean 'dsg'"),
        (lambda: lowbit.quantize(normed(), calibration="dsg"), CalibrationError, "pass sample="),
        (lambda: lowbit.train(normed(), "dsg", teacher="self"), SpecError, "pass sample="),
        (
            lambda: lowbit.quantize(nn.Sequential(nn.Linear(4, 4)), calibration="dsg", sample=torch.zeros(1, 4)),
            LayerError,
            "batch norms, and it has none. Pass calibration data instead",
        ),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(run: Callable[[], object], error: type[LowbitError], told: str) -> None:
    with pytest.raises(error, match=told):
        run()


def test_names_files_and_forms() -> None:
    assert is_made("noise") and is_made("zeroq") and is_made(ZeroqSamples) and is_made("my.py:Method")
    assert not is_made("./zeroq") and not is_made(None) and not is_made(torch.zeros(2))
    assert samples_file(Path("somewhere/x.safetensors")) is not None and samples_file("nowhere") is None
    several = training_data_of(Inputs((torch.zeros(4, 2), torch.ones(4, 3))))
    assert has_no_labels(torch.zeros(2)) and len(several) == 4 and all(isinstance(part, Tensor) for part in several[0])  # type: ignore[arg-type,index]
    with pytest.raises(SpecError, match="first dimension"):
        training_data_of(Inputs((torch.zeros(7, 4, 3),), batch_dim=1))
    assert (
        str(Provenance(calibration="noise", synthesis={"method": "noise", "seed": 1}))
        == "calibration noise, no data: samples made by noise with seed 1"
    )


@pytest.mark.parametrize("replace_by", [None, os.mkfifo, os.mkdir])
def test_a_folder_of_samples_that_lost_them_is_no_folder_of_pictures(replace_by: Callable[[Path], object] | None, tmp_path: Path) -> None:
    for name in ("synthesis.json", "samples.png"):
        (tmp_path / name).touch()
    if replace_by is not None:
        replace_by(tmp_path / "samples.safetensors")
    found = samples_file(tmp_path)
    assert found == tmp_path / "samples.safetensors"
    with pytest.raises(FileFormatError, match=r"samples\.safetensors: (there is no such file|a pipe or a device|a folder)"):
        SynthesizedData.load(found)
