"""SP-Nets: switches with quantizers and norms of their own, and what a lower one learns from."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.methods.adaptive.several import X, Y, check_every_width_is_a_plain_network, check_resumes, network, outputs, run_of
from tests.qat.training import data, train
from torch import Tensor, nn
from torch.nn import functional

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.methods.adaptive.sp_nets import SpNets, soft_cross_entropy
from lowbit.qat import Classification, GivenNetworks, Recipe, Regression, TrainRun
from lowbit.quantizers.switchable import SwitchableQuantizer

BINARY = "32/32,4/4,1/1"


def prepared(bits: object = BINARY, **options: object) -> nn.Module:
    return lowbit.prepare(network(), method="sp_nets", bits=bits, sample=X, **options)  # type: ignore[arg-type]


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Of one step of the model's run."""
    run = run_of(model)
    run.before_step()
    for loss in run.losses((X, Y)):
        loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_hand(model: nn.Module, soft: list[tuple[object, list[object]]]) -> dict[str, Tensor]:
    """The gradients of hard labels at the highest switch, and of the divergence of each switch from those that teach it."""
    model = copy.deepcopy(model).train()
    seen: dict[object, Tensor] = {None: model(X)}
    functional.cross_entropy(seen[None], Y).backward()
    for switch, teachers in soft:
        lowbit.set_bits(model, switch)  # type: ignore[arg-type]
        seen[switch] = model(X)
        targets = [functional.softmax(seen[teacher].detach(), 1) for teacher in teachers]
        found = [functional.kl_div(functional.log_softmax(seen[switch], 1), target, reduction="batchmean") for target in targets]
        torch.stack(found).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("teacher", "teachers"), [("highest", [[None], [None]]), ("previous", [[None], [4]]), ("all_higher", [[None], [None, 4]])]
)
def test_lower_switches_learn_from_the_one_that_was_asked_for(teacher: str, teachers: list[list[object]]) -> None:
    model = prepared(teacher_switch=teacher)
    expected = by_hand(model, list(zip((4, 1), teachers, strict=True)))
    found = gradients_of(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_without_distillation_the_gradients_are_the_sum_of_those_of_every_switch() -> None:
    model = prepared("8,4,2", self_distillation=0.0)
    alone: dict[str, Tensor] = {}
    for width in (8, 4, 2):
        single = copy.deepcopy(model).train()
        lowbit.set_bits(single, width)
        functional.cross_entropy(single(X), Y).backward()
        for name, parameter in single.named_parameters():
            if parameter.grad is not None:
                alone[name] = alone.get(name, torch.zeros_like(parameter)) + parameter.grad
    found = gradients_of(model)
    for name, gradient in alone.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_half_of_the_loss_may_come_from_the_labels() -> None:
    def lower_loss(**options: object) -> float:
        model = prepared("8,2", **options)
        return [float(loss.detach()) for loss in run_of(model).losses((X, Y))][1]

    hard, soft, both = lower_loss(self_distillation=0.0), lower_loss(), lower_loss(self_distillation=0.5)
    assert both == pytest.approx((hard + soft) / 2, rel=1e-5)
    entropy = lower_loss(distance="cross_entropy") - soft
    assert 0 < entropy <= torch.log(torch.tensor(3.0))
    assert lower_loss(distance="mse") > 0 and lower_loss(temperature=4.0) != pytest.approx(soft)


def test_the_gradient_of_the_soft_cross_entropy_is_the_difference_of_probabilities() -> None:
    logits, teacher = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    soft_cross_entropy(logits, teacher).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, (logits.softmax(1).detach() - teacher.softmax(1)) / 5)
    same = teacher.clone().requires_grad_()
    soft_cross_entropy(same, teacher).backward()
    assert same.grad is not None and same.grad.abs().max() < 1e-7


def test_a_distance_between_classes_needs_classes() -> None:
    model = prepared("8,2", distance="cross_entropy").train()
    run = TrainRun(model, model.lowbit_method, Regression(), Recipe(1), 4)  # type: ignore[arg-type]
    run.start_phase()
    with pytest.raises(SpecError, match="compares classes, and the task is Regression"):
        list(run.losses((X, torch.zeros(16, 3))))


