from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.methods.gradients.proxquant import (
    ProxQuant,
    ProxQuantizer,
    alternating,
    greedy_median,
    prox_binary,
    prox_median,
    prox_towards,
    ternary,
)
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of, prepare
from lowbit.spec import Granularity

W = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))


def test_the_binary_map_moves_towards_the_sign_and_stops_there() -> None:
    w = torch.tensor([-2.0, -1.05, -0.3, 0.0, 0.95, 1.0, 1.5])
    torch.testing.assert_close(prox_binary(w, 0.1), torch.tensor([-1.9, -1.0, -0.4, 0.0, 1.0, 1.0, 1.4]))
    assert torch.equal(prox_binary(w, 0.0), w)
    assert prox_binary(w, math.inf).tolist() == [-1, -1, -1, 0, 1, 1, 1]


@pytest.mark.parametrize("strength", [0.0, 0.2, 3.0])
def test_soft_thresholds_leave_the_distance_less_the_strength(strength: float) -> None:
    target, _ = greedy_median(W, 1)
    torch.testing.assert_close((prox_median(W, 1, strength) - target).abs(), ((W - target).abs() - strength).clamp(min=0))


def test_the_squared_distance_leaves_a_share_of_it() -> None:
    target = ternary(W)
    torch.testing.assert_close((prox_towards(W, target, 3.0) - target).abs(), (W - target).abs() / 4, atol=1e-6, rtol=1e-5)


def test_ternary_values_are_the_means_of_both_sides() -> None:
    w = torch.tensor([-4.0, -2.0, 0.1, 0.2, 1.0, 3.0])  # the threshold is 0.7 * 10.3 / 6
    torch.testing.assert_close(ternary(w), torch.tensor([-3.0, -3.0, 0, 0, 0, 3.0]))
    assert (ternary(torch.zeros(4)) == 0).all()


@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize("bit_width", [1, 2, 3, 5])
def test_refining_never_makes_bit_planes_worse_and_magnitudes_are_sorted(bit_width: int, by_row: bool) -> None:
    first, last = (alternating(W, bit_width, by_row=by_row, rounds=rounds) for rounds in (1, 4))
    assert float((last.values - W).square().sum()) <= float((first.values - W).square().sum()) * (1 + 1e-5)
    assert (last.alphas >= 0).all() and (last.alphas.diff(dim=1) <= 1e-6).all()


def test_one_plane_is_the_mean_magnitude_times_the_sign() -> None:
    found = alternating(W, 1)
    torch.testing.assert_close(found.values, W.abs().mean(1, keepdim=True) * W.sign())


def test_the_norm_rate_multiplies_the_values_and_not_the_magnitudes() -> None:
    found = alternating(torch.tensor([[1.0, -0.5, 0.25, -0.45]]), 2, rounds=3, norm_rate=0.5)
    assert found.alphas.flatten().tolist() == pytest.approx([0.7, 0.3], abs=1e-5)
    assert found.values.flatten().tolist() == pytest.approx([0.5, -0.2, 0.2, -0.2], abs=1e-5)


def test_training_passes_weights_through_and_evaluation_quantizes_them() -> None:
    quantizer = ProxQuantizer(1, "binary", Granularity.channel())
    assert torch.equal(quantizer.train()(W), W)
    assert quantizer.eval()(torch.tensor([-0.2, 0.0, 7.0])).tolist() == [-1, 1, 1]


def short_run(*, is_checked: bool = True, **options: object) -> tuple[TrainRun, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )
    x, y = torch.randn(12, 1, 6, 6), torch.arange(12) % 3
    qat = prepare(model, method="proxquant", weight_bits=1, sample=x, **options).train()  # type: ignore[arg-type]
    run = TrainRun(qat, method_of(qat), Classification(), Recipe(3, optimizer=OptimizerSpec(learning_rate=0.05)), 4)
    layer = qat[3]
    for epoch in run.each_epoch():
        for _ in range(4):
            before = insert.float_weight(layer).detach().clone()
            run.before_step()
            run.loss((x, y)).backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()
            if epoch == 2 and is_checked:
                assert torch.equal(insert.float_weight(layer), before)
    return run, layer


def test_weights_end_binary_and_stay_still_while_the_rest_trains() -> None:
    run, layer = short_run()
    assert [phase.name for phase in run.phases] == ["prox", "frozen"]
    assert insert.float_weight(layer).detach().abs().unique().tolist() == [1.0]
    assert not insert.float_weight(layer).requires_grad


def test_the_lazy_map_moves_what_the_network_sees_and_only_clips_what_is_stored() -> None:
    quantizer = ProxQuantizer(1, "binary", Granularity.tensor()).train()
    quantizer.lazy_strength = 0.1
    weight = torch.tensor([-1.4, -0.95, 0.3], requires_grad=True)
    seen = quantizer(weight)
    torch.testing.assert_close(seen.detach(), torch.tensor([-1.0, -1.0, 0.4]))
    seen.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [1, 1, 1]
    assert quantizer.proximal(weight.detach(), 0.0).tolist() == pytest.approx([-1.0, -0.95, 0.3])


def test_a_lazy_run_sees_signs_at_a_strength_of_one_and_ends_binary() -> None:
    _, layer = short_run(lazy=True, reg_rate=1e9)
    assert insert.float_weight(layer).detach().abs().unique().tolist() == [1.0]
    _, layer = short_run(lazy=True, reg_rate=1e9, frozen_share=0.0, is_checked=False)
    assert insert.float_weight(layer).detach().abs().max() <= 1 and insert.float_weight(layer).detach().abs().unique().numel() > 2
    assert layer.train().weight.detach().abs().unique().tolist() == [1.0]


def test_the_pull_is_spread_over_the_steps_of_the_phase() -> None:
    method = ProxQuant(pull=2.0)
    run = TrainRun(nn.Linear(2, 2), method, Classification(), Recipe(3), 5)
    total = 0.0
    for step in range(10):
        run.step = step
        total += method.strength(run, "binary")
    assert total == pytest.approx(2.0)
    assert ProxQuant(reg_rate=0.5).strength(run, "binary") == pytest.approx(run.learning_rate * 0.5 * 0)


def test_a_share_of_one_is_refused() -> None:
    with pytest.raises(SpecError, match="frozen_share"):
        ProxQuant(frozen_share=1.0)
