"""The data set: samples, batches, files, and use as calibration data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.synthesis.networks import small, two_inputs
from torch import nn
from torch.utils.data import DataLoader

import lowbit
from lowbit.errors import FileFormatError
from lowbit.files import write_tensors
from lowbit.inputs import Calibration
from lowbit.synthesis.samples import SynthesizedData


def several() -> tuple[nn.Module, SynthesizedData]:
    model, given = two_inputs()
    named = dict(zip(("picture", "vector", "row", "mask"), given, strict=True))
    return model, lowbit.synthesize(model, method="zeroq", sample=named, count=4, iterations=3)


def test_samples_are_tensors_and_batches_are_those_of_any_loader() -> None:
    data = lowbit.synthesize(small(), method="zeroq", shape=(2, 6, 6), count=5, iterations=3)
    assert len(data) == 5 and data[0].shape == (2, 6, 6) and torch.equal(data[-1], data[4])  # type: ignore[union-attr, arg-type]
    with pytest.raises(IndexError):
        data[5]
    batches = list(DataLoader(data, batch_size=2))
    assert torch.equal(torch.cat(batches), data.inputs.args[0])
    calibration = Calibration.of(data)
    assert calibration.samples == 5 and torch.equal(calibration.sample.args[0], data.inputs.args[0])
    assert "5 samples of 2 x 6 x 6 by zeroq" in repr(data)


def test_several_inputs_keep_their_names_and_shared_ones_their_shape() -> None:
    model, data = several()
    assert data.shapes == [(1, 5, 6), (5,), (), (5, 6)]
    assert set(data[0]) == {"picture", "vector", "row", "mask"} and data[0]["row"].shape == ()  # type: ignore[call-overload, index]
    batch = Calibration.of(data, model).sample
    assert batch.kwargs["picture"].shape == (4, 1, 5, 6) and torch.equal(batch.kwargs["row"], torch.tensor([0, 1, 2, 0]))
    assert model(**batch.kwargs).shape == (4, 4)
    quantized = lowbit.quantize(model, method="round_to_nearest", calibration=data)
    assert quantized(**batch.kwargs).shape == (4, 4)


def test_a_file_holds_all_of_it(tmp_path: Path) -> None:
    for data in (several()[1], lowbit.synthesize(small(), method="dsg", shape=(2, 6, 6), iterations=3, noise_samples=16)):
        data.save(tmp_path / "samples.safetensors")
        loaded = SynthesizedData.load(tmp_path / "samples.safetensors")
        assert loaded.to_dict() == data.to_dict() and loaded.statistics == data.statistics
        assert loaded.shapes == data.shapes
        assert all(torch.equal(a, b) for a, b in zip(loaded.inputs.tensors, data.inputs.tensors, strict=True))
        assert list(loaded.inputs.kwargs) == list(data.inputs.kwargs)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="there is no such file"):
        SynthesizedData.load(tmp_path / "none.safetensors")
    write_tensors(tmp_path / "other.safetensors", {"x": torch.zeros(1)}, {"kind": "something"})
    with pytest.raises(FileFormatError, match="no samples that lowbit made"):
        SynthesizedData.load(tmp_path / "other.safetensors")
    write_tensors(tmp_path / "part.safetensors", {"args.0": torch.zeros(1)}, {"kind": "lowbit samples"})
    with pytest.raises(FileFormatError, match="damaged: KeyError"):
        SynthesizedData.load(tmp_path / "part.safetensors")
