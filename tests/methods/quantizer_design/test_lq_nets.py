from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.methods.quantizer_design.lq_nets import (
    LearnedBasis,
    LqNets,
    binary_codes,
    initial_activation_basis,
    initial_weight_basis,
)
from lowbit.network import insert
from lowbit.qat import Classification, OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.quantizers.qtensor import CodebookDecoder
from lowbit.spec import Granularity


def at(*basis: float, signed: bool = False, **options: object) -> LearnedBasis:
    q = LearnedBasis(len(basis), signed=signed, **options)  # type: ignore[arg-type]
    q.set_basis(torch.tensor([basis]))
    return q


def error(q: LearnedBasis, x: Tensor) -> float:
    return float((q.encode(x).decode().double() - x.double()).square().sum())


def run_with(model: nn.Module, reduce_mean: Callable[[Tensor], None] = lambda _: None) -> TrainRun:
    recipe = Recipe(epochs=1, optimizer=OptimizerSpec(learning_rate=0.01))
    run = TrainRun(model, method_of(model), Classification(), recipe, 4, reduce_mean=reduce_mean)
    run.start_phase()
    return run


# Levels


def test_codes_count_upwards_with_the_first_bit_changing_fastest() -> None:
    assert binary_codes(2, signed=False).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert binary_codes(2, signed=True).tolist() == [[-1, -1], [1, -1], [-1, 1], [1, 1]]


def test_levels_are_all_sums_of_the_basis_in_order_whatever_its_order_and_signs() -> None:
    assert at(1.0, 2.5).levels()[0].tolist() == [[0, 1, 2.5, 3.5]]
    levels, codes = at(2.5, -1.0).levels()
    assert levels.tolist() == [[-1, 0, 1.5, 2.5]]
    assert codes.tolist() == [[[0, 1], [0, 0], [1, 1], [1, 0]]]
    assert at(0.5, 2.0, signed=True).levels()[0].tolist() == [[-2.5, -1.5, 1.5, 2.5]]


def test_values_go_to_the_nearest_level_and_the_lower_one_midway() -> None:
    x = torch.tensor([-9.0, 0.0, 0.5, 0.50001, 1.75, 1.76, 3.0, 3.01, 99.0])
    assert at(1.0, 2.5)(x).tolist() == [0, 0, 0, 1, 1, 2.5, 2.5, 3.5, 3.5]


def test_a_basis_of_powers_of_two_is_a_uniform_quantizer() -> None:
    x = torch.rand(500, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(at(0.5, 1.0, 2.0)(x), (x / 0.5).round().clamp(0, 7) * 0.5)


def test_each_channel_has_its_own_basis() -> None:
    q = LearnedBasis(1, signed=True, granularity=Granularity.channel(1))
    q.set_basis(torch.tensor([[1.0], [10.0]]))
    assert q(torch.tensor([[3.0, 3.0], [-3.0, -0.1]])).tolist() == [[1, 10], [-1, -10]]


# Gradients


def test_activations_above_the_top_level_get_no_gradient_and_those_below_zero_do() -> None:
    x = torch.tensor([-5.0, 0.2, 3.5, 3.6], requires_grad=True)
    at(1.0, 2.5, clips_gradient=True)(x).backward(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert x.grad is not None and x.grad.tolist() == [1, 2, 3, 0]


def test_signed_activations_lose_their_gradient_beyond_both_ends() -> None:
    x = torch.tensor([-2.6, -2.5, 0.0, 2.5, 2.6], requires_grad=True)
    at(0.5, 2.0, signed=True, clips_gradient=True)(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 0]


def test_weights_get_the_whole_gradient_and_the_basis_none() -> None:
    weight = (torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0)) * 100).requires_grad_()
    q = LqNets().weight_quantizer(Slot("layer", nn.Conv2d(3, 4, 3), 2, True, "inner"))
    assert isinstance(q, LearnedBasis)
    q.set_basis(torch.ones(4, 2))
    upstream = torch.randn_like(weight)
    q(weight).backward(upstream)
    assert weight.grad is not None and torch.equal(weight.grad, upstream)
    assert not list(q.parameters())


# The least squares


def test_the_new_basis_is_the_least_squares_solution_for_the_present_codes() -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(1)).relu() * 2
    q = at(0.7, 1.1, 2.0)
    codes = binary_codes(3, signed=False)
    nearest = ((codes @ q.basis[0]) - x[:, None]).abs().argmin(1)
    expected = torch.linalg.lstsq(codes[nearest].double(), x[:, None].double()).solution[:, 0]
    q.pull = 0.0
    torch.testing.assert_close(q.solve(*q.statistics(x[None]))[0], expected.float())


