"""Companion networks are trained, frozen and kept as their method says, and are no part of the network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from tests.qat.companions import Adversarial, Mutual
from tests.qat.recording import BATCHES, network, prepared
from torch import Tensor, nn

from lowbit.errors import LoopError, SpecError
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.qat import Classification, Companion, GivenNetworks, OptimizerSpec, Phase, Recipe, TrainingMethod, TrainRun, Turn
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer

SGD = OptimizerSpec(learning_rate=0.1, momentum=0.9, weight_decay=0.0, schedule="constant")
RECIPE = Recipe(epochs=2, optimizer=SGD)


def run_of(method: TrainingMethod, recipe: Recipe = RECIPE, **given: nn.Module) -> TrainRun:
    model = prepared()
    model.lowbit_method = method  # type: ignore[assignment]
    given = given or {"float_network": network()}
    return TrainRun(model, method, Classification(temperature=1.0), recipe, len(BATCHES), given=GivenNetworks(**given))


def step(run: TrainRun, batch: Batch = BATCHES[0]) -> None:
    for _ in run.phase.turns:
        run.before_step()
        for loss in run.losses(batch):
            loss.backward()
        run.after_backward()
        run.optimizer_step()
        run.after_step()


def values(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in (*model.parameters(), *model.buffers())]


def are_same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def test_a_companion_is_no_part_of_the_network() -> None:
    run = run_of(Mutual(), teacher=network())
    names = [name for name, _ in run.model.named_modules()]
    copied = copy.deepcopy(run.model)
    assert "teacher" not in " ".join(names) and len(list(copied.parameters())) == len(list(prepared().parameters()))
    assert run.model.state_dict().keys() == prepared().state_dict().keys()
    assert run.networks["teacher"] is not run.model


def test_a_teacher_learns_in_the_phases_that_train_it_and_rests_in_the_others() -> None:
    teacher = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    run = run_of(Mutual(), teacher=teacher)
    seen = []
    for _ in run.each_epoch():
        before = values(teacher)
        trains = (teacher.training, all(p.requires_grad for p in teacher.parameters()))
        step(run)
        seen.append((run.phase.name, *trains, are_same(values(teacher), before)))
    assert seen == [("alone", False, False, True), ("together", True, True, False)]


def test_a_teacher_that_learns_follows_its_own_loss_by_its_own_optimizer() -> None:
    teacher, x, labels = network(), *BATCHES[0]
    run = run_of(Mutual(alone=0), teacher=teacher)
    by_hand = copy.deepcopy(teacher)
    run.start_phase()
    z = run.model(x).detach()
    y = by_hand(x)
    kl = (z.softmax(1) * (z.log_softmax(1) - y.log_softmax(1))).sum(1).mean()
    (nn.functional.cross_entropy(y, labels) + kl).backward()
    step(run)
    for mine, theirs in zip(teacher.parameters(), by_hand.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(mine.detach(), theirs.detach() - 0.01 * theirs.grad)


@pytest.mark.parametrize(("mode", "modes"), [("follow", [False, True]), ("eval", [False, False]), ("train", [True, True])])
def test_a_companions_mode_is_what_was_declared(mode: str, modes: list[bool]) -> None:
    @dataclass
    class Declared(Mutual):
        def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
            return {"teacher": Companion(given.float_twin(), mode=mode)}  # type: ignore[arg-type]

    run = run_of(Declared())
    assert [run.networks["teacher"].training for _ in run.each_epoch()] == modes
    with run.evaluating():
        assert run.networks["teacher"].training == (mode == "train")
        assert not run.model.training and not torch.is_grad_enabled()
    assert run.networks["teacher"].training == modes[-1] and run.model.training


def test_the_users_teacher_is_frozen_and_in_evaluation_mode_by_default() -> None:
    teacher = network().train()
    run = run_of(Lsq(), teacher=teacher)
    assert run.networks == {"teacher": teacher} and not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert list(run.parameters()) == list(run.model.parameters())
    assert "networks.teacher" not in run.objects()  # the user gives it again


def test_parameters_of_a_companion_may_have_roles_of_their_own() -> None:
    @dataclass
    class TwoRates(Lsq):
        def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
            return {"twin": Companion(given.float_twin(), role=lambda name, _p, _m: "biases" if name.endswith("bias") else "weights")}

        def phases(self, recipe: Recipe) -> list[Phase]:
            return [Phase("one", 1, {"twin": SGD, "twin.biases": replace(SGD, learning_rate=0.3)}), Phase("two", 1, {"twin.biases": SGD})]

    run = run_of(TwoRates())
    twin = run.networks["twin"]
    found = []
    for _ in run.each_epoch():
        found.append({group["role"]: [tuple(p.shape) for p in group["params"]] for o in run.optimizers for group in o.param_groups})
    biases, weights = [(16,), (12,), (3,)], [(16, 6), (12, 16), (3, 12)]
    assert found == [{"twin": weights, "twin.biases": biases}, {"twin.biases": biases}]
    assert len(run.parameters_of("twin")) == 6 and len(run.parameters_of("twin.biases")) == 3
    assert [p.requires_grad for p in twin.parameters()] == [False, True] * 3


def test_companions_are_made_from_the_recipes_seed() -> None:
    weights = [run_of(Adversarial(shape=(6,)), Recipe(seed=seed)).networks["generator"].linear.weight for seed in (3, 3, 4)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    state = torch.get_rng_state()
    run_of(Adversarial(shape=(6,)))
    assert torch.equal(torch.get_rng_state(), state)


def test_each_turn_trains_its_own_roles_alone() -> None:
    run = run_of(Adversarial(shape=(6,)))
    run.start_phase()
    networks = {"model": run.model, **run.networks}
    moved = []
    for index in range(3):
        assert (run.turn_index, run.step) == (index, 0)
        before = {name: [p.detach().clone() for p in model.parameters()] for name, model in networks.items()}
        run.before_step()
        for loss in run.losses(BATCHES[0]):
            loss.backward()
        run.after_backward()
        with_gradient = {name for name, model in networks.items() if any(p.grad is not None for p in model.parameters())}
        run.optimizer_step()
        run.after_step()
        changed = {name for name, model in networks.items() if not all(map(torch.equal, model.parameters(), before[name]))}
        assert changed == with_gradient
        moved.append(changed)
    assert moved == [{"model"}, {"model"}, {"generator"}]
    assert (run.turn_index, run.step) == (0, 1)


def test_turns_are_the_steps_of_separate_optimizers_by_hand() -> None:
    recipe = replace(RECIPE, optimizer=replace(SGD, learning_rate=0.02, weight_decay=0.01))
    run = run_of(Adversarial(shape=(6,)), recipe)
    model, generator, twin = copy.deepcopy(run.model), copy.deepcopy(run.networks["generator"]), network()
    run.start_phase()
    noise = torch.Generator().manual_seed(recipe.seed)
    quantizers = [p for name, p in model.named_parameters() if "quantizer" in name]
    others = [p for name, p in model.named_parameters() if "quantizer" not in name]
    q = torch.optim.SGD([{"params": others, "weight_decay": 0.01}, {"params": quantizers}], lr=0.02, momentum=0.9)
    g = torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9))
    for index in range(2):
        for turn in ("network", "network", "generator"):
            images = generator(torch.randn(8, 4, generator=noise))
            images = images.detach() if turn == "network" else images
            gap = (model(images) - twin(images)).abs().mean()
            q.zero_grad()
            g.zero_grad()
            if turn == "network":
                gap.backward()
                q.step()
                for module in model.modules():
                    if isinstance(module, Quantizer):
                        module.project()
            else:
                (-gap).backward()
                for group in g.param_groups:
                    group["lr"] = run.phase.optimizers["generator"].rate_at(index / 8)
                g.step()
        step(run)
    trained = (*run.model.parameters(), *run.networks["generator"].parameters())
    for mine, theirs in zip(trained, (*model.parameters(), *generator.parameters()), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert are_same(values(run.networks["twin"]), values(network()))


def test_the_sum_of_the_losses_has_the_gradients_of_the_single_passes() -> None:
    one, each = run_of(Mutual(alone=0)), run_of(Mutual(alone=0))
    for run in (one, each):
        run.start_phase()
        run.before_step()
    one.loss(BATCHES[0]).backward()
    for loss in each.losses(BATCHES[0]):
        loss.backward()
    gradients = [[p.grad for p in run.parameters()] for run in (one, each)]
    assert len(gradients[0]) == len(list(one.model.parameters())) + 6
    torch.testing.assert_close(*gradients)


def test_gradients_are_clipped_for_each_network_by_itself() -> None:
    run = run_of(Mutual(alone=0), replace(RECIPE, clip_norm=1e-3))
    run.start_phase()
    run.before_step()
    run.loss(BATCHES[0]).backward()
    run.after_backward()
    for model in (run.model, run.networks["teacher"]):
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(1e-3, rel=1e-3)


def test_what_cannot_be_a_companion_is_refused() -> None:
    class Unsaved(Mutual):
        def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
            return {"teacher": Companion(given.float_twin(), is_saved=False)}

    class Shared(Lsq):
        def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
            return {"branch": Companion(nn.Sequential(model[0], nn.Linear(16, 3)))}  # type: ignore[index]

    class Silent(Lsq):
        def losses(self, run: TrainRun, batch: Batch) -> list[Tensor]:
            return []

    class Mistaken(Lsq):
        def phases(self, recipe: Recipe) -> list[Phase]:
            return [Phase("only", 1, self.optimizers(recipe), turns=(Turn("a", ("weights",)), Turn("b", ("generators",))))]

    with pytest.raises(SpecError, match="companion 'teacher': a phase trains it, so checkpoints must hold it"):
        run_of(Unsaved())
    with pytest.raises(SpecError, match="companion 'branch': it holds parameters of the network itself"):
        run_of(Shared())
    with pytest.raises(SpecError, match="float twin of the network: pass float_network="):
        TrainRun(prepared(), Mutual(), Classification(), RECIPE, 4)
    with pytest.raises(LoopError, match="'lsq' gave no loss in the turn 'step'"):
        run_of(Silent()).loss(BATCHES[0])
    with pytest.raises(SpecError, match="phase 'only': no parameter has the role generators"):
        run_of(Mistaken()).start_phase()
