from __future__ import annotations

import math

import pytest

from lowbit.errors import SpecError
from lowbit.qat import OptimizerSpec, Phase, Recipe, Turn


def test_a_cosine_falls_from_the_rate_to_nothing() -> None:
    spec = OptimizerSpec(learning_rate=0.4)
    assert [spec.rate_at(f) for f in (0.0, 0.5, 1.0)] == pytest.approx([0.4, 0.2, 0.0])
    assert spec.rate_at(0.25) == pytest.approx(0.2 * (1 + math.sqrt(0.5)))


def test_a_line_falls_to_nothing() -> None:
    spec = OptimizerSpec(learning_rate=0.4, schedule="linear")
    assert [spec.rate_at(f) for f in (0.0, 0.25, 1.0)] == pytest.approx([0.4, 0.3, 0.0])


def test_a_constant_stays() -> None:
    assert OptimizerSpec(learning_rate=0.4, schedule="constant").rate_at(0.99) == 0.4


def test_steps_multiply_from_each_milestone_on() -> None:
    spec = OptimizerSpec(learning_rate=1.0, schedule="step", milestones=(0.5, 0.75), gamma=0.1)
    assert [spec.rate_at(f) for f in (0.49, 0.5, 0.74, 0.75, 1.0)] == pytest.approx([1, 0.1, 0.1, 0.01, 0.01])


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.2), ("linear", 0.2), ("constant", 0.4), ("step", 0.04)])
def test_warm_up_rises_in_a_line_before_any_schedule(schedule: str, middle: float) -> None:
    spec = OptimizerSpec(learning_rate=0.4, schedule=schedule, warmup=0.2)  # type: ignore[arg-type]
    assert [spec.rate_at(f) for f in (0.0, 0.1, 0.2)] == pytest.approx([0.0, 0.2, 0.4])
    assert spec.rate_at(0.6) == pytest.approx(middle)  # half of what comes after


def test_warm_up_starts_and_schedules_end_at_shares_of_the_rate() -> None:
    spec = OptimizerSpec(learning_rate=0.4, warmup=0.2, start_factor=0.1, final_factor=0.01)
    assert [spec.rate_at(f) for f in (0.0, 0.1, 0.2, 0.6, 1.0)] == pytest.approx([0.04, 0.22, 0.4, 0.4 * (0.01 + 0.99 / 2), 0.004])
    assert OptimizerSpec(learning_rate=0.4, schedule="linear", final_factor=0.5).rate_at(0.5) == pytest.approx(0.3)


def test_a_specification_counts_for_the_roles_below_its_own() -> None:
    phase = Phase("p", 1, {"others": OptimizerSpec(), "teacher.biases": OptimizerSpec()})
    keys = {role: phase.key(role) for role in ("others", "others.norms", "weights", "teacher", "teacher.biases.last", "teacher.weights")}
    assert keys == {
        "others": "others", "others.norms": "others", "weights": None, "teacher": None, "teacher.biases.last": "teacher.biases",
        "teacher.weights": None,
    }  # fmt: skip
    assert phase.key("others.norms", Turn("t", ("others.norms",))) == "others"
    assert phase.key("others", Turn("t", ("others.norms",))) is None


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "step"])
def test_no_rate_is_negative_behind_the_end(schedule: str) -> None:
    spec = OptimizerSpec(learning_rate=0.4, schedule=schedule)  # type: ignore[arg-type]
    assert spec.rate_at(1.5) == spec.rate_at(1.0) >= 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"gamma": -0.1}, "gamma"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"warmup": 1.0}, "warmup"),
        ({"warmup": -0.1}, "warmup"),
        ({"start_factor": 1.1}, "start_factor"),
        ({"final_factor": -0.1}, "final_factor"),
        ({"betas": (0.9, 1.0)}, "betas must be from 0 to below 1"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
        ({"kind": "rmsprop"}, "kind .* 'sgd', 'adam', 'adamw', got 'rmsprop'"),
        ({"schedule": "exponential"}, "schedule .* 'cosine', 'step', 'linear', 'constant'"),
    ],
)
def test_optimizers_out_of_range_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        OptimizerSpec(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 0}, "epochs must be 1"),
        ({"batch_size": 0}, "batch_size must be 1"),
        ({"accumulate": 0}, "accumulate must be 1"),
        ({"average_weights": 1.0}, "average_weights"),
        ({"distillation": 1.1}, "distillation"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"clip_norm": math.nan}, "clip_norm"),
    ],
)
def test_recipes_out_of_range_are_refused(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Recipe(**wrong)  # type: ignore[arg-type]


def test_the_ends_of_every_range_are_allowed() -> None:
    Recipe(1, 1, clip_norm=0.1, distillation=1.0, average_weights=0.0)
    Recipe(distillation=0.0)
    assert OptimizerSpec(learning_rate=0.0, momentum=0.0, weight_decay=0.0).rate_at(0.3) == 0
