"""QKD's quantizers by hand, and what each of its phases trains."""

from __future__ import annotations

import pytest
import torch
from tests.qat.recording import BATCHES, network
from torch import nn

import lowbit
from lowbit.errors import DataError, LayerError, SpecError
from lowbit.methods.training.qkd import Qkd, QkdActivation, QkdQuantizer, QkdQuantizers
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun

SGD = OptimizerSpec(learning_rate=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")
TASK = Classification(temperature=1.0)


def at(quantizer: QkdQuantizer, center: float, distance: float) -> QkdQuantizer:
    quantizer.set_interval(torch.tensor(center), torch.tensor(distance))
    return quantizer.train()


def run_of(method: Qkd, teacher: nn.Module | None = None, epochs: int = 3) -> TrainRun:
    model = lowbit.prepare(network(), method=method, weight_bits=2, activation_bits=2, sample=BATCHES[0][0])
    given = GivenNetworks(teacher, network())
    return TrainRun(model, method, TASK, Recipe(epochs, optimizer=SGD), len(BATCHES), given=given)


def step(run: TrainRun) -> None:
    run.before_step()
    for loss in run.losses(BATCHES[0]):
        loss.backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()


def test_weights_below_the_interval_are_pruned_and_above_it_clipped() -> None:
    quantizer = at(QkdQuantizer(3, rescale=False), 0.5, 0.25)
    x = torch.tensor([-1.0, -0.6, -0.2, 0.0, 0.2, 0.4, 0.6, 1.0])
    # |x| = 0.6 lies at 0.7 of the interval, 2.1 steps of 1/3; 0.4 at 0.3, 0.9 steps
    expected = torch.tensor([-3.0, -2.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0]) / 3
    torch.testing.assert_close(quantizer(x), expected)
    torch.testing.assert_close(at(QkdQuantizer(3), 0.5, 0.25)(x), expected * 0.75)


def test_the_weights_grid_is_odd_and_has_a_zero_and_two_to_the_k_minus_one_levels() -> None:
    for bits in range(2, 9):
        quantizer = at(QkdQuantizer(bits), 0.5, 0.5)
        x = torch.linspace(-1.2, 1.2, 4001)
        assert torch.equal(quantizer(-x), -quantizer(x))
        levels = quantizer(x).unique()
        assert len(levels) == 2**bits - 1 and 0 in levels


def test_activations_have_two_to_the_k_levels() -> None:
    y = at(QkdActivation(2, rescale=False), 1.0, 0.5)(torch.tensor([-1.0, 0.4, 0.7, 1.0, 1.4, 9.0]))
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 1.0, 2.0, 3.0, 3.0]) / 3)  # 1.0 is a tie between 1 and 2


@pytest.mark.parametrize("kind", [QkdQuantizer, QkdActivation])
def test_gradients_of_the_interval_are_those_of_the_paper(kind: type[QkdQuantizer]) -> None:
    quantizer = at(kind(4, rescale=False), 0.5, 0.25)
    x = torch.tensor([0.1, 0.3, 0.45, 0.7, 0.9], requires_grad=True)
    quantizer(x).sum().backward()
    inside = torch.tensor([0.0, 1.0, 1.0, 1.0, 0.0])
    assert x.grad is not None and quantizer.center is not None and quantizer.center.grad is not None
    torch.testing.assert_close(x.grad, inside * 2.0)  # alpha = 0.5 / d
    torch.testing.assert_close(quantizer.center.grad, torch.tensor(-0.5 / 0.25 * 3))
    torch.testing.assert_close(quantizer.distance.grad, -(0.5 / 0.25**2 * (x.detach() - 0.5) * inside).sum())


def test_rescaling_follows_the_product_rule() -> None:
    plain, scaled = at(QkdQuantizer(4, rescale=False), 0.5, 0.25), at(QkdQuantizer(4), 0.5, 0.25)
    x = torch.tensor([0.3, 0.45, 0.7, 0.9])
    levels = plain(x)
    levels.sum().backward()
    scaled(x).sum().backward()
    for mine, theirs in ((scaled.center, plain.center), (scaled.distance, plain.distance)):
        assert mine is not None and theirs is not None and theirs.grad is not None
        torch.testing.assert_close(mine.grad, 0.75 * theirs.grad + levels.sum().detach())


def test_an_interval_that_starts_at_zero_is_the_clip_form() -> None:
    x = torch.linspace(-2, 2, 401)
    clip = at(QkdQuantizer(3, interval="clip"), 0.4, 0.4)
    assert clip.center is None and len(list(clip.parameters())) == 1
    torch.testing.assert_close(clip(x), at(QkdQuantizer(3), 0.4, 0.4)(x))
    torch.testing.assert_close(clip(x), (x / 0.8).clamp(-1, 1).mul(3).round() / 3 * 0.8)


