from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

import lowbit
from lowbit.cli import app
from lowbit.data import Preprocessing, load_data
from lowbit.data.image_data import TensorImages
from lowbit.data.images import read_picture
from lowbit.models import load_default


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["run", *(str(argument) for argument in arguments)])


def fails(*arguments: str | Path) -> str:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.output.startswith("error:")
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def digits() -> TensorImages:
    data = load_data("digits", split="test").dataset
    assert isinstance(data, TensorImages)
    return data


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, digits: TensorImages) -> Path:
    """The embedded network with binary layers."""
    sample = digits.normalized(digits.images[:64])
    model = lowbit.prepare(load_default(), method="bi_real_net", weight_bits=1, activation_bits=1, sample=sample).train()
    with torch.no_grad():
        for _ in range(3):
            model(sample)  # settles the norms
    path = tmp_path_factory.mktemp("packed") / "model.lowbit"
    lowbit.export(model.eval(), path, sample=sample)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory, digits: TensorImages) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "more").mkdir()
    for index in range(5):
        pixels = (digits.images[index, 0].numpy().astype(int) * 255 // 16).astype(np.uint8)
        Image.fromarray(pixels).save(folder / ("more" if index > 2 else ".") / f"{index}.png")
    return folder


def test_classes_of_a_folder_are_those_of_the_network(packed: Path, pictures: Path, digits: TensorImages, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "classes.csv"
    result = run(packed, pictures, "--data", "digits", "--top", "2", "--batch-size", "2", "--out", out)
    assert result.exit_code == 0, result.output
    assert "binary with batch norm" in result.output
    rows = list(csv.DictReader(out.open()))
    assert [Path(row["picture"]).name for row in rows] == [f"{index}.png" for index in range(5)]
    data = load_data("digits", split="test")
    preprocessing = Preprocessing(size=8, crop_fraction=1.0, mean=data.mean, std=data.std, grey=True)
    inputs = torch.stack([preprocessing(read_picture(Path(row["picture"]))) for row in rows])
    torch.testing.assert_close(inputs, digits.normalized(digits.images[:5]), atol=0.05, rtol=0)  # a pixel has 8 bits there, 4 here
    with torch.no_grad():
        shares = lowbit.load(packed)(inputs).softmax(1)
    assert [row["class_1"] for row in rows] == [str(int(label)) for label in shares.argmax(1)]
    assert [float(row["share_1"]) for row in rows] == pytest.approx(shares.amax(1).tolist(), abs=1e-3)
    assert list(rows[0]) == ["picture", "class_1", "share_1", "class_2", "share_2"]


def test_one_picture_is_enough_and_the_plain_numbers_are_used_without_data(packed: Path, pictures: Path, tmp_path: Path) -> None:
    result = run(packed, pictures / "0.png", "--out", tmp_path / "classes.csv", "--top", "20")
    assert result.exit_code == 0, result.output
    (row,) = csv.DictReader((tmp_path / "classes.csv").open())
    assert row["picture"] == str(pictures / "0.png")
    assert sum(float(row[f"share_{place}"]) for place in range(1, 11)) == pytest.approx(1, abs=1e-4)  # all of the ten classes


def test_the_benchmark_names_both_sides_and_where_the_time_goes(packed: Path) -> None:
    before = torch.get_num_threads()
    result = run(packed, "--benchmark", "--runs", "2", "--batch-size", "3", "--threads", "1")
    torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    for word in ("low-bit kernels", "decoded to float", "binary_conv2d", "batch 3", "where the time goes"):
        assert word in result.output


def test_a_network_without_layers_of_few_bits_runs_in_float_and_says_why(tmp_path: Path) -> None:
    lowbit.export(nn.Linear(6, 3), tmp_path / "m.lowbit", sample=torch.randn(2, 6))
    result = run(tmp_path / "m.lowbit", "--benchmark", "--runs", "1")
    assert result.exit_code == 0, result.output
    assert "in float: no layer can run on low-bit kernels" in " ".join(result.output.split())
    assert "no square grey or colour pictures" in fails(tmp_path / "m.lowbit", tmp_path)


def test_what_cannot_be_run_is_said(packed: Path, pictures: Path, tmp_path: Path) -> None:
    assert "--benchmark" in fails(packed)
    assert "there is no such file" in fails(tmp_path / "none.lowbit", pictures)
    assert "no such file or folder" in fails(packed, tmp_path / "none")
    assert "no picture" in fails(packed, tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "bad.png" in run(packed, tmp_path).output
    assert "leave out --preprocess" in fails(packed, pictures, "--data", "digits", "--preprocess", "size=8")
    assert "the network takes" in fails(packed, pictures, "--preprocess", "size=9")
