from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tests.networks import SharedWeightNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.models import load_default
from lowbit.workflows.deliver import layer_reference
from lowbit.workflows.quantize import quantize_and_deliver
from lowbit.workflows.requests import QuantizeRequest


def test_python_and_a_request_give_the_same_report_and_the_same_file(tmp_path: Path) -> None:
    from lowbit.data import load_data, loader

    request = QuantizeRequest(
        method="round_to_nearest", weight_bits=4, calibration_samples=32, batch_size=32, onnx=False, out=str(tmp_path / "request")
    )
    asked = quantize_and_deliver(request)
    model = load_default()
    samples = next(iter(loader(load_data("digits", split="calibration"), 32)))[0]
    small = lowbit.quantize(model, method="round_to_nearest", weight_bits=4, calibration=samples)
    test = loader(load_data("digits", split="test"), 32)
    known = lowbit.load(tmp_path / "request" / "model.lowbit").provenance
    given = lowbit.deliver(
        small,
        tmp_path / "python",
        calibration=samples,
        float_model=model,
        test_data=test,
        name="digits",
        onnx=False,
        provenance=known,
    )
    first, second = asked.report.to_dict(), given.report.to_dict()
    for name in ("quantized", "metrics", "size_bytes", "options", "samples", "weight_bits", "model", "provenance"):
        assert first[name] == second[name], name
    assert (tmp_path / "request" / "model.lowbit").read_bytes() == (tmp_path / "python" / "model.lowbit").read_bytes()
    assert {path.name for path in (tmp_path / "python").iterdir()} == {"report.json", "report.html", "policy.yaml", "model.lowbit"}
    assert json.loads((tmp_path / "python" / "report.json").read_text())["parity"]["packed"]["passed"] is True


def test_without_a_float_network_nothing_is_compared(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 6)
    small = lowbit.quantize(nn.Sequential(nn.Linear(6, 4)), weight_bits=4, calibration=images)
    report = lowbit.deliver(small, tmp_path, calibration=images, onnx=False).report
    assert (report.size_float, report.sqnr_db, report.model) == (None, None, "Sequential")
    assert report.layers[0].sqnr_db is not None and report.layers[0].sqnr_db > 20


