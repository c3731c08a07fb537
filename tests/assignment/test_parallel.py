"""Measurements here, in two processes, and after a kill."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import lowbit
from lowbit.assignment.budget import Budget
from lowbit.assignment.costs import Assignment
from lowbit.assignment.parallel import LossOf, losses, table
from lowbit.assignment.problem import SearchProblem, make_problem
from lowbit.errors import LayerError, SpecError
from lowbit.inputs import Inputs
from lowbit.spec import LayerBits

X = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


class AlwaysDropping(nn.Module):
    """Dropout that is on in evaluation too: every call draws random numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


def problem(**given: object) -> SearchProblem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 32), AlwaysDropping(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    settings = {"candidates": (2, 4), "activation_bits": (None,), "first_last": None, "task": lowbit.Classification(), **given}
    return make_problem(model, Inputs.of(X, model), budget=Budget(), batches=X.split(16), **settings)  # type: ignore[arg-type]


def rounding_error(problem: SearchProblem, factor: float = 1.0, log: Path | None = None, stop: str = "") -> LossOf:
    """A loss that depends on the network, the samples, its random numbers and the number of threads; ``log`` gets a line for each."""

    def loss(bits: Assignment) -> float:
        if stop in bits and stop:
            raise KeyboardInterrupt
        if log is not None:
            with log.open("a") as file:
                file.write(" ".join(bits) + "\n")
        assert problem.calibration is None and torch.get_num_threads() == 1
        noise = sum(float(problem.model(batch).detach().sum()) for batch in problem.batches)
        weights = sum(
            float(problem.layers[name].original.detach().mul(2.0 ** (width.weight or 0)).frac().abs().sum()) for name, width in bits.items()
        )
        return factor * (weights + noise)

    return loss


def failing(problem: SearchProblem) -> LossOf:
    def loss(bits: Assignment) -> float:
        if "2" in bits:
            raise ArithmeticError("no such luck")
        return float("nan")

    return loss


def test_the_table_has_every_layer_at_every_width_and_a_network_that_is_random_is_measured_alike_each_time() -> None:
    found = table(problem(), rounding_error, name="errors", facts={})
    assert {name: list(widths) for name, widths in found.items()} == {name: [LayerBits(4, None), LayerBits(2, None)] for name in "024"}
    one = losses(problem(), [{"4": LayerBits(2, None)}], rounding_error, name="errors", facts={})
    assert one == [found["4"][LayerBits(2, None)]]
    assert table(problem(seed=1), rounding_error, name="errors", facts={}) != found


def test_two_processes_give_the_same_numbers_as_none(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    apart = table(problem(workers=2, work_dir=tmp_path), rounding_error, name="errors", facts={})
    torch.set_num_threads(2)
    try:
        assert table(problem(), rounding_error, name="errors", facts={}) == apart
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    (file,) = tmp_path.glob("errors-*.json")
    kept = json.loads(file.read_text())["found"]
    assert sorted(kept.values()) == sorted(loss for widths in apart.values() for loss in widths.values())


def test_a_killed_search_measures_only_what_is_missing_and_ends_the_same(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        table(problem(work_dir=tmp_path), partial(rounding_error, log=log, stop="4"), name="errors", facts={})
    assert log.read_text().split() == ["0", "0", "2", "2"]
    log.unlink()
    found = table(problem(work_dir=tmp_path), partial(rounding_error, log=log), name="errors", facts={})
    assert log.read_text().split() == ["4", "4"]
    assert found == table(problem(), rounding_error, name="errors", facts={})
    table(problem(work_dir=tmp_path), partial(rounding_error, log=log), name="errors", facts={})
    assert log.read_text().split() == ["4", "4"]  # nothing more


@pytest.mark.parametrize("change", ["seed", "facts", "weights", "samples", "file"])
def test_what_was_measured_of_something_else_is_measured_again(tmp_path: Path, change: str) -> None:
    log = tmp_path / "log"
    bits = [{"0": LayerBits(2, None)}]
    measure = partial(rounding_error, log=log)
    losses(problem(work_dir=tmp_path), bits, measure, name="errors", facts={"factor": 1})
    other = problem(work_dir=tmp_path, seed=int(change == "seed"))
    if change == "weights":
        other.layers["4"].original.data[0, 0] += 1
    if change == "samples":
        other.batches[0][0, 0] += 1
    if change == "file":
        next(tmp_path.glob("errors-*.json")).write_text("{")
    try:
        losses(other, bits, measure, name="errors", facts={"factor": 2 if change == "facts" else 1})
        assert log.read_text().split() == ["0", "0"]
        assert len(list(tmp_path.glob("errors-*.json"))) == 1 + (change != "file")  # what there was is there still
    finally:
        if change == "samples":
            other.batches[0][0, 0] -= 1


def test_a_measurement_that_fails_is_an_error_that_names_the_layer_and_its_bits() -> None:
    with pytest.raises(LayerError, match=r"errors of 2 4/float: ArithmeticError: no such luck"):
        losses(problem(), [{"2": LayerBits(4, None)}], failing, name="errors", facts={})
    with pytest.raises(LayerError, match=r"errors of 0 4/float: LayerError: the loss is nan"):
        losses(problem(), [{"0": LayerBits(4, None)}], failing, name="errors", facts={})


def test_what_cannot_be_sent_to_other_processes_is_an_error() -> None:
    wanted = [{"0": LayerBits(2, None)}, {"0": LayerBits(4, None)}]
    with pytest.raises(SpecError, match=r"workers=2: Sequential, its samples or its task cannot be sent .* or use workers=1"):
        losses(
            problem(workers=2, task=lowbit.CriterionTask(lambda output, target: output.sum())),
            wanted,
            rounding_error,
            name="errors",
            facts={},
        )