def test_the_pull_of_activations_does_not_show_where_every_bit_varies() -> None:
    x = torch.randn(1, 300, generator=torch.Generator().manual_seed(1)).relu()
    q = LqNets().activation_quantizer(Slot("layer", nn.Linear(2, 2), 2, False, "inner"))
    assert isinstance(q, LearnedBasis)
    q.set_basis(torch.tensor([[0.5, 1.0]]))
    pulled = q.solve(*q.statistics(x))
    q.pull = 0.0
    torch.testing.assert_close(pulled, q.solve(*q.statistics(x)), rtol=1e-6, atol=0)


def test_one_bit_weights_get_the_mean_magnitude_of_each_channel() -> None:
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    q = LearnedBasis(1, signed=True, granularity=Granularity.channel())
    q.set_basis(torch.full((3, 1), 0.3))
    torch.testing.assert_close(q.solve(*q.statistics(rows)), rows.abs().mean(1, keepdim=True), rtol=1e-4, atol=0)


def test_one_bit_activations_get_the_mean_of_what_lies_above_half_the_level() -> None:
    x = torch.tensor([[0.0, 0.1, 0.4, 0.5, 0.6, 0.9, 3.0]])
    q = at(1.0, pull=0.0)
    assert q.solve(*q.statistics(x)).item() == pytest.approx((0.6 + 0.9 + 3.0) / 3)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bit_width", [1, 2, 3, 4])
def test_no_step_on_the_same_data_increases_the_squared_error(signed: bool, bit_width: int) -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(bit_width))
    x = x if signed else x.relu()
    q = LearnedBasis(bit_width, signed=signed, pull=0.0)
    q.set_basis(4 * initial_activation_basis(bit_width)[None])  # far off
    errors = [error(q, x)]
    for _ in range(100):
        q._set_table("basis", q.solve(*q.statistics(x[None])))
        errors.append(error(q, x))
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(errors))
    assert errors[-1] < 0.9 * errors[0] and errors[-1] > 0.999 * errors[-2]


def test_a_solution_scales_with_the_data() -> None:
    x = torch.randn(1, 400, generator=torch.Generator().manual_seed(3)).relu()
    one, five = at(0.4, 0.9), at(2.0, 4.5)
    torch.testing.assert_close(five(5 * x), 5 * one(x))
    torch.testing.assert_close(five.solve(*five.statistics(5 * x)), 5 * one.solve(*one.statistics(x)), rtol=1e-4, atol=0)


def test_bits_that_never_vary_keep_their_number() -> None:
    q = at(0.5, 1.0, pull=1e-9, pull_by_element=True)
    small = q.solve(*q.statistics(torch.tensor([[0.0, 0.4, 0.6, 0.6]])))  # the second bit is 0 throughout
    assert small.tolist()[0] == pytest.approx([1.6 / 3, 1.0])
    assert q.solve(*q.statistics(torch.zeros(1, 9))).tolist() == [[0.5, 1.0]]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_values_that_are_not_finite_leave_the_basis_of_their_channel_as_it_is(wrong: float) -> None:
    rows = torch.tensor([[wrong, 1.0, 2.0], [1.0, 2.0, -3.0]])
    q = LearnedBasis(1, signed=True, granularity=Granularity.channel())
    q.set_basis(torch.tensor([[0.5], [0.5]]))
    new = q.solve(*q.statistics(rows))
    assert new[0].item() == 0.5 and new[1].item() == pytest.approx(2.0, rel=1e-3)


# The moving average


def test_the_first_corrected_update_is_the_new_basis_itself_and_later_ones_a_weighted_mean() -> None:
    q, v = at(9.0, momentum=0.9), [1.0, 3.0, 2.0]
    seen = []
    for value in v:
        q.average(torch.tensor([[value]]))
        seen.append(q.basis.item())
    weights = [0.9**2, 0.9, 1.0]
    assert seen[0] == pytest.approx(1.0)
    assert seen[1] == pytest.approx((0.9 * v[0] + v[1]) / 1.9)
    assert seen[2] == pytest.approx(sum(w * value for w, value in zip(weights, v, strict=True)) / sum(weights))


