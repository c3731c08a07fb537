from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from tests.runtime.binary_cases import any_window
from tests.runtime.test_compile import images, trained
from torch import Tensor, nn
from torch.library import opcheck
from torch.nn import functional

import lowbit
from lowbit.errors import LayerError, SpecError
from lowbit.runtime.arguments import Affine, PlanesLayer, Window
from lowbit.runtime.layers import planes
from lowbit.runtime.layers.binary import compiled_loops
from lowbit.runtime.layers.int8 import InputGrid, has_exact_kernels
from lowbit.runtime.layers.planes import (
    choose_kernel,
    input_thresholds,
    pack_planes,
    planes_conv2d,
    planes_conv2d_reference,
    planes_linear,
    planes_linear_reference,
    unpack_planes,
)
from lowbit.runtime.lowering import convert

needs_kernels = pytest.mark.skipif(compiled_loops() is None, reason="there are no compiled kernels here")
WEIGHTS = [(-1, 1), (-1, 0, 1), (-2, -1, 0, 1), (-3, -1, 1, 3), (0,), (-3, -2, -1, 0, 1, 2, 3)]


def whole_numbers(levels: tuple[int, ...], shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.tensor(levels)[torch.randint(len(levels), shape, generator=generator)].float()


def planes_layer(weight: Tensor, thresholds: Tensor, zero_code: int, groups: int = 1) -> PlanesLayer[Tensor]:
    words, mask = pack_planes(weight, groups)
    return PlanesLayer(words, weight.shape[1] * groups, thresholds, zero_code, mask)


@needs_kernels
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_the_kernels_give_the_numbers_of_the_reference_for_any_shape(data: st.DataObject) -> None:
    draw = data.draw
    (inputs, outputs), window, size = any_window(draw)
    groups = window.groups
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = whole_numbers(draw(st.sampled_from(WEIGHTS)), (groups * outputs, inputs, *window.kernel_size), generator)
    levels, channels = draw(st.integers(1, 15)), draw(st.sampled_from([1, groups * inputs]))
    thresholds = torch.randn(levels, channels, generator=generator).sort(0).values
    x = torch.randn(draw(st.integers(0, 3)), groups * inputs, *size, generator=generator)
    if draw(st.booleans()):
        x = x.contiguous(memory_format=torch.channels_last)
    layer = planes_layer(weight, thresholds, draw(st.integers(0, levels)), groups)
    arguments = x, layer, window, Affine(torch.rand(groups * outputs), torch.randn(groups * outputs))
    got = planes_conv2d(*arguments)
    assert torch.equal(got, planes_conv2d_reference(*arguments))
    assert got.is_contiguous(memory_format=torch.channels_last) or not x.numel()


@pytest.mark.parametrize("is_reference", [True, pytest.param(False, marks=needs_kernels)])
@pytest.mark.parametrize("levels", WEIGHTS)
@pytest.mark.parametrize("zero_point", [0, 2])
def test_it_is_the_convolution_of_what_the_codes_stand_for(zero_point: int, levels: tuple[int, ...], is_reference: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 36, 7, 6, generator=generator), whole_numbers(levels, (10, 18, 3, 3), generator)
    scale, bias = torch.rand(10, generator=generator), torch.randn(10, generator=generator)
    grid = InputGrid(0.0, 0.4, float(zero_point), float(zero_point), 0.4, 0, 7)
    function = planes_conv2d_reference if is_reference else planes_conv2d
    window = Window((3, 3), (2, 1), (1, 2), groups=2)
    got = function(x, planes_layer(weight, input_thresholds(grid), grid.zero_code, 2), window, Affine(scale * 0.4, bias))
    values = ((x / 0.4).round() + zero_point).clamp(0, 7).sub(zero_point).mul(0.4)
    expected = functional.conv2d(values, weight * scale.reshape(-1, 1, 1, 1), bias, (2, 1), (1, 2), groups=2)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("is_reference", [True, pytest.param(False, marks=needs_kernels)])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 100), (0, 40)])
