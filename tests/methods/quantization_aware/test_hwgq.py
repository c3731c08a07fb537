from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.networks import TinyNet
from torch import Tensor, nn

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.methods.quantization_aware.hwgq import (
    GaussianQuantizer,
    Hwgq,
    gaussian_error,
    half_wave_table,
    lloyd_levels,
    positive_levels,
    symmetric_table,
    uniform_levels,
)
from lowbit.network import insert
from lowbit.qat import Slot
from lowbit.quantizers import ScaledSignQuantizer


def error_of(levels: tuple[float, ...]) -> float:
    return float(gaussian_error(torch.tensor(levels, dtype=torch.float64)))


def ready(bit_width: int, **options: object) -> GaussianQuantizer:
    q = GaussianQuantizer(bit_width, has_unit_scale=True, **options)  # type: ignore[arg-type]
    q.initialize(torch.ones(3))
    return q


# Levels


def test_levels_are_those_of_the_tables_of_optimal_gaussian_quantizers() -> None:
    assert uniform_levels(1) == pytest.approx([0.7979], abs=1e-4) == lloyd_levels(1)
    assert uniform_levels(3) == pytest.approx([0.5388, 1.0776, 1.6164], abs=2e-4)
    assert uniform_levels(15)[0] == pytest.approx(0.1842, abs=1e-4)
    assert lloyd_levels(2) == pytest.approx([0.4528, 1.5104], abs=1e-4)
    assert lloyd_levels(7) == pytest.approx([0.1457, 0.4413, 0.7504, 1.0856, 1.4675, 1.9386, 2.6251], abs=1e-4)
    # half the steps of Max 1960, "Quantizing for minimum distortion", table II
    halves = [uniform_levels(count, is_symmetric=True)[0] for count in (1, 2, 4, 8, 16)]
    assert halves == pytest.approx([1.596 / 2, 0.9957 / 2, 0.5860 / 2, 0.3352 / 2, 0.1881 / 2], abs=2e-4)


def test_each_level_is_the_mean_of_its_interval() -> None:
    levels = lloyd_levels(15)
    x = torch.linspace(0, 9, 900_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    which = torch.bucketize(x, (torch.tensor(levels[1:]) + torch.tensor(levels[:-1])).double() / 2)
    for index, level in enumerate(levels):
        inside = which == index
        assert level == pytest.approx(float((x * density)[inside].sum() / density[inside].sum()), abs=1e-4)


def test_more_levels_and_free_ones_have_less_error() -> None:
    counts = [1, 3, 7, 15, 31, 63, 127, 255]
    uniform, free = [error_of(uniform_levels(n)) for n in counts], [error_of(lloyd_levels(n)) for n in counts]
    assert uniform == sorted(uniform, reverse=True) and free == sorted(free, reverse=True)
    assert all(a <= b + 1e-12 for a, b in zip(free, uniform, strict=True))
    assert free[-1] == pytest.approx(math.sqrt(3) * math.pi / 2 / 510**2, rel=0.01)  # what Panter and Dite's formula says of 510 levels


def test_the_error_is_the_mean_squared_distance_from_the_nearest_level() -> None:
    levels = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64)
    x = torch.linspace(0, 9, 900_001, dtype=torch.float64)
    density = torch.exp(-x.square() / 2)
    distance = (x[:, None] - levels).abs().amin(1)
    assert float(gaussian_error(levels)) == pytest.approx(float((distance.square() * density).sum() / density.sum()), rel=1e-4)


# The quantizer


def at_levels(*levels: float, **options: object) -> GaussianQuantizer:
    """A half-wave quantizer with these positive levels."""
    quantizer = ready(2, **options)
    quantizer.unit_levels, quantizer.scale = torch.tensor(levels), torch.tensor(1.0)
    return quantizer


def test_signed_one_bit_inputs_can_be_the_sign_with_the_gradient_of_a_hard_tanh() -> None:
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    method = Hwgq(signed_inputs="sign")
    y = method.activation_quantizer(Slot("x", nn.Identity(), 1, True, "inner"))(x)
    y.sum().backward()
    assert y.tolist() == [-1, -1, 1, 1, 1, 1]
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    more, unsigned = (method.activation_quantizer(Slot("x", nn.Identity(), *slot, "inner")) for slot in ((2, True), (1, False)))
    assert isinstance(more, GaussianQuantizer) and more.is_symmetric
    assert isinstance(unsigned, GaussianQuantizer) and not unsigned.is_symmetric


