"""Segmentation, several labels, regression: metrics by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.qat import MultiLabel, Regression, Segmentation, Task
from lowbit.qat.task import Meter


def measured(task: Task, *pairs: tuple[Tensor, Tensor]) -> dict[str, float]:
    meter = Meter(task)
    for output, target in pairs:
        meter.add(output, (output, target))
    return dict(meter.scores().metrics)


def logits_for(classes: list[list[int]], count: int) -> Tensor:
    """A picture whose pixels are predicted to be of these classes."""
    return torch.nn.functional.one_hot(torch.tensor([classes]), count).movedim(-1, 1).float()


def test_intersection_over_union_is_that_of_all_pixels_together() -> None:
    first, second = logits_for([[0, 0], [1, 1]], 4), logits_for([[2, 2, 0]], 4)
    masks = torch.tensor([[[0, 1], [1, 1]]]), torch.tensor([[[2, 0, 255]]])
    # class 0: 1 right, predicted 2, true 2: 1/3; class 1: 2 right, 2 predicted, 3 true: 2/3; class 2: 1 right of 2 and 1: 1/2; class 3 never occurs
    found = measured(Segmentation(), (first, masks[0]), (second, masks[1]))
    assert found == pytest.approx({"mean IoU": (1 / 3 + 2 / 3 + 1 / 2) / 3, "pixel accuracy": 4 / 6})


def test_masks_may_have_a_channel_and_ignored_pixels_have_no_loss() -> None:
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.randint(0, 3, (2, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    mask[0, 0, :2] = 255
    counted = mask != 255
    per_pixel = torch.nn.functional.cross_entropy(logits, mask.long().where(counted, 0), reduction="none")
    for target in (mask, mask[:, None]):
        torch.testing.assert_close(Segmentation().loss(logits, (None, target)), per_pixel[counted].mean())
    assert measured(Segmentation(), (logits, mask)) == measured(Segmentation(), (logits, mask[:, None]))
    with pytest.raises(DataError, match=r"needs labels of shape \[N, 4, 4\].*got int64 of shape \[N, 2, 2\]"):
        Segmentation().check(logits, (None, torch.zeros(2, 2, 2, dtype=torch.long)))


def test_f1_counts_all_labels_together() -> None:
    logits = torch.tensor([[1.0, -1.0, 2.0], [-1.0, -2.0, 1.0]])
    labels = torch.tensor([[1, 0, 0], [1, 0, 1]])  # 2 both, 1 only predicted, 1 only true, 2 neither
    for target in (labels, labels.bool(), labels.float()):
        assert measured(MultiLabel(), (logits[:1], target[:1]), (logits[1:], target[1:])) == pytest.approx(
            {"F1": 4 / 6, "label accuracy": 4 / 6}
        )
    assert measured(MultiLabel(), (-logits.abs(), torch.zeros(2, 3))) == {"F1": 1.0, "label accuracy": 1.0}
    assert measured(MultiLabel(), (-logits.abs(), torch.ones(2, 3))) == {"F1": 0.0, "label accuracy": 0.0}


def test_the_loss_of_several_labels_is_binary_cross_entropy() -> None:
    logits = torch.tensor([[math.log(3), 0.0]])
    task = MultiLabel()
    assert task.loss(logits, (None, torch.tensor([[1, 0]]))).item() == pytest.approx(-(math.log(3 / 4) + math.log(1 / 2)) / 2)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25) + math.log(0.5)) / 2
    assert task.distillation_loss(logits, logits).item() == pytest.approx(entropy)


@pytest.mark.parametrize(
    ("target", "message"),
    [(torch.tensor([0, 1]), r"outputs of shape \[N, 3\] needs targets of that shape.*got \[N\]"), (torch.full((2, 3), 2), "from 2 to 2")],
)
def test_wrong_labels_are_refused(target: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MultiLabel().check(torch.zeros(2, 3), (None, target))


def test_r2_is_the_mean_over_columns() -> None:
    predicted = torch.tensor([[1.0, 0.0], [2.0, 2.0], [4.0, 4.0]])
    target = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]])
    # errors 0, 1, 1 of variance (-2, 0, 2): 1 - 2/8; the second column is exact
    found = measured(Regression(), (predicted[:1], target[:1]), (predicted[1:], target[1:]))
    assert found == pytest.approx({"RMSE": math.sqrt(2 / 6), "R2": (0.75 + 1) / 2})


def test_targets_far_from_zero_and_constant_ones_have_a_right_r2() -> None:
    target = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64) + 1e4
    assert measured(Regression(), (target + torch.tensor([0.5, 0, 0]), target))["R2"] == pytest.approx(1 - 0.25 / 2, rel=1e-6)
    constant = torch.full((3, 1), 7.3)
    assert measured(Regression(), (constant, constant))["R2"] == 1.0
    assert measured(Regression(), (constant + 1, constant))["R2"] == 0.0


def test_pictures_are_taken_as_one() -> None:
    target = torch.tensor([[[0.0, 4.0]], [[4.0, 0.0]]])
    assert measured(Regression(), (target + 1, target)) == {"RMSE": 1.0, "R2": 0.75}  # 4 / 16


def test_a_vector_goes_with_one_column_and_is_not_spread() -> None:
    column, vector = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 4])
    assert Regression().loss(column, (None, vector)).item() == 2.0  # (0 + 4) / 2
    assert Regression().loss(vector.float(), (None, column)).item() == 2.0
    with pytest.raises(DataError, match=r"outputs of shape \[N, 3\] needs targets of that shape, got \[N\]"):
        Regression().check(torch.zeros(3, 3), (None, torch.zeros(3)))
    with pytest.raises(DataError, match="NaN"):
        Regression().check(torch.zeros(1, 1), (None, torch.full((1, 1), math.nan)))
