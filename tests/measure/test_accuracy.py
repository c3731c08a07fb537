from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import DataError
from lowbit.measure import measure_accuracy


class Given(nn.Module):
    """Returns its input as logits."""

    def forward(self, x: Tensor) -> Tensor:
        assert not self.training and not torch.is_grad_enabled()
        return x


def one_hot(classes: list[int], width: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), width).float()


def test_counts_are_those_made_by_hand() -> None:
    logits = torch.tensor([[7.0, 6, 5, 4, 3, 2, 1]]).repeat(4, 1)
    data = [(logits[:3], torch.tensor([0, 4, 5])), (logits[3:], torch.tensor([6]))]
    result = measure_accuracy(Given(), data)
    assert (result.top1, result.top5, result.samples) == (0.25, 0.5, 4)


def test_five_classes_have_no_top_five() -> None:
    assert measure_accuracy(Given(), [(one_hot([0, 1], 5), torch.tensor([0, 2]))]).top5 is None


def test_dense_predictions_are_counted_per_position() -> None:
    logits = torch.zeros(1, 6, 2, 2)
    logits[0, 3] = 1.0
    result = measure_accuracy(Given(), [(logits, torch.tensor([[[3, 3], [3, 0]]]))])
    assert (result.top1, result.samples) == (0.75, 4)


def test_training_flags_come_back_even_after_an_error() -> None:
    model = nn.Sequential(Given(), nn.Identity()).train()
    model[1].eval()
    with pytest.raises(DataError):
        measure_accuracy(model, [(one_hot([0], 3), torch.tensor([3]))])
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no sample"),
        ([(one_hot([0], 3), torch.tensor([3]))], "3 classes"),
        ([(one_hot([0], 3), torch.tensor([-1]))], "3 classes"),
        ([(one_hot([0, 1], 3), torch.tensor([0]))], "do not fit"),
        ([one_hot([0], 3)], "needs labels"),
        ([(one_hot([0], 3), torch.tensor([0.0]))], "integers"),
    ],
)
def test_bad_data_is_refused(data: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        measure_accuracy(Given(), data)
