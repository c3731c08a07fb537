"""Bit-Mixer: codes cut out of those of the highest width, norms for pairs of widths, three stages, and widths for a budget."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.methods.adaptive.several import X, Y, check_every_width_is_a_plain_network, check_resumes, network, outputs, run_of, weight_codes
from tests.qat.training import RECIPE, assert_same, data, train
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.methods.adaptive.bit_mixer import BitMixer, MixedWeight, draw_widths, start_from_diagonal, transitional_norm
from lowbit.models.loading import load_model
from lowbit.network.bits import switching_layers
from lowbit.network.insert import quantized_weights
from lowbit.network.record import record_of
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.qat import GivenNetworks, Recipe, TrainRun
from lowbit.quantizers import LearnedScaleQuantizer
from lowbit.quantizers.switchable import SwitchableQuantizer
from lowbit.spec import BitPolicy, LayerBits

WIDTHS = (4, 3, 2)
W = torch.tensor([-5.0, -1.9, -0.6, 0.0, 0.7, 2.2, 3.4, 9.0])  # over a step of 0.5: -10, -3.8, -1.2, 0, 1.4, 4.4, 6.8, 18
CODES = {
    4: [-7, -4, -1, 0, 1, 4, 7, 7],
    3: [-3, -2, 0, 0, 0, 2, 3, 3],
    2: [-1, -1, 0, 0, 0, 1, 1, 1],
}
FLOOR_CODES = {3: [-3, -2, -1, 0, 0, 2, 3, 3], 2: [-1, -1, -1, 0, 0, 1, 1, 1]}  # -3.5 and -1.75 go down to -4 and -2, and are clipped


def mixed_weight(bits: int, widths: tuple[int, ...] = WIDTHS, step: float = 0.5, **options: object) -> MixedWeight:
    quantizer = MixedWeight(widths, **options)  # type: ignore[arg-type]
    with torch.no_grad():
        quantizer.scale.fill_(step)
    quantizer.set_bit_width(bits)
    return quantizer


def prepared(bits: object = WIDTHS, **options: object) -> nn.Module:
    return lowbit.prepare(network(), method="bit_mixer", bits=bits, sample=X, **options)  # type: ignore[arg-type]


def norms_of(model: nn.Module) -> dict[str, SwitchableNorm]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SwitchableNorm)}


def at_phase(model: nn.Module, name: str, epochs: int = 3) -> TrainRun:
    """A run of four steps an epoch that has entered the phases up to the one of this name."""
    run = run_of(model, epochs)
    for run.phase_index in range(1, [phase.name for phase in run.phases].index(name) + 1):  # noqa: B020 - where the run stands
        run.step = 4 * run.phase_index
        run.start_phase()
    return run


def float_network() -> nn.Module:
    """The network, trained in float."""
    model, (images, labels) = network(), data().tensors
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


# Weights


@pytest.mark.parametrize("bits", WIDTHS)
def test_codes_of_fewer_bits_worked_out_by_hand(bits: int) -> None:
    quantizer = mixed_weight(bits)
    assert quantizer.encode(W).codes.tolist() == CODES[bits]
    assert quantizer(W).tolist() == [code * 0.5 * 2 ** (4 - bits) for code in CODES[bits]]


@pytest.mark.parametrize("bits", [3, 2])
def test_floor_drops_the_last_bits_of_negative_codes_downwards(bits: int) -> None:
    assert mixed_weight(bits, rounding="floor").encode(W).codes.tolist() == FLOOR_CODES[bits]
    assert mixed_weight(4, rounding="floor").encode(W).codes.tolist() == CODES[4]


@pytest.mark.parametrize("rounding", ["trunc", "floor"])
def test_codes_say_everything_on_symmetric_grids_and_there_and_back_changes_nothing(rounding: str) -> None:
    quantizer = MixedWeight((8, 6, 4, 3, 2), rounding=rounding)  # type: ignore[arg-type]
    weight = torch.cat([torch.randn(4000), torch.tensor([0.0, 9.0, -9.0])])
    quantizer.initialize(weight)
    first = quantizer(weight)
    for bits in (8, 6, 4, 3, 2, 3, 4, 6, 8):
        quantizer.set_bit_width(bits)
        encoded = quantizer.encode(weight)
        assert torch.equal(encoded.decode(), quantizer(weight)) and encoded.bit_width == bits
        top = 2 ** (bits - 1) - 1
        assert (int(encoded.codes.min()), int(encoded.codes.max())) == (-top, top)
    assert torch.equal(quantizer(weight), first)


def test_gradients_at_two_of_four_bits_worked_out_by_hand() -> None:
    raw = -4 + (-4 + 3.8) + 1.2 + 0 - 1.4 + (4 - 4.4) + (4 - 6.8) + 4  # outside of +-7: the code alone; inside less w / s
    factors = {"highest": 1 / math.sqrt(8 * 7), "current": 4**-2 / math.sqrt(8 * 1)}
    for kind, factor in factors.items():
        quantizer, weight = mixed_weight(2, gradient=kind), W.clone().requires_grad_()
        quantizer(weight).sum().backward()
        assert weight.grad is not None and weight.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0]
        assert quantizer.scale.grad is not None and quantizer.scale.grad.item() == pytest.approx(raw * factor, rel=1e-5)


def test_the_gradient_of_the_current_width_changes_the_step_by_as_much_as_that_of_lsq_at_this_width() -> None:
    """For weights on the coarse grid, where both round alike, the relative changes of ``s`` and of LSQ's ``s 2**(B - b)`` agree."""
    weight = 0.01 * torch.tensor([-192.0, -128.0, -64.0, 0.0, 64.0, 128.0, 250.0])
    for bits, factor in ((8, 1), (2, 64)):
        mixed, plain = mixed_weight(bits, (8, 2), step=0.01), LearnedScaleQuantizer(bits, signed=True)
        with torch.no_grad():
            plain.scale.fill_(0.01 * factor)
        inside = weight[weight.abs() <= plain.qmax * plain.scale.detach()]
        out = torch.linspace(1, 2, len(inside))
        for quantizer in (mixed, plain):
            (quantizer(inside) * out).sum().backward()
        torch.testing.assert_close(mixed(inside), plain(inside))
        changes = [quantizer.scale.grad / quantizer.scale.detach() ** 2 for quantizer in (mixed, plain)]
        shares = [change * quantizer.scale.detach() for change, quantizer in zip(changes, (mixed, plain), strict=True)]
        torch.testing.assert_close(shares[0], shares[1], atol=1e-6, rtol=1e-4)


