from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.networks import TinyNet
from tests.qat.training import assert_same, killed, train
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.quantizer_design.qil import (
    SMALLEST_DISTANCE,
    IntervalQuantizer,
    QilActivation,
    QilWeight,
    interval_of_histogram,
    interval_of_least_error,
    interval_of_maximum,
    transform_magnitudes,
)
from lowbit.network import insert
from lowbit.network.bits import get_bits
from lowbit.qat import Classification, OptimizerSpec, Recipe, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.spec import LayerBits
from lowbit.surrogates import SURROGATES


def at(q: IntervalQuantizer, center: float, distance: float) -> IntervalQuantizer:
    q.set_interval(torch.tensor(center), torch.tensor(distance))
    return q


def weight(bit_width: int, center: float, distance: float, gamma: float | None = None) -> QilWeight:
    q = QilWeight(bit_width, learns_gamma=gamma is not None)
    at(q, center, distance)
    if gamma is not None:
        assert q.gamma is not None
        q.gamma.data.fill_(gamma)
    return q


def gradients(q: IntervalQuantizer, x: Tensor, upstream: Tensor) -> tuple[Tensor, float, float]:
    leaf = x.clone().requires_grad_()
    q.center.grad = q.distance.grad = None
    q(leaf).backward(upstream)
    assert leaf.grad is not None and q.center.grad is not None and q.distance.grad is not None
    return leaf.grad, float(q.center.grad), float(q.distance.grad)


W = torch.tensor([-2.0, -0.9, -0.55, -0.3, -0.1, 0.0, 0.05, 0.2, 0.45, 0.7, 1.0, 3.0])
G = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, 1.5, -0.75, 4.5, -3.0, 0.75, 1.25])


# The transform


def test_magnitudes_below_the_interval_become_zero_those_above_one() -> None:
    v = transform_magnitudes(torch.tensor([0.0, 0.19, 0.2, 0.35, 0.5, 0.8, 0.81, 9.0]), torch.tensor(0.5), torch.tensor(0.3))
    assert v.tolist() == pytest.approx([0, 0, 0, 0.25, 0.5, 1, 1, 1], abs=1e-6)


def test_a_larger_exponent_shrinks_and_a_smaller_one_expands_but_order_stays() -> None:
    m = torch.linspace(0.0, 1.0, 101)
    one, two, half = (transform_magnitudes(m, torch.tensor(0.5), torch.tensor(0.4), torch.tensor(g)) for g in (1.0, 2.0, 0.5))
    inside = (m > 0.11) & (m < 0.89)
    assert (two[inside] < one[inside]).all() and (half[inside] > one[inside]).all()
    assert all((v.diff() >= 0).all() for v in (one, two, half))
    torch.testing.assert_close(two[inside], one[inside] ** 2, rtol=1e-5, atol=1e-6)


# Weights


def test_weights_round_to_signed_levels_and_prune_below_the_interval() -> None:
    y = weight(3, 0.5, 0.4)(torch.tensor([-1.0, -0.9, -0.6, -0.1, -0.05, 0.0, 0.23, 0.24, 0.9, 5.0]))
    # (m - 0.1) / 0.8 * 3, halves to even
    assert y.tolist() == pytest.approx([-1, -1, -2 / 3, 0, 0, 0, 0, 1 / 3, 1, 1])


@pytest.mark.parametrize("bit_width", [2, 3, 4, 8])
def test_the_interval_from_zero_to_the_maximum_is_a_uniform_quantizer(bit_width: int) -> None:
    w = torch.randn(500, generator=torch.Generator().manual_seed(0))
    q = QilWeight(bit_width, start="max")
    q.initialize(w)
    top = 2 ** (bit_width - 1) - 1
    expected = (w / w.abs().max() * top).round() / top
    torch.testing.assert_close(q(w), expected)
    assert torch.equal(q(-w), -q(w))


