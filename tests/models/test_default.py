from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from lowbit.data import load_data, loader
from lowbit.models import default_weights, load_default


def test_the_shipped_weights_reach_the_accuracy_that_they_state() -> None:
    pytest.importorskip("sklearn", reason='pip install "lowbit[data]"')
    with safe_open(default_weights(), "pt") as file:
        facts = file.metadata()
    model, right = load_default(), 0
    data = load_data("digits", split="test")
    with torch.no_grad():
        for images, labels in loader(data, 200):
            right += int((model(images).argmax(1) == labels).sum())
    assert 100 * right / len(data) == pytest.approx(float(facts["test_accuracy"]), abs=0.2)  # one of 600 may tip on another machine
    assert float(facts["test_accuracy"]) >= 99
    assert facts["seed"] == "0"


def test_the_shipped_weights_are_small() -> None:
    assert default_weights().stat().st_size < 100_000