def test_a_single_width_is_lsq_on_a_symmetric_grid() -> None:
    weight = torch.randn(300).abs() - 0.3
    mixed, plain = MixedWeight((4,), start="lsq"), LearnedScaleQuantizer(4, signed=True)
    found = []
    for quantizer in (mixed, plain):
        quantizer.initialize(weight)
        own = weight.clone().requires_grad_()
        y = quantizer(own)
        (y * torch.linspace(-1, 2, 300)).sum().backward()
        assert quantizer.scale.grad is not None
        found.append((y.detach(), own.grad, quantizer.scale.detach(), quantizer.scale.grad / math.sqrt(300 * 7)))
    assert (weight / found[0][2]).min() >= -7 and (weight / found[0][2]).max() > 7  # -8 is no code of the symmetric grid
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def squared_errors(weight: Tensor, step: float, widths: tuple[int, ...]) -> float:
    """The sum of the squared errors of all widths, in plain numbers."""
    top, total = 2 ** (max(widths) - 1) - 1, 0.0
    for value in weight.tolist():
        whole = max(-top, min(top, round(value / step)))
        for bits in widths:
            factor = 2 ** (max(widths) - bits)
            code = max(-(2 ** (bits - 1)) + 1, min(2 ** (bits - 1) - 1, math.trunc(whole / factor)))
            total += (code * step * factor - value) ** 2
    return total


def test_the_step_starts_where_the_errors_of_all_widths_are_least() -> None:
    weight = torch.randn(400)
    quantizer = MixedWeight((8, 2))
    quantizer.initialize(weight)
    errors = {share: squared_errors(weight, float(weight.abs().max()) * share / 50 / 127, (8, 2)) for share in range(1, 51)}
    best = min(errors, key=errors.__getitem__)
    assert quantizer.scale.item() == pytest.approx(float(weight.abs().max()) * best / 50 / 127, rel=1e-5)
    assert quantizer.bit_width == 8