@pytest.mark.parametrize("gamma", [None, 0.7, 1.0, 1.6, 2.0])
def test_gradients_of_weights_follow_the_formula(gamma: float | None) -> None:
    c, d, power = 0.5, 0.35, 1.0 if gamma is None else gamma
    q = weight(3, c, d, gamma)
    by_w, by_c, by_d = gradients(q, W, G)
    alpha, m = 0.5 / d, W.abs()
    inside = ((m >= c - d) & (m <= c + d)).float()
    base = (alpha * (m - c) + 0.5).clamp(1e-9, 1)
    slope = power * base ** (power - 1) * inside
    torch.testing.assert_close(by_w, G * slope * alpha)
    assert by_c == pytest.approx(float((G * W.sign() * slope * -alpha).sum()), rel=1e-4)
    assert by_d == pytest.approx(float((G * W.sign() * slope * alpha / d * (c - m)).sum()), rel=1e-4)
    if gamma is not None:
        assert q.gamma is not None and q.gamma.grad is not None
        assert float(q.gamma.grad) == pytest.approx(float((G * W.sign() * base**power * base.log() * inside).sum()), rel=1e-4)


def test_moving_the_center_and_every_weight_alike_changes_nothing() -> None:
    by_w, by_c, by_d = gradients(weight(3, 0.5, 0.35), W, G)
    assert by_c == pytest.approx(-float((W.sign() * by_w).sum()), rel=1e-4)
    assert by_d == pytest.approx(float((W.sign() * by_w * (0.5 - W.abs())).sum()) / 0.35, rel=1e-4)
    torch.testing.assert_close(weight(3, 0.75, 0.35)(W + 0.25 * W.sign()), weight(3, 0.5, 0.35)(W))


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.5])
def test_pruned_clipped_and_edge_weights_leave_no_nan_with_a_learned_exponent(gamma: float) -> None:
    q = weight(2, 0.5, 0.25, gamma)
    w = torch.tensor([0.0, -0.0, 0.1, 0.25, 0.75, 100.0, -0.25], requires_grad=True)
    y = q(w)
    y.sum().backward()
    assert q.gamma is not None and q.gamma.grad is not None and w.grad is not None
    for tensor in (y, w.grad, q.gamma.grad, q.center.grad, q.distance.grad):
        assert tensor is not None and torch.isfinite(tensor).all()
    assert w.grad[[0, 1, 2, 5]].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("gamma", [None, 1.0])
def test_a_weight_of_zero_gets_the_slope_of_an_interval_that_starts_there(gamma: float | None) -> None:
    by_w, _, _ = gradients(weight(3, 0.5, 0.5, gamma), torch.zeros(2), torch.tensor([3.0, -5.0]))
    assert by_w.tolist() == [3, -5]
    q = weight(3, 0.5, 2.0, gamma)  # before the interval is brought back
    assert q(torch.zeros(1)).item() == 0


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_an_exponent_of_another_size_leaves_a_weight_of_zero_its_finite_slope(gamma: float) -> None:
    by_w, _, _ = gradients(weight(3, 0.5, 0.5, gamma), torch.zeros(2), torch.ones(2))
    assert by_w.tolist() == pytest.approx([0, 0], abs=1e-9)


def test_a_scale_multiplies_levels_and_gradients() -> None:
    plain, scaled = weight(3, 0.5, 0.35), weight(3, 0.5, 0.35)
    scaled.set_scale(torch.tensor(0.25))
    torch.testing.assert_close(scaled(W), 0.25 * plain(W))
    torch.testing.assert_close(gradients(scaled, W, G)[0], 0.25 * gradients(plain, W, G)[0])


def test_scaled_gradients_of_the_interval_shrink_with_elements_and_steps() -> None:
    for scaled, plain, x, elements in (
        (QilWeight(4, scale_gradient=True), QilWeight(4), W, 12),
        (QilActivation(3, scale_gradient=True), QilActivation(3), W.abs().reshape(4, 3), 3),
    ):
        by_x, *by_interval = gradients(at(scaled, 0.5, 0.35), x, G.reshape(x.shape))
        expected_x, *expected = gradients(at(plain, 0.5, 0.35), x, G.reshape(x.shape))
        factor = 1 / math.sqrt(elements * 7)
        torch.testing.assert_close(by_x, expected_x)
        assert by_interval == pytest.approx([factor * value for value in expected])


# Activations