def test_the_plain_average_starts_from_the_initial_basis() -> None:
    q = at(9.0, momentum=0.9, zero_debias=False)
    q.average(torch.tensor([[1.0]]))
    assert q.basis.item() == pytest.approx(0.9 * 9 + 0.1 * 1)


# Training and evaluation


def test_outputs_come_from_the_basis_before_the_update_and_evaluation_changes_nothing() -> None:
    x = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 3
    q = at(1.0, 1.5)
    before = copy.deepcopy(q.state_dict())
    q.eval()
    q(x)
    q.update()
    q.train()
    with torch.no_grad():
        q(x)
    q.update()
    assert all(torch.equal(value, before[name]) for name, value in q.state_dict().items())
    expected = q.solve(*q.statistics(x[None]))
    assert set(q(x).tolist()) <= {0.0, 1.0, 1.5, 2.5}
    q.update()
    torch.testing.assert_close(q.basis, expected)
    q.update()  # nothing was seen since
    torch.testing.assert_close(q.basis, expected)
    assert q.updates.item() == 1


def test_several_passes_before_an_update_count_together() -> None:
    x = torch.rand(64, generator=torch.Generator().manual_seed(0)) * 3
    whole, parts = at(1.0, 1.5), at(1.0, 1.5)
    whole(x), parts(x[:20]), parts(x[20:])
    whole.update(), parts.update()
    torch.testing.assert_close(parts.basis, whole.basis)


def test_processes_fit_one_basis_together_and_one_whose_layer_rested_takes_part() -> None:
    model = lowbit.prepare(TinyNet(), method="lq_nets", weight_bits=2, activation_bits=2, sample=torch.randn(4, 3, 8, 8))
    reduced: list[Tensor] = []
    run = run_with(model, reduced.append)
    x = torch.rand(200, generator=torch.Generator().manual_seed(0)) * 3
    halves, whole = (at(1.0, 1.5), at(1.0, 1.5)), at(1.0, 1.5)
    whole(x)
    whole.update()
    for q, part in zip(halves, x.split(100), strict=True):
        q(part)
        q.update(run)
    mean = [(a + b) / 2 for a, b in zip(reduced[:2], reduced[2:4], strict=True)]
    resting = at(1.0, 1.5)
    answers = iter(mean)
    run.reduce_mean = lambda tensor: tensor.copy_(next(answers))  # type: ignore[assignment, return-value]
    resting.update(run)
    torch.testing.assert_close(resting.basis, whole.basis)


def test_autocast_trains_on_the_very_levels_that_are_stored() -> None:
    x = torch.randn(300, generator=torch.Generator().manual_seed(0)).relu()
    q = at(0.3337, 0.7771, 1.1113)
    with torch.autocast("cpu", torch.bfloat16):
        y = q(x)
    assert torch.equal(y, q.encode(x).decode()) and q.levels()[0].dtype == torch.float32


# Starting


def test_the_papers_start_is_fixed_by_the_shape() -> None:
    assert initial_activation_basis(2).tolist() == pytest.approx([0.6745 * 2 / 3, 0.6745 * 4 / 3])
    assert initial_weight_basis(2, 8, 3)[:, 0].tolist() == pytest.approx([0.6745 * 0.5 / 2, 0.6745 * 0.5])
    method = LqNets(start="paper")
    for layer in (nn.Conv2d(6, 4, 3, groups=2), nn.ConvTranspose2d(3, 4, 3), nn.Linear(5, 4)):
        q = method.weight_quantizer(Slot("layer", layer, 2, True, "inner"))
        assert isinstance(q, LearnedBasis)
        q.initialize(layer.weight)
        fan_out = 4 if isinstance(layer, nn.Linear) else 36
        torch.testing.assert_close(q.basis, initial_weight_basis(2, fan_out, 4).T)


def test_starting_at_the_data_has_less_error_than_a_uniform_grid_of_the_same_mean() -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for signed, values in ((True, x), (False, x.relu() * 7)):
        q = LearnedBasis(2, signed=signed)
        q.initialize(values)
        uniform = LearnedBasis(2, signed=signed)
        best = min(
            (0.1 * k for k in range(1, 60)), key=lambda s: (uniform.set_basis(torch.tensor([[s, 2 * s]])), error(uniform, values))[1]
        )
        uniform.set_basis(torch.tensor([[best, 2 * best]]))
        assert error(q, values) <= error(uniform, values) * 1.01


# The law, and awkward tensors