def test_the_start_of_lsq_leaves_nothing_but_zeros_where_widths_lie_far_apart() -> None:
    weight, found = torch.randn(1000).clamp(-3, 3), {}
    for start in ("lsq", "least_error"):
        quantizer = MixedWeight((8, 2), start=start)  # type: ignore[arg-type]
        quantizer.initialize(weight)
        found[start] = float(quantizer.scale)
        quantizer.set_bit_width(2)
        assert bool((quantizer(weight) == 0).all()) is (start == "lsq")
    assert found["lsq"] == pytest.approx(2 * float(weight.abs().mean()) / math.sqrt(127), rel=1e-5)


@pytest.mark.parametrize("weight", [torch.zeros(4, 3), torch.full((4, 3), 0.25), torch.tensor([[-2.0]])])
def test_weights_that_are_all_equal_stay_finite(weight: Tensor) -> None:
    quantizer = MixedWeight(WIDTHS)
    quantizer.initialize(weight)
    for bits in WIDTHS:
        quantizer.set_bit_width(bits)
        own = weight.clone().requires_grad_()
        y = quantizer(own)
        y.sum().backward()
        assert torch.isfinite(y).all() and own.grad is not None and torch.isfinite(quantizer.scale.grad).all()  # type: ignore[arg-type]
    assert float(quantizer.scale) == 1.0 or bool(weight.any())


# Norms and widths


def test_every_pair_has_a_norm_and_a_side_in_float_has_none_of_its_own() -> None:
    widths = {"a": (4, 2), "b": (4, 2)}
    found = {layers: transitional_norm(nn.BatchNorm1d(3), widths, layers) for layers in (("a", "b"), (None, "b"), ("a", "head"))}
    keys = {layers: list(norm.norms) for layers, norm in found.items() if norm is not None}
    assert keys == {
        ("a", "b"): ["4>4", "4>2", "2>4", "2>2"],
        (None, "b"): ["float>4", "float>2"],
        ("a", "head"): ["4>float", "2>float"],
    }
    assert transitional_norm(nn.BatchNorm1d(3), widths, (None, "head")) is None


@pytest.mark.parametrize(("producer", "expected"), [(0, {"4>2": 4.0, "2>4": 2.0}), (1, {"4>2": 2.0, "2>4": 4.0})])
def test_pairs_of_different_widths_start_from_that_of_the_producer_twice(producer: int, expected: dict[str, float]) -> None:
    norm = transitional_norm(nn.BatchNorm1d(3), {"a": (4, 2), "b": (4, 2)}, ("a", "b"))
    assert norm is not None
    with torch.no_grad():
        for width in (4, 2):
            own = norm.norms[f"{width}>{width}"]
            for tensor in (own.weight, own.bias, own.running_mean, own.running_var):
                tensor.fill_(width)  # type: ignore[operator, union-attr]
    start_from_diagonal(norm, producer)
    for key, value in {**expected, "4>4": 4.0, "2>2": 2.0}.items():
        assert all(own.unique().tolist() == [value] for own in norm.norms[key].state_dict().values() if own.dim())


def test_norms_beside_a_layer_in_float_have_no_diagonal_to_start_from() -> None:
    norm = transitional_norm(nn.BatchNorm1d(2), {"b": (4, 2)}, (None, "b"))
    assert norm is not None
    with torch.no_grad():
        norm.norms["float>2"].weight.fill_(3.0)  # type: ignore[operator, union-attr]
    start_from_diagonal(norm, 0)
    assert [float(own.weight[0]) for own in norm.norms.values()] == [1.0, 3.0]  # type: ignore[index]


def test_a_layer_leaves_the_width_of_the_batch_as_often_as_the_progress_says() -> None:
    u = torch.tensor([0.0, 0.2, 0.5, 0.7, 0.99])
    base = torch.tensor(0.4)  # the second of three

    def drawn(progress: float) -> list[int]:
        return draw_widths([4, 3, 2], torch.tensor(progress), base, u, u.flip(0)).tolist()

    assert drawn(0.0) == [3, 3, 3, 3, 3]
    assert drawn(0.6) == [2, 2, 3, 3, 3]  # the first three redraw, from .99, .7 and .5
    assert drawn(1.0) == [2, 2, 3, 4, 4]
    several = draw_widths([4, 2], torch.tensor([0.0, 1.0]), torch.tensor([0.9, 0.9]), torch.rand(2, 3), torch.zeros(2, 3))
    assert several.tolist() == [[2, 2, 2], [4, 4, 4]]


