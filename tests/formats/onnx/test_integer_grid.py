from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from tests.formats.networks import WEIGHT_QUANTIZERS, quantized
from torch import nn

from lowbit.formats.onnx.integer_grid import IntegerGrid, integer_grid, why_no_integer_grid
from lowbit.network.insert import bake_weights
from lowbit.quantizers import PowerOfTwoQuantizer, QTensor, UniformQuantizer
from lowbit.quantizers.qtensor import AffineDecoder
from lowbit.spec import Granularity
from lowbit.workflows.export import export

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


def affine_grid(bit_width: int, zero_points: list[int], codes: list[list[int]]) -> IntegerGrid:
    """Unsigned codes, one row for each channel, each channel with its own zero point."""
    decoder = AffineDecoder(torch.tensor([[0.5], [0.25]]), torch.tensor(zero_points).float().reshape(2, 1), Granularity.channel(0))
    grid = integer_grid(QTensor(torch.tensor(codes, dtype=torch.uint8), decoder, bit_width))
    assert grid is not None
    return grid


def test_centring_moves_the_zero_point_into_the_codes() -> None:
    grid = affine_grid(4, [3, 15], [[0, 3, 15], [0, 1, 15]])
    assert grid.zero_point.tolist() == [-5, 7]
    centred = grid.centred()
    assert centred.codes.tolist() == [[-3, 0, 12], [-15, -14, 0]]
    assert centred.codes.dtype == torch.int8
    assert centred.zero_point.tolist() == [0, 0]
    assert torch.equal(centred.decode(), grid.decode())


@pytest.mark.parametrize("bit_width", range(1, 8))
def test_up_to_seven_bits_are_always_centred(bit_width: int) -> None:
    top = 2**bit_width - 1
    centred = affine_grid(bit_width, [0, top], [[0, top], [0, top]]).centred()
    assert centred.codes.tolist() == [[0, top], [-top, 0]]
    assert centred.zero_point.dtype == torch.int8
    assert not centred.zero_point.any()


def test_eight_bits_are_centred_where_the_codes_allow_it() -> None:
    assert affine_grid(8, [128, 127], [[0, 255], [0, 254]]).centred().codes.tolist() == [[-128, 127], [-127, 127]]
    wide = affine_grid(8, [127, 127], [[0, 255], [0, 255]])
    assert wide.centred() is wide


def test_a_symmetric_grid_is_its_own_centre() -> None:
    grid = integer_grid(codes_of("uniform", Granularity.channel(0)))
    assert grid is not None
    assert torch.equal(grid.centred().codes, grid.codes)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_affine_weights_run_in_integers_with_a_zero_point_of_zero(tmp_path: Path, granularity: str) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 8, 8)
    layers = (nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Linear(180, 4))
    for layer in (*layers[:3], layers[4]):
        layer.weight.data += 0.1  # away from a zero point in the middle
    model = quantized(nn.Sequential(*layers), image, weights="affine", granularity=granularity)
    grids = [integer_grid(codes) for codes in bake_weights(model)[1].values()]
    assert all(grid is not None and bool(grid.zero_point.any()) for grid in grids)
    for container, in_integers, decoded_in_float in (("int8", 3, 0), ("int4", 0, 1)):  # a linear layer that is decoded while loading
        report = export(model, tmp_path / "m.onnx", sample=image, weight_container=container, measure_speed=False)
        assert report.parity.passed
        assert report.integer is not None
        assert report.integer.operators.get("QLinearConv", 0) == report.integer.conv_integer == in_integers
        held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer}
        zero_points = [value for name, value in held.items() if "weight" in name and name.endswith("zero_point")]
        assert len(zero_points) == 4 - decoded_in_float
        assert any(value.astype(int).any() for value in zero_points) == (container == "int4")