def test_activations_round_to_levels_from_zero_to_one() -> None:
    y = at(QilActivation(2), 0.5, 0.25)(torch.tensor([-4.0, 0.0, 0.25, 0.33, 0.34, 0.5, 0.66, 0.67, 0.75, 8.0]))
    # (x - 0.25) / 0.5 * 3
    assert y.tolist() == pytest.approx([0, 0, 0, 0, 1 / 3, 2 / 3, 2 / 3, 1, 1, 1])


def test_gradients_of_activations_follow_the_formula() -> None:
    c, d = 0.8, 0.45
    by_x, by_c, by_d = gradients(at(QilActivation(3), c, d), W, G)
    inside = ((c - d <= W) & (c + d >= W)).float()
    alpha = 0.5 / d
    torch.testing.assert_close(by_x, G * alpha * inside)
    assert by_c == pytest.approx(-alpha * float((G * inside).sum()), rel=1e-4)
    assert by_d == pytest.approx(alpha / d * float((G * inside * (c - W)).sum()), rel=1e-4)


def test_signed_activations_run_from_minus_one_to_one_and_keep_their_gradient_below_zero() -> None:
    q = at(QilActivation(2, is_signed=True), 0.0, 1.5)
    assert q(torch.tensor([-9.0, -1.5, -0.6, 0.4, 1.4, 9.0])).tolist() == pytest.approx([-1, -1, -1 / 3, 1 / 3, 1, 1])
    by_x, _, _ = gradients(q, torch.tensor([-2.0, -1.0, 1.0, 2.0]), torch.ones(4))
    assert by_x.tolist() == pytest.approx([0, 2 / 3, 2 / 3, 0])


# Intervals to start from


def test_the_interval_of_the_maximum_clips_and_prunes_nothing() -> None:
    center, distance = interval_of_maximum(torch.tensor([-3.0, 1.0]))
    assert center.item() == distance.item() == 1.5
    assert interval_of_maximum(torch.zeros(4))[0].item() == 1.0


def test_the_interval_of_least_error_beats_every_other_clip() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    center, distance = interval_of_least_error(x, 3)
    assert center.item() == distance.item()

    def error(clip: float) -> float:
        return float(((x.abs() / clip * 3).round().clamp(max=3) / 3 * clip - x.abs()).square().mean())

    assert error(2 * center.item()) <= min(error(0.05 * k) for k in range(10, 80)) * 1.02


def test_the_interval_of_the_histogram_cuts_a_tenth_of_the_range_off_below_and_of_the_values_above() -> None:
    x = torch.cat([torch.arange(1.0, 101.0), torch.full((50,), -7.0)])  # negative values do not count
    center, distance = interval_of_histogram(x)
    # below the 90th percentile, 90.1: 1 to 90; first of ten bins ends at 9.9
    assert (center - distance).item() == pytest.approx(9.9) and (center + distance).item() == pytest.approx(90.0)
    for odd in (torch.zeros(5), torch.ones(5), torch.tensor([2.0])):
        assert torch.equal(interval_of_histogram(odd)[0], interval_of_maximum(odd)[0])


def test_the_histogram_takes_more_values_than_torch_has_quantiles_for() -> None:
    x = torch.linspace(0, 1, 2**24 + 10)
    center, distance = interval_of_histogram(x)
    assert (center + distance).item() == pytest.approx(0.9, abs=1e-4)


@pytest.mark.parametrize("start", ["mse", "max", "histogram"])
def test_signed_activations_start_around_zero_at_the_end_of_the_magnitudes(start: str) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    q = QilActivation(3, is_signed=True, start=start)  # type: ignore[arg-type]
    q.initialize(x)
    expected = {
        "mse": 2 * interval_of_least_error(x, 3)[0],
        "max": x.abs().max(),
        "histogram": sum(interval_of_histogram(x.abs())),
    }
    assert q.center.item() == 0.0 and q.distance.item() == pytest.approx(float(expected[start]))


# Parameters where they are allowed


