from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.qat import Classification
from lowbit.qat.task import Meter

LOGITS = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 0.0, 0.0]])  # predicts 0, 2, 1, 0
LABELS = torch.tensor([0, 2, 2, 0])


def measured(logits: Tensor, target: object, **options: int) -> dict[str, float]:
    meter = Meter(Classification(**options))  # type: ignore[arg-type]
    meter.add(logits, (logits, target))
    return dict(meter.scores().metrics)


@pytest.mark.parametrize(
    "target",
    [
        LABELS, LABELS.int(), LABELS.to(torch.uint8), LABELS[:, None], LABELS.numpy(),
        torch.eye(3)[LABELS], torch.eye(3, dtype=torch.long)[LABELS], torch.eye(3, dtype=torch.bool)[LABELS],
    ],
    ids=["int64", "int32", "uint8", "column", "numpy", "one-hot", "integer one-hot", "boolean one-hot"],
)  # fmt: skip
def test_labels_of_every_form_give_one_loss_and_accuracy(target: object) -> None:
    expected = sum(
        math.log(math.exp(-row[label]) * sum(map(math.exp, row))) for row, label in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
    )
    loss = Classification().loss(LOGITS, (LOGITS, target))
    assert loss.item() == pytest.approx(expected / 4, rel=1e-6)
    assert measured(LOGITS, target) == {"accuracy": 0.75}


def test_probabilities_are_soft_labels() -> None:
    soft = torch.tensor([[0.5, 0.5]])
    assert Classification().loss(torch.tensor([[0.0, math.log(3)]]), (None, soft)).item() == pytest.approx(
        -(math.log(1 / 4) + math.log(3 / 4)) / 2
    )
    assert measured(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.4, 0.6]])) == {"accuracy": 1.0}


def test_ignored_labels_count_nowhere() -> None:
    some = torch.tensor([0, -100, 2, -100])
    assert measured(LOGITS, some) == {"accuracy": 0.5}
    assert torch.equal(Classification().loss(LOGITS, (None, some)), Classification().loss(LOGITS[[0, 2]], (None, some[[0, 2]])))
    assert measured(LOGITS, torch.tensor([0, 2, 1, 1]), ignored_label=1) == {"accuracy": 1.0}


def test_a_batch_without_a_counted_label_has_a_loss_of_0_and_no_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = Classification().loss(logits, (None, torch.full((4,), -100)))
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_more_than_five_classes_have_a_top_five() -> None:
    logits = torch.arange(6.0, 0, -1).repeat(3, 1)
    assert measured(logits, torch.tensor([0, 4, 5])) == pytest.approx({"accuracy": 1 / 3, "top-5 accuracy": 2 / 3})


@pytest.mark.parametrize(("dim", "shape"), [(1, (2, 3, 5)), (2, (2, 5, 3)), (1, (2, 3, 4, 5))])
def test_classes_stand_behind_the_samples_or_last(dim: int, shape: tuple[int, ...]) -> None:
    labels = torch.arange(math.prod(shape) // 3).reshape([size for place, size in enumerate(shape) if place != dim]) % 3
    logits = torch.nn.functional.one_hot(labels, 3).movedim(-1, dim).float() * 2
    assert measured(logits, labels) == {"accuracy": 1.0}
    assert Classification().loss(logits, (None, labels)).item() == pytest.approx(math.log(1 + 2 * math.exp(-2)))


def test_label_smoothing_spreads_the_label() -> None:
    logits = torch.tensor([[0.0, math.log(3)]])
    expected = -0.9 * math.log(3 / 4) - 0.1 * math.log(1 / 4)  # 0.8 + 0.2 / 2 and 0.2 / 2
    assert Classification(label_smoothing=0.2).loss(logits, (None, torch.tensor([1]))).item() == pytest.approx(expected)


def test_distillation_follows_the_teacher_at_every_position() -> None:
    ours, theirs = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2 * math.log(3)]])
    soft = 4 * (0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5))
    task = Classification(temperature=2.0)
    assert task.distillation_loss(ours, theirs).item() == pytest.approx(soft)
    spread = [logits[:, :, None, None].expand(1, 2, 3, 4) for logits in (ours, theirs)]
    assert task.distillation_loss(*spread).item() == pytest.approx(soft)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (torch.tensor([0, 1, 2, 3]), "label 3, but the network has 3 outputs"),
        (torch.tensor([0, 1, -1, 0]), "label -1"),
        (torch.zeros(4), r"outputs of shape \[N, 3\] needs labels of shape \[N\].*got float32 of shape \[N\]"),
        (torch.zeros(4, 2), r"got float32 of shape \[N, 2\]"),
        (torch.ones(4, 3, dtype=torch.long), r"got int64 of shape \[N, 3\]"),
        (["a"] * 4, "must be tensors, got a list of str"),
        (None, "got NoneType"),
    ],
)
def test_wrong_targets_are_refused_with_the_shape_that_fits(target: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Classification().check(LOGITS, (LOGITS, target))
