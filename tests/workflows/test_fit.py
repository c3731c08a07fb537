from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.data import Preprocessing, load_data
from lowbit.errors import CalibrationError
from lowbit.inputs import Inputs
from lowbit.models import load_default
from lowbit.provenance import Provenance
from lowbit.qat.task import Scores
from lowbit.workflows.fit import count_outputs, doubtful, fit_notes

NET = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 5))
GREY = Inputs((torch.zeros(2, 1, 8, 8),))


def test_inputs_that_the_network_cannot_take_are_an_error_that_says_what_made_them() -> None:
    colour = Inputs((torch.zeros(2, 3, 224, 224),))
    with pytest.raises(
        CalibrationError, match=r"the network net cannot take inputs of shape 3 x 224 x 224 .*224 x 224, colour, mean 0.485"
    ):
        fit_notes(NET, "net", colour, Provenance(preprocessing=Preprocessing()))
    with pytest.raises(CalibrationError, match="Change it with preprocess="):
        fit_notes(NET, "net", colour, Provenance())


def test_more_outputs_than_classes_are_told() -> None:
    (note,) = fit_notes(NET, "net", GREY, Provenance(data="photos", classes=("a", "b")))
    assert note.startswith("the network has 5 outputs, photos has 2 classes")
    assert fit_notes(NET, "net", GREY, Provenance(classes=tuple("abcde"))) == ()
    assert fit_notes(NET, "net", GREY, Provenance()) == ()


def test_preprocessing_unlike_that_of_the_training_is_told_with_what_is_used() -> None:
    data = load_data("digits", split="test")
    images = torch.stack([data.dataset[index][0] for index in range(64)])
    assert fit_notes(load_default(), "digits", Inputs((images,)), Provenance(data="digits", preprocessing=data.preprocessing)) == ()
    wrong = Preprocessing(size=8, crop_fraction=1.0, mean=(0.0,), std=(1.0,), grey=True)
    pixels = images * data.std[0] + data.mean[0]
    (note,) = fit_notes(load_default(), "digits", Inputs((pixels,)), Provenance(data="digits", preprocessing=wrong))
    assert fit_notes(load_default(), "digits", Inputs((pixels,)), Provenance()) == ()  # noise in place of data
    assert "at its first batch norm, norm, their variance is 0.1" in note and "Check the preprocessing: 8 x 8, grey, mean 0, std 1" in note


class Pairs(nn.Module):
    """A network that takes two samples or more."""

    def forward(self, x: Tensor) -> Tensor:
        return x[1:] - x[:1]


def test_a_network_that_needs_several_samples_is_given_them() -> None:
    assert fit_notes(Pairs(), "pairs", Inputs((torch.zeros(2, 4),)), Provenance(classes=("a", "b"))) != ()


def test_outputs_are_counted_over_classes_and_training_flags_stay() -> None:
    NET.train()
    assert count_outputs(NET, GREY) == 5
    assert NET.training
    assert count_outputs(nn.Conv2d(1, 7, 3), GREY) == 7
    assert count_outputs(nn.Flatten(0), GREY) is None


def test_an_accuracy_that_guessing_reaches_is_doubted() -> None:
    guess, good = (Scores({"accuracy": value}, "accuracy", 600) for value in (0.115, 0.5))
    (note,) = doubtful(lowbit.Classification(), {"the float network": guess, "the quantized network": good, "none": None}, 10)
    assert note.startswith("the float network: an accuracy of 11.50% on 600 samples cannot be told from guessing among 10 classes")
    assert "reaches 14.17%" in note  # 85 of 600
    assert doubtful(lowbit.Classification(), {"the float network": guess}, None) == ()
    assert doubtful(lowbit.Classification(), {"few": Scores({"accuracy": 1.0}, "accuracy", 3)}, 2) != ()
    assert doubtful(lowbit.Regression(), {"other": Scores({"mean absolute error": 0.0}, "mean absolute error", 600)}, 10) == ()