def test_every_positive_value_is_at_least_the_first_level_and_ties_go_down() -> None:
    x = torch.tensor([-3.0, -0.1, 0.0, 1e-30, 0.24, 0.75, 0.76, 1.25, 1.26, 1.5, 99.0])
    assert at_levels(0.5, 1.0, 1.5)(x).tolist() == [0, 0, 0, 0.5, 0.5, 0.5, 1.0, 1.0, 1.5, 1.5, 1.5]


def test_gradients_stop_at_the_largest_level_or_go_on_or_fade() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 1.5, 1.6, 2.5])
    expected = {"clipped": [0, 0, 1, 1, 0, 0], "vanilla": [0, 0, 1, 1, 1, 1], "log_tailed": [0, 0, 1, 1, 1 / 1.1, 1 / 2.0]}
    for backward, factors in expected.items():
        values = x.clone().requires_grad_()
        upstream = torch.arange(1.0, 7.0)
        at_levels(0.5, 1.0, 1.5, backward=backward)(values).backward(upstream)
        assert values.grad is not None
        assert values.grad.tolist() == pytest.approx((upstream * torch.tensor(factors, dtype=torch.float)).tolist())


def test_the_fading_gradient_is_the_slope_of_the_papers_logarithm() -> None:
    q = ready(2, backward="log_tailed")
    q.scale.fill_(2.0)
    top = 2.0 * q.unit_levels[-1].item()
    x = torch.tensor([top + 1.0, top + 5.0], requires_grad=True)
    q(x).sum().backward()
    assert x.grad is not None
    free = x.detach().clone().requires_grad_()
    tau = q.unit_levels[-1] - 1
    (2.0 * (q.unit_levels[-1] + torch.log(free / 2.0 - tau))).sum().backward()
    torch.testing.assert_close(x.grad, free.grad)


def test_signed_levels_are_mirror_images_and_zero_is_positive() -> None:
    q = ready(2, is_symmetric=True, levels="non_uniform")
    x = torch.tensor([-9.0, -0.9, -1e-30, 0.0, 0.9, 9.0], requires_grad=True)
    y = q(x)
    y.sum().backward()
    a, b = lloyd_levels(2)
    assert y.tolist() == pytest.approx([-b, -a, -a, a, a, b])
    assert x.grad is not None and x.grad.tolist() == [0, 1, 1, 1, 1, 0]
    uniform = ready(3, is_symmetric=True)
    levels = uniform.table()[1]
    torch.testing.assert_close(levels.diff(), levels.diff()[:1].expand(7))


