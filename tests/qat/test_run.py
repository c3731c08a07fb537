from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.qat.recording import BATCHES, Recorder, prepared, recorded
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.network import insert
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Phase, Recipe, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.qat.run import penalty
from lowbit.quantizers import LearnedScaleQuantizer

ALL = ("weights", "quantizers", "others")


def run_of(model: nn.Module, recipe: Recipe | None = None, **given: object) -> TrainRun:
    return TrainRun(model, method_of(model), Classification(), recipe or Recipe(epochs=2), len(BATCHES), **given)  # type: ignore[arg-type]


def step(run: TrainRun, batch: tuple[Tensor, Tensor] = BATCHES[0]) -> None:
    run.before_step()
    run.loss(batch).backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def roles_changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    method, owners = method_of(model), dict(model.named_modules())
    changed = [(name, p) for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    return {method.role(name, p, owners[name.rpartition(".")[0]]) for name, p in changed}


# Order


def test_hooks_are_called_for_every_phase_epoch_and_step() -> None:
    model, method = recorded(("first", 1, ALL), ("empty", 0, ()), ("second", 2, ALL))
    run = run_of(model)
    seen = []
    for epoch in run.each_epoch():
        seen.append((epoch, run.phase.name, run.epoch))
        step(run)
    assert seen == [(0, "first", 0), (1, "second", 0), (2, "second", 1)]
    one = ["backward", "after"]
    expected = ["phase first", "epoch 0", "before 0", *one, "phase empty", "phase second", "epoch 0", "before 1", *one, "epoch 1"]
    assert method.calls == [*expected, "before 2", *one]


def test_a_run_that_returns_goes_on_inside_its_epoch() -> None:
    model, method = recorded(("first", 2, ALL), ("second", 2, ALL))
    run = run_of(model)
    run.return_to(1, 1, 13)
    assert method.calls == ["phase first", "phase second"]
    assert (run.phase_index, run.epoch, run.step, run.epochs_done) == (1, 1, 13, 3)
    assert list(run.each_epoch()) == [3]
    assert method.calls == ["phase first", "phase second"]  # that epoch has started before


def test_a_return_to_a_first_phase_enters_the_later_ones() -> None:
    model, method = recorded(("first", 2, ALL), ("second", 1, ALL))
    run = run_of(model)
    run.return_to(0, 1, 5)
    assert list(run.each_epoch()) == [1, 2]
    assert method.calls == ["phase first", "phase second", "epoch 0"]


# Where it stands


def test_progress_counts_steps_of_all_phases_and_of_the_present_one() -> None:
    model, _ = recorded(("first", 1, ALL), ("second", 3, ALL))
    run = run_of(model)
    assert run.epochs == 4 and run.progress == 0
    run.phase_index, run.epoch, run.step = 1, 1, 10
    assert run.epochs_done == 2
    assert run.progress == 10 / 16
    assert run.phase_progress == 6 / 12
    run.step = 99
    assert run.progress == 1


def test_the_learning_rate_follows_the_phase() -> None:
    model, method = recorded(("first", 1, ALL))
    fast, slow = OptimizerSpec(learning_rate=1.0, schedule="linear"), OptimizerSpec(learning_rate=0.1, schedule="linear")
    method.schedule = (Phase("a", 1, {"weights": fast, "quantizers": slow}), Phase("b", 1, {"others": slow}), Phase("c", 0, {}))
    run = run_of(model)
    run.start_phase()
    run.step = 1
    run.before_step()
    assert run.learning_rate == pytest.approx(0.75)
    rates = {group["role"]: group["lr"] for optimizer in run.optimizers for group in optimizer.param_groups}
    assert rates == pytest.approx({"weights": 0.75, "quantizers": 0.075})
    run.phase_index, run.step = 1, 6
    assert run.learning_rate == pytest.approx(0.05)
    run.phase_index = 2
    assert run.learning_rate == 0


class Clock(nn.Module):
    """Notes the progress it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.times: list[float] = []

    def set_progress(self, progress: float) -> None:
        self.times.append(progress)


def test_modules_with_a_schedule_see_the_progress_before_each_step() -> None:
    model, clock = prepared(), Clock()
    model.append(clock)  # type: ignore[operator]
    run = run_of(model, Recipe(epochs=1))
    run.start_phase()
    for run.step in (0, 2, 9):
        run.before_step()
    assert clock.times == [0, 0.5, 1]


def test_the_generator_starts_from_the_recipes_seed() -> None:
    draws = [torch.rand(3, generator=run_of(prepared(), Recipe(seed=seed)).generator).tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


# What is trained


@pytest.mark.parametrize("roles", [("weights",), ("quantizers",), ("others",), ALL])
def test_a_phase_trains_its_roles_and_no_other(roles: tuple[str, ...]) -> None:
    model, _ = recorded(("only", 1, roles))
    run = run_of(model)
    run.start_phase()
    before = state(model)
    step(run)
    assert roles_changed(model, before) == set(roles)


def test_a_later_phase_trains_what_an_earlier_one_froze() -> None:
    model, _ = recorded(("first", 1, ("quantizers",)), ("second", 1, ("weights",)))
    run = run_of(model)
    for _ in run.each_epoch():
        before = state(model)
        step(run)
    assert roles_changed(model, before) == {"weights"}


def test_what_was_frozen_before_stays_frozen() -> None:
    model = prepared()
    frozen = insert.float_weight(model[2])  # type: ignore[index]
    frozen.requires_grad_(False)
    before = frozen.clone()
    run = run_of(model)
    run.start_phase()
    step(run)
    assert not frozen.requires_grad and torch.equal(frozen, before)
    assert all(p is not frozen for optimizer in run.optimizers for group in optimizer.param_groups for p in group["params"])
    assert model[0].bias.requires_grad  # type: ignore[index]


def test_a_later_run_trains_what_the_last_phase_of_an_earlier_one_froze() -> None:
    model, _ = recorded(("only", 1, ("quantizers",)))
    run_of(model).start_phase()
    assert not model[0].bias.requires_grad  # type: ignore[index]
    model.lowbit_method = Recorder()  # type: ignore[assignment]
    run_of(model).start_phase()
    assert all(p.requires_grad for p in model.parameters())


def test_roles_of_parameters() -> None:
    model = prepared()
    run = run_of(model)
    assert len(run.parameters_of("weights")) == 3
    assert {id(p) for p in run.parameters_of("weights")} == {id(insert.float_weight(model[i])) for i in (0, 2, 4)}  # type: ignore[index]
    assert len(run.parameters_of("others")) == 3
    quantizers = {id(p) for q in run.quantizers() for p in q.parameters()}
    assert {id(p) for p in run.parameters_of("quantizers")} == quantizers


def test_each_kind_of_optimizer_gets_its_numbers() -> None:
    model, method = recorded(("only", 1, ALL))
    sgd = OptimizerSpec(momentum=0.8, nesterov=True, weight_decay=0.01)
    method.schedule = (
        Phase("all", 1, {"weights": sgd, "quantizers": OptimizerSpec("adam", weight_decay=0.02), "others": replace(sgd, momentum=0.0)}),
    )
    run = run_of(model)
    run.start_phase()
    found = {g["role"]: (type(o), g["weight_decay"]) for o in run.optimizers for g in o.param_groups}
    assert found["weights"] == (torch.optim.SGD, 0.01) and found["quantizers"] == (torch.optim.Adam, 0.02)
    groups = {g["role"]: g for o in run.optimizers for g in o.param_groups}
    assert (groups["weights"]["momentum"], groups["weights"]["nesterov"]) == (0.8, True)
    assert (groups["others"]["momentum"], groups["others"]["nesterov"]) == (0.0, False)  # there is no Nesterov without momentum
    step(run)


def test_a_role_that_no_parameter_has_is_refused() -> None:
    model, _ = recorded(("only", 1, ("weights", "teachers")))
    with pytest.raises(SpecError, match="phase 'only': no parameter has the role teachers"):
        run_of(model).start_phase()


def test_optimizers_are_new_in_each_epoch_where_a_phase_asks_for_it() -> None:
    model, method = recorded(("only", 2, ALL))
    for renews in (False, True):
        method.schedule = (replace(method.schedule[0], renew_each_epoch=renews),)
        run = run_of(model)
        found = [run.optimizers[0] for _ in run.each_epoch()]
        assert (found[0] is not found[1]) == renews


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    return lowbit.prepare(model, method="lsq", sample=BATCHES[0][0]).train()


def test_a_phase_may_train_norms_alone() -> None:
    model = with_norm()
    model.lowbit_method = Recorder(schedule=(Phase("norms", 1, {"others.norms": OptimizerSpec(learning_rate=0.1)}),))  # type: ignore[assignment]
    run = run_of(model)
    run.start_phase()
    before = state(model)
    step(run)
    assert roles_changed(model, before) == {"others.norms"}
    assert [tuple(p.shape) for p in run.parameters_of("others.norms")] == [(8,), (8,)]
    assert len(run.parameters_of("others")) == 4  # two biases of layers too


def test_layers_are_frozen_by_name_over_phases_until_they_are_released() -> None:
    model, _ = recorded(("first", 1, ALL), ("second", 1, ALL))
    run, moved = run_of(model), []
    for epoch in run.each_epoch():
        for action in ("freeze", "release") if epoch else ("train", "freeze"):
            if action != "train":
                getattr(run, action)("2")
            before = state(model)
            step(run)
            weights = [insert.float_weight(model[index]) for index in (0, 2, 4)]  # type: ignore[index]
            names = [f"{index}.parametrizations.weight.original" for index in (0, 2, 4)]
            moved.append([not torch.equal(weight, before[name]) for weight, name in zip(weights, names, strict=True)])
            assert not torch.equal(model[2].bias, before["2.bias"])  # type: ignore[index]
    assert moved == [[True, True, True], [True, False, True], [True, False, True], [True, True, True]]


def test_other_roles_of_a_layer_may_be_frozen() -> None:
    run = run_of(prepared())
    run.start_phase()
    run.freeze("2", "4", roles=("weights", "others"))
    frozen = {name for name, parameter in run.model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"{layer}.{name}" for layer in (2, 4) for name in ("bias", "parametrizations.weight.original")} == set(run.frozen)
    run.release("2", roles=("others",))
    assert run.model[2].bias.requires_grad  # type: ignore[index]
    with pytest.raises(SpecError, match="layer '1' of Sequential has no parameter with the role weights"):
        run.freeze("1")


# The step


def test_a_step_is_that_of_the_optimizer_by_hand() -> None:
    model, method = recorded(("only", 1, ALL))
    method.schedule = (Phase("all", 1, {"others": OptimizerSpec(learning_rate=0.5, momentum=0.0, weight_decay=0.0)}),)
    run = run_of(model)
    run.start_phase()
    before = model[4].bias.detach().clone()  # type: ignore[index]
    step(run)
    torch.testing.assert_close(model[4].bias, before - 0.5 * model[4].bias.grad)  # type: ignore[index]
    assert run.step == 1


def test_gradients_start_anew_in_each_step() -> None:
    model = prepared()
    run = run_of(model)
    run.start_phase()
    step(run)
    run.before_step()
    assert all(p.grad is None for p in model.parameters())


def test_gradients_are_clipped_to_the_norm_of_the_phase() -> None:
    model, method = recorded(("only", 1, ALL))
    method.schedule = (replace(method.schedule[0], clip_norm=1e-3),)
    run = run_of(model)
    run.start_phase()
    run.before_step()
    run.loss(BATCHES[0]).backward()
    run.after_backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_another_way_to_step_replaces_the_optimizers_own() -> None:
    model = prepared()
    run = run_of(model)
    run.start_phase()
    before, stepped = state(model), []
    run.before_step()
    run.loss(BATCHES[0]).backward()
    run.optimizer_step(stepped.append)
    assert stepped == run.optimizers
    assert roles_changed(model, before) == set()


def test_scales_stay_positive_after_every_step() -> None:
    model = prepared()
    run = run_of(model, Recipe(epochs=1, optimizer=OptimizerSpec(learning_rate=1e3)))
    run.start_phase()
    step(run)
    scales = [q.scale for q in run.quantizers() if isinstance(q, LearnedScaleQuantizer)]
    assert len(scales) == 6 and all(bool((scale > 0).all()) for scale in scales)


# The loss


def test_the_loss_is_the_tasks_mixed_with_the_teachers() -> None:
    model, teacher = prepared().eval(), nn.Linear(6, 3)
    task = Classification(temperature=2.0)
    run = run_of(model, Recipe(distillation=0.25), given=GivenNetworks(teacher))
    run.task = task
    output, soft = model(BATCHES[0][0]), teacher(BATCHES[0][0])
    expected = 0.75 * task.loss(output, BATCHES[0]) + 0.25 * task.distillation_loss(output, soft)
    torch.testing.assert_close(run.task_loss(BATCHES[0]), expected)
    run.loss(BATCHES[0]).backward()
    assert teacher.weight.grad is None


def test_another_network_can_be_given_to_the_task() -> None:
    run, other = run_of(prepared()), nn.Linear(6, 3)
    assert torch.equal(run.task_loss(BATCHES[0], other), Classification().loss(other(BATCHES[0][0]), BATCHES[0]))


class Costly(LearnedScaleQuantizer):
    def penalty(self) -> Tensor:
        return 3 * self.scale.sum()


def test_penalties_of_quantizers_are_part_of_the_loss_and_learned_from() -> None:
    model = prepared().eval()
    assert penalty(model).item() == 0
    quantizer = Costly(2, signed=True)
    quantizer.initialize(insert.float_weight(model[2]).detach())  # type: ignore[index]
    insert.set_weight_quantizer(model[2], quantizer)  # type: ignore[index]
    run = run_of(model)
    torch.testing.assert_close(run.penalty(), 3 * quantizer.scale)
    torch.testing.assert_close(run.loss(BATCHES[0]), run.task_loss(BATCHES[0]) + 3 * quantizer.scale)
    run.penalty().backward()
    assert quantizer.scale.grad is not None and quantizer.scale.grad.item() == 3
    quantizer.scale.requires_grad_(False)
    assert penalty(model).item() == 0  # nothing to learn from it


def test_a_wrapper_is_called_in_place_of_the_network() -> None:
    model, calls = prepared(), []

    class Wrapper(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            calls.append(len(x))
            return model(x)

    run = run_of(model, wrapped=Wrapper())
    run.task_loss(BATCHES[0])
    run.task_loss(BATCHES[0], model)
    run.task_loss(BATCHES[0], nn.Linear(6, 3))
    assert calls == [8, 8]