def test_the_network_has_the_pairs_of_its_layers_and_only_the_selected_one_learns() -> None:
    model = prepared().train()
    assert {name: norm.layers for name, norm in norms_of(model).items()} == {
        "norm1": (None, "conv2"), "norm2": ("conv2", "conv3"), "norm3": ("conv3", None)
    }  # fmt: skip
    lowbit.set_bits(model, {"conv2": 2, "conv3": 4})
    model(X).sum().backward()
    selected = {"norm1": "float>2", "norm2": "2>4", "norm3": "4>float"}
    for name, norm in norms_of(model).items():
        assert norm.key == selected[name]
        assert {key for key, own in norm.norms.items() if int(own.num_batches_tracked)} == {selected[name]}  # type: ignore[arg-type]
        assert {key for key, own in norm.norms.items() if own.weight.grad is not None} == {selected[name]}  # type: ignore[union-attr]


def test_the_norms_may_belong_to_the_two_layers_before_them_or_be_shared() -> None:
    layers = {name: norm.layers for name, norm in norms_of(prepared(pair="previous_producer")).items()}
    assert layers == {"norm2": (None, "conv2"), "norm3": ("conv2", "conv3")}
    shared = prepared(pair="none")
    assert not norms_of(shared)
    lowbit.set_bits(shared, {"conv2": 2})
    assert torch.isfinite(outputs(shared)).all()


def test_one_width_is_a_network_with_ordinary_norms() -> None:
    model = lowbit.prepare(network(), method="bit_mixer", weight_bits=3, activation_bits=3, sample=X)
    assert not norms_of(model)
    assert prepared([3]).state_dict().keys() == model.state_dict().keys()
    assert isinstance(quantized_weights(model)["conv2"].quantizer, MixedWeight)


def test_a_convolution_in_a_shortcut_has_the_bits_and_the_pair_of_the_one_it_goes_around() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 8, 8)
    model = lowbit.prepare(load_model("resnet8", num_classes=4, in_channels=3, width=4), method="bit_mixer", bits=[4, 2], sample=images)
    record = record_of(model)
    assert record is not None
    shortcuts = [name for name, module in model.named_modules() if "downsample" in name and isinstance(module, nn.Conv2d)]
    assert shortcuts and sorted(record.tied) == sorted(shortcuts)
    assert not set(shortcuts) & set(switching_layers(model))
    for shortcut, main in record.tied.items():
        assert main == f"{shortcut.split('.downsample')[0]}.conv2"
        lowbit.set_bits(model, 4)
        lowbit.set_bits(model, {main: 2})
        assert lowbit.get_bits(model)[shortcut] == lowbit.get_bits(model)[main] == LayerBits(2, 2)
        norms = norms_of(model)
        beside = norms[shortcut.removesuffix("0") + "1"]
        behind = norms[main.replace("conv", "norm")]
        assert beside.layers == behind.layers and beside.key == behind.key and beside.key.startswith("2>")
        with pytest.raises(SpecError, match=f"layer '{shortcut}' always has the bits of '{main}'"):
            lowbit.set_bits(model, {main: 2, shortcut: 4})


# Training


def test_the_stages_share_the_epochs_and_weights_join_in_the_second() -> None:
    phases = BitMixer().phases(Recipe(9))
    assert [(phase.name, phase.epochs, phase.span) for phase in phases] == [
        ("activations", 3, (0.0, pytest.approx(1 / 3))),
        ("weights", 3, (pytest.approx(1 / 3), pytest.approx(2 / 3))),
        ("layers", 3, (pytest.approx(2 / 3), 1.0)),
    ]
    assert [{role for role in phase.optimizers if role.startswith("quantizers")} for phase in phases] == [
        {"quantizers.activations"}, {"quantizers"}, {"quantizers"}
    ]  # fmt: skip
    assert [phase.name for phase in BitMixer(activation_share=0, weight_share=0).phases(Recipe(4))] == ["layers"]
    with pytest.raises(SpecError, match="shares of the epochs must be positive"):
        BitMixer(activation_share=0, weight_share=0, layer_share=0).phases(Recipe(4))


