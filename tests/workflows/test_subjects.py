from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lowbit.errors import CalibrationError, DataError, LowbitError
from lowbit.workflows.subjects import Subject, data_digest, open_subject, training_data
from lowbit.workflows.suite import SubjectSettings

DIGITS = SubjectSettings()


def test_the_embedded_network_comes_with_its_data_and_trained_weights() -> None:
    subject = open_subject(DIGITS, 0)
    facts = subject.facts()
    assert facts["split"] == "train 1197, test 600" and not subject.follows_seed
    assert facts == open_subject(DIGITS, 5).facts()


def test_random_weights_are_those_of_the_seed() -> None:
    settings = SubjectSettings(model="resnet8", data="digits")
    weights = [open_subject(settings, seed).facts()["weights"] for seed in (0, 0, 1)]
    assert weights[0] == weights[1] != weights[2]
    assert open_subject(settings, 0).follows_seed


def test_the_first_training_samples_are_other_data() -> None:
    subject = open_subject(replace(DIGITS, train_samples=100), 0)
    whole = open_subject(DIGITS, 0)
    assert subject.facts()["split"] == "train 100, test 600" and subject.facts()["data"] != whole.facts()["data"]
    first, second = subject.train_data.dataset[99], whole.train_data.dataset[99]  # type: ignore[attr-defined]
    assert torch.equal(first[0], second[0]) and first[1] == second[1]


def test_calibration_is_drawn_from_the_data_and_the_seed_alone() -> None:
    inputs = torch.arange(100.0).view(50, 2)
    subject = Subject("own", torch.nn.Linear(2, 2), train_data=(inputs, torch.zeros(50)))
    drawn = [torch.cat([next(iter(batch.tensors)) for batch in subject.draw_calibration(20, 8, seed)]) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    rows = drawn[0][:, 0].tolist()
    assert len(rows) == len(set(rows)) == 20 and set(rows) <= set(inputs[:, 0].tolist())
    whole = open_subject(DIGITS, 0)
    seen = [whole.draw_calibration(64, 32, seed).sample.tensors for seed in (0, 0, 1)]
    (first,), (second,), (third,) = (list(tensors) for tensors in seen)
    assert first.shape == (32, 1, 8, 8) and torch.equal(first, second) and not torch.equal(first, third)


def test_the_digest_of_data_follows_their_values(tmp_path: Path) -> None:
    tensors = (torch.arange(4.0), torch.arange(4))
    assert (
        data_digest(tensors) == data_digest((torch.arange(4.0), torch.arange(4))) != data_digest((torch.arange(4.0) + 1, torch.arange(4)))
    )
    batches = [(torch.zeros(2, 3), torch.zeros(2)), (torch.ones(2, 3), torch.ones(2))]
    assert data_digest(batches) != data_digest(batches[:1])
    for name, shade in (("a", 10), ("b", 200)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / name / "1.png")
    settings = SubjectSettings(test_data=str(tmp_path), model="resnet8", preprocess={"size": 8})
    before = open_subject(settings, 0).facts()["data"]
    Image.new("RGB", (64, 9), (3, 2, 1)).save(tmp_path / "b" / "2.png")
    assert open_subject(settings, 0).facts()["data"] != before


def test_what_is_missing_is_named() -> None:
    with pytest.raises(DataError, match="networks, resnet8: there is no data to measure on"):
        open_subject(SubjectSettings(model="resnet8"), 0)
    with pytest.raises(CalibrationError, match="own: there are no samples to calibrate on"):
        Subject("own", torch.nn.Linear(2, 2)).draw_calibration(4, 2, 0)


def test_a_folder_without_training_samples_is_measured_on_and_told_when_it_is_to_be_trained_on(tmp_path: Path) -> None:
    for name, shade in (("a", 10), ("b", 200)):
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / "test" / name / "1.png")
    settings = SubjectSettings(data=str(tmp_path), calibration=str(tmp_path / "test"), model="resnet8", preprocess={"size": 8})
    subject = open_subject(settings, 0)
    assert subject.train_data is None and subject.facts()["split"] == "test 2"
    with pytest.raises(DataError, match="has test, but for the train samples a sub-folder train"):
        training_data(settings)


FACTORIES = """
import torch, lowbit

def ramp():
    data = torch.arange(12.0).reshape(6, 2), torch.tensor([0, 1] * 3)
    return lowbit.Subject("inner name", torch.nn.Linear(2, 2), train_data=data, test_data=data)

def number():
    return 3

def broken():
    raise ValueError("no weights here")
"""


def test_a_function_of_a_file_gives_network_data_and_task(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FACTORIES)
    opened = open_subject(SubjectSettings(subject=f"{path}:ramp"), seed=0)
    assert (opened.name, opened.model.out_features) == ("ramp", 2)
    assert open_subject(SubjectSettings(name="other", subject=f"{path}:ramp"), seed=0).name == "other"


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        (":number", {}, "returned int, expected a lowbit.Subject"),
        (":broken", {}, "calling it failed with ValueError: no weights here"),
        (":rampp", {}, "Did you mean 'ramp'"),
        ("", {}, "name a file and the function in it"),
        (":ramp", {"data": "digits", "train_samples": 3}, "leave out data, train_samples"),
    ],
)
def test_what_is_wrong_with_a_subject_is_told(tmp_path: Path, name: str, changes: dict[str, object], told: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(FACTORIES)
    with pytest.raises(LowbitError, match=told):
        open_subject(SubjectSettings(subject=f"{path}{name}", **changes), seed=0)  # type: ignore[arg-type]
