"""Quantization Networks in the course of training: temperatures, the clip before the chain rule, phases; and its tables of levels."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.gradients.quantization_networks import QuantizationNetworks, StairsQuantizer, cluster_biases, target_values
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.quantizers.ops import mark_codebook

W = 0.3 * torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
X, LABELS = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 4


def ready(weight_bits: int | None = 2, activation_bits: int | None = 2, epochs: int = 6, steps: int = 2, **options: object) -> TrainRun:
    torch.manual_seed(0)
    model = lowbit.prepare(
        TinyNet(),
        method="quantization_networks",
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        sample=X,
        **options,  # type: ignore[arg-type]
    ).train()
    recipe = Recipe(epochs, optimizer=OptimizerSpec(learning_rate=0.02))
    return TrainRun(model, method_of(model), Classification(), recipe, steps)


def backward(run: TrainRun) -> None:
    run.before_step()
    run.loss((X, LABELS)).backward()
    run.after_backward()


def step(run: TrainRun) -> None:
    backward(run)
    run.optimizer_step()
    run.after_step()


def stairs_of(run: TrainRun) -> list[StairsQuantizer]:
    return [module for module in run.model.modules() if isinstance(module, StairsQuantizer)]


@pytest.mark.parametrize("values", [(-1, 1), (-1, 0, 1), (0, 1, 2, 3), (-4, -2, -1, 0, 1, 2, 4), tuple(range(-127, 128))], ids=len)
def test_codes_decode_to_the_values_of_evaluation(values: tuple[int, ...]) -> None:
    bit_width = max(math.ceil(math.log2(len(values))), 1)
    quantizer = StairsQuantizer(bit_width, values, is_centred=values[0] < 0).eval()
    quantizer.initialize(W)
    y, encoded = quantizer(W), quantizer.encode(W)
    assert torch.equal(encoded.decode(), y) and int(encoded.codes.max()) < len(values)
    expected = torch.tensor(values, dtype=torch.float32) * quantizer.output_scale.detach()
    assert bool(torch.isin(y.unique(), expected).all())
    hard = sum((quantizer.input_scale * W > bias).float() * gap for gap, bias in zip(quantizer.gaps, quantizer.biases, strict=True))
    torch.testing.assert_close(y, quantizer.output_scale.detach() * (hard - quantizer.offset))


def test_an_exported_activation_is_one_marker_with_the_arithmetic_of_evaluation() -> None:
    quantizer = StairsQuantizer(2, (0, 1, 2, 3), is_centred=False, is_weight=False).eval()
    quantizer.initialize(W.abs())
    program = torch.export.export(quantizer, (W,))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("fake_quantize_codebook" in call for call in calls) == 1
    assert torch.equal(program.module()(W), quantizer(W))
    assert torch.equal(mark_codebook(W, *quantizer._table()), quantizer(W))


def test_scales_start_so_that_the_largest_value_reaches_five_quarters_of_the_last_level() -> None:
    quantizer = StairsQuantizer(3, target_values(3, "powers"), is_centred=True)
    quantizer.initialize(W)
    torch.testing.assert_close(quantizer.input_scale.detach(), 1.25 * 4 / W.abs().max())
    torch.testing.assert_close(quantizer.output_scale.detach(), 1 / quantizer.input_scale.detach())


@pytest.mark.parametrize(
    "bit_width, values, is_centred, expected",
    [(1, (-1, 1), True, [0.0]), (1, (0, 1), False, [0.05]), (2, (-1, 0, 1), True, [-0.05, 0.05])],
)
def test_binary_and_ternary_steps_lie_where_the_paper_puts_them(
    bit_width: int, values: tuple[int, ...], is_centred: bool, expected: list[float]
) -> None:
    quantizer = StairsQuantizer(bit_width, values, is_centred=is_centred)
    quantizer.initialize(W)
    torch.testing.assert_close(quantizer.biases, torch.tensor(expected))


def test_a_tight_zero_moves_only_the_two_steps_beside_it() -> None:
    values = target_values(3, "uniform")
    loose, tight = (StairsQuantizer(3, values, is_centred=True, is_tight=is_tight) for is_tight in (False, True))
    for quantizer in (loose, tight):
        quantizer.initialize(W)
    assert tight.biases[2:4].tolist() == pytest.approx([-0.05, 0.05])
    assert torch.equal(tight.biases[[0, 1, 4, 5]], loose.biases[[0, 1, 4, 5]])
    skewed = StairsQuantizer(3, values, is_centred=True, is_tight=True)
    skewed.initialize(W.abs() + 1)  # all clusters lie above zero
    assert bool((skewed.biases.diff() >= 0).all())


@pytest.mark.parametrize("bit_width", [1, 2, 3, 8])
@pytest.mark.parametrize("weight", [torch.zeros(3, 4), torch.full((3, 4), 0.25), torch.tensor([[-3.0]])], ids=["zero", "constant", "one"])
def test_weights_without_spread_give_finite_values_and_gradients(bit_width: int, weight: Tensor) -> None:
    quantizer = StairsQuantizer(bit_width, target_values(bit_width, "uniform"), is_centred=True)
    quantizer.initialize(weight)
    assert bool((quantizer.biases.diff() >= 0).all())
    y = quantizer.eval()(weight)
    assert torch.isfinite(y).all() and torch.equal(quantizer.encode(weight).decode(), y)
    x = weight.clone().requires_grad_()
    quantizer.train()(x).sum().backward()
    for gradient in (x.grad, quantizer.output_scale.grad, quantizer.input_scale.grad):
        assert gradient is not None and torch.isfinite(gradient).all()


def test_clusters_of_a_large_tensor_are_found_from_an_even_sample() -> None:
    values = torch.cat([torch.full((50_000,), -2.0), torch.zeros(60_000), torch.full((50_000,), 3.0)])
    noise = 0.1 * torch.rand(len(values), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cluster_biases(values + noise, 3), torch.tensor([-0.95, 1.55]), atol=0.01, rtol=0)


def test_the_derivative_of_binary_activations_can_be_taken_wholly_at_temperature_one() -> None:
    quantizer = StairsQuantizer(1, (0, 1), is_centred=False, unit_backward=True, is_weight=False)
    quantizer.set_scales(torch.tensor(0.5), torch.tensor(2.0))
    quantizer.set_biases(torch.tensor([0.05]))
    quantizer.temperature.fill_(40.0)
    x = torch.tensor([0.3], requires_grad=True)
    quantizer(x).sum().backward()
    sigmoid = 1 / (1 + math.exp(-(0.6 - 0.05)))
    assert x.grad is not None and x.grad.item() == pytest.approx(sigmoid * (1 - sigmoid), rel=1e-5)


def test_activation_temperatures_are_not_capped() -> None:
    quantizer = StairsQuantizer(1, (0, 1), is_centred=False, is_weight=False)
    quantizer.temperature.fill_(9000.0)
    assert quantizer.soft_temperature == 9000.0


def test_training_without_gradients_is_hard() -> None:
    quantizer = StairsQuantizer(2, (-1, 0, 1), is_centred=True).train()
    quantizer.initialize(W)
    with torch.no_grad():
        assert torch.equal(quantizer(W), quantizer.encode(W).decode())
    assert not torch.allclose(quantizer(W), quantizer.encode(W).decode())


def test_bfloat16_weights_are_computed_in_float32() -> None:
    quantizer = StairsQuantizer(2, (-1, 0, 1), is_centred=True).eval()
    quantizer.initialize(W)
    y = quantizer(W.bfloat16())
    assert y.dtype == torch.bfloat16 and torch.equal(y, quantizer(W.bfloat16().float()).bfloat16())


def test_inputs_that_can_be_negative_get_centred_values() -> None:
    layer, method = nn.Linear(3, 3), QuantizationNetworks()
    for bit_width, values in ((1, (-1, 1)), (2, (-1, 0, 1)), (3, tuple(range(-3, 4)))):
        signed, unsigned = (method.activation_quantizer(Slot("fc", layer, bit_width, flag, "inner")) for flag in (True, False))
        assert isinstance(signed, StairsQuantizer) and isinstance(unsigned, StairsQuantizer)
        assert signed.values == values and signed.is_centred
        assert unsigned.values == tuple(range(2**bit_width)) and not unsigned.is_centred


def test_the_temperature_rises_by_equal_factors_from_the_first_to_the_last() -> None:
    run = ready(epochs=4, steps=5, first_temperature=2.0, final_temperature=32.0)
    run.start_phase()
    found = []
    for run.step in (0, 5, 10, 20):
        run.before_step()
        found.append({float(quantizer.temperature) for quantizer in stairs_of(run)})
    assert [len(one) for one in found] == [1] * 4
    assert [one.pop() for one in found] == pytest.approx([2.0, 4.0, 8.0, 32.0])


def test_the_gradient_is_clipped_at_the_soft_values_and_what_lies_behind_shrinks_by_the_same_factor() -> None:
    free, clipped = ready(2, None, soft_clip_norm=None), ready(2, None, soft_clip_norm=1e-3)
    soft: dict[str, Tensor] = {}
    for run in (free, clipped):
        run.start_phase()
        run.start_epoch()
    free.before_step()
    loss = free.loss((X, LABELS))
    layers = {name: free.model.get_submodule(name) for name in ("conv1", "conv2")}
    loss.backward()
    for name, layer in layers.items():
        quantizer = insert.weight_quantizer(layer)
        assert isinstance(quantizer, StairsQuantizer) and quantizer.soft_gradient is not None
        soft[name] = quantizer.soft_gradient
    others = [
        parameter.grad
        for name, parameter in free.model.named_parameters()
        if parameter.grad is not None and not name.startswith(("conv1.", "conv2."))
    ]
    assert len(others) == sum(not name.startswith(("conv1.", "conv2.")) for name, _ in free.model.named_parameters())
    norm = torch.stack([gradient.square().sum() for gradient in [*soft.values(), *others]]).sum().sqrt()
    backward(clipped)
    factor = 1e-3 / norm
    assert factor < 0.1
    for (name, one), other in zip(clipped.model.named_parameters(), free.model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad * factor, rtol=1e-3, atol=1e-9, msg=name)


def test_a_small_gradient_is_left_alone() -> None:
    free, clipped = ready(soft_clip_norm=None), ready(soft_clip_norm=1e6)
    for run in (free, clipped):
        run.start_phase()
        run.start_epoch()
        backward(run)
    for one, other in zip(clipped.model.parameters(), free.model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None and torch.equal(one.grad, other.grad)


def test_the_soft_gradients_of_several_backward_passes_count_as_one() -> None:
    quantizer = StairsQuantizer(2, (-1, 0, 1), is_centred=True).train()
    quantizer.initialize(W)
    for factor in (1.0, 2.0):
        x = W.clone().requires_grad_()
        quantizer(x).backward(torch.full_like(W, factor))
    assert quantizer.soft_gradient is not None and torch.equal(quantizer.soft_gradient, torch.full_like(W, 3.0))


def test_all_processes_clip_by_the_mean_of_their_squared_norms() -> None:
    plain, shared = ready(soft_clip_norm=1e-3), ready(soft_clip_norm=1e-3)
    shared.reduce_mean = lambda total: total.mul_(4.0)  # as if the others had larger ones
    for run in (plain, shared):
        run.start_phase()
        run.start_epoch()
        backward(run)
    for one, other in zip(shared.model.parameters(), plain.model.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        torch.testing.assert_close(one.grad, other.grad / 2, rtol=1e-3, atol=1e-10)


def test_no_gradient_is_kept_between_steps() -> None:
    run = ready()
    run.start_phase()
    run.start_epoch()
    step(run)
    assert all(quantizer.soft_gradient is None for quantizer in stairs_of(run))
    copy.deepcopy(run.model)


def test_there_is_one_phase_unless_three_are_asked_for_and_both_sides_are_quantized() -> None:
    assert [phase.name for phase in ready().phases] == ["train"]
    for one_side in ((2, None), (None, 2)):
        if one_side[0] is not None:
            assert [phase.name for phase in ready(*one_side, staged=True).phases] == ["train"]
    phases = ready(epochs=8, staged=True).phases
    assert [(phase.name, phase.epochs) for phase in phases] == [("weights", 2), ("activations", 2), ("both", 4)]
    assert [phase.name for phase in ready(epochs=2, staged=True).phases] == ["train"]


def test_the_three_phases_train_weights_then_activations_then_both() -> None:
    run = ready(epochs=3, steps=2, staged=True, quantizer_learning_rate=1.0)
    weights, activations = ([q for q in stairs_of(run) if q.is_weight == flag] for flag in (True, False))
    conv = run.model.conv1
    moved: dict[str, tuple[bool, bool, bool]] = {}
    modes: dict[str, tuple[set[str], set[str]]] = {}
    temperatures: dict[str, float] = {}
    for _ in run.each_epoch():
        parameters = (insert.float_weight(conv), weights[0].input_scale, activations[0].input_scale)  # type: ignore[arg-type]
        before = [parameter.detach().clone() for parameter in parameters]
        step(run)
        temperatures[run.phase.name] = float(weights[0].temperature)
        step(run)
        moved[run.phase.name] = tuple(not torch.equal(a, b) for a, b in zip(parameters, before, strict=True))  # type: ignore[assignment]
        modes[run.phase.name] = ({q.mode for q in weights}, {q.mode for q in activations})
    assert moved == {"weights": (True, True, False), "activations": (False, False, True), "both": (True, True, True)}
    assert modes == {"weights": ({"soft"}, {"float"}), "activations": ({"hard"}, {"soft"}), "both": ({"soft"}, {"soft"})}
    assert set(temperatures.values()) == {10.0}  # each phase begins anew


def test_the_last_phase_moves_all_but_activation_scales_slowly() -> None:
    phases = ready(staged=True, joint_learning_rate=0.25).phases
    rates = [{role: spec.learning_rate for role, spec in phase.optimizers.items()} for phase in phases]
    assert rates[2]["activation_scales"] == rates[1]["activation_scales"]
    for role in ("weights", "others", "weight_scales"):
        assert rates[2][role] == pytest.approx(rates[0][role] / 4)


def test_hard_weights_and_float_activations_are_those_of_the_mode() -> None:
    quantizer = StairsQuantizer(2, (-1, 0, 1), is_centred=True).train()
    quantizer.initialize(W)
    x = W.clone().requires_grad_()
    quantizer.mode = "hard"
    assert torch.equal(quantizer(x), quantizer.encode(x).decode()) and not quantizer(x).requires_grad
    quantizer.mode = "float"
    assert quantizer(x) is x
    assert torch.equal(quantizer.eval()(x), quantizer.encode(x).decode())  # evaluation is always hard


def test_scales_stay_positive() -> None:
    quantizer = StairsQuantizer(2, (-1, 0, 1), is_centred=True)
    quantizer.set_scales(torch.tensor(-0.5), torch.tensor(0.0))
    quantizer.project()
    assert float(quantizer.output_scale) > 0 and float(quantizer.input_scale) > 0


@pytest.mark.parametrize("name", ["temperature", "first_temperature", "final_temperature", "soft_clip_norm"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan])
def test_temperatures_and_the_clip_must_be_positive(name: str, value: float) -> None:
    with pytest.raises(SpecError, match=f"quantization_networks: {name} must be above 0"):
        QuantizationNetworks(**{name: value})  # type: ignore[arg-type]