@pytest.mark.parametrize(("x", "center", "distance"), [([-1.0, 0.25, 0.5], 0.625, 0.375), ([0.5, 0.5], 0.25, 0.25), ([0.0, 0.0], 0.5, 0.5)])
def test_a_range_starts_at_the_least_and_the_largest_magnitude(x: list[float], center: float, distance: float) -> None:
    quantizer = QkdQuantizer(2, start="range")
    quantizer.initialize(torch.tensor(x))
    found = [value.item() for value in quantizer.interval()]
    assert found == pytest.approx([center, distance])


def test_one_bit_of_weights_is_refused() -> None:
    with pytest.raises(SpecError, match="needs 2 bits or more, got 1"):
        QkdQuantizer(1)


def test_the_phases_share_the_epochs_and_one_schedule() -> None:
    recipe = Recipe(10, optimizer=OptimizerSpec(learning_rate=0.1, schedule="linear"))
    phases = Qkd().phases(recipe)
    assert [(phase.name, phase.epochs, phase.span) for phase in phases] == [
        ("self-studying", 3, (0.0, 0.3)), ("co-studying", 3, (0.3, 0.6)), ("tutoring", 4, (0.6, 1.0)),
    ]  # fmt: skip
    assert ["teacher" in phase.optimizers for phase in phases] == [False, True, False]
    assert phases[1].optimizers["teacher"].learning_rate == pytest.approx(0.01)
    assert [phase.span for phase in Qkd(restart_schedule=True).phases(recipe)] == [(0.0, 1.0)] * 3
    assert [phase.name for phase in Qkd().phases(Recipe(1))] == ["tutoring"]
    with pytest.raises(SpecError, match="at most 1 together"):
        Qkd(self_share=0.7, co_share=0.7)


def test_the_teacher_learns_while_both_study_and_is_left_untouched_otherwise() -> None:
    teacher = nn.Sequential(nn.Linear(6, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    run, changed = run_of(Qkd(), teacher), {}
    for _ in run.each_epoch():
        before = [t.clone() for t in (*teacher.parameters(), *teacher.buffers())]
        step(run)
        now = (*teacher.parameters(), *teacher.buffers())
        changed[run.phase.name] = [not torch.equal(a, b) for a, b in zip(before, now, strict=True)]
    assert changed["co-studying"] == [True] * 8
    assert not any(changed["self-studying"]) and not any(changed["tutoring"])


def test_neither_loss_reaches_the_other_network() -> None:
    run = run_of(Qkd(self_share=0.0, co_share=1.0), epochs=1)
    run.start_phase()
    teacher = run.networks["teacher"]
    own, theirs = run.losses(BATCHES[0])
    mine = [p for p in run.model.parameters() if p.requires_grad]
    assert all(g is None for g in torch.autograd.grad(own, list(teacher.parameters()), allow_unused=True, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(theirs, mine, allow_unused=True))


def test_without_a_distance_every_phase_is_self_studying() -> None:
    results = []
    for method in (Qkd(self_share=1.0, co_share=0.0), Qkd(kd_weight=0.0)):
        run = run_of(method)
        for _ in run.each_epoch():
            step(run)
        results.append([p.detach().clone() for p in run.model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_a_teacher_of_other_classes_is_refused() -> None:
    run = run_of(Qkd(self_share=0.0, co_share=0.0), nn.Linear(6, 4), epochs=1)
    run.start_phase()
    with pytest.raises(DataError, match=r"the teacher gives outputs of shape \[N, 4\], the network \[N, 3\]"):
        run.loss(BATCHES[0])


def test_intervals_of_weights_have_the_small_learning_rate() -> None:
    recipe = Recipe(optimizer=OptimizerSpec(learning_rate=0.1))
    rates = {role: spec.learning_rate for role, spec in QkdQuantizers().optimizers(recipe).items()}
    assert rates["quantizers"] == 0.1 and rates["quantizers.weights"] == pytest.approx(1e-3)
    run = run_of(Qkd())
    assert {role for role, _ in run.roles()} >= {"weights", "quantizers", "quantizers.weights", "teacher"}


def test_bits_of_weights_that_are_not_there_are_named() -> None:
    with pytest.raises((SpecError, LayerError), match="qkd supports 2 to 8 weight bits, got 1"):
        lowbit.prepare(network(), method="qkd", weight_bits=1, sample=BATCHES[0][0])
