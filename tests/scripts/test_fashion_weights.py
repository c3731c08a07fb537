"""The weights that scripts/train_fashion.py left in benchmarks/weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from lowbit.data import load_data, loader
from lowbit.data.fashion_mnist import DEBIAN_FOLDER
from lowbit.models import load_model

WEIGHTS = Path(__file__).parents[2] / "benchmarks" / "weights"
FILES = sorted(WEIGHTS.glob("*_fashion.safetensors"))


def facts(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_resnet20_is_there() -> None:
    assert WEIGHTS / "resnet20_fashion.safetensors" in FILES


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_states_its_accuracy_and_is_small(path: Path) -> None:
    assert float(facts(path)["test_accuracy"]) >= 91
    assert path.stat().st_size < 1_500_000


@pytest.mark.skipif(not DEBIAN_FOLDER.is_dir(), reason="apt-get install dataset-fashion-mnist")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_is_as_accurate_as_it_states_on_a_tenth_of_the_test_images(path: Path) -> None:
    model = load_model(facts(path)["model"], path, in_channels=1)
    batches = loader(load_data("fashion-mnist", split="test"), 100)
    right = 0
    with torch.inference_mode():
        for _, (images, labels) in zip(range(10), batches, strict=False):
            right += int((model(images).argmax(1) == labels).sum())
    assert right / 10 == pytest.approx(float(facts(path)["test_accuracy"]), abs=2.5)  # three standard deviations of 1,000 samples