@pytest.mark.parametrize("bit_width", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("is_symmetric", [False, True])
@pytest.mark.parametrize("kind", ["uniform", "non_uniform"])
def test_codes_decode_to_the_forward_pass_on_two_to_the_b_levels(bit_width: int, is_symmetric: bool, kind: str) -> None:
    q = GaussianQuantizer(bit_width, is_symmetric=is_symmetric, levels=kind)  # type: ignore[arg-type]
    x = torch.cat([torch.randn(40_000) * 3, torch.zeros(1), torch.tensor([-1e30, 1e30])])
    q.initialize(x)
    encoded = q.encode(x)
    assert torch.equal(encoded.decode(), q(x))
    assert q(x).unique().numel() == 2**bit_width == encoded.codes.unique().numel()


def test_the_scale_is_the_deviation_of_the_half_wave_and_one_where_nothing_is_left() -> None:
    q = GaussianQuantizer(2)
    q.initialize(torch.tensor([-100.0, 0.0, 3.0, 4.0]))
    assert q.scale.item() == pytest.approx(math.sqrt(12.5))
    q.initialize(torch.randn(100_000, generator=torch.Generator().manual_seed(0)).relu() * 5)
    assert q.scale.item() == pytest.approx(5, rel=0.01)
    for nothing in (torch.zeros(4), torch.full((4,), -1.0), torch.zeros(0)):
        q.initialize(nothing)
        assert q.scale.item() == 1.0
    unit = GaussianQuantizer(2, has_unit_scale=True)
    unit.initialize(torch.full((4,), 7.0))
    assert unit.scale.item() == 1.0


def test_the_authors_constants_are_an_option_for_two_bits() -> None:
    x = torch.tensor([-1.0, 0.1, 0.9, 1.0, 1.2, 9.0])
    assert ready(2, levels="authors")(x).tolist() == pytest.approx([0, 0.538, 1.076, 1.076, 1.076, 1.614])
    two = ready(2, levels="authors_non_uniform")
    assert two(x).tolist() == pytest.approx([0, 0.453, 0.453, 1.51, 1.51, 1.51])
    assert torch.equal(two.encode(x).decode(), two(x)) and two.encode(x).codes.max() == 2
    with pytest.raises(SpecError, match="not for 3 bits"):
        positive_levels(3, "authors", is_symmetric=False)
    with pytest.raises(SpecError, match="signed_inputs='rectify'"):
        positive_levels(2, "authors", is_symmetric=True)


def test_tables_of_boundaries_and_levels() -> None:
    boundaries, levels = half_wave_table(torch.tensor([1.0, 2.0, 4.0]))
    assert boundaries.tolist() == [0.0, 1.5, 3.0] and levels.tolist() == [0.0, 1.0, 2.0, 4.0]
    boundaries, levels = symmetric_table(torch.tensor([1.0, 2.0]))
    assert boundaries.tolist() == [-1.5, -(2.0**-149), 1.5] and levels.tolist() == [-2.0, -1.0, 1.0, 2.0]


@pytest.mark.parametrize("options", [{}, {"is_symmetric": True}, {"levels": "authors_non_uniform"}], ids=str)
def test_the_exported_operator_computes_the_same(options: dict[str, object]) -> None:
    q, x = ready(2, **options), torch.linspace(-3, 3, 601)
    program = torch.export.export(nn.Sequential(q), (x,))
    assert [node.target for node in program.graph.nodes].count(torch.ops.lowbit.fake_quantize_codebook.default) == 1
    assert torch.equal(program.module()(x), q(x))
    assert q(x.bfloat16()).dtype == torch.bfloat16


# The method


X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_weights_are_scaled_signs_with_unchanged_gradients() -> None:
    layer = nn.Conv2d(2, 3, 3)
    q = Hwgq().weight_quantizer(Slot("layer", layer, 1, True, "inner"))
    assert isinstance(q, ScaledSignQuantizer)
    weight, upstream = (layer.weight.detach() * 50).requires_grad_(), torch.randn(3, 2, 3, 3)
    y = q(weight)
    y.backward(upstream)
    assert weight.grad is not None and torch.equal(weight.grad, upstream)  # far beyond 1 too: nothing is clipped
    torch.testing.assert_close(y.abs().amax((1, 2, 3)), weight.detach().abs().mean((1, 2, 3)))
    unscaled = Hwgq(weight_scale=False).weight_quantizer(Slot("layer", layer, 1, True, "inner"))
    assert unscaled(weight).detach().unique().tolist() == [-1.0, 1.0]


def test_a_prepared_network_scales_levels_to_its_activations() -> None:
    torch.manual_seed(0)
    model = lowbit.prepare(TinyNet(), method="hwgq", weight_bits=1, activation_bits=2, sample=X)
    q = insert.input_quantizer(model.conv1)
    assert isinstance(q, GaussianQuantizer) and not q.is_symmetric
    seen: list[Tensor] = []
    q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model.train()(X)
    positive = seen[0][seen[0] > 0]
    torch.testing.assert_close(q.scale, positive.square().mean().sqrt(), rtol=1e-2, atol=0)
    unit = lowbit.prepare(TinyNet(), method="hwgq", weight_bits=1, activation_bits=2, sample=X, input_scale="unit")
    assert unit.conv1.input_quantizer.scale.item() == 1.0


def test_signed_inputs_keep_their_sign_unless_the_quantizer_is_the_activation_function() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    for choice, lowest in (("symmetric", -1), ("rectify", 0)):
        model = lowbit.prepare(net, method="hwgq", weight_bits=1, activation_bits=2, sample=X, signed_inputs=choice).eval()
        levels = insert.input_quantizer(model[2]).table()[1]  # type: ignore[union-attr, operator]
        assert len(levels) == 4 and levels[0].sign() == lowest
    with pytest.raises(LayerError, match=r"layer '2'.*'rectify'"):
        lowbit.prepare(net, method="hwgq", weight_bits=1, activation_bits=2, sample=X, levels="authors")


def test_state_and_copies_keep_the_levels() -> None:
    torch.manual_seed(0)
    model = lowbit.prepare(TinyNet(), method="hwgq", weight_bits=1, activation_bits=3, sample=X).eval()
    other = lowbit.prepare(TinyNet(), method="hwgq", weight_bits=1, activation_bits=3, sample=X * 2).eval()
    with torch.no_grad():
        expected = model(X)
        assert not torch.equal(other(X), expected)
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(X), expected) and torch.equal(copy.deepcopy(model)(X), expected)
        assert torch.equal(torch.export.export(model, (X,)).module()(X), expected)
