from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lowbit.quantizers import LearnedScaleQuantizer, qrange
from lowbit.spec import Granularity

SIGNED = {"signed": True}
OFFSET = {"signed": False, "learn_offset": True}


def quantizer_with(scale: float, offset: float | None = None, bit_width: int = 2, **options: object) -> LearnedScaleQuantizer:
    quantizer = LearnedScaleQuantizer(bit_width, scale_gradient=False, **options)  # type: ignore[arg-type]
    quantizer._set_table("scale", torch.tensor(scale))
    if offset is not None:
        quantizer._set_table("offset", torch.tensor(offset))
    return quantizer


@pytest.mark.parametrize("bit_width", range(1, 9))
@pytest.mark.parametrize("options", [SIGNED, {"signed": False}, OFFSET], ids=["signed", "unsigned", "offset"])
@pytest.mark.parametrize(
    "granularity", [Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(9)], ids=str
)
def test_codes_say_everything(bit_width: int, options: dict[str, bool], granularity: Granularity) -> None:
    x = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    quantizer = LearnedScaleQuantizer(bit_width, granularity=granularity, **options)
    quantizer.initialize(x)
    assert quantizer.scale.shape == granularity.scale_shape(x)
    encoded = quantizer.encode(x)
    assert torch.equal(encoded.decode(), quantizer(x))
    assert max(row.unique().numel() for row in granularity.flatten(quantizer(x))) <= 2**bit_width
    assert bool(torch.isfinite(quantizer(x)).all())


def test_values_by_hand() -> None:
    x = torch.tensor([-9.0, -0.8, 0.3, 0.8, 9.0])
    assert quantizer_with(0.5, signed=True)(x).tolist() == [-1, -1, 0.5, 0.5, 0.5]
    assert quantizer_with(0.5, signed=False)(x).tolist() == [0, 0, 0.5, 1, 1.5]
    assert quantizer_with(0.5, offset=-0.6, **OFFSET)(x).tolist() == [-0.5, -0.5, 0.5, 1, 1]  # the zero point is round(1.2)


def test_one_signed_bit_has_the_levels_minus_and_plus_scale() -> None:
    quantizer = quantizer_with(0.7, signed=True, bit_width=1)
    y = quantizer(torch.tensor([-3.0, -0.1, 0.1, 3.0]))
    torch.testing.assert_close(y, torch.tensor([-0.7, -0.7, 0.7, 0.7]))


def test_gradients_of_values_and_scale_are_those_of_the_paper() -> None:
    x = torch.tensor([-9.0, -0.8, 0.3, 9.0], requires_grad=True)
    quantizer = quantizer_with(0.5, signed=True)
    grad = torch.tensor([1.0, 2.0, 4.0, 8.0])
    quantizer(x).backward(grad)
    assert x.grad is not None and quantizer.scale.grad is not None
    assert x.grad.tolist() == [0, 2, 4, 0]
    # Eq. 3: round(x/s) - x/s inside, the clipped code outside
    expected = 1 * -2 + 2 * (-2 + 1.6) + 4 * (1 - 0.6) + 8 * 1
    assert quantizer.scale.grad.item() == pytest.approx(expected, rel=1e-5)


def test_the_offset_learns_through_its_rounded_zero_point() -> None:
    x = torch.tensor([-9.0, -0.2, 0.3, 9.0])
    quantizer = quantizer_with(0.5, offset=-0.6, **OFFSET)
    quantizer(x).backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert quantizer.offset.grad is not None
    # clipped levels are (code - zero_point) scale with zero_point = -offset / scale; inside, the offset cancels
    assert quantizer.offset.grad.item() == pytest.approx(1 + 8, rel=1e-5)


@pytest.mark.parametrize(
    ("is_batched", "granularity", "elements"),
    [
        (False, Granularity.tensor(), 96),
        (True, Granularity.tensor(), 24),
        (False, Granularity.channel(0), 24),
        (False, Granularity.channel(1), 32),
    ],
    ids=["weight", "activation", "per channel", "per other channel"],
)
def test_the_scales_gradient_is_divided_by_the_root_of_elements_times_levels(
    is_batched: bool, granularity: Granularity, elements: int
) -> None:
    x = torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(1))
    grads = []
    for scale_gradient in (True, False):
        quantizer = LearnedScaleQuantizer(3, signed=True, granularity=granularity, is_batched=is_batched, scale_gradient=scale_gradient)
        quantizer.initialize(x)
        quantizer(x).sum().backward()
        grads.append(quantizer.scale.grad)
    torch.testing.assert_close(grads[0], grads[1] / math.sqrt(elements * 3))  # type: ignore[operator]


