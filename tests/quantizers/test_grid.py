from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from lowbit.quantizers import AffineDecoder, Grid, GridQuantizer, fake_quantize_grid
from lowbit.quantizers.fused import fused_kernels
from lowbit.quantizers.ops import mark_grid as marked
from lowbit.spec import Granularity
from lowbit.surrogates import SURROGATES, bounded_straight_through, make_surrogate, straight_through

either = pytest.mark.parametrize("is_fused", [True, False], ids=["fused", "composed"])


def scalar(value: float, *, learned: bool = False) -> Tensor:
    return torch.tensor(float(value), requires_grad=learned)


class Shifted(GridQuantizer):
    """Levels that stand for twice the values that take them, from a learned lower end."""

    def __init__(self, bit_width: int = 2, granularity: Granularity | None = None, **options: object) -> None:
        super().__init__(bit_width, 0, 2**bit_width - 1, granularity=granularity, **options)  # type: ignore[arg-type]
        self.lower, self.step = nn.Parameter(torch.tensor(-1.0)), nn.Parameter(torch.tensor(0.5))

    def initialize(self, x: Tensor) -> None:
        rows, shape = self.granularity.flatten(x.detach().float()), self.granularity.scale_shape(x)
        self.lower = nn.Parameter(rows.amin(1).reshape(shape))
        self.step = nn.Parameter(((rows.amax(1) - rows.amin(1)) / self.qmax + 1e-3).reshape(shape))

    def grid(self, x: Tensor) -> Grid:
        return Grid(self.lower, self.step, 2 * self.step, -self.lower / self.step)


class Cubed(Shifted):
    """Quantizes another function of the values."""

    def prepare(self, x: Tensor) -> Tensor:
        return x**3


# The function


@either
def test_codes_are_found_on_one_grid_and_decoded_on_another(is_fused: bool) -> None:
    x = torch.tensor([-2.0, -0.8, -0.7, 0.0, 0.1, 9.0])  # positions -2, 0.4, 0.6, 2, 2.2, 20
    with fused_kernels(is_fused):
        y = fake_quantize_grid(x, Grid(scalar(-1), scalar(0.5), scalar(10), scalar(1)), 0, 3)
    assert y.tolist() == [-10, -10, 0, 10, 10, 20]


@either
def test_rounding_is_half_to_even(is_fused: bool) -> None:
    with fused_kernels(is_fused):
        y = fake_quantize_grid(torch.tensor([0.5, 1.5, 2.5, -0.5]), Grid(scalar(0), scalar(1), scalar(1), scalar(0)), -4, 3)
    assert y.tolist() == [0, 2, 2, 0]


@either
def test_gradients_of_all_parts_are_those_of_the_expression(is_fused: bool) -> None:
    x = torch.tensor([-2.0, -0.8, 0.1, 9.0], requires_grad=True)
    lower, step, scale, zero_point = scalar(-1, learned=True), scalar(0.5, learned=True), scalar(3, learned=True), scalar(1, learned=True)
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0])
    with fused_kernels(is_fused):
        fake_quantize_grid(x, Grid(lower, step, scale, zero_point), 0, 3).backward(grad)
    # positions -2, 0.4, 2.2, 20; codes 0, 0, 2, 3; the two in the middle pass their gradient
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 2.0, 4.0, 0.0]) * 3 / 0.5)
    for part, expected in (
        (lower, -(2 + 4) * 3 / 0.5),
        (step, -(2 * 0.4 + 4 * 2.2) * 3 / 0.5),
        (scale, 1 * -1 + 2 * -1 + 4 * 1 + 8 * 2.0),
        (zero_point, -15.0 * 3),
    ):
        assert part.grad is not None and part.grad.item() == pytest.approx(expected, rel=1e-5)


@either
def test_a_part_that_is_used_twice_gets_both_gradients(is_fused: bool) -> None:
    x, scale = torch.tensor([0.3, 1.2, 7.0]), scalar(0.5, learned=True)
    with fused_kernels(is_fused):
        fake_quantize_grid(x, Grid(scalar(0), scale, scale, scalar(0)), 0, 3).sum().backward()
    assert scale.grad is not None  # code - position inside, the last code beyond
    assert scale.grad.item() == pytest.approx((1 - 0.6) + (2 - 2.4) + 3, rel=1e-5)


@either
def test_learned_ends_take_the_gradient_of_what_they_clip(is_fused: bool) -> None:
    x = torch.tensor([-1.0, 0.0, 0.7, 1.5, 2.0], requires_grad=True)
    low, high = scalar(0), scalar(1.5, learned=True)
    with fused_kernels(is_fused):
        y = fake_quantize_grid(x, Grid(low, (high / 3).detach(), (high / 3).detach(), scalar(0), (low, high)), 0, 3)
    y.sum().backward()
    assert y.tolist() == [0, 0, 0.5, 1.5, 1.5]
    assert x.grad is not None and high.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0] and high.grad.item() == 2


