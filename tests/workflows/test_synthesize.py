"""``lowbit.synthesize`` as users call it, and the files that a request writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.synthesis.networks import seen, small, two_inputs
from torch import nn

import lowbit
from lowbit.errors import CalibrationError, SpecError, UnknownNameError
from lowbit.models import load_default
from lowbit.progress import Stage
from lowbit.synthesis import descent
from lowbit.workflows.requests import SynthesizeRequest
from lowbit.workflows.synthesize import FILES, synthesize_and_write

QUICK = {"method": "zeroq", "options": {"iterations": 12}, "count": 6, "compared": 20}


def test_shapes_and_counts_that_mean_nothing_are_refused() -> None:
    model = small()
    for given, words in (
        ({}, r"pass shape=, the shape of one sample .* or sample="),
        ({"shape": (2, 6, 6), "sample": torch.zeros(1, 2, 6, 6)}, "not both"),
        ({"shape": (2, 0, 6)}, r"shape=\(2, 0, 6\): expected the positive sizes"),
        ({"shape": ()}, "expected the positive sizes"),
        ({"shape": (2, 6, 6), "count": 0}, "count=0: at least one"),
    ):
        with pytest.raises(SpecError, match=words):
            lowbit.synthesize(model, **given)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match=r"cannot take inputs of shape 6 x 6 for a sample"):
        lowbit.synthesize(model, shape=(6, 6))
    with pytest.raises(UnknownNameError, match="unknown option of dsg 'iteration'"):
        lowbit.synthesize(model, shape=(2, 6, 6), iteration=3)
    with pytest.raises(UnknownNameError, match=r"It is an argument of lowbit\.synthesize"):
        lowbit.synthesize(model, shape=(2, 6, 6), shapes=3)
    with pytest.raises(SpecError, match="To make samples use one of: dsg, zeroq"):
        lowbit.synthesize(model, method="adaround", shape=(2, 6, 6))


def test_wrappers_and_gradients_that_are_off_make_no_difference() -> None:
    expected = lowbit.synthesize(small(), method="zeroq", shape=(2, 6, 6), count=3, iterations=5)
    with torch.inference_mode():
        wrapped = lowbit.synthesize(nn.DataParallel(small()), method="zeroq", shape=(2, 6, 6), count=3, iterations=5)
    assert torch.equal(wrapped.inputs.args[0], expected.inputs.args[0])
    assert [entry.norm for entry in wrapped.statistics] == ["1", "4"]


def test_real_data_are_measured_beside_the_samples() -> None:
    torch.manual_seed(1)
    data = lowbit.synthesize(small(), method="zeroq", shape=(2, 6, 6), count=8, iterations=5, data=2 * torch.randn(200, 2, 6, 6) + 0.5)
    for entry in data.statistics:
        assert entry.data is not None and entry.data.std_error < 0.8 * entry.noise.std_error
    assert lowbit.synthesize(small(), method="zeroq", shape=(2, 6, 6), iterations=2).statistics[0].data is None


def test_several_inputs_are_given_as_a_sample() -> None:
    model, given = two_inputs()
    data = lowbit.synthesize(model, method="dsg", sample=given, iterations=20, noise_samples=32)
    assert len(data) == 2 and [entry.norm for entry in data.statistics] == ["norm", "norm1"]
    assert data.statistics[0].samples.spread is not None and data.statistics[1].samples.spread is None


def test_samples_are_kept_by_network_method_options_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(**given: object) -> torch.Tensor:
        settings = {"method": "zeroq", "shape": (2, 6, 6), "count": 3, "iterations": 4, "work_dir": tmp_path, **given}
        return lowbit.synthesize(small(), **settings).inputs.args[0]  # type: ignore[arg-type]

    steps: list[float] = []
    run = descent._Batch.run

    def counting(self: descent._Batch, *arguments: object) -> None:
        before = len(self.losses)
        run(self, *arguments)  # type: ignore[arg-type]
        steps.append(len(self.losses) - before)

    monkeypatch.setattr(descent._Batch, "run", counting)
    variants: list[dict[str, object]] = [{}, {"seed": 1}, {"learning_rate": 0.1}, {"count": 4}, {"method": "dsg", "noise_samples": 8}]
    first = [of(**variant) for variant in variants]
    assert steps == [4] * 5
    steps.clear()
    second = [of(**variant) for variant in variants]
    assert steps == [0] * 5
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = small()
    other[0].weight.data.mul_(1.01)
    lowbit.synthesize(other, method="zeroq", shape=(2, 6, 6), count=3, iterations=4, work_dir=tmp_path)
    assert steps[-1] == 4


def test_a_request_writes_samples_a_sheet_facts_and_a_page(tmp_path: Path) -> None:
    written = synthesize_and_write(SynthesizeRequest(**QUICK, out=str(tmp_path)))  # type: ignore[arg-type]
    assert written.files == FILES == tuple(name for name in FILES if (tmp_path / name).is_file())
    loaded = lowbit.SynthesizedData.load(tmp_path / "samples.safetensors")
    again = lowbit.synthesize(load_default(), method="zeroq", shape=(1, 8, 8), count=6, iterations=12)
    assert torch.equal(loaded.inputs.args[0], again.inputs.args[0])
    facts = json.loads((tmp_path / "synthesis.json").read_text())
    assert facts["network"] == "digits" and facts["count"] == 6 and len(facts["losses"]) == 12 and facts["options"]["iterations"] == 12
    assert [entry["norm"] for entry in facts["statistics"]] == [entry.norm for entry in loaded.statistics]
    assert all(entry["data"] is not None for entry in facts["statistics"])
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.mode == "L" and sheet.size == (3 * 50 + 2, 2 * 50 + 2)
    page = (tmp_path / "report.html").read_text()
    assert "block2.norm1" in page and "data:image/png;base64," in page and page.count("<svg") == 4
    assert not (tmp_path / ".work").exists()


def test_without_data_a_shape_is_needed_and_pictures_of_other_channels_are_not_drawn(tmp_path: Path) -> None:
    model = tmp_path / "net.py"
    model.write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())\n    model(torch.randn(8, 2, 6, 6))\n    return model.eval()\n"
    )
    request = SynthesizeRequest(model=f"{model}:build", method="zeroq", count=2, options={"iterations": 2}, out=str(tmp_path / "out"))
    with pytest.raises(CalibrationError, match=r"no data for the network .*input_shape='3x224x224'"):
        synthesize_and_write(request)
    written = synthesize_and_write(request.changed({"input_shape": "2x6x6"}))
    assert "samples.png" not in written.files and not (tmp_path / "out" / "samples.png").exists()
    assert any("no samples.png" in note for note in written.notes)
    assert written.data.statistics[0].data is None
    assert "no pictures of one or three channels" in (tmp_path / "out" / "report.html").read_text()


def test_a_stopped_request_goes_on_to_the_same_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synthesize_and_write(SynthesizeRequest(**QUICK, out=str(tmp_path / "whole")))  # type: ignore[arg-type]
    advance = Stage.advance

    def deadly(stage: Stage, amount: float = 1, note: str = "") -> None:
        advance(stage, amount, note)
        if stage.name == "synthesis" and stage.done == 7:
            raise KeyboardInterrupt

    request = SynthesizeRequest(**QUICK, out=str(tmp_path / "killed"))  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(Stage, "advance", deadly)
        patched.setattr(descent, "SAVE_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            synthesize_and_write(request)
    assert list((tmp_path / "killed" / ".work").rglob("*.safetensors"))
    with pytest.raises(SpecError, match=r"stopped run with other settings .*seed: 0, now 1"):
        synthesize_and_write(request.changed({"seed": 1}))
    synthesize_and_write(request)
    whole, killed = (lowbit.SynthesizedData.load(tmp_path / name / "samples.safetensors") for name in ("whole", "killed"))
    assert torch.equal(whole.inputs.args[0], killed.inputs.args[0]) and whole.to_dict() == killed.to_dict()


def test_norms_that_are_left_out_are_said(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    data = lowbit.synthesize(seen(model, torch.randn(8, 1, 6, 6)), method="zeroq", shape=(1, 6, 6), count=2, iterations=2)
    assert data.notes == ("left out: 3: no running statistics (track_running_stats=False)",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"input_shape": "1,x,3"}, r"input_shape='1,x,3': expected whole numbers joined by x"),
        ({"input_shape": "3x9x9"}, r"input_shape='3x9x9' contradicts digits, whose samples are 1x8x8"),
        ({"count": 10**14}, r"count=100000000000000: the samples take [\d,.]+ GB, and this machine has"),
    ],
)
def test_shapes_and_counts_that_cannot_be_are_refused(settings: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=message):
        synthesize_and_write(SynthesizeRequest(method="zeroq", options={"iterations": 1}, out=str(tmp_path / "s")).changed(settings))