def test_a_linear_layer_of_planes(shape: tuple[int, ...], is_reference: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(shape, generator=generator), whole_numbers((-2, -1, 0, 1), (7, shape[-1]), generator)
    scale, bias = torch.rand(7, generator=generator), torch.randn(7, generator=generator)
    function = planes_linear_reference if is_reference else planes_linear
    got = function(x, planes_layer(weight, torch.tensor([[0.5], [1.5], [2.5]]), 1), Affine(scale, bias))
    codes = torch.bucketize(x, torch.tensor([0.5, 1.5, 2.5]))
    torch.testing.assert_close(got, functional.linear(codes.float() - 1, weight) * scale + bias)


@pytest.mark.parametrize(
    ("levels", "count", "is_masked"), [((-1, 1), 1, False), ((-1, 0, 1), 1, True), ((-3, -1, 1, 3), 2, False), ((0, 2), 2, True)]
)
def test_weights_take_as_few_planes_as_they_need(levels: tuple[int, ...], count: int, is_masked: bool) -> None:
    weight = whole_numbers(levels, (6, 40, 2, 1), torch.Generator().manual_seed(0))
    words, mask = pack_planes(weight)
    assert words.shape == (count, 6, 2, 1, 2)
    assert (mask is not None) == is_masked
    assert torch.equal(unpack_planes(words, mask, 40).movedim(-1, 1), weight)


@pytest.mark.parametrize(
    "grid",
    [
        InputGrid(0.0, 0.1, 0.0, 0.0, 0.1, 0, 3),
        InputGrid(0.0, 0.3, 7.0, 7.0, 0.3, 0, 15),
        InputGrid(-0.7, 0.2, -4.0, 0.0, 0.2, -4, 3),
    ],
)
def test_thresholds_give_the_codes_of_a_grid_to_the_last_bit(grid: InputGrid) -> None:
    thresholds = input_thresholds(grid)
    below = torch.nextafter(thresholds, torch.tensor(-torch.inf))
    x = torch.cat([thresholds.flatten(), below.flatten(), torch.linspace(-6, 6, 1001), torch.tensor([torch.inf, -torch.inf])])
    assert torch.equal((x >= thresholds).sum(0), grid.encode(x).long())


def test_what_is_no_number_has_code_0() -> None:
    layer = planes_layer(torch.ones(1, 32), torch.tensor([[0.0], [1.0]]), 0)
    x = torch.full((1, 32), torch.nan)
    assert planes_linear(x, layer, Affine(torch.ones(1))).item() == 0


@needs_kernels
def test_weights_that_are_loaded_in_place_are_used() -> None:
    x, layer, epilogue = torch.rand(3, 40), planes_layer(torch.full((8, 40), 3.0), torch.tensor([[0.5]]), 0), Affine(torch.ones(8))
    first = planes_linear(x, layer, epilogue)
    layer.words.copy_(pack_planes(torch.full((8, 40), -3.0))[0])
    assert torch.equal(planes_linear(x, layer, epilogue), -first)


def test_the_operators_can_be_exported_and_compiled() -> None:
    thresholds = torch.tensor([[0.0], [1.0]])
    generator = torch.Generator().manual_seed(0)
    layer = planes_layer(whole_numbers((-2, -1, 0, 1), (8, 5, 3, 3), generator), thresholds, 1)
    x, window = torch.randn(2, 5, 9, 9, generator=generator), Window((3, 3), (2, 1), (1, 1))
    opcheck(torch.ops.lowbit.planes_conv2d.default, (), planes_conv2d.flatten(x, layer, window, Affine(torch.rand(8))))
    linear = planes_linear.flatten(torch.randn(4, 40), planes_layer(torch.ones(7, 40), thresholds, 0), Affine(torch.rand(7)))
    opcheck(torch.ops.lowbit.planes_linear.default, (), linear)

    class Layer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return planes_conv2d(x, layer, window, Affine(torch.ones(8)))

    assert torch.equal(torch.export.export(Layer(), (x,)).module()(x), Layer()(x))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.randn(1, 6, 8, 8)}, "got an input of shape"),
        ({"x": torch.randn(1, 5, 8, 8).double()}, "takes float32 inputs, got torch.float64"),
        ({"x": torch.randn(1, 5, 1, 8)}, "smaller than the kernel's reach"),
        ({"words": torch.zeros(8, 3, 3, 1, dtype=torch.int32)}, "1 or 2 planes of words as pack_planes gives them"),
        ({"mask": torch.zeros(8, 3, 3, 1, dtype=torch.int32)}, "and a mask of"),
        ({"scale": torch.ones(4)}, r"scale must be float32 \(8,\)"),
        ({"thresholds": torch.zeros(3)}, r"thresholds must be float32 \[1..15, 1 or 5\]"),
        ({"thresholds": torch.zeros(16, 1)}, r"thresholds must be float32 \[1..15, 1 or 5\]"),
        ({"thresholds": torch.tensor([[1.0], [0.0]])}, "must ascend in each channel"),
        ({"thresholds": torch.tensor([[0.0], [torch.nan]])}, "must ascend in each channel"),
        ({"zero_code": 4}, r"zero_code must lie in 0..3"),
        ({"stride": [0, 1]}, "stride must be two whole numbers"),
        ({"groups": 2}, "cannot be divided into 2 groups"),
        ({"pad_value": 1}, "only layers of signs have a pad_value, got 1"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], told: str) -> None:
    words, mask = pack_planes(torch.ones(8, 5, 3, 3))
    arguments: dict[str, Any] = {
        "x": torch.randn(1, 5, 8, 8), "words": words, "mask": mask, "scale": torch.ones(8), "bias": None,
        "thresholds": torch.tensor([[0.0], [1.0], [2.0]]), "zero_code": 0, "in_channels": 5,
        "kernel_size": [3, 3], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1,
    }  # fmt: skip
    with pytest.raises(SpecError, match=told):
        planes_conv2d.flat(**{**arguments, **change})


