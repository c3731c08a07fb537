"""ProxQuant in the course of training, its levels, and weights of every kind."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.gradients.proxquant import DRAWN, ProxQuant, ProxQuantizer, alternating, prox_binary, prox_mean, prox_towards
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.spec import Granularity

KINDS = [("binary", 1), ("ternary", 2), ("mean", 2), ("mean", 3), ("mean", 5), ("median", 2), ("median", 4)]
every_kind = pytest.mark.parametrize("kind, bit_width", KINDS)
W = 0.3 * torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
X, LABELS = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4


def ready(bit_width: int = 1, epochs: int = 3, steps: int = 2, weight_decay: float = 0.01, **options: object) -> TrainRun:
    torch.manual_seed(0)
    model = lowbit.prepare(TinyNet(), method="proxquant", weight_bits=bit_width, sample=X, **options).train()  # type: ignore[arg-type]
    optimizer = OptimizerSpec(learning_rate=0.02, weight_decay=weight_decay)
    return TrainRun(model, method_of(model), Classification(), Recipe(epochs, optimizer=optimizer), steps)


def step(run: TrainRun) -> None:
    run.before_step()
    run.loss((X, LABELS)).backward()
    run.after_backward()
    run.optimizer_step()
    run.after_step()


def weight_of(run: TrainRun) -> Tensor:
    return insert.float_weight(run.model.conv1)  # type: ignore[arg-type]


@every_kind
def test_codes_decode_to_the_values_of_evaluation_and_there_are_few_of_them(kind: str, bit_width: int) -> None:
    for granularity in (Granularity.channel(), Granularity.channel(1), Granularity.group(9)):
        quantizer = ProxQuantizer(bit_width, kind, granularity).eval()  # type: ignore[arg-type]
        y = quantizer(W)
        assert torch.equal(quantizer.encode(W).decode(), y)
        assert all(row.unique().numel() <= 2**bit_width for row in quantizer.granularity.flatten(y))
        assert int(quantizer.encode(W).codes.max()) < 2**bit_width


@every_kind
def test_frozen_levels_leave_frozen_weights_bit_for_bit(kind: str, bit_width: int) -> None:
    quantizer = ProxQuantizer(bit_width, kind, Granularity.channel())  # type: ignore[arg-type]
    expected = quantizer.eval()(W)
    frozen = quantizer.freeze(W)
    assert torch.equal(frozen, expected)
    assert torch.equal(quantizer(frozen), frozen) and torch.equal(quantizer.encode(frozen).decode(), frozen)
    fresh = ProxQuantizer(bit_width, kind, Granularity.channel()).eval()  # type: ignore[arg-type]
    fresh.load_state_dict(quantizer.state_dict())
    assert torch.equal(fresh(frozen), frozen)


def test_without_frozen_levels_quantizing_again_would_move_the_weights() -> None:
    quantizer = ProxQuantizer(3, "mean", Granularity.channel()).eval()
    once = quantizer(W)
    assert float((quantizer(once) - once).abs().max()) > 1e-3


@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), 0.25), torch.full((3, 4), -0.25)], ids=["zero", "plus", "minus"])
@every_kind
def test_zero_and_constant_weights_stay_finite_and_but_for_binary_ones_exact(kind: str, bit_width: int, weight: Tensor) -> None:
    quantizer = ProxQuantizer(bit_width, kind, Granularity.channel()).eval()  # type: ignore[arg-type]
    y = quantizer(weight)
    expected = torch.where(weight >= 0, 1.0, -1.0) if kind == "binary" else weight
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert torch.isfinite(quantizer.proximal(weight, 0.5)).all()
    assert torch.equal(quantizer(quantizer.freeze(weight)), y)


def test_equal_planes_do_not_trouble_the_least_squares_of_a_whole_matrix() -> None:
    found = alternating(torch.full((2, 3), 0.5), 3, by_row=False)
    torch.testing.assert_close(found.values, torch.full((2, 3), 0.5))


@every_kind
def test_the_map_of_strength_zero_is_the_identity_and_a_strong_one_quantizes(kind: str, bit_width: int) -> None:
    quantizer = ProxQuantizer(bit_width, kind, Granularity.channel()).eval()  # type: ignore[arg-type]
    weight = W.clamp(-0.9, 0.9)
    torch.testing.assert_close(quantizer.proximal(weight, 0.0), weight)
    torch.testing.assert_close(quantizer.proximal(weight, 1e7), quantizer(weight).clamp(-1, 1), rtol=1e-5, atol=1e-5)


def test_the_binary_map_is_odd_and_weights_end_in_minus_one_to_one() -> None:
    w = torch.linspace(-3, 3, 61)
    torch.testing.assert_close(prox_binary(-w, 0.4), -prox_binary(w, 0.4))
    assert ProxQuantizer(1, "binary", Granularity.channel()).proximal(torch.tensor([5.0, -7.0]), 0.1).tolist() == [1, -1]


def test_several_rounds_of_the_mean_map_look_again_for_the_nearest_planes() -> None:
    rows = W.flatten(1)
    once = prox_towards(rows, alternating(rows, 2).values, 0.5)
    torch.testing.assert_close(prox_mean(rows, 2, 0.5), once)
    torch.testing.assert_close(prox_mean(rows, 2, 0.5, rounds=2), prox_towards(rows, alternating(once, 2).values, 0.5))


def test_bfloat16_weights_are_moved_in_float32() -> None:
    quantizer, weight = ProxQuantizer(3, "mean", Granularity.channel()), W.bfloat16()
    assert quantizer.proximal(weight, 0.3).dtype == torch.bfloat16
    torch.testing.assert_close(quantizer.proximal(weight, 0.3), quantizer.proximal(weight.float(), 0.3).bfloat16(), rtol=0, atol=0)
    frozen = quantizer.freeze(weight)
    assert torch.equal(quantizer.eval()(frozen), frozen)


def test_a_step_is_the_optimizers_and_then_the_map_of_its_strength() -> None:
    run, alone = ready(), ready(pull=0.0)
    for one in (run, alone):
        one.start_phase()
        one.start_epoch()
        step(one)
    strength = 1.5 * 2 / (4 * 5)  # the first of the 4 steps before freezing: 1, 2, 3, 4 tenths of 1.5
    torch.testing.assert_close(weight_of(run), prox_binary(weight_of(alone).detach(), strength))


@pytest.mark.parametrize("bit_width, left", [(1, 0.0), (2, math.exp(-5)), (3, math.exp(-5))])
@pytest.mark.parametrize("epochs", [1, 20])
def test_the_whole_pull_is_done_whatever_the_epochs(bit_width: int, left: float, epochs: int) -> None:
    run = ready(bit_width, epochs=epochs, steps=10)
    run.start_phase()
    quantizer = insert.weight_quantizer(run.model.conv1)  # type: ignore[arg-type]
    assert isinstance(quantizer, ProxQuantizer)
    weight, target = torch.tensor([1e-6], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    for index in range(run.phase.epochs * 10):
        run.step = index
        strength = run.method.strength(run, quantizer.kind)  # type: ignore[attr-defined]
        weight = prox_binary(weight, strength) if quantizer.kind == "binary" else prox_towards(weight, target, strength)
    assert (weight - target).abs().item() == pytest.approx(left, rel=1e-5)


def test_the_papers_strength_is_learning_rate_times_rate_times_epoch() -> None:
    run = ready(reg_rate=0.5)
    run.start_phase()
    run.epoch = 1
    assert run.method.strength(run, "binary") == pytest.approx(run.learning_rate * 0.5 * 1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options, epochs, expected",
    [
        ({}, 9, [6, 3]),
        ({}, 1, [1]),
        ({"frozen_share": 0.0}, 9, [9]),
        ({"frozen_share": 0.99}, 2, [1, 1]),
        ({"freeze_epoch": 200}, 300, [200, 100]),
        ({"freeze_epoch": 200}, 10, [10]),
    ],
)
def test_phases_share_the_users_epochs(options: dict[str, float], epochs: int, expected: list[int]) -> None:
    phases = ProxQuant(**options).phases(Recipe(epochs))  # type: ignore[arg-type]
    assert [phase.epochs for phase in phases] == expected
    assert [phase.name for phase in phases] == ["prox", "frozen"][: len(expected)]
    assert DRAWN in phases[0].optimizers and all(DRAWN not in phase.optimizers for phase in phases[1:])


@pytest.mark.parametrize("bit_width, options", [(1, {}), (2, {}), (2, {"two_bits": "median"}), (3, {}), (3, {"planes": "median"})])
def test_evaluation_uses_the_very_weights_that_the_rest_was_trained_with(bit_width: int, options: dict[str, str]) -> None:
    run = ready(bit_width, **options)
    seen: list[Tensor] = []
    for _ in run.each_epoch():
        for _ in range(2):
            step(run)
            if run.phase.name == "frozen":
                seen.append(run.model.conv1.weight.detach().clone())  # type: ignore[union-attr, operator]
    weight = run.model.eval().conv1.weight  # type: ignore[union-attr]
    assert seen and all(torch.equal(one, weight) for one in seen)  # type: ignore[arg-type]
    copied = copy.deepcopy(run.model)
    assert torch.equal(copied.conv1.weight, weight)  # type: ignore[union-attr, arg-type]


def test_the_first_phase_sees_float_weights_and_evaluation_hard_ones() -> None:
    run = ready()
    run.start_phase()
    weight = weight_of(run).detach().clone()
    assert torch.equal(run.model.train().conv1.weight, weight)  # type: ignore[union-attr, arg-type]
    assert torch.equal(run.model.eval().conv1.weight, torch.where(weight >= 0, 1.0, -1.0))  # type: ignore[union-attr, arg-type]


def test_other_parameters_go_on_learning_while_weights_are_frozen() -> None:
    run = ready()
    norm = run.model.bn1
    for _ in run.each_epoch():
        before = norm.weight.detach().clone()  # type: ignore[union-attr, operator]
        step(run)
        step(run)
        assert not torch.equal(norm.weight, before), run.phase.name  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"frozen_share": -0.1}, "frozen_share"),
        ({"freeze_epoch": 0}, "freeze_epoch must be 1 or more"),
        ({"pull": -1.0}, "pull must be 0 or more"),
        ({"pull": math.inf}, "pull must be 0 or more"),
        ({"reg_rate": math.nan}, "reg_rate must be 0 or more"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ProxQuant(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "layer", [nn.Conv1d(4, 4, 3, groups=4), nn.ConvTranspose2d(3, 5, 2), nn.Linear(4, 3)], ids=lambda x: type(x).__name__
)
def test_planes_belong_to_the_layers_own_output_channels(layer: nn.Module) -> None:
    axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
    weight = layer.weight.detach()
    y = ProxQuantizer(2, "mean", Granularity.channel(axis)).eval()(weight)
    for channel, quantized in zip(weight.movedim(axis, 0), y.movedim(axis, 0), strict=True):
        torch.testing.assert_close(quantized.reshape(1, -1), alternating(channel.reshape(1, -1), 2).values)
