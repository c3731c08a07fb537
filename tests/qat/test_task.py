"""Tasks: what they take of a batch, how metrics add up, and how a custom task is written."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from lowbit.errors import DataError, SpecError
from lowbit.qat import Classification, CriterionTask, Regression, Task
from lowbit.qat.task import Meter, format_metric


class TwoInputs(nn.Module):
    def forward(self, image: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"scaled": image * scale, "image": image}


class Distance(Task):
    """A task in a few lines."""

    metric_name, higher_is_better = "distance", False

    def loss(self, output: Tensor, batch: Any) -> Tensor:
        return mse_loss(output, batch["points"])

    def measure(self, output: Tensor, batch: Any) -> tuple[Tensor, int]:
        distances = (output - batch["points"]).norm(dim=-1)
        return distances.sum(), len(distances)


def test_a_task_of_ones_own_needs_a_loss_and_a_metric() -> None:
    task, model = Distance(), nn.Identity()
    first = {"input": torch.tensor([[3.0, 4.0], [0.0, 0.0]]), "points": torch.zeros(2, 2)}
    last = {"input": torch.tensor([[6.0, 8.0]]), "points": torch.zeros(1, 2)}
    meter = Meter(task)
    for batch in (first, last):
        meter.add(task.predict(model, batch), batch)
    assert task.predict(model, last).tolist() == [[6.0, 8.0]]
    assert task.loss(first["input"], first).item() == 25 / 4
    assert meter.scores().metrics == {"distance": 5.0} and meter.scores().samples == 3  # (5 + 0 + 10) / 3
    assert task.facts() == {"name": "Distance"}


def test_the_default_distillation_is_the_mean_square_over_all_outputs() -> None:
    ours, theirs = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([0.0])}, {"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([1.0])}
    assert Distance().distillation_loss(ours, theirs).item() == pytest.approx(5 / 3)


def test_metrics_of_several_processes_are_those_of_one() -> None:
    task = Regression()
    predicted, target = torch.arange(10.0)[:, None], torch.arange(10.0)[:, None].square()
    alone, together, parts = Meter(task), Meter(task), [Meter(task), Meter(task), Meter(task)]
    alone.add(predicted, (predicted, target))
    for part, span in zip(parts, (slice(0, 4), slice(4, 10)), strict=False):  # the third had no batch
        part.add(predicted[span], (predicted[span], target[span]))
    for part in parts:
        together.merge(part.sums, part.samples)
    assert together.scores().metrics == pytest.approx(alone.scores().metrics) and together.scores().samples == 10


def test_targets_are_found_in_tuples_dicts_and_by_name() -> None:
    x, y, z = torch.zeros(2, 1), torch.ones(2, 1), torch.full((2, 1), 2.0)
    assert Regression().target_in((x, y)) is y
    assert Regression().target_in((x, y, ["a", "b"])) is y
    assert Regression().target_in(((x, z), y)) is y
    assert Regression().target_in({"x": x, "target": y}) is y
    assert Regression(target="depth").target_in({"x": x, "labels": z, "depth": y}) is y
    assert Regression(target=-1).target_in((x, z, y)) is y
    assert torch.equal(Regression().target_in((x, numpy.ones((2, 1), numpy.float32))), y)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(2, 1), "Tensor without a target"),
        ((torch.zeros(2, 1),), "has 1 members"),
        ({"x": torch.zeros(2, 1)}, "holds x, but no labels"),
        ((torch.zeros(2, 1), None), "must be tensors, got NoneType"),
        ((torch.zeros(2, 1), [{"boxes": 1}]), "got a list of dict"),
    ],
)
def test_a_missing_target_is_an_error_that_says_what_came(batch: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Regression().loss(torch.zeros(2, 1), batch)


def test_several_inputs_come_nested_or_flat_with_the_place_of_the_target() -> None:
    image, scale, target = torch.ones(2, 3), torch.full((2, 1), 2.0), torch.full((2, 3), 2.0)
    model = TwoInputs()
    for task, batch in (
        (Regression(), ((image, scale), target)),
        (Regression(), ({"scale": scale, "image": image}, target)),
        (Regression(), {"scale": scale, "image": image, "target": target, "name": ["a", "b"]}),
        (Regression(target=2), (image, scale, target)),
    ):
        output = task.predict(model, batch)
        assert task.loss(output, batch).item() == 0
    assert Regression(target=2, output="image").loss(output, batch).item() == 1
    with pytest.raises(DataError, match=r"takes 2 inputs \(image, scale\).*Regression\(target=2\)"):
        Regression().predict(model, (image, scale, target))


def test_a_criterion_gets_targets_of_any_kind() -> None:
    seen: list[object] = []

    def criterion(output: Tensor, target: object) -> Tensor:
        seen.append(target)
        return output.mean()

    task = CriterionTask(criterion)
    boxes = [{"boxes": torch.zeros(2, 4)}, {"boxes": torch.zeros(0, 4)}]
    assert task.measure(torch.tensor([1.0, 3.0]), (torch.zeros(2, 3), boxes)) == (4.0, 2)
    assert seen == [boxes] and not task.higher_is_better
    assert CriterionTask(l1_loss, output="b").loss({"a": torch.zeros(1), "b": torch.ones(1)}, (None, torch.zeros(1))).item() == 1
    assert task.facts()["name"] == "CriterionTask" and str(task.facts()["criterion"]).endswith("criterion")


def test_a_task_must_measure_what_it_selects_by() -> None:
    class Wrong(Distance):
        def metrics(self, sums: Any) -> dict[str, float]:
            return {"error": 1.0}

    meter = Meter(Wrong())
    meter.add(torch.zeros(1, 2), {"points": torch.zeros(1, 2)})
    with pytest.raises(DataError, match="selects by 'distance', but it measures error"):
        meter.scores()


def test_values_are_told_in_their_units() -> None:
    assert Classification().describe("accuracy", 0.9725) == "97.25 %"
    assert Regression().describe("RMSE", 0.123456) == "0.1235"
    assert format_metric(31.2, "dB") == "31.2 dB" and format_metric(None) == "\N{EN DASH}"


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"label_smoothing": 1.0}, {"label_smoothing": -0.1}, {"temperature": 0.0}, {"temperature": float("nan")}):
        with pytest.raises(SpecError, match=next(iter(wrong))):
            Classification(**wrong)


def test_named_tuples_are_batches_too() -> None:
    Pair = namedtuple("Pair", "x y")
    pair = Pair(torch.zeros(2, 1), torch.ones(2, 1))
    assert Regression().loss(Regression().predict(nn.Identity(), pair), pair).item() == 1