@pytest.mark.parametrize(
    "granularity", [Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(6)], ids=str
)
def test_every_granularity_is_one_code_path(granularity: Granularity) -> None:
    x = torch.randn(4, 3, 4, generator=torch.Generator().manual_seed(0))
    quantizer = Shifted(3, granularity)
    quantizer.initialize(x)
    found = []
    for row, lower, step in zip(granularity.flatten(x), quantizer.lower.flatten(), quantizer.step.flatten(), strict=True):
        found.append((((row - lower) / step).round().clamp(0, 7) + lower / step) * 2 * step)
    torch.testing.assert_close(granularity.flatten(quantizer(x)), torch.stack(found))
    assert torch.equal(quantizer.encode(x).decode(), quantizer(x))


# The quantizer


@pytest.mark.parametrize("kind", [Shifted, Cubed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_say_everything_and_bfloat16_keeps_its_type(kind: type[Shifted], dtype: torch.dtype) -> None:
    x = torch.randn(200, generator=torch.Generator().manual_seed(1)).to(dtype)
    quantizer = kind(3).eval()
    encoded = quantizer.encode(x)
    assert encoded.codes.dtype == torch.uint8 and int(encoded.codes.max()) <= 7
    assert isinstance(encoded.decoder, AffineDecoder)
    assert quantizer(x).dtype == dtype
    assert torch.equal(encoded.decode().to(dtype), quantizer(x))
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


def test_values_are_prepared_before_they_are_quantized_and_learn_through_it() -> None:
    x = torch.tensor([-0.5, 0.6, 3.0], requires_grad=True)
    quantizer = Cubed()
    y = quantizer(x)
    plain = Shifted()
    assert torch.equal(y, plain(x.detach() ** 3))
    y.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([3 * 0.25, 3 * 0.36, 0]) * 2)


@pytest.mark.parametrize("name", SURROGATES)
def test_any_surrogate_gives_the_same_values_and_a_finite_gradient(name: str) -> None:
    x = torch.linspace(-2, 2, 101).requires_grad_()
    plain, quantizer = Shifted(), Shifted(surrogate=make_surrogate(name))
    y = quantizer(x)
    assert torch.equal(y, plain(x))
    y.sum().backward()
    assert x.grad is not None and bool(torch.isfinite(x.grad).all()) and float(x.grad.abs().sum()) > 0
    assert quantizer.step.grad is not None and bool(torch.isfinite(quantizer.step.grad))


def test_the_surrogate_decides_the_gradient_beyond_the_range() -> None:
    found = []
    for surrogate in (bounded_straight_through, straight_through):
        x = torch.tensor([-9.0, 0.0, 9.0], requires_grad=True)
        Shifted(surrogate=surrogate)(x).sum().backward()
        assert x.grad is not None
        found.append(x.grad.tolist())
    assert found == [[0, 2, 0], [2, 2, 2]]


def test_copies_and_saved_states_compute_the_same() -> None:
    x = torch.randn(50, generator=torch.Generator().manual_seed(2))
    quantizer = Shifted(surrogate=make_surrogate("ewgs"))
    quantizer.initialize(x)
    fresh = Shifted(surrogate=make_surrogate("ewgs"))
    fresh.load_state_dict(quantizer.state_dict())
    for other in (copy.deepcopy(quantizer), pickle.loads(pickle.dumps(quantizer)), fresh):
        assert torch.equal(other(x), quantizer(x))


class Layer(nn.Module):
    def __init__(self, quantizer: GridQuantizer) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_exported_program_has_one_operator_that_computes_the_same(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 77).to(dtype)
    layer = Layer(Shifted()).eval()
    program = torch.export.export(layer, (x,))
    assert [n.target for n in program.graph.nodes if "lowbit" in str(n.target)] == [torch.ops.lowbit.fake_quantize_grid.default]
    assert program.module()(x).dtype == dtype
    assert torch.equal(program.module()(x), layer(x))


def test_the_operator_equals_the_function_bit_for_bit() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(3)) * 3
    parts = scalar(-0.37), scalar(0.21), scalar(0.43), scalar(2.9)
    assert torch.equal(marked(x, *parts, 0, 15), fake_quantize_grid(x, Grid(*parts), 0, 15))
    torch.library.opcheck(torch.ops.lowbit.fake_quantize_grid.default, (x, *parts, 0, 15), test_utils="test_faketensor")


def test_nan_stays_nan() -> None:
    assert Shifted()(torch.tensor([float("nan"), 0.0])).isnan().tolist() == [True, False]
