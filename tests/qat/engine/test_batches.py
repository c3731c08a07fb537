"""Training data of every form: which batches come of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

import lowbit
from lowbit.errors import DataError, SpecError
from lowbit.inputs import sample_count
from lowbit.qat import Classification, Recipe, Regression
from lowbit.qat.engine.batches import DatasetSource, EmptySource, IterableSource, collated, evaluation_batches, make_source

X, Y = torch.arange(14.0).reshape(7, 2), torch.arange(7)
RECIPE = Recipe(batch_size=3, epochs=1)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    """Seven samples, or no end of them."""

    def __init__(self, *, is_endless: bool = False) -> None:
        self.is_endless = is_endless

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from zip(X, Y, strict=True)
        while self.is_endless:
            yield from zip(X, Y, strict=True)


class Rows(Dataset[dict[str, object]]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> dict[str, object]:
        return {"x": X[index], "labels": int(Y[index]), "name": f"row {index}", "boxes": torch.zeros(index, 4), "nothing": None}


def labels_of(batches: list[Any]) -> list[int]:
    return sorted(int(label) for batch in batches for label in (batch["labels"] if isinstance(batch, dict) else batch[1]))


@pytest.mark.parametrize(
    "data",
    [
        (X, Y), [X, Y], {"x": X, "labels": Y}, (X, Y, X), ((X, X), Y), list(zip(X, Y, strict=True)), [(x.tolist(), int(y)) for x, y in zip(X, Y, strict=True)],
        [{"x": x, "labels": y} for x, y in zip(X, Y, strict=True)], Rows(), DataLoader(Rows(), 2, collate_fn=collated), DataLoader(list(zip(X, Y, strict=True)), 2),
    ],
    ids=["pair", "list of two", "dict", "three tensors", "two inputs", "samples", "plain samples", "dict samples", "data set", "loader", "loader of a list"],
)  # fmt: skip
def test_every_sample_comes_once_in_batches_of_nearly_equal_size(data: object) -> None:
    source = make_source(data, RECIPE)
    assert isinstance(source, DatasetSource) and (source.samples, source.steps) == (7, 3)
    batches = [batch for batch, _ in source.epoch(0)]
    assert labels_of(batches) == list(range(7))
    assert [len(batch["labels"] if isinstance(batch, dict) else batch[1]) for batch in batches] == [3, 2, 2]
    tested = list(evaluation_batches(data, 3))
    assert labels_of(tested) == list(range(7))


def test_inputs_alone_are_data_too() -> None:
    batches = [batch for batch, _ in make_source(X, RECIPE).epoch(0)]
    assert all(isinstance(batch, Tensor) for batch in batches) and sum(len(batch) for batch in batches) == 7


def test_members_that_cannot_be_stacked_stay_lists() -> None:
    batch = collated([Rows()[1], Rows()[2]])
    assert batch["x"].tolist() == X[1:3].tolist() and batch["labels"].tolist() == [1, 2]
    assert batch["name"] == ["row 1", "row 2"] and batch["nothing"] == [None, None]
    assert [len(boxes) for boxes in batch["boxes"]] == [1, 2]
    image, target = collated([(X[0], None), (X[1], None)])
    assert image.tolist() == X[:2].tolist() and target == [None, None]


def test_the_batches_of_a_stream_are_counted() -> None:
    source = make_source(DataLoader(Stream(), 3), RECIPE)
    assert isinstance(source, IterableSource) and source.steps == 3
    assert [len(batch[1]) for batch, _ in source.epoch(0)] == [3, 3, 1]
    assert [batch[1].tolist() for batch, _ in source.epoch(1, start=2)] == [[6]]


def test_an_endless_stream_needs_the_length_of_an_epoch() -> None:
    source = make_source(DataLoader(Stream(is_endless=True), 3), RECIPE, steps=5)
    assert source.steps == 5 and len(list(source.epoch(0))) == 5
    with pytest.raises(DataError, match="ended after 3 batches, but an epoch takes 5"):
        list(make_source(DataLoader(Stream(), 3), RECIPE, steps=5).epoch(0))
    with pytest.raises(SpecError, match="steps_per_epoch"):
        make_source((X, Y), RECIPE, steps=5)


def test_batches_stay_batches() -> None:
    source = make_source([(X[:4], Y[:4]), (X[4:], Y[4:])], RECIPE)
    assert isinstance(source, IterableSource) and [len(batch[1]) for batch, _ in source.epoch(0)] == [4, 3]


@pytest.mark.parametrize(
    ("data", "target"),
    [
        ((X, Y % 3), None), (DataLoader(Stream(), 3), None), (list(zip(X, Y.int() % 3, strict=True)), None), ((X, Y[:, None] % 3), None),
        ({"input": X, "labels": Y % 3}, None), ({"input": X, "kind": Y % 3}, "kind"), ((X, X, Y % 3), 2), ([(X, (Y % 3).numpy())] * 2, None),
    ],
    ids=["pair", "stream", "samples", "column", "dict", "key", "three members", "numpy"],
)  # fmt: skip
def test_networks_are_trained_on_data_of_every_form(data: object, target: int | str | None) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 7))
    trained = lowbit.train(network, data, task=Classification(target=target), test_data=data, sample=X, recipe=RECIPE)
    moved = [
        name
        for name, before in network.named_parameters()
        if not torch.equal(before, dict(trained.named_parameters()).get(name, before * 0))
    ]
    assert moved and lowbit.evaluate(trained, data, task=Classification(target=target)).samples in (7, 14)


def test_a_wrong_target_is_an_error_before_anything_is_learned() -> None:
    network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3))
    for task, targets, message in (
        (Classification(), torch.rand(7, 2), r"got float32 of shape \[N, 2\]"),
        (Regression(), torch.rand(7), r"needs targets of that shape, got \[N\]"),
        (Classification(), numpy.full(7, 5), "label 5"),
    ):
        with pytest.raises(DataError, match=message):
            lowbit.train(network, [(X, targets)], task=task, recipe=RECIPE)


def test_empty_batches_say_how_many_samples_and_go_on_where_they_stopped() -> None:
    source = EmptySource(3, Recipe(batch_size=5, accumulate=2))
    batches = list(source.epoch(0))
    assert [(sample_count(batch), weight) for batch, weight in batches] == [(5, 1.0)] * 6
    assert len(list(source.epoch(4, start=2))) == 2 and len(list(source.first(7))) == 7
    assert source.is_empty and source.facts() == {"samples": 0, "steps": 3}