@pytest.mark.parametrize(("sampling", "each", "always"), [("sandwich", 3, {8, 2}), ("random", 2, {8})])
def test_a_step_may_train_some_switches_only(sampling: str, each: int, always: set[int]) -> None:
    model = prepared("8,6,4,3,2", switch_sampling=sampling)
    run, method = run_of(model), model.lowbit_method
    assert isinstance(method, SpNets)
    drawn = [[switch.weight for switch in method.training_switches(run)] for _ in range(60)]
    assert all(len(widths) == each and always <= set(widths) and widths == sorted(widths, reverse=True) for widths in drawn)  # type: ignore[type-var]
    assert {width for widths in drawn for width in widths} == {8, 6, 4, 3, 2}


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", ["dorefa", "pact", "lsq", "lq_nets"])
def test_every_switch_of_every_quantizer_is_exported_as_a_plain_network(quantizer: str, tmp_path: Path) -> None:
    bits = "4/4,2/2" if quantizer == "lq_nets" else "32/32,4/4,1/1"
    model = train(network(), method="sp_nets", bits=bits, quantizer=quantizer)
    check_every_width_is_a_plain_network(model, tmp_path)


def test_quantizers_of_other_widths_rest() -> None:
    model = prepared("8,2", quantizer="lsq").train()
    lowbit.set_bits(model, 2)
    model(X).sum().backward()
    quantizer = model.get_submodule("conv2.input_quantizer")
    assert isinstance(quantizer, SwitchableQuantizer)
    assert [part.get_parameter("scale").grad is not None for part in quantizer.at.values()] == [False, True]


def test_binary_weights_go_with_activations_of_any_width() -> None:
    model = prepared("1/32,1/4,1/1")
    weights = {}
    for activation in (None, 4, 1):
        lowbit.set_bits(model, lowbit.LayerBits(1, activation))
        weights[activation] = model.get_parameter("conv2.parametrizations.weight.original"), model.get_submodule("conv2").weight
    assert all(torch.equal(weight, weights[None][1]) for _, weight in weights.values())
    assert weights[1][1].abs().unique().numel() == 1


def test_the_highest_switch_does_not_depend_on_the_others_and_is_the_network_as_it_was() -> None:
    plain = network()
    assert torch.equal(outputs(prepared("32/32,4/4")), outputs(prepared(BINARY)))
    model = lowbit.prepare(plain, method="sp_nets", bits=BINARY, sample=X, policy=lowbit.BitPolicy())
    torch.testing.assert_close(outputs(model), outputs(plain))


def test_the_users_teacher_teaches_the_highest_switch() -> None:
    torch.manual_seed(3)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(72, 3))
    model = prepared("8,2").train()
    run = TrainRun(
        model, model.lowbit_method, Classification(), Recipe(1), 4, given=GivenNetworks(teacher)  # type: ignore[arg-type]
    )  # fmt: skip
    run.start_phase()
    first = float(next(iter(run.losses((X, Y)))).detach())
    task = Classification()
    twin = prepared("8,2").train()
    logits = twin(X)
    assert first == pytest.approx(float(0.5 * task.loss(logits, (X, Y)) + 0.5 * task.distillation_loss(logits, teacher(X))), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"switch_sampling": "random", "quantizer": "lsq"}])
def test_a_training_that_was_killed_ends_with_the_same_bits(options: dict[str, object], tmp_path: Path) -> None:
    check_resumes([8], tmp_path, method="sp_nets", bits=BINARY, **options)


def test_every_switch_learns() -> None:
    model = train(network(), method="sp_nets", bits="32/32,4/4,2/2", recipe=Recipe(12, 16, lowbit.OptimizerSpec(learning_rate=0.05)))
    images, labels = data(200, 5).tensors
    for width in (None, 4, 2):
        lowbit.set_bits(model, width)
        assert float((model.eval()(images).argmax(1) == labels).float().mean()) > 0.9, width


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(LayerError, match="has no batch norm"):
        lowbit.prepare(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), method="sp_nets", bits=BINARY, sample=X)
    with pytest.raises(SpecError, match="is above"):
        prepared("1/1,4/4")
    with pytest.raises(SpecError, match="self_distillation must be from 0 to 1"):
        prepared(self_distillation=1.5)
    with pytest.raises(SpecError, match="was trained for the widths float/float, 4/4, 1/1, got 2"):
        lowbit.set_bits(prepared(), 2)