def test_intervals_are_brought_back_to_between_zero_and_the_values() -> None:
    for q in (QilWeight(2, learns_gamma=True), QilActivation(2)):
        at(q, -0.3, 0.5).project()
        assert q.center.item() == pytest.approx(0.3) and q.distance.item() == pytest.approx(0.3)
        at(q, 0.3, -0.1).project()
        assert q.distance.item() == pytest.approx(0.1)
        at(q, 0.0, 0.0).project()
        assert q.center.item() == q.distance.item() == pytest.approx(SMALLEST_DISTANCE)
    signed = at(QilActivation(2, is_signed=True), -0.3, 0.5)
    signed.project()
    assert signed.center.item() == pytest.approx(-0.3) and signed.distance.item() == 0.5


def test_zero_activations_stay_zero_whatever_the_step_did() -> None:
    q = at(QilActivation(4), 0.2, 0.9)
    q.project()
    assert q(torch.zeros(1)).item() == 0


# The law, and awkward tensors


@pytest.mark.parametrize("bit_width", [2, 3, 8])
@pytest.mark.parametrize("gamma", [None, 1.7])
def test_codes_of_weights_decode_to_the_forward_pass(bit_width: int, gamma: float | None) -> None:
    w = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    q = weight(bit_width, 1.0, 0.8, gamma)
    q.set_scale(torch.tensor(0.37))
    encoded = q.eval().encode(w)
    assert torch.equal(encoded.decode(), q(w)) and encoded.codes.abs().max() == 2 ** (bit_width - 1) - 1
    assert q(torch.linspace(-2, 2, 5001)).unique().numel() == 2**bit_width - 1


@pytest.mark.parametrize("bit_width", [1, 2, 8])
@pytest.mark.parametrize("is_signed", [False, True])
def test_codes_of_activations_decode_to_the_forward_pass(bit_width: int, is_signed: bool) -> None:
    values = torch.randn(9000, generator=torch.Generator().manual_seed(0))
    q = QilActivation(bit_width, is_signed=is_signed)
    q.initialize(values if is_signed else values.relu())
    x = torch.cat([values, torch.linspace(-5, 5, 3001), torch.tensor([0.0, 1e30, -1e30])])
    assert torch.equal(q.eval().encode(x).decode(), q(x)) and q(x).unique().numel() == 2**bit_width


@pytest.mark.parametrize("w", [torch.zeros(3, 2, 3, 3), torch.full((3, 2, 3, 3), -0.1), torch.ones(1, 1, 1, 1)], ids=["0", "-0.1", "one"])
@pytest.mark.parametrize("start", ["mse", "max", "histogram"])
def test_zero_and_constant_weights_have_finite_intervals_and_keep_their_sign(w: Tensor, start: str) -> None:
    q = QilWeight(2, learns_gamma=True, start=start)  # type: ignore[arg-type]
    q.initialize(w)
    leaf = w.clone().requires_grad_()
    y = q(leaf)
    y.sum().backward()
    assert leaf.grad is not None
    assert all(torch.isfinite(t).all() for t in (y, leaf.grad, *(p.grad for p in q.parameters() if p.grad is not None)))
    assert torch.equal(y.sign(), w.sign())


def test_bfloat16_in_bfloat16_out() -> None:
    w = torch.randn(50).bfloat16()
    for q in (weight(3, 0.5, 0.4), at(QilActivation(2), 0.5, 0.4)):
        y = q(w)
        assert y.dtype == torch.bfloat16 and torch.equal(y, q.encode(w).decode().bfloat16())


def test_one_bit_weights_are_refused() -> None:
    with pytest.raises(SpecError, match="2 bits or more"):
        QilWeight(1)


@pytest.mark.parametrize("is_signed", [False, True])
def test_the_exported_operator_computes_the_same(is_signed: bool) -> None:
    q, x = at(QilActivation(3, is_signed=is_signed), 0.8, 0.6).eval(), torch.linspace(-3, 3, 601)
    program = torch.export.export(nn.Sequential(q), (x,))
    assert [node.target for node in program.graph.nodes].count(torch.ops.lowbit.fake_quantize_grid.default) == 1
    assert torch.equal(program.module()(x), q(x))


