from __future__ import annotations

import copy
import functools
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from tests.qat.companions import Adversarial, Mutual
from tests.qat.recording import BATCHES, Recorder, network, prepared, recorded
from torch import Tensor, nn

import lowbit
from lowbit.errors import FileFormatError, LoopError, SpecError, StateError
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainingMethod, TrainRun
from lowbit.qat.loops.manual import ManualLoop
from lowbit.qat.prepare import method_of
from lowbit.qat.task import Batch
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.registry import list_methods
from lowbit.testing import tiny
from lowbit.testing.training import batch as tiny_batch, one_step, prepared as tiny_prepared


def sgd(run: ManualLoop, learning_rate: float = 0.1) -> torch.optim.SGD:
    return torch.optim.SGD(run.parameter_groups(learning_rate, 1e-2), momentum=0.9)


def step(run: ManualLoop, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    optimizer.zero_grad()
    run.before_step(optimizer)
    run.loss(batch).backward()
    run.after_backward()
    optimizer.step()
    run.after_step()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_loop_of_ones_own_gives_the_weights_of_a_run_with_the_same_optimizer() -> None:
    mine, theirs = prepared(), prepared()
    own = lowbit.training(mine, steps_per_epoch=4, epochs=2)
    optimizer = torch.optim.SGD(own.parameter_groups(0.1, 1e-2), momentum=0.9)
    spec = OptimizerSpec(learning_rate=0.1, weight_decay=1e-2, momentum=0.9, schedule="constant")
    run = TrainRun(theirs, method_of(theirs), Classification(), Recipe(epochs=2, optimizer=spec), 4)
    run.start_phase()
    for run.epoch in range(2):
        run.start_epoch()
        for x, y in BATCHES:
            run.before_step()
            run.loss((x, y)).backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()

            optimizer.zero_grad()
            own.before_step(optimizer)
            loss = nn.functional.cross_entropy(mine(x), y) + own.penalty()
            loss.backward()
            own.after_backward()
            optimizer.step()
            own.after_step()
    assert_same(values(mine), values(theirs))
    assert not torch.equal(mine[2].parametrizations.weight.original, network()[2].weight)


@pytest.mark.parametrize("name", [info.name for info in list_methods(kind="training")])
def test_every_method_learns_the_same_in_a_loop_of_ones_own(name: str) -> None:
    kinds = {"sgd": functools.partial(torch.optim.SGD, momentum=0.9), "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    recipe = Recipe(4, optimizer=OptimizerSpec(learning_rate=0.02, schedule="constant"), seed=4)
    theirs = tiny_prepared(name).train()
    mine = copy.deepcopy(theirs)

    def batches(count: int) -> list[Batch]:
        return [tiny_batch(index) for index in range(count)]

    given = GivenNetworks(float_network=tiny.trained())
    run = TrainRun(theirs, method_of(theirs), Classification(), recipe, 2, given=given, batches=batches)
    for _ in run.each_epoch():
        for _ in range(2):
            one_step(run)
    own = lowbit.training(mine, steps_per_epoch=2, epochs=4, recipe=recipe, batches=batches, float_network=tiny.trained())
    groups: dict[str, list[dict[str, object]]] = {}
    for group in own.parameter_groups():
        groups.setdefault(str(group["kind"]), []).append(group)
    optimizers = [kinds[kind](found) for kind, found in groups.items()]
    for index in range(8):
        for _ in own.phase.turns:
            own.before_step(*optimizers)
            own.loss(tiny_batch(index)).backward()
            own.after_backward()
            for optimizer in optimizers:
                optimizer.step()
            own.after_step()
    assert_same(values(mine), values(theirs))
    assert own.step == own.total_steps == 8


def test_hooks_come_in_the_order_of_phases_epochs_and_steps() -> None:
    model, method = recorded(("warm", 0, ("weights",)), ("first", 1, ("weights",)), ("second", 2, ("quantizers",)), ("end", 0, ("others",)))
    run = lowbit.training(model, steps_per_epoch=2, epochs=3)
    optimizer = sgd(run)
    for index in range(6):
        step(run, optimizer, BATCHES[index % 4])
    hooks = ["backward", "after"]
    assert method.calls == [
        "phase warm", "phase first", "epoch 0", "before 0", *hooks, "before 1", *hooks,
        "phase second", "epoch 0", "before 2", *hooks, "before 3", *hooks, "epoch 1", "before 4", *hooks, "before 5", *hooks,
        "phase end",
    ]  # fmt: skip


def test_training_longer_than_planned_stays_in_the_last_epoch() -> None:
    model, method = recorded(("only", 1, ("weights",)))
    run = lowbit.training(model, steps_per_epoch=1, epochs=1)
    optimizer = sgd(run)
    for _ in range(3):
        step(run, optimizer, BATCHES[0])
    assert method.calls.count("epoch 0") == 1
    assert (run.step, run.progress) == (3, 1.0)


def test_what_a_phase_does_not_train_stays_even_with_momentum_and_decay() -> None:
    model, _ = recorded(("weights", 1, ("weights", "others")), ("scales", 1, ("quantizers",)))
    run = lowbit.training(model, steps_per_epoch=2, epochs=2)
    optimizer = sgd(run)
    for batch in BATCHES[:2]:
        step(run, optimizer, batch)
    middle = values(model)
    for batch in BATCHES[2:]:
        optimizer.zero_grad(set_to_none=False)  # gradients of zeros would still be stepped
        run.before_step(optimizer)
        run.loss(batch).backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
    moved = {name for name, value in values(model).items() if not torch.equal(value, middle[name])}
    assert "2.parametrizations.weight.0.quantizer.scale" in moved
    assert all("quantizer" in name for name in moved)


def test_what_the_user_froze_stays_frozen() -> None:
    model = prepared()
    frozen = model[0].bias
    frozen.requires_grad_(False)
    run = lowbit.training(model, steps_per_epoch=4, epochs=1)
    optimizer = sgd(run)
    before = frozen.clone()
    step(run, optimizer, BATCHES[0])
    assert not frozen.requires_grad
    assert torch.equal(frozen, before)
    assert all(parameter is not frozen for group in optimizer.param_groups for parameter in group["params"])


def test_parameter_groups_hold_each_parameter_once_with_the_rate_of_its_role() -> None:
    model = prepared(quantizer_learning_rate=0.25, quantizer_weight_decay=0.5)
    groups = {group["role"]: group for group in lowbit.parameter_groups(model, learning_rate=0.2, weight_decay=0.01)}
    assert {role: (group["lr"], group["weight_decay"]) for role, group in groups.items()} == {
        "weights": (0.2, 0.01),
        "others": (0.2, 0.01),
        "quantizers": (0.05, 0.5),
    }
    assert [p.shape for p in groups["weights"]["params"]] == [(16, 6), (12, 16), (3, 12)]
    assert [p.shape for p in groups["others"]["params"]] == [(16,), (12,), (3,)]
    held = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_the_learning_rate_is_the_users() -> None:
    model, _ = recorded(("only", 2, ("weights", "quantizers")))
    run = lowbit.training(model, steps_per_epoch=2, epochs=2, recipe=Recipe(optimizer=OptimizerSpec(learning_rate=3.0)))
    quantizers, weights, others = run.parameters_of("quantizers"), run.parameters_of("weights"), run.parameters_of("others")
    optimizers = torch.optim.Adam([*quantizers, *others], lr=7.0), torch.optim.SGD(weights, lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizers[1], gamma=0.5)
    seen = []
    for batch in BATCHES:
        run.before_step(*optimizers)
        seen.append(run.learning_rate)
        run.loss(batch).backward()
        run.after_backward()
        for optimizer in optimizers:
            optimizer.step()
        run.after_step()
        schedule.step()
    assert seen == [0.5, 0.25, 0.125, 0.0625]


def test_optimizers_that_change_between_steps_are_looked_at_again() -> None:
    model, _ = recorded(("only", 1, ("weights", "quantizers")))
    run = lowbit.training(model, steps_per_epoch=4, epochs=1)
    optimizer = sgd(run)
    step(run, optimizer, BATCHES[0])
    optimizer.load_state_dict(optimizer.state_dict())  # makes new groups
    optimizer.param_groups[0]["lr"] = 0.25
    step(run, optimizer, BATCHES[1])
    assert run.learning_rate == 0.25
    other = sgd(run)
    other.param_groups[0]["lr"] = 0.75
    run.before_step(other)
    assert run.learning_rate == 0.75
    run.loss(BATCHES[2]).backward()
    run.after_backward()
    run.after_step()
    with pytest.raises(LoopError, match="no optimizer holds 7 parameters of the quantizers"):
        run.before_step(torch.optim.SGD(run.parameters_of("weights"), lr=0.1))


def test_modules_with_a_schedule_see_the_progress_of_all_steps() -> None:
    seen: list[float] = []

    class Temperature(nn.Module):
        def set_progress(self, progress: float) -> None:
            seen.append(progress)

        def forward(self, x: Tensor) -> Tensor:
            return x

    model = prepared()
    model.add_module("temperature", Temperature())
    run = lowbit.training(model, steps_per_epoch=2, epochs=2)
    optimizer = sgd(run)
    for batch in BATCHES:
        step(run, optimizer, batch)
    assert seen == [0, 0.25, 0.5, 0.75]


@dataclass
class Replacing(Recorder):
    """Replaces a scale at the start of the phase called "second"."""

    def start_phase(self, run: TrainRun) -> None:
        if run.phase.name == "second":
            quantizer = run.model.get_submodule("2.parametrizations.weight.0.quantizer")
            quantizer.scale = nn.Parameter(torch.full((1, 1), 0.1))


def test_parameters_that_a_method_replaces_are_replaced_in_the_users_optimizer() -> None:
    roles = ("weights", "quantizers", "others")
    model, _ = recorded(("first", 1, roles), ("second", 1, roles), base=Replacing)
    run = lowbit.training(model, steps_per_epoch=1, epochs=2)
    optimizer = sgd(run)
    old = model.get_parameter("2.parametrizations.weight.0.quantizer.scale")
    step(run, optimizer, BATCHES[0])
    assert old in optimizer.state
    step(run, optimizer, BATCHES[1])
    new = model.get_parameter("2.parametrizations.weight.0.quantizer.scale")
    held = {id(p): group["role"] for group in optimizer.param_groups for p in group["params"]}
    assert held[id(new)] == "quantizers"
    assert new.item() != pytest.approx(0.1, abs=1e-6)  # it was stepped
    assert id(old) not in held
    assert old not in optimizer.state


@dataclass
class Worsening(Recorder):
    """Doubles a bias when a phase starts, draws random numbers, and keeps values of its own in the network and beside it."""

    noise: float = 0.0

    def start_phase(self, run: TrainRun) -> None:
        super().start_phase(run)
        with torch.no_grad():
            run.model.get_parameter("2.bias").mul_(2)

    def after_step(self, run: TrainRun) -> None:
        super().after_step(run)
        self.noise += float(torch.randn((), generator=run.generator))
        run.model.kept = self.noise  # type: ignore[assignment]
        with torch.no_grad():
            run.model.get_parameter("0.bias").add_(self.noise)


def test_a_run_goes_on_from_its_state_to_the_same_weights(tmp_path: Path) -> None:
    phases = ("first", 1, ("weights", "quantizers")), ("second", 2, ("quantizers", "others"))
    model, whole = recorded(*phases, base=Worsening)
    run = lowbit.training(model, steps_per_epoch=2, epochs=3)
    optimizer = sgd(run)
    for index in range(3):
        step(run, optimizer, BATCHES[index])
    torch.save({"run": run.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    for index in range(3, 6):
        step(run, optimizer, BATCHES[index % 4])

    again, method = recorded(*phases, base=Worsening)
    resumed = lowbit.training(again, steps_per_epoch=2, epochs=3)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(saved["run"])
    fresh = sgd(resumed)
    fresh.load_state_dict(saved["optimizer"])
    for index in range(3, 6):
        step(resumed, fresh, BATCHES[index % 4])
    assert_same(values(again), values(model))
    assert again.kept == model.kept == whole.noise != 0
    assert method.calls == whole.calls


def test_a_state_before_the_first_step_starts_all() -> None:
    model, _ = recorded(("first", 1, ("weights",)))
    state = lowbit.training(model, steps_per_epoch=1, epochs=1).state_dict()
    again, method = recorded(("first", 1, ("weights",)))
    run = lowbit.training(again, steps_per_epoch=1, epochs=1)
    run.load_state_dict(state)
    step(run, sgd(run), BATCHES[0])
    assert method.calls == ["phase first", "epoch 0", "before 0", "backward", "after"]


def test_a_state_of_another_network_is_refused() -> None:
    state = lowbit.training(prepared(), steps_per_epoch=1, epochs=1).state_dict()
    other = lowbit.prepare(network()[:3], method="lsq", weight_bits=2, activation_bits=3, sample=BATCHES[0][0])
    run = lowbit.training(other, steps_per_epoch=1, epochs=1)
    with pytest.raises(FileFormatError, match="the saved state is of another network: modules missing here: 3, 4"):
        run.load_state_dict(state)
    with pytest.raises(FileFormatError, match=r"this is no state of 'lsq' on this network \(KeyError: 'has_entered'\)"):
        run.load_state_dict({"step": 3})


def test_going_on_by_the_number_of_steps_keeps_the_weights_that_were_loaded() -> None:
    model, method = recorded(("first", 1, ("weights",)), ("second", 1, ("quantizers",)), base=Worsening)
    run = lowbit.training(model, steps_per_epoch=2, epochs=2)
    before = values(model)
    run.resume(2)
    assert_same(values(model), before)
    assert run.progress == 0.5
    step(run, sgd(run), BATCHES[0])
    assert method.calls == ["phase first", "phase second", "epoch 0", "before 2", "backward", "after"]


def test_a_later_run_trains_what_the_last_phase_of_an_earlier_one_froze() -> None:
    model, _ = recorded(("only", 1, ("quantizers",)))
    model[0].bias.requires_grad_(False)
    run = lowbit.training(model, steps_per_epoch=1, epochs=1)
    step(run, sgd(run), BATCHES[0])
    assert not model[2].bias.requires_grad
    model.lowbit_method = Recorder()  # type: ignore[assignment]
    step(later := lowbit.training(model, steps_per_epoch=1, epochs=1), sgd(later), BATCHES[0])
    assert model[2].bias.requires_grad
    assert not model[0].bias.requires_grad  # the user's doing


@dataclass
class Looking(Recorder):
    """Leaves gradients behind when an epoch starts."""

    def start_epoch(self, run: TrainRun) -> None:
        assert run.batches is not None
        for batch in run.batches(2):
            run.task_loss(batch).backward()


def test_gradients_of_a_method_that_looks_at_data_do_not_reach_the_step() -> None:
    model, _ = recorded(base=Looking)
    reference = prepared()
    for network_, batches in ((model, BATCHES), (reference, None)):
        run = lowbit.training(network_, steps_per_epoch=4, epochs=1, batches=batches)
        step(run, sgd(run), BATCHES[0])
    assert_same(values(model), values(reference))


def test_methods_see_the_optimizer_inside_that_of_accelerate() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    run = lowbit.training(prepared(), steps_per_epoch=1, epochs=1)
    optimizer = sgd(run)
    run.before_step(Wrapper(optimizer))
    assert run.optimizers == [optimizer]


def test_the_loss_of_a_wrapped_network_goes_through_the_wrapper() -> None:
    model = prepared()
    wrapper = nn.DataParallel(model)
    calls = []
    wrapper.register_forward_hook(lambda *_: calls.append(1))
    run = lowbit.training(wrapper, steps_per_epoch=1, epochs=1)
    loss = run.loss(BATCHES[0])
    assert run.model is model
    assert len(calls) == 1
    assert loss.item() == nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).item()


def test_a_network_inside_a_larger_module_is_found() -> None:
    class Whole(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

    model = prepared()
    run = lowbit.training(Whole(model), steps_per_epoch=1, epochs=1)
    assert run.model is model
    assert run.loss(BATCHES[0]).item() == nn.functional.cross_entropy(model(BATCHES[0][0]), BATCHES[0][1]).item()
    with pytest.raises(SpecError, match="holds 2 prepared networks: 0, 1"):
        lowbit.training(nn.Sequential(model, prepared()), steps_per_epoch=1, epochs=1)


def test_soft_targets_of_the_teacher_are_mixed_in() -> None:
    model, teacher = prepared(), network().train()
    x, y = BATCHES[0]
    run = lowbit.training(
        model, steps_per_epoch=1, epochs=1, teacher=teacher, task=Classification(temperature=2.0), recipe=Recipe(distillation=0.25)
    )
    student, target = torch.log_softmax(model(x) / 2, 1), torch.softmax(teacher(x) / 2, 1)
    soft = 4 * (target * (target.log() - student)).sum(1).mean()
    expected = 0.75 * nn.functional.cross_entropy(model(x), y) + 0.25 * soft
    torch.testing.assert_close(run.loss((x, y)), expected)
    assert not teacher.training


def test_a_plain_function_is_a_task() -> None:
    model = prepared()
    x, target = BATCHES[0][0], torch.randn(8, 3)
    run = lowbit.training(model, steps_per_epoch=1, epochs=1, task=nn.functional.l1_loss)
    assert run.loss((x, target)).item() == nn.functional.l1_loss(model(x), target).item()
    output, other = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert run.task.distillation_loss(output, other).item() == 2.5  # (1 + 4) / 2
    assert run.task.measure(output, (output, other)) == (1.5, 1)  # (1 + 2) / 2
    assert not run.task.higher_is_better


def test_methods_that_look_at_data_get_the_first_batches_of_a_loader() -> None:
    run = lowbit.training(prepared(), steps_per_epoch=4, epochs=1, batches=BATCHES)
    assert run.batches is not None
    for _ in range(2):  # each time from the start
        assert [x for x, _ in run.batches(2)] == [BATCHES[0][0], BATCHES[1][0]]


def test_scales_stay_positive_whatever_the_users_optimizer_does() -> None:
    model = prepared()
    run = lowbit.training(model, steps_per_epoch=1, epochs=1)
    step(run, sgd(run, learning_rate=1e4), BATCHES[0])
    scales = [m.scale for m in model.modules() if isinstance(m, LearnedScaleQuantizer)]
    assert all(bool((scale > 0).all()) for scale in scales)


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (("after_backward",), r"after_backward was called where before_step is next \(step 0\)"),
        (("after_step",), r"after_step was called where before_step is next"),
        (("before_step", "after_step"), r"after_step was called where after_backward is next"),
        (("before_step", "before_step"), r"before_step was called where after_backward is next"),
        (("before_step", "backward", "after_backward", "before_step"), r"before_step was called where after_step is next"),
        (("before_step", "state_dict", "resume"), r"resume was called where after_backward is next"),
        (("before_step", "after_backward"), r"no parameter has a gradient. Call after_backward\(\) after loss.backward\(\)"),
    ],
)
def test_hooks_out_of_order_are_refused(calls: tuple[str, ...], message: str) -> None:
    run = lowbit.training(prepared(), steps_per_epoch=1, epochs=1)
    optimizer = sgd(run)
    with pytest.raises(LoopError, match=message):
        for call in calls:
            if call == "backward":
                run.loss(BATCHES[0]).backward()
            else:
                getattr(run, call)(*{"before_step": [optimizer], "resume": [1]}.get(call, []))


def test_an_optimizer_that_does_not_fit_the_network_is_refused() -> None:
    model = prepared()
    run = lowbit.training(model, steps_per_epoch=1, epochs=1)
    with pytest.raises(LoopError, match=r"before_step needs the optimizer of the loop: run.before_step\(optimizer\)"):
        run.before_step()
    with pytest.raises(LoopError, match=r"holds no parameter of the prepared network. Make it after lowbit.prepare"):
        run.before_step(torch.optim.SGD(network().parameters(), lr=0.1))
    missing = "no optimizer holds 7 parameters of the quantizers"  # a scale for each weight and input, an offset for the signed input
    with pytest.raises(LoopError, match=f"{missing}, '0.parametrizations.weight.0.quantizer.scale'"):
        run.before_step(torch.optim.SGD([*run.parameters_of("weights"), *run.parameters_of("others")], lr=0.1))
    run.before_step(torch.optim.SGD(model.parameters(), lr=0.1))  # all in one group will do


@dataclass
class TwoPasses(Recorder):
    """Has its own loss."""

    def loss(self, run: TrainRun, batch: Batch) -> Tensor:
        return 2 * run.task_loss(batch)


def test_a_method_with_a_loss_of_its_own_is_not_trained_with_another() -> None:
    model, _ = recorded(base=TwoPasses)
    run = lowbit.training(model, steps_per_epoch=1, epochs=1)
    optimizer = sgd(run)
    x, y = BATCHES[0]
    run.before_step(optimizer)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(LoopError, match=r"'lsq' has its own loss: compute it with run.loss\(\(inputs, targets\)\)"):
        run.after_backward()
    loss = run.loss((x, y))
    assert loss.item() == pytest.approx(2 * nn.functional.cross_entropy(model(x), y).item())
    run.after_backward()


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(SpecError, match=r"Sequential was not made by lowbit.prepare: it is not quantized"):
        lowbit.training(network(), steps_per_epoch=1, epochs=1)
    with pytest.raises(SpecError, match="steps_per_epoch must be 1 or more, got 0"):
        lowbit.training(prepared(), steps_per_epoch=0, epochs=1)
    with pytest.raises(SpecError, match="epochs must be 1 or more, got -1"):
        lowbit.training(prepared(), steps_per_epoch=1, epochs=-1)
    model, _ = recorded(("first", 2, ("weights",)), ("second", 3, ("weights",)))
    with pytest.raises(SpecError, match="'lsq' has 2 phases, which take 5 epochs or more; got epochs=4"):
        lowbit.training(model, steps_per_epoch=1, epochs=4)


def test_a_recipe_keeps_its_values_but_for_the_epochs() -> None:
    recipe = Recipe(epochs=99, seed=5, distillation=0.1)
    run = lowbit.training(prepared(), steps_per_epoch=1, epochs=3, recipe=recipe)
    assert run.recipe == replace(recipe, epochs=3)
    assert run.task == Classification()
    assert run.generator.initial_seed() == 5


# Companions and turns


def mutual(method: TrainingMethod | None = None) -> nn.Module:
    model = prepared()
    model.lowbit_method = method or Mutual()  # type: ignore[assignment]
    return model


def in_turns(run: ManualLoop, optimizers: list[torch.optim.Optimizer], batch: Batch) -> None:
    for _ in run.phase.turns:
        run.before_step(*optimizers)
        for loss in run.losses(batch):
            loss.backward()
        run.after_backward()
        for optimizer in optimizers:
            optimizer.step()
        run.after_step()


def everything(run: TrainRun) -> dict[str, Tensor]:
    networks = {"model": run.model, **run.networks}
    return {f"{kind}.{name}": value for kind, network_ in networks.items() for name, value in values(network_).items()}


@pytest.mark.parametrize("holder", ["user", "run"])
@pytest.mark.parametrize("method", [Mutual(), Adversarial(shape=(6,))], ids=["passes", "turns"])
def test_companions_learn_the_same_in_a_loop_of_ones_own(method: TrainingMethod, holder: str) -> None:
    recipe = Recipe(2, optimizer=OptimizerSpec(learning_rate=0.02, momentum=0.9, schedule="constant"), seed=4)
    model = mutual(method)
    own = lowbit.training(copy.deepcopy(model), steps_per_epoch=4, epochs=2, float_network=network(), recipe=recipe)
    run = TrainRun(model, method, Classification(), recipe, 4, GivenNetworks(float_network=network()))
    for _ in run.each_epoch():
        for batch in BATCHES:
            for _ in run.phase.turns:
                run.before_step()
                for loss in run.losses(batch):
                    loss.backward()
                run.after_backward()
                run.optimizer_step()
                run.after_step()
    groups = own.parameter_groups() if holder == "user" else lowbit.parameter_groups(own.model)
    companion = "teacher" if isinstance(method, Mutual) else "generator"
    assert [group["role"] for group in groups] == ["weights", "others", "quantizers", *([companion] if holder == "user" else [])]
    kinds = {"sgd": lambda found: torch.optim.SGD(found, momentum=0.9), "adam": lambda found: torch.optim.Adam(found, betas=(0.5, 0.9))}
    optimizers = [kinds[kind]([g for g in groups if g["kind"] == kind]) for kind in kinds if any(g["kind"] == kind for g in groups)]
    for index in range(8):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            if group["role"] == companion:  # the user's schedule; the run's own follows the method's by itself
                group["lr"] = own.phases[-1].optimizers[companion].rate_at(max(index - 4, 0) / 4 if companion == "teacher" else index / 8)
                group["momentum"] = 0.5
        in_turns(own, optimizers, BATCHES[index % 4])
    assert_same(everything(own), everything(run))
    assert not torch.equal(own.networks[companion].state_dict()[next(iter(own.networks[companion].state_dict()))], network()[0].weight)
    assert own.step == own.total_steps == 8


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_with_companions_goes_on_from_its_state_to_the_same_weights(step: int, tmp_path: Path) -> None:
    def started() -> ManualLoop:
        return lowbit.training(mutual(), steps_per_epoch=4, epochs=2, float_network=network())

    def optimizer_of(run: ManualLoop) -> torch.optim.SGD:
        return torch.optim.SGD(lowbit.parameter_groups(run.model), momentum=0.9)

    run = started()
    optimizer = optimizer_of(run)
    for index in range(8):
        if index == step:
            torch.save({"run": run.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
        in_turns(run, [optimizer], BATCHES[index % 4])
    saved, resumed = torch.load(tmp_path / "state.pt", weights_only=True), started()
    resumed.load_state_dict(saved["run"])
    fresh = optimizer_of(resumed)
    fresh.load_state_dict(saved["optimizer"])
    for index in range(step, 8):
        in_turns(resumed, [fresh], BATCHES[index % 4])
    assert_same(everything(resumed), everything(run))


def test_gradients_of_a_scaled_loss_reach_companions_unscaled_and_infinite_ones_do_not() -> None:
    plain, scaled = (lowbit.training(mutual(Mutual(alone=0)), steps_per_epoch=4, epochs=1, float_network=network()) for _ in range(2))
    for factor, run in ((1.0, plain), (1024.0, scaled)):
        optimizer = torch.optim.SGD(lowbit.parameter_groups(run.model), lr=0.0)
        run.before_step(optimizer)
        run.gradient_scale = factor
        for loss in run.losses(BATCHES[0]):
            (factor * loss).backward()
        for parameter in run.model.parameters():
            parameter.grad /= factor  # what scaler.unscale_ does
        run.after_backward()
        run.after_step()
    for a, b in zip(plain.networks["teacher"].parameters(), scaled.networks["teacher"].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    before = values(scaled.networks["teacher"])
    scaled.before_step()
    scaled.gradient_scale = 1e38
    (1e38 * scaled.loss(BATCHES[0]) * 1e30).backward()
    scaled.after_backward()
    scaled.after_step()
    assert_same(values(scaled.networks["teacher"]), before)


def test_a_method_with_several_losses_is_not_trained_with_another_one() -> None:
    run = lowbit.training(mutual(), steps_per_epoch=4, epochs=2, float_network=network())
    x, y = BATCHES[0]
    run.before_step(sgd(run))
    nn.functional.cross_entropy(run.model(x), y).backward()
    with pytest.raises(LoopError, match="'lsq' has its own loss"):
        run.after_backward()


def test_a_state_between_two_turns_is_refused() -> None:
    run = lowbit.training(mutual(Adversarial(shape=(6,))), steps_per_epoch=4, epochs=2, float_network=network())
    run.before_step(sgd(run))
    run.loss(BATCHES[0]).backward()
    run.after_backward()
    run.after_step()
    with pytest.raises(LoopError, match="state_dict was called after 1 of the 3 turns of step 0: end the step first"):
        run.state_dict()


@dataclass
class Counting(Recorder):
    """Keeps an object that checkpoints know nothing of."""

    def after_step(self, run: TrainRun) -> None:
        run.model.counts.update([run.step % 2])  # type: ignore[operator, union-attr]


def test_state_that_cannot_be_saved_is_an_error_when_it_is_asked_for() -> None:
    model, _ = recorded(base=Counting)
    model.counts = OddCounts()  # type: ignore[assignment]
    run = lowbit.training(model, steps_per_epoch=4, epochs=1)
    run.state_dict()
    step(run, sgd(run), BATCHES[0])
    with pytest.raises(StateError, match=r"'counts' of the network is a .*OddCounts, which checkpoints cannot save, and has changed"):
        run.state_dict()


class OddCounts:
    """Counts of numbers, in a form of its own."""

    def __init__(self) -> None:
        self.found = Counter[int]()

    def update(self, numbers: list[int]) -> None:
        self.found.update(numbers)
