from __future__ import annotations

import io

import pytest
import torch
from PIL import Image
from torch import nn

from lowbit.inputs import Calibration
from lowbit.measure import measure_agreement
from lowbit.report.pictures import LARGEST_SIDE, MOST_PICTURES, Disagreements, picture_png


class Answers(nn.Module):
    """Answers each picture with the logits ``scale * (mean, 0.5)``."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.flatten(1).mean(1)
        return self.scale * torch.stack([mean, torch.full_like(mean, 0.5)], 1)


def pictures(values: list[float]) -> torch.Tensor:
    return torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()


def test_pictures_that_are_answered_differently_are_kept_with_their_labels_the_surest_first() -> None:
    batches = [(pictures([0.9, 0.5, 0.2]), torch.tensor([0, 1, 1])), (pictures([0.8, 0.1]), torch.tensor([1, 0]))]
    seen = Disagreements(batches)
    agreement = measure_agreement(Answers(1.0), Answers(-1.0), seen, watch=seen.watch)
    found = seen.found()
    assert agreement.top1 == 1 / 5 and seen.count == len(found) == 4  # a tie is the first class either way
    assert [one.facts for one in found] == [
        {"sample": 0, "float": 0, "quantized": 1, "label": 0},
        {"sample": 4, "float": 1, "quantized": 0, "label": 0},
        {"sample": 3, "float": 0, "quantized": 1, "label": 1},
        {"sample": 2, "float": 1, "quantized": 0, "label": 1},
    ]
    assert [one.margin for one in found] == pytest.approx([0.4, 0.4, 0.3, 0.3])


def test_calibration_data_has_no_labels_and_only_some_pictures_are_kept() -> None:
    seen = Disagreements(Calibration.of(pictures([0.9] * 40)))
    measure_agreement(Answers(1.0), Answers(-1.0), seen, watch=seen.watch)
    found = seen.found()
    assert seen.count == 40 and len(found) == MOST_PICTURES
    assert {one.label for one in found} == {None}


def test_what_is_no_picture_is_not_kept() -> None:
    seen = Disagreements([torch.full((2, 5, 4, 4), 0.9)])
    measure_agreement(Answers(1.0), Answers(-1.0), seen, watch=seen.watch)
    assert (seen.count, seen.found()) == (0, [])


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB")])
def test_a_picture_is_a_small_png_from_black_to_white(channels: int, mode: str) -> None:
    picture = torch.linspace(-2, 3, 6).reshape(1, 2, 3).expand(channels, 2, 3)
    image = Image.open(io.BytesIO(picture_png(picture)))
    assert (image.format, image.mode, image.size) == ("PNG", mode, (3, 2))
    assert list(image.convert("L").getdata()) == [0, 51, 102, 153, 204, 255]
    large = Image.open(io.BytesIO(picture_png(torch.rand(channels, 300, 600))))
    assert large.size == (LARGEST_SIDE, LARGEST_SIDE // 2)


def test_a_picture_of_one_value_is_drawn() -> None:
    assert Image.open(io.BytesIO(picture_png(torch.zeros(1, 2, 2)))).getextrema() == (0, 0)