def drawn_bits(run: TrainRun, steps: int) -> list[dict[str, int | None]]:
    """The bits that steps of a run draw for weights, and that it is back at the highest ones behind each."""
    found = []
    for _ in range(steps):
        run.before_step()
        run.loss((X, Y)).backward()
        found.append({name: own.weight for name, own in lowbit.get_bits(run.model).items() if name in ("conv2", "conv3")})
        run.after_backward()
        assert lowbit.get_bits(run.model)["conv2"] == LayerBits(4, 4)
    return found


def test_the_first_stage_trains_activations_of_one_random_width_with_weights_in_float() -> None:
    model = prepared()
    run = at_phase(model, "activations")
    twin = copy.deepcopy(model)
    run.before_step()
    (loss,) = run.losses((X, Y))
    loss.backward()
    bits = lowbit.get_bits(model)
    assert bits["conv2"].weight is None and bits["conv2"].activation in WIDTHS and bits["conv2"] == bits["conv3"]
    lowbit.set_bits(twin, bits["conv2"].activation)
    for site in quantized_weights(twin).values():
        site.quantizer.enabled = False  # type: ignore[union-attr]
    assert float(loss) == float(nn.functional.cross_entropy(twin.train()(X), Y))
    assert all(site.quantizer.scale.grad is None for site in quantized_weights(model).values())  # type: ignore[union-attr]
    run.after_backward()
    assert lowbit.get_bits(model)["conv2"] == LayerBits(4, 4)
    activations = [lowbit.get_bits(model)]
    for _ in range(30):
        run.before_step()
        run.loss((X, Y)).backward()
        activations.append(lowbit.get_bits(model))
        run.after_backward()
    assert {own["conv2"].activation for own in activations} == set(WIDTHS)
    for norm in norms_of(model).values():
        assert {key for key, own in norm.norms.items() if int(own.num_batches_tracked)} == {  # type: ignore[arg-type]
            key for key in norm.norms if "float" in key or key[0] == key[-1]
        }


def test_the_second_stage_starts_steps_from_the_weights_as_they_are_and_draws_one_width() -> None:
    model = prepared()
    run = at_phase(model, "activations")
    with torch.no_grad():
        quantized_weights(model)["conv2"].original.mul_(3.0)
    before = float(quantized_weights(model)["conv2"].quantizer.scale)  # type: ignore[union-attr, arg-type]
    run.phase_index, run.step = 1, 4
    run.start_phase()
    assert float(quantized_weights(model)["conv2"].quantizer.scale) == pytest.approx(3 * before, rel=1e-4)  # type: ignore[union-attr, arg-type]
    drawn = drawn_bits(run, 30)
    assert all(own["conv2"] == own["conv3"] for own in drawn) and {own["conv2"] for own in drawn} == set(WIDTHS)


def test_the_third_stage_starts_norms_from_the_diagonal_and_layers_leave_the_width_of_the_batch() -> None:
    model = prepared()
    run = at_phase(model, "weights")
    with torch.no_grad():
        for key, own in norms_of(model)["norm2"].norms.items():
            own.weight.fill_(float(key[0]) if key[0] == key[-1] else 9.0)  # type: ignore[operator, union-attr]
    run.phase_index, run.step = 2, 8
    run.start_phase()
    assert {key: float(own.weight[0]) for key, own in norms_of(model)["norm2"].norms.items()} == {  # type: ignore[index]
        f"{a}>{b}": float(a) for a, b in itertools.product(WIDTHS, WIDTHS)
    }
    assert all(own["conv2"] == own["conv3"] for own in drawn_bits(run, 12))  # no progress yet
    run.step = 12
    drawn = drawn_bits(run, 60)  # every layer for itself
    assert {(own["conv2"], own["conv3"]) for own in drawn} == set(itertools.product(WIDTHS, WIDTHS))


def test_a_teacher_is_added_to_the_labels_or_replaces_them() -> None:
    def loss(**options: object) -> float:
        model = prepared([4, 2], activation_share=0, layer_share=0, **options)
        run = run_of(model, given=GivenNetworks(float_network=network()))
        run.before_step()
        return float(run.loss((X, Y)).detach())

    hard, soft, both = (loss(distillation=kind) for kind in ("none", "replace", "add"))
    assert both == pytest.approx(hard + soft, rel=1e-5) and soft > 0
    assert loss(distillation="replace", temperature=4.0) != pytest.approx(soft)


