"""Descent against the same loop written out, plateaus, batches, and resuming after a kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.synthesis.networks import small, two_inputs
from torch import Tensor

from lowbit.errors import DivergedError
from lowbit.inputs import Inputs
from lowbit.progress import Stage
from lowbit.synthesis import descent
from lowbit.synthesis.descent import Schedule, descend
from lowbit.synthesis.problem import SynthesisProblem, Synthesized, make_problem, normal

SCHEDULE = Schedule(iterations=40, learning_rate=0.2, patience=3, factor=0.1, min_learning_rate=1e-3, batch_size=64)


def problem_of(count: int = 6, work_dir: Path | None = None) -> SynthesisProblem:
    return make_problem(small(), Inputs((torch.zeros(1, 2, 6, 6),)), count=count, work_dir=work_dir)


def loss_of(problem: SynthesisProblem) -> descent.Loss:
    def loss(inputs: Inputs, places: range) -> Tensor:
        return torch.stack([(one.mean - one.kept.mean).square().sum() / len(places) for one in problem.statistics(inputs)]).sum()

    return loss


def made(problem: SynthesisProblem, schedule: Schedule = SCHEDULE) -> Synthesized:
    return descend(problem, problem.draw(normal), loss_of(problem), schedule, {})


def test_it_is_adam_on_the_inputs_with_a_rate_that_falls_on_plateaus() -> None:
    problem = problem_of()
    x = problem.draw(normal).args[0].clone().requires_grad_()
    optimizer = torch.optim.Adam([x], 0.2)
    rate, best, bad, losses = 0.2, float("inf"), 0, []
    for _ in range(40):
        value = loss_of(problem)(Inputs((x,)), range(6))
        losses.append(float(value.detach()))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        bad = 0 if losses[-1] < best * (1 - 1e-4) else bad + 1
        best = min(best, losses[-1]) if bad == 0 else best
        if bad > 3:
            rate, bad = max(rate * 0.1, 1e-3), 0
            optimizer.param_groups[0]["lr"] = rate
    found = made(problem)
    assert rate < 0.2  # it has fallen
    assert found.losses == pytest.approx(losses)
    torch.testing.assert_close(found.inputs.args[0], x.detach())


def test_batches_are_optimized_one_after_the_other_and_losses_are_means_over_samples() -> None:
    schedule = Schedule(**{**vars(SCHEDULE), "batch_size": 4})
    whole = made(problem_of(7), schedule)
    problem = problem_of(7)
    parts = [descend(problem, part, loss_of(problem), SCHEDULE, {}) for _, part in problem.batches(problem.draw(normal), 4)]
    assert torch.equal(whole.inputs.args[0], torch.cat([part.inputs.args[0] for part in parts]))
    assert whole.losses == pytest.approx([(3 * a + 4 * b) / 7 for a, b in zip(parts[0].losses, parts[1].losses, strict=True)])


def test_several_inputs_are_made_together_and_those_without_samples_stay() -> None:
    model, given = two_inputs()
    problem = make_problem(model, Inputs(given), count=4)
    start = problem.draw(normal)
    found = descend(problem, start, loss_of(problem), SCHEDULE, {})
    assert found.losses[-1] < found.losses[0] / 2
    assert not torch.equal(found.inputs.args[0], start.args[0]) and not torch.equal(found.inputs.args[1], start.args[1])
    assert torch.equal(found.inputs.args[2], torch.tensor([0, 1, 2, 0]))
    assert torch.equal(found.inputs.args[3], given[3])


class Killed(Exception):
    pass


@pytest.mark.parametrize("step", [1, 17, 40, 41, 63, 80])
def test_a_killed_descent_goes_on_to_the_same_bits(step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = Schedule(**{**vars(SCHEDULE), "batch_size": 4})
    expected = made(problem_of(7), schedule)
    advance, steps = Stage.advance, []

    def deadly(stage: Stage, amount: float = 1, note: str = "") -> None:
        advance(stage, amount, note)
        steps.append(stage.done)
        if stage.done == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Stage, "advance", deadly)
        patched.setattr(descent, "SAVE_SECONDS", 0.0)
        with pytest.raises(Killed):
            made(problem_of(7, tmp_path), schedule)
    steps.clear()
    with monkeypatch.context() as patched:
        patched.setattr(Stage, "advance", lambda stage, amount=1, note="": (advance(stage, amount, note), steps.append(stage.done)))
        found = made(problem_of(7, tmp_path), schedule)
    assert (steps[0] if steps else 81) >= step  # what was done is not done again
    assert torch.equal(found.inputs.args[0], expected.inputs.args[0]) and found.losses == expected.losses


def test_samples_of_other_seeds_are_kept_beside_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of(seed: int) -> Synthesized:
        problem = make_problem(small(), Inputs((torch.zeros(1, 2, 6, 6),)), count=3, seed=seed, work_dir=tmp_path)
        return made(problem)

    first, second = of(0), of(1)
    monkeypatch.setattr(descent._Batch, "run", lambda *_: None)  # nothing is computed again
    assert torch.equal(of(0).inputs.args[0], first.inputs.args[0]) and torch.equal(of(1).inputs.args[0], second.inputs.args[0])
    assert not torch.equal(first.inputs.args[0], second.inputs.args[0])


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    problem = problem_of()
    with pytest.raises(DivergedError, match=r"the loss is inf at iteration 1\. Pass a lower learning_rate than 0\.2"):
        descend(problem, problem.draw(normal), lambda inputs, _: inputs.args[0].sum() * float("inf"), SCHEDULE, {})