@pytest.mark.parametrize("bit_width", [1, 2, 4, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_codes_decode_to_the_forward_pass_on_at_most_two_to_the_b_levels(bit_width: int, signed: bool) -> None:
    q = LearnedBasis(bit_width, signed=signed)
    x = torch.cat([torch.randn(5000, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, -1e30, 1e30])])
    x = x if signed else x.relu()
    q.initialize(x)
    q.eval()
    encoded = q.encode(x)
    assert isinstance(encoded.decoder, CodebookDecoder) and encoded.decoder.levels.shape == (1, 2**bit_width)
    assert torch.equal(encoded.decode(), q(x)) and torch.equal(q(x), q.train()(x.requires_grad_()))
    assert q(x).unique().numel() <= 2**bit_width


def test_bit_plane_products_give_the_float_product() -> None:
    generator = torch.Generator().manual_seed(0)
    w, a = torch.randn(1, 40, generator=generator), torch.randn(1, 40, generator=generator).relu()
    weights, activations = at(0.4, 0.9, signed=True), at(0.3, 0.7, 1.2)
    planes = []
    for q, x in ((weights, w), (activations, a)):
        planes.append(q.levels()[1][0][q.encode(x).codes[0].long()])  # [elements, bits]
    products = planes[0].T @ planes[1]
    torch.testing.assert_close(weights.basis[0] @ products @ activations.basis[0], (weights(w) * activations(a)).sum())


@pytest.mark.parametrize(
    "weight", [torch.zeros(3, 2, 3, 3), torch.full((3, 2, 3, 3), 0.1), torch.ones(1, 1, 1, 1)], ids=["0", "0.1", "one"]
)
@pytest.mark.parametrize("bit_width", [1, 2, 8])
def test_zero_and_constant_weights_come_out_as_they_are(weight: Tensor, bit_width: int) -> None:
    q = LearnedBasis(bit_width, signed=True, granularity=Granularity.channel())
    q.initialize(weight)
    for _ in range(3):
        q(weight.requires_grad_()).sum().backward()
        q.update()
    torch.testing.assert_close(q(weight), weight.detach(), rtol=1e-3, atol=1e-4)
    assert torch.isfinite(q.basis).all()


def test_bfloat16_in_bfloat16_out() -> None:
    q, x = at(0.3, 0.9, signed=True), torch.randn(50).bfloat16()
    y = q(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, q.encode(x).decode().bfloat16())


def test_the_exported_operator_computes_the_same() -> None:
    q, x = at(0.3, 1.0).eval(), torch.linspace(-1, 3, 801)
    program = torch.export.export(nn.Sequential(q), (x,))
    assert [node.target for node in program.graph.nodes].count(torch.ops.lowbit.fake_quantize_codebook.default) == 1
    assert torch.equal(program.module()(x), q(x))


# The method


def test_a_step_of_training_moves_every_basis_and_the_state_keeps_it() -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    options: dict[str, object] = {"method": "lq_nets", "weight_bits": 2, "activation_bits": 2, "sample": x}
    model = lowbit.prepare(TinyNet(), **options).train()  # type: ignore[arg-type]
    run = run_with(model)
    bases = [q for q in run.quantizers() if isinstance(q, LearnedBasis)]
    before = [q.basis.clone() for q in bases]
    for _ in range(2):
        run.before_step()
        run.loss((torch.randn(16, 3, 8, 8), torch.randint(4, (16,)))).backward()
        run.optimizer_step()
        run.after_step()
    assert len(bases) == 4 and all(q.updates.item() == 2 for q in bases)
    assert not any(torch.equal(q.basis, old) for q, old in zip(bases, before, strict=True))
    other = lowbit.prepare(TinyNet(), **options)  # type: ignore[arg-type]
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), model.eval()(x))


def test_signed_inputs_have_symmetric_levels() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    model = lowbit.prepare(net, method="lq_nets", weight_bits=2, activation_bits=2, sample=torch.randn(8, 3, 8, 8))
    q = insert.input_quantizer(model[1])  # type: ignore[index]
    assert isinstance(q, LearnedBasis)
    levels = q.levels()[0][0]
    torch.testing.assert_close(levels, -levels.flip(0))
    assert levels[0] < 0


def test_a_momentum_of_one_is_refused() -> None:
    with pytest.raises(SpecError, match="momentum must be from 0 to below 1, got 1"):
        LqNets(momentum=1.0)
