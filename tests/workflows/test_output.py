from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.errors import SpecError
from lowbit.workflows.output import check_results

QUICK = {"method": "round_to_nearest", "calibration_samples": 32, "packed": False, "onnx": False}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_results_of_another_method_are_only_replaced_on_demand(tmp_path: Path) -> None:
    check_results(tmp_path / "absent", "lsq", resume=True)
    (tmp_path / "report.json").write_text(json.dumps({"method": "brecq"}))
    check_results(tmp_path, "brecq", resume=True)
    check_results(tmp_path, "lsq", resume=False)
    with pytest.raises(
        SpecError, match=r"report\.json there holds results of brecq, this is lsq\. Name another folder with out=.*resume=False"
    ):
        check_results(tmp_path, "lsq", resume=True)
    (tmp_path / "report.json").write_text("[broken")
    check_results(tmp_path, "lsq", resume=True)


def test_a_second_method_in_a_folder_is_refused_before_anything_is_deleted(tmp_path: Path) -> None:
    lowbit.quantize_and_deliver(lowbit.QuantizeRequest(out=str(tmp_path), **QUICK))  # type: ignore[arg-type]
    before = content(tmp_path)
    for request in (lowbit.QuantizeRequest(method="dfq", out=str(tmp_path)), lowbit.TrainRequest(out=str(tmp_path))):
        deliver = lowbit.quantize_and_deliver if isinstance(request, lowbit.QuantizeRequest) else lowbit.train_and_deliver
        with pytest.raises(SpecError, match="holds results of round_to_nearest"):
            deliver(request)  # type: ignore[arg-type]
    assert content(tmp_path) == before
    fresh = lowbit.QuantizeRequest(**{**QUICK, "method": "dfq"}, resume=False, out=str(tmp_path))  # type: ignore[arg-type]
    lowbit.quantize_and_deliver(fresh)
    assert json.loads((tmp_path / "report.json").read_text())["method"] == "dfq"


def test_a_second_training_method_in_a_folder_is_refused_and_the_checkpoints_stay(tmp_path: Path) -> None:
    data = (torch.randn(16, 4), torch.randint(2, (16,)))
    recipe = lowbit.Recipe(epochs=1, batch_size=8)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    lowbit.train(model, data, method="lsq", recipe=recipe, out=tmp_path, tensorboard=False)
    before = content(tmp_path)
    with pytest.raises(SpecError, match=r"train\.json there holds results of lsq, this is pact"):
        lowbit.train(model, data, method="pact", recipe=recipe, out=tmp_path, tensorboard=False)
    assert content(tmp_path) == before
    lowbit.train(model, data, method="pact", recipe=recipe, out=tmp_path, tensorboard=False, resume=False)
    assert json.loads((tmp_path / "train.json").read_text())["settings"]["method"] == "pact"
