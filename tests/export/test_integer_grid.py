from __future__ import annotations

import pytest
import torch
from tests.export.networks import WEIGHT_QUANTIZERS

from lowbit.export.integer_grid import IntegerGrid, integer_grid
from lowbit.quantizers import PowerOfTwoQuantizer, QTensor, UniformQuantizer
from lowbit.spec import Granularity

WEIGHT = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))


def codes_of(kind: str, granularity: Granularity) -> QTensor:
    quantizer = WEIGHT_QUANTIZERS[kind](granularity)
    quantizer.initialize(WEIGHT)
    return quantizer.encode(WEIGHT)


@pytest.mark.parametrize("kind", ["uniform", "affine", "binary", "power_of_two"])
@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(0), Granularity.channel(1)], ids=str)
def test_evenly_spaced_levels_become_integers_that_decode_to_the_same_bits(kind: str, granularity: Granularity) -> None:
    weight = codes_of(kind, granularity)
    grid = integer_grid(weight)
    assert grid is not None
    assert grid.codes.dtype == torch.int8
    assert grid.axis == (None if granularity.kind == "per_tensor" else granularity.axis)
    assert torch.equal(grid.decode(), weight.decode())


@pytest.mark.parametrize("kind", ["codebook", "sum"])
def test_free_levels_have_no_integer_grid(kind: str) -> None:
    assert integer_grid(codes_of(kind, Granularity.channel(0))) is None


def test_groups_within_a_channel_have_no_integer_grid() -> None:
    assert integer_grid(codes_of("uniform", Granularity.group(9))) is None


def test_powers_of_two_that_span_more_than_six_octaves_have_no_integer_grid() -> None:
    quantizer = PowerOfTwoQuantizer(5, granularity=Granularity.tensor())
    quantizer.initialize(torch.tensor([1.0, 2.0**-10]))
    assert integer_grid(quantizer.encode(torch.tensor([1.0, 2.0**-10]))) is None
    narrow = integer_grid(quantizer.encode(torch.tensor([1.0, 2.0**-6])))
    assert narrow is not None
    assert narrow.codes.tolist() == [64, 1]


def test_eight_unsigned_bits_are_shifted_into_the_signed_container() -> None:
    quantizer = UniformQuantizer(8, signed=False, symmetric=False)
    quantizer.set_parameters(torch.tensor(0.5), torch.tensor(3.0))
    grid = integer_grid(quantizer.encode(torch.tensor([-1.5, 0.0, 126.0])))
    assert grid is not None
    assert grid.codes.tolist() == [-128, -125, 127]
    assert int(grid.zero_point) == -125
    assert grid.decode().tolist() == [-1.5, 0.0, 126.0]


@pytest.mark.parametrize(("bit_width", "factor"), [(2, 32), (3, 16), (4, 8), (7, 1), (8, 1)])
def test_widening_multiplies_codes_up_to_64_and_keeps_the_values(bit_width: int, factor: int) -> None:
    quantizer = UniformQuantizer(bit_width, signed=True, symmetric=True, granularity=Granularity.channel(0))
    quantizer.set_parameters(torch.full((6, 1, 1, 1), 0.37))
    weight = torch.full((6, 1, 1, 1), -1e3)
    grid = integer_grid(quantizer.encode(weight))
    assert grid is not None
    widened = grid.widened()
    assert int(widened.codes.min()) == -(2 ** (bit_width - 1)) * factor
    assert torch.equal(widened.decode(), grid.decode())


def test_a_weight_of_zeros_is_widened_to_itself() -> None:
    grid = IntegerGrid(torch.zeros(3, dtype=torch.int8), torch.ones(()), torch.zeros((), dtype=torch.int8), None)
    assert grid.widened().decode().tolist() == [0.0, 0.0, 0.0]


def test_transposing_moves_the_channel_axis() -> None:
    weight = codes_of("affine", Granularity.channel(0))
    grid = integer_grid(weight)
    assert grid is not None
    moved = grid.permute((1, 2, 3, 0))
    assert moved.axis == 3
    assert torch.equal(moved.decode(), weight.decode().permute(1, 2, 3, 0))
