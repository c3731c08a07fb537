"""AdaBits: codes that nest, clips with their gradient, norms and clips of each width, and the ways to adapt."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from tests.methods.adaptive.several import X, Y, check_every_width_is_a_plain_network, check_resumes, network, outputs, run_of, weight_codes
from tests.qat.training import data, train
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.methods.adaptive.adabits import AdabitsActivation, AdabitsWeight, UnscaledWeight
from lowbit.network import insert
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.spec import BitPolicy


def prepared(bits: object = (8, 4, 2), **options: object) -> nn.Module:
    return lowbit.prepare(network(), method="adabits", bits=bits, sample=X, **options)  # type: ignore[arg-type]


# Weights


def test_levels_of_two_bits_worked_out_by_hand() -> None:
    weight = torch.atanh(torch.tensor([-0.8, -0.3, 0.0, 0.1, 0.5, 0.8]))  # divided by 0.8: -1, -.375, 0, .125, .625, 1
    found = {rounding: AdabitsWeight(2, rounding=rounding)(weight).tolist() for rounding in ("floor", "centered")}  # type: ignore[arg-type]
    assert found["floor"] == [-1.0, -0.5, 0.0, 0.0, 0.5, 0.5]
    assert found["centered"] == [-0.75, -0.25, 0.25, 0.25, 0.75, 0.75]
    nearest = AdabitsWeight(2, rounding="nearest").eval()(weight)
    torch.testing.assert_close(nearest, torch.tensor([-1, -1 / 3, 1 / 3, 1 / 3, 1 / 3, 1]))


@pytest.mark.parametrize("rounding", ["floor", "centered"])
def test_codes_of_fewer_bits_are_the_upper_bits_of_those_of_more(rounding: str) -> None:
    weight = torch.cat([torch.randn(3000), torch.zeros(3), torch.linspace(-2, 2, 257)])
    quantizer = AdabitsWeight(8, rounding=rounding)  # type: ignore[arg-type]
    highest = quantizer.encode(weight).codes.int()
    assert (int(highest.min()), int(highest.max())) == (-128, 127)
    for bits in range(2, 9):
        quantizer.set_bit_width(bits)
        assert torch.equal(quantizer.encode(weight).codes.int(), highest >> (8 - bits))


def test_the_codes_of_the_nearest_level_do_not_nest() -> None:
    weight, quantizer = torch.randn(3000), AdabitsWeight(8, rounding="nearest")
    highest = quantizer.encode(weight).codes.int()
    quantizer.set_bit_width(4)
    assert not torch.equal(quantizer.encode(weight).codes.int(), highest >> 4)


@pytest.mark.parametrize("kind", ["constant", "stddev"])
def test_a_rescaled_weight_has_the_deviation_that_was_asked_for(kind: str) -> None:
    weight = torch.randn(40, 30)
    quantizer = AdabitsWeight(3, rescale=kind, outputs=40)  # type: ignore[arg-type]
    wanted = 40**-0.5 if kind == "constant" else float(weight.std())
    assert float(quantizer(weight).std()) == pytest.approx(wanted, rel=1e-5)
    assert torch.equal(quantizer.eval()(weight), quantizer.encode(weight).decode())


@pytest.mark.parametrize("weight", [torch.zeros(4, 3), torch.full((4, 3), 0.25), torch.ones(1, 1)])
def test_weights_without_deviation_stay_finite(weight: Tensor) -> None:
    weight = weight.clone().requires_grad_()
    values = AdabitsWeight(2, rescale="stddev")(weight)
    values.sum().backward()
    assert torch.isfinite(values).all() and weight.grad is not None and torch.isfinite(weight.grad).all()


def test_a_weight_that_is_not_rescaled_in_evaluation_divides_all_that_the_layer_gives() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Linear(6, 5)]
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, kind in zip(layers, (AdabitsWeight, UnscaledWeight), strict=True):
        insert.set_weight_quantizer(layer, kind(4, rescale="constant", outputs=5))
    x = torch.randn(7, 6)
    scaled, unscaled = (layer(x) for layer in layers)
    assert torch.equal(scaled, unscaled)  # in training
    scaled, unscaled = (layer.eval()(x) for layer in layers)
    quantizer = insert.weight_quantizer(layers[1])
    assert isinstance(quantizer, UnscaledWeight) and not 0.95 < float(quantizer.last_factor) < 1.05
    torch.testing.assert_close(unscaled * quantizer.last_factor, scaled)


# Activations


def test_the_gradient_of_the_clip_is_calibrated() -> None:
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0, 3.0], requires_grad=True)
    quantizer = AdabitsActivation(2, clip=2.0)
    y = quantizer(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([0, 0, 4 / 3, 2, 2]))
    assert x.grad is not None and x.grad.tolist() == [0, 0, 1, 0, 0]
    assert quantizer.clip.grad is not None and quantizer.clip.grad.item() == pytest.approx(2 / 3 - 1 / 2 + 1 + 1)


def test_a_negative_clip_counts_by_its_size_and_never_becomes_zero() -> None:
    x = torch.tensor([0.4, 3.0], requires_grad=True)
    quantizer = AdabitsActivation(2, clip=2.0)
    with torch.no_grad():
        quantizer.clip.fill_(-2.0)
    quantizer(x).sum().backward()
    assert quantizer.clip.grad is not None and quantizer.clip.grad.item() == pytest.approx(-(1 / 3 - 0.2 + 1))
    with torch.no_grad():
        quantizer.clip.zero_()
    quantizer.project()
    assert torch.isfinite(quantizer(x)).all() and quantizer.clip.item() > 0


def test_signed_activations_have_levels_on_both_sides_and_none_at_zero() -> None:
    x = torch.tensor([-5.0, -0.2, 0.1, 0.6, 5.0], requires_grad=True)
    quantizer = AdabitsActivation(2, clip=1.0, is_signed=True)
    y = quantizer(x)
    y.sum().backward()
    torch.testing.assert_close(y.detach(), torch.tensor([-1, -1 / 3, 1 / 3, 1 / 3, 1]))
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]
    inside = (-1 / 3 + 0.2) + (1 / 3 - 0.1) + (1 / 3 - 0.6)
    assert quantizer.clip.grad is not None and quantizer.clip.grad.item() == pytest.approx(inside + 1 - 1, abs=1e-6)


def test_each_width_has_a_clip_of_its_own_unless_it_shares_one() -> None:
    model = prepared()
    lowbit.set_bits(model, 2)
    model.train()(X).sum().backward()
    quantizer = model.get_submodule("conv2.input_quantizer")
    assert [quantizer.at[width].clip.grad is not None for width in ("8", "4", "2")] == [False, False, True]  # type: ignore[index, union-attr]
    shared = prepared(switchable_clip=False).get_submodule("conv2.input_quantizer")
    assert isinstance(shared, AdabitsActivation) and shared.bit_widths == range(1, 9)


# Networks


def test_one_width_is_a_network_with_ordinary_norms() -> None:
    model = lowbit.prepare(network(), method="adabits", weight_bits=3, activation_bits=3, sample=X)
    assert not any(isinstance(module, SwitchableNorm) for module in model.modules())
    assert prepared([3]).state_dict().keys() == model.state_dict().keys()


def test_every_width_is_exported_as_a_plain_network_and_codes_nest_through_the_layers(tmp_path: Path) -> None:
    model = train(network(), method="adabits", bits="8,4,2")
    check_every_width_is_a_plain_network(model, tmp_path)
    codes = {}
    for width in (8, 4, 2):
        lowbit.set_bits(model, width)
        codes[width] = weight_codes(model, "conv2")
    assert torch.equal(codes[4], codes[8] >> 4) and torch.equal(codes[2], codes[8] >> 6)


def test_norms_that_share_their_affine_parameters_keep_statistics_of_their_own(tmp_path: Path) -> None:
    model = prepared(shares_affine=True)
    norm = copy.deepcopy(model).get_submodule("norm2")
    assert isinstance(norm, SwitchableNorm)
    first, *others = norm.norms.values()
    assert all(other.weight is first.weight and other.bias is first.bias for other in others)
    assert not any(other.running_mean is first.running_mean for other in others)
    check_resumes([4], tmp_path, method="adabits", bits="8,2", shares_affine=True)


def test_weight_decay_is_for_weights_that_are_not_depthwise() -> None:
    model = lowbit.prepare(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 3)),
        method="adabits", weight_bits=4, activation_bits=4, sample=X,
    )  # fmt: skip
    groups = run_of(model).optimizers[0].param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    assert {name for name, p in model.named_parameters() if id(p) in decayed} == {
        "0.parametrizations.weight.original",
        "4.parametrizations.weight.original",
    }


def test_integer_images_enter_the_first_layer_as_the_authors_have_them() -> None:
    images = torch.rand(16, 2, 6, 6)
    policy = BitPolicy.uniform(4, 4, first_last=None).with_rule(match="conv1", weight=8, activation="float")
    ask = {"method": "adabits", "bits": [4, 2], "policy": policy}
    model = lowbit.prepare(network(), sample=images, integer_images=True, **ask).eval()  # type: ignore[arg-type]
    twin = lowbit.prepare(network(), sample=images, **ask).eval()  # type: ignore[arg-type]
    twin.load_state_dict(model.state_dict())
    assert torch.equal(model(images), twin((255 * images).round()))


@pytest.mark.parametrize(
    ("adaptation", "trained"),
    [("direct", ["8", "8", "8"]), ("direct_lowest", ["2", "2", "2"]), ("descending", ["8", "4", "2"]), ("ascending", ["2", "4", "8"])],
)
def test_one_width_is_trained_at_a_time_and_the_others_follow_it(adaptation: str, trained: list[str]) -> None:
    model = prepared(adaptation=adaptation)
    run = run_of(model, epochs=3)
    norm, clips = model.get_submodule("norm2"), model.get_submodule("conv2.input_quantizer")
    for epoch, width in enumerate(trained):
        run.step = 4 * epoch
        run.before_step()
        losses = [loss.backward() for loss in run.losses((X, Y))]
        assert len(losses) == 1
        assert [key for key, own in norm.norms.items() if own.weight.grad is not None] == [f"{width}/{width}"]  # type: ignore[union-attr, operator]
        with torch.no_grad():
            norm.norms[f"{width}/{width}"].weight.add_(1)  # type: ignore[index, union-attr]
            clips.at[width].clip.add_(1)  # type: ignore[index, union-attr]
        list(run.losses((X, Y)))
        weights = [own.weight for own in norm.norms.values()]  # type: ignore[union-attr, operator]
        assert all(torch.equal(weight, weights[0]) for weight in weights)
        assert len({own.clip.item() for own in clips.at.values()}) == 1  # type: ignore[union-attr, operator]
        assert [int(own.num_batches_tracked) for own in norm.norms.values()] == [2 * (epoch + 1)] * 3  # type: ignore[union-attr, operator]
        assert norm.key == "8/8"


@pytest.mark.parametrize("adaptation", ["joint", "descending"])
def test_a_training_that_was_killed_ends_with_the_same_bits(adaptation: str, tmp_path: Path) -> None:
    check_resumes([8], tmp_path, method="adabits", bits="8,4,2", adaptation=adaptation)


def test_joint_training_teaches_every_width_and_norms_of_another_one_spoil_it() -> None:
    model = train(network(), method="adabits", bits="8,4,2", recipe=lowbit.Recipe(12, 16, lowbit.OptimizerSpec(learning_rate=0.05)))
    images, labels = data(200, 5).tensors
    with torch.no_grad():
        for width in (8, 4, 2):
            lowbit.set_bits(model, width)
            own = model.eval()(images)
            assert float((own.argmax(1) == labels).float().mean()) > 0.95, width
        for module in model.modules():
            if isinstance(module, SwitchableNorm):
                module.select("8/8")
        loss, shared = (float(nn.functional.cross_entropy(logits, labels)) for logits in (own, model(images)))
    assert shared > 1.5 * loss, (loss, shared)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(LayerError, match="has no batch norm"):
        lowbit.prepare(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), method="adabits", bits=[8, 4], sample=X)
    with pytest.raises(SpecError, match="adabits has weight bits 2, 3, 4, 5, 6, 7, 8, got 1/1"):
        prepared([4, 1])
    with pytest.raises(SpecError, match="4/4 stands there twice"):
        prepared([4, 4])
    with pytest.raises(SpecError, match="adaptation must be one of 'joint'"):
        prepared(adaptation="all")
    model = prepared()
    with pytest.raises(SpecError, match="was trained for the widths 8/8, 4/4, 2/2, got 3"):
        lowbit.set_bits(model, 3)
    assert torch.equal(outputs(model), outputs(copy.deepcopy(model)))


def test_norms_can_be_shared_by_all_widths_for_comparison() -> None:
    model = prepared(switchable_norms=False)
    assert not any(isinstance(module, SwitchableNorm) for module in model.modules())
    found = {}
    for width in (8, 2):
        lowbit.set_bits(model, width)
        found[width] = outputs(model)
    assert not torch.equal(found[8], found[2])
