from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from lowbit import Regression, evaluate
from lowbit.errors import DataError


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
    result = evaluate(Given(), data)
    assert (result["accuracy"], result["top-5 accuracy"], result.samples) == (0.25, 0.5, 4)
    assert result.value == 0.25


def test_five_classes_have_no_top_five() -> None:
    assert list(evaluate(Given(), [(one_hot([0, 1], 5), torch.tensor([0, 2]))]).metrics) == ["accuracy"]


def test_dense_predictions_are_counted_per_position() -> None:
    logits = torch.zeros(1, 6, 2, 2)
    logits[0, 3] = 1.0
    assert evaluate(Given(), [(logits, torch.tensor([[[3, 3], [3, 0]]]))])["accuracy"] == 0.75


def test_training_flags_come_back_even_after_an_error() -> None:
    model = nn.Sequential(Given(), nn.Identity()).train()
    model[1].eval()
    with pytest.raises(DataError):
        evaluate(model, [(one_hot([0], 3), torch.tensor([3]))])
    assert model.training and model[0].training and not model[1].training


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "no sample"),
        ([(one_hot([0], 3), torch.tensor([3]))], "3 outputs"),
        ([(one_hot([0], 3), torch.tensor([-1]))], "3 outputs"),
        ([(one_hot([0], 3), torch.tensor([0.0]))], "got float32 of shape"),
        ([one_hot([0], 3)], "without a target"),
        ([(one_hot([0], 3), ["cat"])], "got a list of str"),
    ],
)
def test_bad_data_is_refused(data: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        evaluate(Given(), data)


def test_a_last_batch_of_one_counts_as_one_sample() -> None:
    logits = one_hot([0, 1, 2, 0, 1], 3)
    result = evaluate(Given(), (logits, torch.tensor([0, 1, 2, 0, 2])), batch_size=2)
    assert (result["accuracy"], result.samples) == (0.8, 5)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([(torch.tensor([1.0]), torch.tensor([2.0])), (torch.tensor([4.0]), torch.tensor([4.0]))])


def test_streams_are_read_once_and_other_tasks_have_other_metrics() -> None:
    result = evaluate(Given(), DataLoader(Stream(), batch_size=1), task=Regression())
    assert result.metrics == pytest.approx({"RMSE": 0.5**0.5, "R2": 0.5}) and result.metric_name == "RMSE"


def test_a_function_is_a_task_whose_metric_is_the_loss() -> None:
    result = evaluate(Given(), (torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [4.0]])), task=nn.functional.l1_loss)
    assert result.metrics == {"loss": 0.5}