def test_a_network_that_is_not_quantized_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"Linear is not quantized: deliver what lowbit.quantize"):
        lowbit.deliver(nn.Linear(2, 2), tmp_path / "out", calibration=torch.randn(4, 2))
    small = lowbit.quantize(nn.Sequential(nn.Linear(6, 4)), calibration=torch.randn(8, 6))
    with pytest.raises(SpecError, match="pass calibration= or sample="):
        lowbit.deliver(small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bytes_levels_and_noise_are_what_the_files_and_networks_say(tmp_path: Path) -> None:
    request = QuantizeRequest(method="round_to_nearest", weight_bits=3, calibration_samples=64, onnx=False, out=str(tmp_path))
    report = quantize_and_deliver(request).report
    data, page = json.loads((tmp_path / "report.json").read_text()), (tmp_path / "report.html").read_text()
    size = (tmp_path / "model.lowbit").stat().st_size
    assert sum(part["total_bytes"] for part in data["stored"]) == size == data["size_bytes"]["packed"]
    assert f"Together {size:,} bytes: all of model.lowbit." in page
    by_name = {part["name"]: part["total_bytes"] for part in data["stored"]}
    assert all(layer["stored_bytes"] == by_name[layer["name"]] for layer in data["layers"])
    assert [part["total_bytes"] for part in data["stored"]] == sorted(by_name.values(), reverse=True)
    for used in re.findall(r"3 bits, (?:\d+ to )?(\d+) of 8 levels per scale", page):
        assert 2 <= int(used) <= 8
    assert len(re.findall(r"3 bits, [\d to]+ of 8 levels per scale", page)) == sum(layer.weight_bits == 3 for layer in report.layers) == 7
    assert data["noise_reference"] == "the float network"
    assert len(data["disagreements"]) == page.count("<img ") == round((1 - report.agreement) * report.samples)  # type: ignore[operator]
    assert {one["role"] for one in data["activations"]} == {"input", "merge"}
    assert data["run"]["data"] == {"calibration": "digits, 64 samples", "test": "digits"}
    assert data["run"]["versions"]["torch"] == torch.__version__


def test_a_weight_that_two_layers_share_counts_as_often_as_the_file_holds_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = SharedWeightNet()
    images = torch.randn(64, 6)
    small = lowbit.quantize(model, method="round_to_nearest", weight_bits=4, calibration=images)
    report = lowbit.deliver(small, tmp_path, calibration=images, float_model=model, onnx=False).report
    assert report.size_float == (36 + 6 + 6) * 4
    sizes = [layer.stored_bytes for layer in report.layers]
    assert sizes == [36 + 24 + 24, 24]  # both ends have 8 bits, so that one form of the weight serves both
    assert sum(part.total_bytes for part in report.stored) == report.size_packed == (tmp_path / "model.lowbit").stat().st_size


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "the same network with its quantizers off"),
        ({"float_model": True}, "the float network"),
        ({"float_model": True, "training": True}, "the float network that training started from"),
        ({"float_model": True, "training": True, "compare": False}, "the trained network with its quantizers off"),
    ],
)
def test_noise_is_measured_against_the_float_network_where_there_is_one(tmp_path: Path, given: dict[str, bool], words: str) -> None:
    torch.manual_seed(0)
    images = torch.randn(64, 6)
    small = lowbit.quantize(nn.Sequential(nn.Linear(6, 4)), weight_bits=8, calibration=images)
    other = nn.Sequential(nn.Linear(6, 4)) if "float_model" in given else None  # of other weights, so that the noise tells
    training = {"metric": "accuracy", "curve": []} if "training" in given else None
    report = lowbit.deliver(
        small, tmp_path, calibration=images, float_model=other, training=training, compare=given.get("compare", True), onnx=False
    ).report
    assert report.noise_reference == words
    is_other = words.startswith("the float network")
    assert (report.layers[0].sqnr_db < 10) == is_other and (report.layers[0].weight_sqnr_db < 10) == is_other  # type: ignore[operator]
    assert f"output against {words} on the same inputs" in (tmp_path / "report.html").read_text()


def test_a_float_network_whose_norms_were_folded_is_no_reference_for_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    small = lowbit.quantize(model, calibration=torch.randn(8, 1, 8, 8))
    assert layer_reference(small, None, model, is_trained=False).network is None
    assert layer_reference(small, model, None, is_trained=False).network is model
    kept = lowbit.prepare(model, method="lsq", sample=torch.randn(8, 1, 8, 8))
    assert layer_reference(kept, None, model, is_trained=True).network is model


def test_the_report_lists_what_else_holds_parameters_with_the_reason(tmp_path: Path) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.norm, self.factor = nn.Linear(6, 6), nn.LayerNorm(6), nn.Parameter(torch.ones(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.inner(x)) * self.factor  # type: ignore[no-any-return]

    images = torch.randn(64, 6)
    small = lowbit.quantize(Scaled(), method="round_to_nearest", weight_bits=4, calibration=images)
    report = lowbit.deliver(small, tmp_path, calibration=images, onnx=False).report
    assert [(row.name, row.kind, row.status, row.stored_bytes) for row in report.others] == [
        ("factor", "parameter", "skipped", 24), ("norm", "LayerNorm", "skipped", 48),
    ]  # fmt: skip
    written = json.loads((tmp_path / "report.json").read_text())["others"]
    assert [(row["name"], row["reason"]) for row in written] == [(row.name, row.reason) for row in report.others]
    page = (tmp_path / "report.html").read_text()
    layers = page[page.index("<h2>Layers") :]
    assert all(f">{row.name}<" in layers and row.reason in layers for row in report.others)