@pytest.mark.parametrize("name", sorted(SURROGATES))
def test_every_surrogate_reaches_weights_and_intervals(name: str) -> None:
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model = lowbit.prepare(TinyNet(), method="qil", weight_bits=3, activation_bits=3, sample=x, surrogate=name).train()
    model(x).square().sum().backward()
    q = insert.weight_quantizer(model.conv1)
    assert isinstance(q, QilWeight)
    for gradient in (insert.float_weight(model.conv1).grad, q.center.grad, q.distance.grad):  # type: ignore[arg-type]
        assert gradient is not None and torch.isfinite(gradient).all() and gradient.abs().sum() > 0


# The method


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plain_network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.Flatten(), nn.Linear(24, 3)]
    return nn.Sequential(*layers)


def test_rescaling_keeps_the_size_of_outputs_without_batch_norms() -> None:
    net = plain_network()
    sizes = {}
    for rescale in (True, False):
        model = lowbit.prepare(net, method="qil", weight_bits=4, activation_bits=4, sample=X, rescale=rescale).eval()
        with torch.no_grad():
            sizes[rescale] = float((model[:5](X)).abs().mean() / net[:5](X).abs().mean())  # type: ignore[index]
    assert sizes[True] == pytest.approx(1, abs=0.15)
    assert not 0.5 < sizes[False] < 2


def test_intervals_learn_at_a_hundredth_of_the_weights_rate_or_alone() -> None:
    for train_weights in (True, False):
        model = lowbit.prepare(TinyNet(), method="qil", weight_bits=3, activation_bits=3, sample=X, train_weights=train_weights).train()
        run = TrainRun(model, method_of(model), Classification(), Recipe(epochs=1, optimizer=OptimizerSpec(learning_rate=0.1)), 2)
        run.start_phase()
        rates = {group["role"]: group["spec"].learning_rate for optimizer in run.optimizers for group in optimizer.param_groups}
        expected = {"weights": 0.1, "others": 0.1, "quantizers": pytest.approx(0.001)}
        assert rates == (expected if train_weights else {"quantizers": expected["quantizers"]})
        before = {name: value.detach().clone() for name, value in model.named_parameters()}
        run.before_step()
        run.loss((X, torch.arange(32) % 4)).backward()
        run.optimizer_step()
        run.after_step()
        changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
        assert "conv1.input_quantizer.center" in changed
        assert ("conv1.parametrizations.weight.original" in changed) is train_weights


def test_a_network_of_fewer_bits_goes_on_from_weights_and_intervals_of_one_of_more() -> None:
    more, fewer = (
        lowbit.prepare(TinyNet(), method="qil", weight_bits=bits, activation_bits=bits, sample=X, gamma="learned") for bits in (4, 2)
    )
    for parameter in more.parameters():
        parameter.data.mul_(1.25)
    fewer.load_state_dict(more.state_dict())
    q = insert.weight_quantizer(fewer.conv1)  # type: ignore[arg-type]
    assert isinstance(q, QilWeight) and q.bit_width == 2
    assert all(torch.equal(a, b) for a, b in zip(fewer.parameters(), more.parameters(), strict=True))
    with torch.no_grad():
        assert fewer.conv1.weight.unique().numel() == 3  # type: ignore[union-attr, operator]


def test_fewer_bits_keep_the_learned_interval_and_change_the_levels() -> None:
    for q, levels in ((weight(5, 0.4, 0.3), 3), (at(QilActivation(5), 0.4, 0.3), 4)):
        before, interval = q(W), (q.center, q.distance)
        q.set_bit_width(2)
        assert (q.center, q.distance) == interval and q.center.item() == pytest.approx(0.4)
        assert q(W).unique().numel() == levels and torch.equal(q.encode(W).decode(), q(W))
        q.set_bit_width(5)
        assert torch.equal(q(W), before)


def progressive(epochs: int, bits: int = 2, stages: tuple[int, ...] = (5, 4, 3)) -> TrainRun:
    torch.manual_seed(0)
    options = {"weight_bits": bits, "activation_bits": bits, "sample": X, "progressive": stages}
    model = lowbit.prepare(TinyNet(), method="qil", **options).train()  # type: ignore[arg-type]
    return TrainRun(model, method_of(model), Classification(), Recipe(epochs, optimizer=OptimizerSpec(learning_rate=0.05)), 2)


