"""The law of every quantizer, and the numbers of each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers import (
    BinaryQuantizer,
    CodebookQuantizer,
    PowerOfTwoQuantizer,
    Quantizer,
    SumQuantizer,
    UniformQuantizer,
    affine_parameters,
    decoder_from,
    fake_quantize,
    qrange,
)  # fmt: skip
from lowbit.spec import Granularity

MAKERS: dict[str, Callable[[Granularity], Quantizer]] = {
    "symmetric_2": lambda g: UniformQuantizer(2, signed=True, symmetric=True, granularity=g),
    "affine_4": lambda g: UniformQuantizer(4, signed=False, symmetric=False, granularity=g),
    "affine_1": lambda g: UniformQuantizer(1, signed=False, symmetric=False, granularity=g),
    "binary": lambda g: BinaryQuantizer(granularity=g),
    "codebook_3": lambda g: CodebookQuantizer(3, granularity=g),
    "power_of_two_4": lambda g: PowerOfTwoQuantizer(4, granularity=g),
    "sum_2x3": lambda g: SumQuantizer([UniformQuantizer(3, signed=True, symmetric=True, granularity=g) for _ in range(2)]),
}
GRANULARITIES = [Granularity.tensor(), Granularity.channel(0), Granularity.channel(1), Granularity.group(9)]


def edge_cases() -> dict[str, Tensor]:
    torch.manual_seed(0)
    dead_channel = torch.randn(6, 5, 3, 3)
    dead_channel[2] = 0
    return {
        "random": torch.randn(6, 5, 3, 3),
        "a channel of zeros": dead_channel,
        "all equal": torch.full((6, 5, 3, 3), 0.7),
        "all zero": torch.zeros(6, 5, 3, 3),
        "tiny": torch.randn(6, 5, 3, 3) * 1e-30,
        "large": torch.randn(6, 5, 3, 3) * 1e20,
        "bfloat16": torch.randn(6, 5, 3, 3).bfloat16(),
        "ties": torch.arange(-135, 135).reshape(6, 5, 3, 3) / 2,
    }


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("case", edge_cases())
def test_decoded_codes_equal_the_forward_pass(kind: str, granularity: Granularity, case: str) -> None:
    x = edge_cases()[case]
    quantizer = MAKERS[kind](granularity).eval()
    quantizer.initialize(x)
    y, encoded = quantizer(x), quantizer.encode(x)
    assert torch.isfinite(y).all()
    assert torch.equal(encoded.decode().to(y.dtype), y)
    parts = 2 if kind.startswith("sum") else 1
    levels = max(row.unique().numel() for row in granularity.flatten(y.float()))
    assert levels <= 2 ** (quantizer.bit_width * parts)


@pytest.mark.parametrize("kind", MAKERS)
def test_training_passes_the_same_values_and_a_gradient(kind: str) -> None:
    x = torch.randn(6, 5, 3, 3, generator=torch.Generator().manual_seed(1))
    quantizer = MAKERS[kind](Granularity.channel(0))
    quantizer.initialize(x)
    leaf = x.clone().requires_grad_()
    y = quantizer(leaf)
    assert torch.equal(y, quantizer.eval()(x))
    y.sum().backward()
    assert leaf.grad is not None and set(leaf.grad.unique().tolist()) <= {0.0, 1.0} and leaf.grad.sum() > 0


@pytest.mark.parametrize("kind", [k for k in MAKERS if not k.startswith("sum")])
def test_a_fresh_quantizer_takes_a_saved_state(kind: str) -> None:
    x = torch.randn(4, 3, 3, 3)
    trained, fresh = MAKERS[kind](Granularity.channel(0)), MAKERS[kind](Granularity.channel(0))
    trained.initialize(x)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))


@pytest.mark.parametrize("kind", MAKERS)
def test_a_decoder_is_rebuilt_from_its_tables(kind: str) -> None:
    quantizer = MAKERS[kind](Granularity.channel(0))
    x = torch.randn(4, 3, 3, 3)
    quantizer.initialize(x)
    encoded = quantizer.encode(x)
    parts = tuple(part.kind for part in getattr(encoded.decoder, "parts", ()))
    rebuilt = decoder_from(encoded.decoder.kind, encoded.decoder.tensors(), Granularity.channel(0), parts)
    assert torch.equal(rebuilt.decode(encoded.codes), encoded.decode())


def test_affine_parameters_by_hand() -> None:
    scale, zero_point = affine_parameters(torch.tensor([-1.0, 0.5, 0.0]), torch.tensor([2.0, 3.0, 0.0]), 0, 3, symmetric=False)
    assert scale.tolist() == [1.0, 1.0, 1.0]  # 3/3; the range [0.5, 3] is widened to contain 0; a dead channel gets 1
    assert zero_point.tolist() == [1.0, 0.0, 0.0]
    scale, zero_point = affine_parameters(torch.tensor(-1.0), torch.tensor(3.5), *qrange(4, signed=True), symmetric=True)
    assert (scale.item(), zero_point.item()) == (0.5, 0.0)


def test_rounding_is_half_to_even_and_saturates() -> None:
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, 99.0, -99.0])
    assert fake_quantize(x, one, zero, -4, 3).tolist() == [0.0, 2.0, 2.0, 0.0, 3.0, -4.0]


def test_the_gradient_of_a_learned_scale_is_that_of_the_expression() -> None:
    x = torch.tensor([0.6, 1.4, 9.0, -9.0])
    scale = torch.tensor(1.0, requires_grad=True)
    fake_quantize(x, scale, torch.tensor(0.0), -2, 1).sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx((1 - 0.6) + (1 - 1.4) + 1 - 2)  # round(x/s) - x/s inside, the bound outside


def test_binary_zero_counts_as_positive() -> None:
    quantizer = BinaryQuantizer()
    quantizer.initialize(torch.tensor([1.0, -3.0]))
    assert quantizer(torch.tensor([0.0, -0.1, 5.0])).tolist() == [2.0, -2.0, 2.0]


def test_powers_of_two_take_the_nearest_level() -> None:
    quantizer = PowerOfTwoQuantizer(3)  # 0, +-1, +-1/2, +-1/4
    quantizer.initialize(torch.tensor([1.0]))
    values = quantizer(torch.tensor([1.3, 0.76, 0.74, 0.38, 0.37, 0.13, 0.125, -0.6]))
    assert values.tolist() == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25, 0.0, -0.5]


def test_two_parts_never_do_worse_than_one() -> None:
    x = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    single = UniformQuantizer(3, signed=True, symmetric=True)
    double = SumQuantizer([UniformQuantizer(3, signed=True, symmetric=True) for _ in range(2)])
    single.initialize(x)
    double.initialize(x)
    assert (double(x) - x).square().sum() < 0.1 * (single(x) - x).square().sum()


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(SpecError, match="1 to 8"):
        UniformQuantizer(bits, signed=True, symmetric=True)


def test_a_scale_that_is_not_positive_is_refused() -> None:
    with pytest.raises(SpecError, match="positive and finite"):
        UniformQuantizer(4, signed=True, symmetric=True).set_parameters(torch.tensor(0.0))


def test_unsorted_codebook_levels_are_refused() -> None:
    with pytest.raises(SpecError, match="ascending"):
        CodebookQuantizer(1).set_levels(torch.tensor([1.0, 0.0]))