@pytest.mark.parametrize("options", [{}, {"weight_sharing": "latent", "distillation": "add", "pair": "previous_producer"}])
def test_a_training_that_was_killed_in_any_stage_ends_with_the_same_bits(options: dict[str, object], tmp_path: Path) -> None:
    check_resumes([3, 8, 13], tmp_path, method="bit_mixer", bits="4,3,2", **options)


def test_a_loop_of_ones_own_gives_the_weights_of_the_trainer() -> None:
    in_order = DataLoader(data(), 16, sampler=range(80))
    constant = replace(RECIPE, optimizer=replace(RECIPE.optimizer, schedule="constant"))
    trained = train(network(), method="bit_mixer", bits="4,3,2", recipe=constant, data=in_order, sample=X)
    mine = lowbit.prepare(network(), method="bit_mixer", bits="4,3,2", sample=X).train()
    run = lowbit.training(mine, steps_per_epoch=5, recipe=constant, epochs=3)
    optimizer = torch.optim.SGD(run.parameter_groups(), momentum=constant.optimizer.momentum)
    for _ in range(3):
        for batch in in_order:
            run.before_step(optimizer)
            run.loss(batch).backward()
            run.after_backward()
            optimizer.step()
            run.after_step()
    assert_same(mine, trained)


@pytest.mark.slow
def test_mixed_configurations_differ_and_each_equals_its_file(tmp_path: Path) -> None:
    model = train(network(), method="bit_mixer", bits="4,3,2")
    check_every_width_is_a_plain_network(model, tmp_path)
    found: dict[tuple[int, int], Tensor] = {}
    for place, (second, third) in enumerate(((4, 2), (2, 4), (3, 2), (2, 3))):
        lowbit.set_bits(model, {"conv2": second, "conv3": third})
        found[second, third] = outputs(model)
        path = tmp_path / f"mixed{place}.lowbit"
        lowbit.export(model, path, sample=X)
        torch.testing.assert_close(outputs(lowbit.load(path)), found[second, third], rtol=1e-5, atol=1e-5)
    assert not any(torch.allclose(one, other) for one, other in itertools.combinations(found.values(), 2))
    lowbit.set_bits(model, {"conv2": 4, "conv3": 2})
    assert torch.equal(outputs(model), found[4, 2])


def test_codes_of_fewer_bits_are_those_of_more_without_their_last_bits() -> None:
    model, codes = train(network(), method="bit_mixer", bits="8,4,2"), {}
    for width in (8, 4, 2):
        lowbit.set_bits(model, width)
        codes[width] = weight_codes(model, "conv2")
    assert torch.equal(codes[4], (codes[8] / 16).trunc().int()) and torch.equal(codes[2], (codes[8] / 64).trunc().int())
    assert codes[2].any()


def test_every_width_has_a_step_of_its_own_on_latent_weights() -> None:
    model = prepared(weight_sharing="latent")
    quantizer = quantized_weights(model)["conv2"].quantizer
    assert isinstance(quantizer, SwitchableQuantizer) and list(quantizer.at) == ["4", "3", "2"]
    lowbit.set_bits(model, 3)
    model.train()(X).sum().backward()
    assert [part.scale.grad is not None for part in quantizer.at.values()] == [False, True, False]  # type: ignore[union-attr]


def test_every_mixture_learns_and_norms_of_other_widths_spoil_it() -> None:
    recipe = Recipe(18, 16, lowbit.OptimizerSpec(learning_rate=0.02))
    model = train(float_network(), method="bit_mixer", bits="8,4,2", recipe=recipe)
    images, labels = data(200, 5).tensors

    def measured() -> tuple[float, float]:
        with torch.no_grad():
            logits = model.eval()(images)
        return float((logits.argmax(1) == labels).float().mean()), float(nn.functional.cross_entropy(logits, labels))

    for second, third in itertools.product((8, 4, 2), repeat=2):
        lowbit.set_bits(model, {"conv2": second, "conv3": third})
        accuracy, loss = measured()
        assert accuracy > 0.9, (second, third)
    for name, norm in norms_of(model).items():
        norm.select({"norm1": "float>8", "norm2": "8>8", "norm3": "8>float"}[name])
    assert measured()[1] > 1.5 * loss  # the last mixture, 2 and 2