@pytest.mark.parametrize("granularity", [Granularity.tensor(), Granularity.channel(0)], ids=str)
@pytest.mark.parametrize("bit_width", [1, 2, 4, 7])
def test_zero_midway_between_two_levels_doubles_the_codes(bit_width: int, granularity: Granularity) -> None:
    top = 2**bit_width - 1
    codes = torch.arange(2 * (top + 1)).reshape(2, -1).remainder(top + 1).to(torch.uint8)
    shape = granularity.scale_shape(codes)
    decoder = AffineDecoder(torch.full(shape, 0.37), torch.full(shape, top / 2), granularity)
    weight = QTensor(codes, decoder, bit_width)
    grid = integer_grid(weight)
    assert grid is not None
    assert grid.codes[0].tolist() == list(range(-top, top + 1, 2))
    assert not grid.zero_point.any()
    assert grid.scale.flatten()[0].item() == torch.tensor(0.37).item() / 2
    assert torch.equal(grid.decode(), weight.decode())


@pytest.mark.parametrize(
    ("bit_width", "zero_point", "why"),
    [
        (8, 127.5, "8-bit levels with zero midway between two"),
        (4, 3.3, "levels with a zero point that is no multiple of 1/2"),
    ],
)
def test_other_zero_points_have_no_integer_grid_and_a_reason(bit_width: int, zero_point: float, why: str) -> None:
    codes = torch.arange(2**bit_width).to(torch.uint8)
    weight = QTensor(codes, AffineDecoder(torch.tensor(0.5), torch.tensor(zero_point), Granularity.tensor()), bit_width)
    assert integer_grid(weight) is None
    assert why_no_integer_grid(weight) == why


def test_every_weight_without_an_integer_grid_has_a_reason() -> None:
    assert why_no_integer_grid(codes_of("codebook", Granularity.tensor())) == "the levels of a codebook quantizer"
    assert why_no_integer_grid(codes_of("uniform", Granularity.group(9))) == "groups within a channel"


def test_rescaling_multiplies_channels_and_negates_codes() -> None:
    codes = torch.tensor([[7, -3, 120], [10, 20, -30], [1, 2, 3]], dtype=torch.int8)
    for scale, axis in ((torch.tensor([0.5, 0.25, 2.0]), 0), (torch.tensor(0.5), None)):
        grid = IntegerGrid(codes, scale, torch.zeros_like(scale).to(torch.int8), axis)
        factor = torch.tensor([2.0, -3.0, 0.0], dtype=torch.float64)
        rescaled = grid.rescaled(factor)
        assert rescaled is not None
        assert rescaled.axis == 0
        assert rescaled.codes.tolist() == [[7, -3, 120], [-10, -20, 30], [0, 0, 0]]
        assert torch.equal(rescaled.decode(), grid.decode() * factor.float()[:, None])
        assert bool((rescaled.scale > 0).all())


def test_rescaling_keeps_a_zero_point_that_cannot_be_centred() -> None:
    wide = affine_grid(8, [127, 127], [[0, 255], [0, 254]])
    rescaled = wide.rescaled(torch.tensor([1.0, 1.0]))
    assert rescaled is not None
    assert rescaled.zero_point.tolist() == [-1, -1]
    assert torch.equal(rescaled.decode(), wide.decode())


def test_the_lowest_code_cannot_be_negated_in_int8_and_another_axis_not_rescaled() -> None:
    grid = IntegerGrid(torch.tensor([[-128], [1]], dtype=torch.int8), torch.ones(()), torch.zeros((), dtype=torch.int8), None)
    assert grid.rescaled(torch.tensor([-1.0, 1.0])) is None
    assert grid.rescaled(torch.tensor([1.0, -1.0])) is not None
    along_inputs = integer_grid(codes_of("uniform", Granularity.channel(1)))
    assert along_inputs is not None
    assert along_inputs.rescaled(torch.ones(6)) is None


def test_coarsening_rounds_to_the_least_scale_and_leaves_coarser_channels_alone() -> None:
    codes = torch.tensor([[7, -3, 120], [10, 20, -30]], dtype=torch.int8)
    grid = IntegerGrid(codes, torch.tensor([0.1, 2.0]), torch.tensor([1, 0], dtype=torch.int8), 0)
    coarse = grid.coarsened(torch.tensor([1.0, 1.0]))
    assert coarse.scale.tolist() == [1.0, 2.0]
    assert coarse.codes.tolist() == [[2, 1, 13], [10, 20, -30]]
    assert coarse.decode().tolist() == [[1.0, 0.0, 12.0], [20.0, 40.0, -60.0]]


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