def test_gradients_are_refused() -> None:
    layer = planes_layer(torch.ones(8, 5), torch.zeros(1, 1), 0)
    with pytest.raises(LayerError, match="planes_linear has no derivative"):
        planes_linear(torch.randn(1, 5, requires_grad=True), layer, Affine(torch.ones(8)))


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        (torch.full((4, 3), 0.5), "must hold whole numbers from -3 to 3"),
        (torch.full((4, 3), 4.0), "must hold whole numbers"),
        (torch.ones(4, 3, 3), "needs a shape"),
    ],
)
def test_weights_that_are_no_small_whole_numbers_are_not_packed(weight: Tensor, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        pack_planes(weight)


def test_planes_are_chosen_up_to_what_they_are_worth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes, "most_pairs", lambda: (2, "measured"))
    monkeypatch.setattr(planes, "has_exact_kernels", lambda *_: True)
    assert [choose_kernel(*bits)[0] for bits in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 4), (8, 8))] == ["planes"] * 3 + ["int8"] * 3
    assert choose_kernel(2, 2)[1] == "4 pairs of bits, more than 2: measured"
    monkeypatch.setattr(planes, "has_exact_kernels", lambda *_: False)
    assert choose_kernel(4, 4)[0] == "float"
    with pytest.raises(SpecError, match="activation_bits must be 1 to 8, got 9"):
        choose_kernel(1, 9)


@torch.no_grad()
@pytest.mark.parametrize(("method", "weight_bits"), [("dorefa", 1), ("lsq", 2)])
def test_a_compiled_network_runs_on_planes_where_they_are_chosen(method: str, weight_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert, "choose_kernel", lambda *_: ("planes", ""))
    model = trained(method, weight_bits, activation_bits=2)
    fast = lowbit.compile_runtime(model, sample=images())
    paths = {layer.name: layer for layer in fast.report.layers}
    assert (paths["layer1.0.conv1"].kernel, paths["layer1.0.conv1"].fused) == ("planes", ("batch norm",))
    torch.testing.assert_close(fast(images(7)), model(images(7)), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(convert, "choose_kernel", lambda *_: ("int8", ""))
    if has_exact_kernels():
        others = {layer.name: layer.kernel for layer in lowbit.compile_runtime(model, sample=images()).report.layers}
        assert others["layer1.0.conv1"] == "int8"
