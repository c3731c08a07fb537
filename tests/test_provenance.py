from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lowbit
from lowbit.data import Preprocessing, load_data, loader
from lowbit.errors import FileFormatError, SpecError
from lowbit.provenance import LONGEST_TEXT, MOST_CLASSES, Provenance, attach_provenance, class_names_of, provenance_from_json, provenance_of

PICTURES = Preprocessing(size=8, crop_fraction=1.0, mean=(0.1,), std=(0.7,), grey=True)
FULL = Provenance(
    model="net.py:build",
    model_options={"width": 16, "names": ["a", None], "deep": {"scale": 0.5, "flag": True}},
    weights="w.safetensors",
    weights_sha256="0123456789abcdef" * 4,
    data="photos",
    calibration="samples.npy",
    preprocessing=PICTURES,
    classes=("cat", "T-shirt/top", "año"),
    task="Classification",
)


@pytest.mark.parametrize("known", [FULL, Provenance(), Provenance(classes=("cat", "dog"))])
def test_what_is_known_comes_back_from_json(known: Provenance) -> None:
    assert provenance_from_json(json.loads(json.dumps(known.to_json()))) == known


def test_only_what_is_known_is_kept() -> None:
    assert Provenance().to_json() == {}
    assert Provenance(data="digits", classes=("0", "1")).to_json() == {"data": "digits", "classes": ["0", "1"]}


def test_people_read_the_facts_that_there_are() -> None:
    text = str(FULL)
    assert text.startswith(
        "network net.py:build with w.safetensors; data photos; calibration samples.npy; inputs 8 x 8, grey, mean 0.1, std 0.7"
    )
    assert text.endswith("3 classes: cat, T-shirt/top, año")
    assert str(Provenance(classes=tuple(map(str, range(12))))).endswith("8, 9, ...")


@pytest.mark.parametrize(
    ("written", "told"),
    [
        (["model"], "must hold some of model"),
        ({"modell": "x"}, "must hold some of model"),
        ({"model": 3}, "model must be printable text"),
        ({"model": ""}, "model must be printable text"),
        ({"data": "a\x1b[2Jb"}, "data must be printable text"),
        ({"weights": "w" * (LONGEST_TEXT + 1)}, "weights must be printable text"),
        ({"weights_sha256": "xyz"}, "64 hexadecimal digits"),
        ({"weights_sha256": "g" * 64}, "64 hexadecimal digits"),
        ({"classes": "cat"}, "classes must be"),
        ({"classes": ["cat", 1]}, "classes must be"),
        ({"classes": ["cat\nerror: all is lost"]}, "classes must be"),
        ({"classes": ["c"] * (MOST_CLASSES + 1)}, "classes must be"),
        ({"model_options": {"a": float("inf")}}, "model_options must be"),
        ({"model_options": {f"o{i}": i for i in range(65)}}, "model_options must be"),
        ({"model_options": {"a": [[[[[[[1]]]]]]]}}, "model_options must be"),
        ({"model_options": [1]}, "model_options must be"),
        ({"preprocessing": {"size": "8"}}, "size cannot be '8'"),
        ({"preprocessing": {"size": True}}, "size cannot be True"),
        ({"preprocessing": {"grey": 1}}, "grey cannot be 1"),
        ({"preprocessing": {"mean": ["0.5"]}}, "mean cannot be"),
        ({"preprocessing": {"std": [float("nan")] * 3}}, "std cannot be"),
        ({"preprocessing": {"std": [0, 0, 0]}}, "every value must be positive"),
        ({"preprocessing": {"interpolation": "magic"}}, "interpolation cannot be 'magic'"),
        ({"preprocessing": {"filter": 1}}, "must hold some of size"),
        ({"preprocessing": 3}, "must hold some of size"),
    ],
)
def test_what_a_file_may_not_say_is_refused(written: object, told: str) -> None:
    with pytest.raises(FileFormatError, match=told):
        provenance_from_json(written)


def test_a_value_that_no_file_could_hold_is_refused_when_it_is_made() -> None:
    with pytest.raises(SpecError, match="preprocessing must be a Preprocessing"):
        Provenance(preprocessing={"size": 8})  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="model_options must be"):
        Provenance(model_options={"layer": nn.Linear(1, 1)})


def test_a_network_carries_it_through_copies() -> None:
    network = nn.Linear(2, 2)
    assert provenance_of(network) is None
    attach_provenance(network, FULL)
    assert provenance_of(copy.deepcopy(network)) == FULL


def test_classes_are_found_in_data_sets_and_in_loaders_over_them() -> None:
    pairs = [(torch.zeros(1), 0)] * 4
    named = Subset(pairs, [0, 1])  # type: ignore[arg-type]
    named.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    assert class_names_of(named) == class_names_of(DataLoader(named)) == class_names_of(DataLoader(Subset(named, [0]))) == ("cat", "dog")
    digits = load_data("digits", split="test")
    assert class_names_of(digits) == tuple("0123456789")
    assert class_names_of(loader(digits, 10)) == class_names_of(pairs) == class_names_of(SimpleNamespace(classes=10)) == ()


def test_names_that_cannot_be_printed_are_written_as_escapes() -> None:
    assert class_names_of(SimpleNamespace(classes=["a\x1b[2J", "b\udcff"])) == ("a\\x1b[2J", "b\\udcff")


def test_what_is_given_to_quantize_and_train_is_in_the_files(tmp_path: Path) -> None:
    known = Provenance(classes=("cat", "dog"), preprocessing=Preprocessing(size=8, mean=(0.5,), std=(0.25,), grey=True))
    inputs, labels = torch.randn(32, 8), torch.arange(32) % 2
    recipe = lowbit.Recipe(epochs=1, batch_size=16)
    networks = [
        lowbit.quantize(nn.Linear(8, 2), calibration=inputs, provenance=known),
        lowbit.train(nn.Linear(8, 2), (inputs, labels), recipe=recipe, provenance=known),
    ]
    again = nn.Linear(8, 2)
    attach_provenance(again, known)
    networks += [lowbit.quantize(again, calibration=inputs), lowbit.train(again, (inputs, labels), recipe=recipe)]
    for number, network in enumerate(networks):
        lowbit.export(network, tmp_path / f"{number}.lowbit", sample=inputs)
        assert lowbit.load(tmp_path / f"{number}.lowbit").provenance == known
    delivery = lowbit.deliver(networks[0], tmp_path, calibration=inputs, onnx=False)
    assert delivery.report.provenance["classes"] == ["cat", "dog"]


def test_quantize_finds_the_classes_of_the_data() -> None:
    data = TensorDataset(torch.randn(32, 8))
    data.classes = ["cat", "dog"]  # type: ignore[attr-defined]
    found = provenance_of(lowbit.quantize(nn.Linear(8, 2), calibration=DataLoader(data, batch_size=16)))
    assert found is not None and found.classes == ("cat", "dog")