# Selection


def test_the_layer_whose_lowering_costs_least_is_lowered_first() -> None:
    model = prepared([4, 3, 2])
    harm = {"conv2": {4: 0.0, 3: 0.3, 2: 0.5}, "conv3": {4: 0.0, 3: 0.1, 2: 0.9}}

    def accuracy(candidate: nn.Module) -> float:
        bits = lowbit.get_bits(candidate)
        return 1 - sum(loss[bits[name].weight] for name, loss in harm.items())  # type: ignore[index]

    path = lowbit.select_bits(model, accuracy, budget_average_bits=2.5)
    assert path.trace == ((4, 4), (4, 3), (3, 3), (2, 3)) and path.costs == (4.0, 3.5, 3.0, 2.5)
    assert path.accuracies == pytest.approx((1.0, 0.9, 0.6, 0.4))
    assert [lowbit.get_bits(model)[name] for name in ("conv2", "conv3")] == [LayerBits(2, 2), LayerBits(3, 3)]
    assert norms_of(model)["norm2"].key == "2>3"


def test_a_budget_of_operations_counts_multiplications_times_bits_of_both() -> None:
    model = prepared([4, 2])
    macs = 6 * 6 * 6 * 6 * 9  # of each of the two layers: 6 to 6 channels, 36 places, kernels of 9
    path = lowbit.select_bits(model, lambda _: 1.0, budget_bit_operations=macs * 20, sample=X)
    assert path.costs == (macs * 32, macs * 20) and path.trace[0] == (4, 4) and sorted(path.bits) == [2, 4]


def test_a_budget_that_no_network_fits_is_refused() -> None:
    model = prepared([4, 2])
    before = lowbit.get_bits(model)
    with pytest.raises(SpecError, match=r"the budget is 1\.5, and all layers at 2 bits cost 2"):
        lowbit.select_bits(model, lambda _: 1.0, budget_average_bits=1.5)
    with pytest.raises(SpecError, match="give either"):
        lowbit.select_bits(model, lambda _: 1.0)
    with pytest.raises(SpecError, match="needs sample="):
        lowbit.select_bits(model, lambda _: 1.0, budget_bit_operations=1e9)
    with pytest.raises(SpecError, match="does not mix widths"):
        lowbit.select_bits(lowbit.prepare(network(), method="adabits", bits=[4, 2], sample=X), lambda _: 1.0, budget_average_bits=3)
    assert lowbit.get_bits(model) == before


# What is refused


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(SpecError, match="bit_mixer has weight bits 2, 3, 4, 5, 6, 7, 8, got 1/1"):
        prepared([4, 1])
    with pytest.raises(SpecError, match="mixes widths by those of their weights, which have to differ and cannot be in float"):
        prepared("4/4,4/2")
    with pytest.raises(SpecError, match="which have to differ and cannot be in float"):
        prepared("32/32,4/4")
    with pytest.raises(LayerError, match="has no batch norm"):
        lowbit.prepare(nn.Sequential(nn.Flatten(), nn.Linear(72, 8), nn.Linear(8, 3)), method="bit_mixer", bits=[4, 2], sample=X)
    with pytest.raises(SpecError, match="step_start must be one of"):
        prepared(step_start="zero")
    with pytest.raises(SpecError, match="temperature must be above 0"):
        prepared(temperature=0)


@pytest.mark.parametrize(
    ("bits", "message"),
    [
        (3, "was trained for the widths 4/4, 2/2, got 3"), ({"conv2": 3}, "was trained for the widths 4/4, 2/2, got 3"),
        ({"conv1": 4}, "layer 'conv1'"), ({"convolution": 4}, "no layer matches"), (BitPolicy.uniform(2, 2), "Give a mapping of patterns"),
    ],
)  # fmt: skip
def test_bits_that_a_layer_does_not_have_are_refused_and_change_nothing(bits: object, message: str) -> None:
    model = prepared([4, 2])
    before = outputs(model)
    with pytest.raises(SpecError, match=message):
        lowbit.set_bits(model, bits)  # type: ignore[arg-type]
    assert torch.equal(outputs(model), before)
