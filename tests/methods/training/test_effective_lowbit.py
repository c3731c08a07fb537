"""Effective low-bitwidth networks: which bits a network has in which phase, and what it and its float twin learn from each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.qat.recording import BATCHES, network
from tests.qat.training import RECIPE, assert_same, data, killed, network as conv_network, state, train
from torch import nn

import lowbit
from lowbit.errors import DataError, LowbitError, SpecError
from lowbit.files import read_tensors
from lowbit.methods.training.effective_lowbit import (
    ClippedActivation,
    EffectiveLowbit,
    ScaledLogitWeight,
    last_of_each_shape,
    on_grid,
    squared_distance,
)
from lowbit.models.resnet import resnet8
from lowbit.network import insert
from lowbit.network.bits import get_bits
from lowbit.qat import Classification, GivenNetworks, OptimizerSpec, Recipe, TrainRun
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.spec import BitPolicy, LayerBits

NOTHING: dict[str, Any] = {"two_stage": False, "progressive": False, "guidance": "none"}


def prepared(weight_bits: int | None = 2, activation_bits: int | None = 3, **asked: Any) -> nn.Module:
    bits = {"weight_bits": weight_bits, "activation_bits": activation_bits}
    policy = asked.pop("policy", None) or BitPolicy.uniform(**bits, first_last=None)
    asked = {"method": "effective_lowbit", **bits, **asked}
    return lowbit.prepare(network(), policy=policy, sample=BATCHES[0][0], **asked).train()


def run_of(model: nn.Module, epochs: int = 8, teacher: nn.Module | None = None) -> TrainRun:
    recipe = Recipe(epochs, optimizer=OptimizerSpec(learning_rate=0.05))
    given = GivenNetworks(teacher, network())
    return TrainRun(model, model.lowbit_method, Classification(), recipe, len(BATCHES), given=given)  # type: ignore[arg-type]


def steps(run: TrainRun, each: Any = None) -> None:
    for _ in run.each_epoch():
        if each is not None:
            each()
        for batch in BATCHES:
            run.before_step()
            for loss in run.losses(batch):
                loss.backward()
            run.after_backward()
            run.optimizer_step()
            run.after_step()


def bits_by_phase(model: nn.Module, epochs: int = 12) -> dict[str, LayerBits]:
    run, seen = run_of(model, epochs), {}

    def note() -> None:
        (seen[run.phase.name],) = set(get_bits(model).values())

    steps(run, note)
    return seen


def test_bits_come_down_in_both_tricks_together_and_in_each_alone() -> None:
    assert bits_by_phase(prepared()) == {
        "weights at 8 bits": LayerBits(8, None),
        "weights and activations at 8 bits": LayerBits(8, 8),
        "weights at 4 bits": LayerBits(4, None),
        "weights and activations at 4 bits": LayerBits(4, 4),
        "weights": LayerBits(2, None),
        "weights and activations": LayerBits(2, 3),
    }
    assert list(bits_by_phase(prepared(two_stage=False)).values()) == [LayerBits(8, 8), LayerBits(4, 4), LayerBits(2, 3)]
    assert list(bits_by_phase(prepared(progressive=False)).values()) == [LayerBits(2, None), LayerBits(2, 3)]
    assert bits_by_phase(prepared(**NOTHING)) == {"weights and activations": LayerBits(2, 3)}


def test_widths_that_no_layer_is_below_are_left_out() -> None:
    assert list(bits_by_phase(prepared(4, 4, two_stage=False)).values()) == [LayerBits(8, 8), LayerBits(4, 4)]
    assert list(bits_by_phase(prepared(8, 8, two_stage=False)).values()) == [LayerBits(8, 8)]
    assert list(bits_by_phase(prepared(2, None)).values()) == [LayerBits(8, None), LayerBits(4, None), LayerBits(2, None)]


def test_half_of_the_epochs_are_spent_at_the_bits_asked_for() -> None:
    run = run_of(prepared(), 20)
    assert [phase.epochs for phase in run.phases] == [2, 2, 2, 2, 2, 10]
    run = run_of(prepared(last_share=1 / 6), 12)
    assert [phase.epochs for phase in run.phases] == [2] * 6
    assert {phase.span for phase in run.phases} == {(0.0, 1.0)}


def test_weights_are_odd_multiples_of_a_third_and_reach_one() -> None:
    model = prepared()
    for layer in (model[0], model[2], model[4]):
        levels = layer.weight.detach().unique() * 3
        assert set(levels.round().int().tolist()) <= {-3, -1, 1, 3}
        torch.testing.assert_close(levels, levels.round())
        assert layer.weight.abs().max() == 1


def test_activations_are_clipped_while_weights_alone_are_quantized() -> None:
    model = prepared(**{**NOTHING, "two_stage": True})
    run = run_of(model, 2)
    run.start_phase()
    quantizer = insert.input_quantizer(model[2])
    assert isinstance(quantizer, ClippedActivation)
    x = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.7], requires_grad=True)
    y = quantizer(x)
    torch.testing.assert_close(y, torch.tensor([0.0, 0.0, 0.3, 1.0, 1.0]))
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    first = insert.input_quantizer(model[0])  # what the network reads can be negative
    assert first is not None and first(torch.tensor([-3.0, -0.3, 3.0])).tolist() == pytest.approx([-1.0, -0.3, 1.0])
    run.phase_index = 1
    run.start_phase()
    assert quantizer(torch.tensor([0.3])).item() == pytest.approx(2 / 7)
    quantizer.set_bit_width(None)
    assert quantizer(torch.tensor([1.7])).item() == pytest.approx(1.7)


def test_bits_that_came_down_compute_as_a_network_made_at_these_bits() -> None:
    model = prepared(guidance="none")
    steps(run_of(model))
    fresh = prepared(**NOTHING)
    fresh.load_state_dict(model.state_dict())
    x = torch.cat([batch for batch, _ in BATCHES])
    assert torch.equal(fresh.eval()(x), model.eval()(x))


@pytest.mark.parametrize("guidance", ["feature", "logit_mse", "kl"])
def test_guidance_without_weight_is_training_alone(guidance: str) -> None:
    alone, guided = prepared(guidance="none"), prepared(guidance=guidance, guidance_weight=0, teacher_guidance_weight=0)
    run, twin = run_of(guided), network()
    steps(run_of(alone))
    steps(run)
    for (name, a), b in zip(alone.named_parameters(), guided.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=name)
    expected = run.networks["teacher"].state_dict()
    for phase in run.phases:  # the twin by itself: optimizer and schedule start again with each phase
        optimizer = torch.optim.SGD(twin.parameters(), momentum=0.9, weight_decay=1e-4)
        for step in range(phase.epochs * len(BATCHES)):
            optimizer.param_groups[0]["lr"] = phase.optimizers["teacher"].rate_at(step / (phase.epochs * len(BATCHES)))
            optimizer.zero_grad()
            x, y = BATCHES[step % len(BATCHES)]
            nn.functional.cross_entropy(twin(x), y).backward()
            optimizer.step()
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("guidance", ["feature", "logit_mse", "kl"])
def test_network_and_twin_learn_from_each_other(guidance: str) -> None:
    found = {}
    for weights in ({}, {"guidance_weight": 0}, {"teacher_guidance_weight": 0}):
        model = prepared(**{**NOTHING, "guidance": guidance}, **weights)
        run = run_of(model, 1)
        run.start_phase()
        run.before_step()
        for loss in run.losses(BATCHES[0]):
            loss.backward()
        twin = run.networks["teacher"]
        assert isinstance(twin, nn.Sequential)
        found[next(iter(weights), "both")] = (insert.float_weight(model[0]).grad, twin[0].weight.grad)
    (own, theirs), (own_alone, same), (same_too, theirs_alone) = found.values()
    assert torch.equal(own, same_too) and torch.equal(theirs, same)
    assert not torch.allclose(own, own_alone, rtol=1e-3) and not torch.allclose(theirs, theirs_alone, rtol=1e-3)


def test_the_gradient_of_the_divergence_sums_to_zero_over_classes() -> None:
    run = run_of(prepared())
    method, logits = run.method, torch.randn(5, 3, requires_grad=True)
    assert isinstance(method, EffectiveLowbit)
    method.distance(run, logits, torch.randn(5, 3)).backward()
    assert logits.grad is not None and logits.grad.abs().max() > 1e-3
    torch.testing.assert_close(logits.grad.sum(1), torch.zeros(5), rtol=0, atol=1e-6)


def test_the_distance_of_features_is_a_mean_of_squares_by_hand() -> None:
    own, other = torch.tensor([[0.0, 1.0]], requires_grad=True), torch.tensor([[0.5, 3.0]], requires_grad=True)
    distance = squared_distance(own, other)
    assert distance.item() == pytest.approx((0.25 + 4) / 2)
    distance.backward()
    assert own.grad is not None and own.grad.tolist() == [[-0.5, -2.0]]
    assert other.grad is None


def test_a_feature_of_the_twin_teaches_the_quantizer_nothing() -> None:
    quantizer = LearnedScaleQuantizer(3, signed=False, learn_offset=False)
    quantizer.initialize(torch.rand(64))
    x = torch.rand(64, requires_grad=True)
    expected = quantizer(x).detach()
    y = on_grid(quantizer, x)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert x.grad is not None and x.grad.sum() > 0
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_features_are_those_of_the_last_layer_at_each_of_the_last_two_shapes() -> None:
    shapes = {"a": (2, 4, 8, 8), "b": (2, 8, 4, 4), "c": (2, 4, 8, 8), "d": (2, 16)}
    assert last_of_each_shape({name: torch.zeros(shape) for name, shape in shapes.items()}) == ["b", "c", "d"]
    model = lowbit.prepare(resnet8(width=4), method="effective_lowbit", guidance="feature", weight_bits=2, sample=torch.randn(2, 3, 16, 16))
    assert model.lowbit_method.hints == ["layer3.0.conv2", "layer3.0.downsample.0"]  # type: ignore[union-attr]
    named = prepared(guidance="feature", guided_layers="2")
    assert named.lowbit_method.hints == ["2"]  # type: ignore[union-attr]


def test_scaled_logits_quantize_weight_and_bias_of_the_last_layer_and_learn_a_factor(tmp_path: Path) -> None:
    model = prepared(policy="paper", weight_bits=2, scaled_logits=True, **NOTHING)
    last, (x, _) = model[4], BATCHES[0]
    quantizer = insert.weight_quantizer(last)
    assert isinstance(quantizer, ScaledLogitWeight) and quantizer.logit_scale.item() == pytest.approx(0.01)
    thirds = (last.bias.detach() * 300).abs()
    torch.testing.assert_close(thirds, thirds.round())
    assert set(thirds.round().tolist()) == {1.0, 3.0}
    before = model.eval()(x).detach()
    with torch.no_grad():
        quantizer.logit_scale.mul_(3)
    torch.testing.assert_close(model(x), 3 * before)
    steps(run_of(model.train(), 2))
    assert quantizer.logit_scale.item() != pytest.approx(0.03)
    lowbit.export(model.eval(), tmp_path / "model.lowbit", sample=x)
    torch.testing.assert_close(lowbit.load(tmp_path / "model.lowbit")(x), model(x))
    wide = prepared(policy=BitPolicy.uniform(2, 3), scaled_logits=True)
    assert isinstance(insert.weight_quantizer(wide[4]), ScaledLogitWeight) and get_bits(wide)["4"] == LayerBits(8, 8)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"widths": (4, 8)}, "widths must descend, got 4, 8"),
        ({"widths": (8, 8)}, "widths must descend, got 8, 8"),
        ({"widths": (16, 8)}, "widths must be .*2.*8"),
        ({"guidance": "feature", "guided_layers": ("9",)}, "guided_layers names '9'.* Those are: 0, 2, 4"),
        ({"guidance": "feature", "activation_bits": None}, "no layer's input is quantized. Choose 'logit_mse' or 'kl'"),
        ({"method": "twn", "procedure": "effective_lowbit", "activation_bits": None}, "lowers weight bits over 8, 4, 2, and TernaryQuantizer has 2 alone"),
        ({"method": "binary_connect", "weight_bits": 1, "activation_bits": None, "squared_hinge": True, "procedure": "effective_lowbit"}, "trains on a loss of its own"),
    ],
)  # fmt: skip
def test_what_cannot_work_says_why(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(LowbitError, match=message):
        prepared(**asked)


def test_a_teacher_of_another_kind_is_refused() -> None:
    other = nn.Sequential(nn.Linear(6, 4))
    for guidance, error, message in (("kl", DataError, "must tell the same classes"), ("logit_mse", SpecError, "of the same shape")):
        with pytest.raises(error, match=message):
            steps(run_of(prepared(guidance=guidance), teacher=other))


@pytest.mark.parametrize(
    ("method", "bits", "options"),
    [
        ("dsq", (2, 3), {}),
        ("ewgs", (2, 3), {"guidance": "feature"}),
        ("lq_nets", (2, 3), {"guidance": "feature"}),
        ("recu", (1, 1), {"progressive": False, "guidance": "logit_mse"}),
        ("twn", (2, None), {"progressive": False}),
        ("binary_connect", (1, None), {"progressive": False, "guidance": "none"}),
    ],
)
def test_quantizers_of_other_methods_go_through_it(method: str, bits: tuple[int, int | None], options: dict[str, Any]) -> None:
    model = prepared(*bits, method=method, procedure="effective_lowbit", procedure_options=options)
    before = insert.float_weight(model[2]).detach().clone()
    steps(run_of(model))
    assert set(get_bits(model).values()) == {LayerBits(*bits)}
    assert bool(torch.isfinite(model(BATCHES[0][0])).all())
    assert not torch.equal(insert.float_weight(model[2]), before)


@pytest.mark.parametrize(
    ("method", "guidance"), [("effective_lowbit", "feature"), ("effective_lowbit", "kl"), ("dsq", "kl"), ("ewgs", "feature")]
)
def test_a_kill_in_any_phase_changes_no_bit_of_network_or_twin(method: str, guidance: str, tmp_path: Path) -> None:
    options = {"guidance": guidance, "last_share": 1 / 6}
    asked: dict[str, Any] = {"method": method, "weight_bits": 2, "recipe": replace(RECIPE, epochs=6), "save_every": "1"}
    asked |= options if method == "effective_lowbit" else {"procedure": "effective_lowbit", "procedure_options": options}
    whole = train(out=tmp_path / "whole", **asked)
    for index, step in enumerate((2, 5, 8, 13, 17, 21, 24, 28)):
        folder = tmp_path / str(index)
        killed(step, folder, **asked)
        assert_same(train(out=folder, **asked), whole)
        one, other = (read_tensors(path / ".work" / "last.safetensors")[0] for path in (tmp_path / "whole", folder))
        twin = [name for name in one if name.startswith("networks.teacher.")]
        assert len(twin) == len(conv_network().state_dict())
        assert all(torch.equal(one[name], other[name]) for name in twin)
    assert any(not torch.equal(one[f"networks.teacher.{name}"], p) for name, p in conv_network().named_parameters())


def test_nothing_of_the_twin_is_exported(tmp_path: Path) -> None:
    trained = {g: train(weight_bits=2, method="effective_lowbit", guidance=g, two_stage=False) for g in ("none", "feature")}
    sizes = {}
    for guidance, model in trained.items():
        assert state(model).keys() == state(trained["none"]).keys()
        lowbit.export(model, tmp_path / f"{guidance}.lowbit", sample=data().tensors[0][:4])
        sizes[guidance] = (tmp_path / f"{guidance}.lowbit").stat().st_size
    assert abs(sizes["feature"] - sizes["none"]) < 64


def test_a_loop_of_ones_own_gives_the_weights_of_the_trainer() -> None:
    x, y = data().tensors
    recipe = Recipe(epochs=6, batch_size=80, optimizer=OptimizerSpec(learning_rate=0.05, momentum=0.9, schedule="constant"))
    asked: dict[str, Any] = {
        "method": "effective_lowbit",
        "weight_bits": 3,
        "activation_bits": 3,
        "last_share": 1 / 6,
        "guidance": "feature",
    }
    whole = train(data=(x, y), recipe=recipe, augment="none", sample=x[:16], **asked)
    model = lowbit.prepare(conv_network(), sample=x[:16], **asked).train()
    run = lowbit.training(model, steps_per_epoch=1, epochs=6, recipe=recipe, float_network=conv_network())
    for _ in range(6):
        optimizer = torch.optim.SGD(run.parameter_groups(), momentum=0.9)  # phases of one step: nothing to carry over
        run.before_step(optimizer)
        for loss in run.losses((x, y)):
            loss.backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, msg=name, rtol=1e-4, atol=1e-5)