@pytest.mark.parametrize(("signed", "bit_width"), [(True, 3), (False, 3), (True, 8), (False, 2)])
def test_the_scale_starts_from_the_mean_magnitude(signed: bool, bit_width: int) -> None:
    x = torch.tensor([[1.0, -3.0], [0.0, 0.0]])
    quantizer = LearnedScaleQuantizer(bit_width, signed=signed, granularity=Granularity.channel(0))
    quantizer.initialize(x)
    expected = 2 * 2 / math.sqrt(qrange(bit_width, signed=signed)[1])
    torch.testing.assert_close(quantizer.scale.detach(), torch.tensor([[expected], [1.0]]))  # a dead channel: 1


def test_one_signed_bit_starts_at_the_mean_magnitude() -> None:
    quantizer = LearnedScaleQuantizer(1, signed=True)
    quantizer.initialize(torch.tensor([1.0, -3.0]))
    assert quantizer.scale.item() == 2


def test_with_an_offset_the_grid_starts_from_the_range() -> None:
    quantizer = LearnedScaleQuantizer(2, **OFFSET)  # type: ignore[arg-type]
    quantizer.initialize(torch.tensor([-1.0, 0.5, 2.0]))
    assert quantizer.scale.item() == 1 and quantizer.offset.item() == -1
    assert quantizer(torch.tensor([-5.0, 0.0, 5.0])).tolist() == [-1, 0, 2]


def test_scale_and_offset_are_parameters_and_known_once_initialized() -> None:
    quantizer = LearnedScaleQuantizer(2, **OFFSET)  # type: ignore[arg-type]
    assert not quantizer.is_initialized
    quantizer.initialize(torch.randn(9))
    assert quantizer.is_initialized
    assert [name for name, _ in quantizer.named_parameters()] == ["scale", "offset"]
    assert not list(quantizer.buffers())


def test_initializing_again_keeps_the_parameter_that_an_optimizer_holds() -> None:
    quantizer = LearnedScaleQuantizer(2, signed=True)
    quantizer.initialize(torch.randn(9))
    held = quantizer.scale
    quantizer.initialize(torch.full((9,), 4.0))
    assert quantizer.scale is held and held.item() == 8


def test_a_fresh_quantizer_takes_a_saved_state_of_any_granularity() -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(2))
    quantizer = LearnedScaleQuantizer(3, granularity=Granularity.channel(0), **OFFSET)  # type: ignore[arg-type]
    quantizer.initialize(x)
    fresh = LearnedScaleQuantizer(3, granularity=Granularity.channel(0), **OFFSET)  # type: ignore[arg-type]
    fresh.load_state_dict(quantizer.state_dict())
    assert isinstance(fresh.scale, nn.Parameter) and torch.equal(fresh(x), quantizer(x))


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1e-12])
@pytest.mark.parametrize("options", [SIGNED, OFFSET], ids=["signed", "offset"])
def test_a_scale_is_brought_back_above_zero(scale: float, options: dict[str, bool]) -> None:
    quantizer = quantizer_with(scale, offset=-3.0 if options is OFFSET else None, **options)
    quantizer.project()
    assert quantizer.scale.item() > 0
    x = torch.randn(20).requires_grad_()
    quantizer(x).sum().backward()
    assert bool(torch.isfinite(quantizer(x)).all()) and x.grad is not None and bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("offset", [50.0, -50.0])
def test_a_zero_point_stays_within_the_codes(offset: float) -> None:
    quantizer = quantizer_with(0.5, offset=offset, **OFFSET)
    decoder = quantizer.encode(torch.randn(5)).decoder
    assert decoder.tensors()["zero_point"].item() == (0 if offset > 0 else 3)


def test_learning_the_scale_lowers_the_error() -> None:
    x = torch.randn(2000, generator=torch.Generator().manual_seed(3))
    quantizer = quantizer_with(3.0, signed=True, bit_width=3)

    def error() -> Tensor:
        return (quantizer(x) - x).square().mean()

    before = error().item()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.2)
    for _ in range(100):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    # the best 3-bit uniform grid for a normal leaves about 0.04
    assert error().item() < 0.06 < before


def test_bfloat16_is_quantized_in_float32() -> None:
    x = torch.randn(100, generator=torch.Generator().manual_seed(4)).bfloat16()
    quantizer = LearnedScaleQuantizer(8, signed=True)
    quantizer.initialize(x)
    assert quantizer.scale.dtype == torch.float32
    assert quantizer(x).dtype == torch.bfloat16 and torch.equal(quantizer(x), quantizer(x.float()).bfloat16())


def test_a_learned_offset_keeps_zero_a_level_and_the_error_within_half_a_step() -> None:
    quantizer = LearnedScaleQuantizer(3, **OFFSET)  # type: ignore[arg-type]
    x = torch.linspace(-1.03, 2.2, 50)
    quantizer.initialize(x)
    assert quantizer(torch.zeros(1)).item() == 0
    assert (quantizer(x) - x).abs().max() < 0.51 * (2.2 + 1.03) / 7 + 0.04