def step(run: TrainRun) -> None:
    run.before_step()
    run.loss((X, torch.arange(len(X)) % 4)).backward()
    run.optimizer_step()
    run.after_step()


def test_bits_fall_in_the_course_of_one_run_and_intervals_go_on() -> None:
    run = progressive(epochs=9)
    assert [(phase.name, phase.epochs) for phase in run.phases] == [("5 bits", 2), ("4 bits", 2), ("3 bits", 2), ("train", 3)]
    assert get_bits(run.model)["conv1"] == LayerBits(2, 2)
    seen, q = [], insert.weight_quantizer(run.model.conv1)  # type: ignore[arg-type]
    assert isinstance(q, QilWeight)
    center = q.center
    for _ in run.each_epoch():
        before = center.detach().clone()
        bits = get_bits(run.model)
        seen.append(bits["conv1"])
        assert bits["conv1"] == bits["conv2"] and bits["stem"] == bits["head"] == LayerBits(8, 8)
        step(run)
        step(run)
        assert q.center is center and (center - before).abs().item() < 0.05  # no stage starts over
    assert [bits.weight for bits in seen] == [bits.activation for bits in seen] == [5, 5, 4, 4, 3, 3, 2, 2, 2]
    with torch.no_grad():
        assert run.model.conv1.weight.unique().numel() == 3  # type: ignore[union-attr, operator]
    assert lowbit.summary(run.model).layers[1].weight_bits == 2


@pytest.mark.parametrize("step", [3, 8, 10, 13, 18])
def test_a_run_that_is_killed_in_any_stage_ends_with_the_same_weights(step: int, tmp_path: Path) -> None:
    recipe = Recipe(epochs=4, batch_size=16, optimizer=OptimizerSpec(learning_rate=0.05))  # five steps, one stage, an epoch
    settings = {"method": "qil", "weight_bits": 2, "activation_bits": 2, "recipe": recipe, "progressive": (5, 4, 3), "save_every": "2"}
    whole = train(**settings)
    killed(step, tmp_path, **settings)
    again = train(out=tmp_path, **settings)
    assert_same(again, whole)
    assert get_bits(again) == get_bits(whole) and get_bits(again)["3"] == LayerBits(2, 2)


def test_a_stage_is_at_least_as_wide_as_the_layers_own_bits() -> None:
    run = progressive(epochs=4, bits=4)
    assert [get_bits(run.model)["conv1"].weight for _ in run.each_epoch()] == [5, 4, 4, 4]


def test_intervals_start_at_the_first_stages_bits() -> None:
    five, staged = (insert.weight_quantizer(progressive(4, bits, stages).model.conv1) for bits, stages in ((5, ()), (2, (5, 4, 3))))  # type: ignore[arg-type]
    assert isinstance(five, QilWeight) and isinstance(staged, QilWeight)
    assert torch.equal(five.center, staged.center) and torch.equal(five.scale, staged.scale) and staged.bit_width == 2


def test_a_run_that_returns_to_a_stage_has_its_bits() -> None:
    run = progressive(epochs=8)
    run.return_to(phase_index=2, epoch=1, step=10)
    assert get_bits(run.model)["conv1"] == LayerBits(3, 3)
    assert [get_bits(run.model)["conv1"].weight for _ in run.each_epoch()] == [3, 2, 2]


def test_stages_need_epochs_and_widths() -> None:
    with pytest.raises(SpecError, match="qil: 4 stages need as many epochs, got 3"):
        progressive(epochs=3)
    with pytest.raises(SpecError, match="qil: progressive must be from 1 to 8, got"):
        progressive(epochs=4, stages=(9,))


def test_signed_inputs_are_not_cut_off_at_zero() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    model = lowbit.prepare(net, method="qil", weight_bits=2, activation_bits=2, sample=X)
    q = insert.input_quantizer(model[1])  # type: ignore[index]
    assert isinstance(q, QilActivation) and q(torch.tensor([-1e3, 1e3])).tolist() == [-1, 1]
