from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import SpecError
from lowbit.models import load_default
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
    given = lowbit.deliver(small, tmp_path / "python", calibration=samples, float_model=model, test_data=test, name="digits", onnx=False)
    first, second = asked.report.to_dict(), given.report.to_dict()
    for name in ("quantized", "metrics", "size_bytes", "options", "samples", "weight_bits", "model"):
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
