from __future__ import annotations

import pytest
import torch

from lowbit.errors import SpecError
from lowbit.runtime.arguments import Affine, Window
from lowbit.runtime.layers import int8
from lowbit.runtime.layers.int8 import (
    InputGrid,
    _codes,
    has_exact_kernels,
    input_grid,
    int8_conv2d,
    int8_conv2d_reference,
    int8_linear,
    int8_linear_reference,
)

GRID = [0.0, 0.5, 2.0, 2.0, 0.5, 0.0, 7.0]  # codes 0 to 7 stand for -1 to 2.5
needs_kernels = pytest.mark.skipif(not has_exact_kernels(7), reason="torch has no exact 8-bit kernels for this processor")
both = pytest.mark.parametrize("is_reference", [True, pytest.param(False, marks=needs_kernels)])


def test_codes_round_half_to_even_saturate_and_count_from_the_lowest() -> None:
    x = torch.tensor([-9.0, -1.0, -0.25, 0.0, 0.25, 0.75, 2.5, 9.0])
    assert input_grid(GRID).encode(x).tolist() == [0, 0, 2, 2, 2, 4, 7, 7]
    signed = InputGrid(-0.7, 0.2, -4.0, 0.0, 0.2, -4, 3)
    assert signed.encode(torch.tensor([-0.7, -0.5, 0.1, 5.0])).tolist() == [0, 1, 4, 7]
    assert (input_grid(GRID).zero_code, signed.zero_code) == (2, 4)


GRIDS = [GRID, [-0.7, 0.2, -4.0, 0.0, 0.2, -4.0, 3.0], [0.0, 0.0123, 128.0, 128.0, 0.0123, 0.0, 255.0]]


@pytest.mark.parametrize("values", GRIDS)
@pytest.mark.parametrize("shape", [(2, 3, 70, 41), (1, 1, 5, 4), (3, 5000, 1, 2), (4, 7), (9,)])
@pytest.mark.parametrize("order", ["as it is", "channels-last", "turned", "sliced", "negated"])
def test_codes_made_in_one_pass_are_those_of_the_grid(values: list[float], shape: tuple[int, ...], order: str) -> None:
    grid, x = input_grid(values), torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x.view(-1)[:9] = torch.tensor([0.25, -0.25, 0.75, -0.0, 1e30, -1e30, torch.inf, -torch.inf, 3e6])
    if order == "channels-last" and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif order == "turned":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif order == "sliced":
        x = torch.stack([x, x], -1)[..., 0]
    elif order == "negated":
        x = torch.complex(torch.zeros(shape), -x).conj().imag
    codes = _codes(x, grid)
    assert torch.equal(codes, grid.encode(x))
    assert codes.dim() < 4 or codes.is_contiguous(memory_format=torch.channels_last)
    assert _codes(torch.full((1, 2, 2, 2), torch.nan), grid).unique().tolist() == [0]


@both
def test_a_convolution_of_codes_by_hand(is_reference: bool) -> None:
    function = int8_conv2d_reference if is_reference else int8_conv2d
    x = torch.tensor([[[[1.0, -3.0], [0.5, 2.0]]]])  # -3 saturates at -1
    codes = torch.tensor([2, -1], dtype=torch.int8).view(1, 1, 1, 2)
    y = function(x, codes, GRID, Window((1, 2)), Affine(torch.tensor([0.25]), torch.tensor([10.0])))
    assert y.tolist() == [[[[10 + 0.25 * (2 * 1 + 1)], [10 + 0.25 * (2 * 0.5 - 2)]]]]


@both
def test_padding_counts_as_0_and_groups_and_dilation_as_in_float(is_reference: bool) -> None:
    function = int8_conv2d_reference if is_reference else int8_conv2d
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 6, (2, 4, 7, 6), generator=generator) * 0.5
    codes = torch.randint(-128, 128, (6, 2, 3, 3), generator=generator).to(torch.int8)
    scale, window = torch.rand(6, generator=generator), Window([3, 3], [2, 1], [1, 2], [1, 2], 2)
    expected = torch.nn.functional.conv2d(x, codes * scale.view(-1, 1, 1, 1), None, (2, 1), (1, 2), (1, 2), 2)
    y = function(x, codes, GRID, window, Affine(scale))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("most_input", "weight"), [(255, 64), (255, -64), (127, 127), (127, -128), (255, 127), (255, -128)])
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_sums_of_the_largest_products_are_exact_on_every_processor(most_input: int, weight: int, kind: str) -> None:
    grid = [0.0, 1.0, 0.0, 0.0, 1.0, 0.0, float(most_input)]
    x, codes = torch.full((2, 36, 5, 5), float(most_input)), torch.full((8, 36, 3, 3), weight, dtype=torch.int8)
    if kind == "conv2d":
        y = int8_conv2d(x, codes, grid, Window((3, 3)), Affine(torch.ones(8)))
    else:
        y = int8_linear(x[:, :, 0, 0], codes[:, :, 0, 0].contiguous(), grid, Affine(torch.ones(8)))
    assert y.unique().tolist() == [most_input * weight * 36 * (9 if kind == "conv2d" else 1)]


def test_kernels_that_saturate_are_exact_for_7_bits_on_one_side(monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch has no 8-bit kernels here at all")
    monkeypatch.setattr(int8, "saturates", lambda: True)
    exact = int8.has_exact_kernels.__wrapped__
    assert [exact(255, 64), exact(127, 128), exact(255, 65), exact(128, 128), exact()] == [True, True, False, False, False]
    monkeypatch.setattr(int8, "saturates", lambda: False)
    assert exact()


@both
def test_a_linear_layer_of_any_rank(is_reference: bool) -> None:
    function = int8_linear_reference if is_reference else int8_linear
    x, codes = torch.full((2, 3, 5), 0.5), torch.arange(-10, 10, dtype=torch.int8).view(4, 5)
    y = function(x, codes, GRID, Affine(torch.full((4,), 2.0), torch.ones(4)))
    assert y.shape == (2, 3, 4)
    torch.testing.assert_close(y[1, 2], codes.float().sum(1) + 1)


def test_codes_that_are_loaded_in_place_are_used_and_empty_batches_stay_empty() -> None:
    x, codes, affine = torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.int8), Affine(torch.ones(1))
    assert int8_conv2d(x, codes, GRID, Window([1, 1]), affine).item() == 1.0
    codes.fill_(-7)
    assert int8_conv2d(x, codes, GRID, Window([1, 1]), affine).item() == -7.0
    assert int8_conv2d(x[:0], codes, GRID, Window([1, 1]), affine).shape == (0, 1, 1, 1)


@pytest.mark.parametrize(
    ("window", "told"),
    [
        (Window((1, 1), stride=(0, 1)), "stride must be two whole numbers of at least 1"),
        (Window((1, 1), pad_value=-1), "only layers of signs have a pad_value, got -1"),
        (Window((3, 1)), r"codes of kernel size \[1, 1\] do not fit a window of \[3, 1\]"),
    ],
)
def test_a_window_that_does_not_fit_is_refused(window: Window, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        int8_conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 1, dtype=torch.int8), GRID, window, Affine(torch.ones(1)))


BAD_OPERANDS = [
    ({"scale": torch.ones(2)}, r"scale must be float32 \(3,\), got float32 \(2,\)"),
    ({"scale": torch.ones(3).double()}, r"scale must be float32 \(3,\), got float64"),
    ({"scale": torch.ones(())}, r"scale must be float32 \(3,\), got float32 \(\)"),
    ({"bias": torch.ones(1)}, r"bias must be float32 \(3,\), got float32 \(1,\)"),
    ({"codes": torch.ones(3, 2)}, "codes must be int8"),
    ({"codes": torch.ones(3, dtype=torch.int8)}, "codes must be int8"),
    ({"codes": torch.ones(0, 2, dtype=torch.int8)}, "not empty"),
    ({"x": torch.ones(4, 5)}, "an 8-bit layer of 2 input channels got an input of float32"),
    ({"x": torch.ones(4, 2, dtype=torch.int32)}, "got an input of int32"),
    ({"grid": GRID[:6]}, "7 finite numbers"),
    ({"grid": [*GRID[:5], 0.0, torch.inf]}, "7 finite numbers"),
    ({"grid": [*GRID[:5], 0.0, 256.0]}, "must fit a byte"),
    ({"grid": [*GRID[:5], 7.0, 0.0]}, "must fit a byte"),
    ({"grid": [0.0, 0.0, *GRID[2:]]}, "steps other than 0"),
    ({"grid": [*GRID[:3], 99.0, *GRID[4:]]}, "zero point 99"),
]


@both
@pytest.mark.parametrize("is_image", [True, False])
@pytest.mark.parametrize(("change", "told"), BAD_OPERANDS)
def test_operands_that_do_not_fit_are_refused(change: dict[str, object], told: str, is_image: bool, is_reference: bool) -> None:
    given = {
        "x": torch.ones(4, 2),
        "codes": torch.ones(3, 2, dtype=torch.int8),
        "grid": GRID,
        "scale": torch.ones(3),
        "bias": torch.ones(3),
    }
    x, codes, grid, scale, bias = (given | change).values()
    if is_image:
        function = int8_conv2d_reference if is_reference else int8_conv2d
        x, codes = x[..., None, None], codes[..., None, None]  # type: ignore[index]
        arguments = (x, codes, grid, Window((1, 1)), Affine(scale, bias))
    else:
        function = int8_linear_reference if is_reference else int8_linear  # type: ignore[assignment]
        arguments = (x, codes, grid, Affine(scale, bias))  # type: ignore[assignment]
    with pytest.raises(SpecError, match=told):
        function(*arguments)  # type: ignore[arg-type]


@both
def test_groups_and_images_that_do_not_fit_are_refused(is_reference: bool) -> None:
    function = int8_conv2d_reference if is_reference else int8_conv2d
    x, codes, affine = torch.ones(1, 2, 2, 2), torch.ones(3, 1, 3, 3, dtype=torch.int8), Affine(torch.ones(3))
    with pytest.raises(SpecError, match="3 output channels cannot be divided into 2 groups"):
        function(x, codes, GRID, Window((3, 3), padding=(1, 1), groups=2), affine)
    with pytest.raises(SpecError, match="got an input of float32"):
        function(x, codes, GRID, Window((3, 3), padding=(1, 1)), affine)
    with pytest.raises(SpecError, match="smaller than the kernel"):
        function(x[:, :1], codes, GRID, Window((3, 3)), affine)


@needs_kernels
def test_layers_that_share_codes_have_grids_of_their_own() -> None:
    x, codes = torch.full((1, 2), 0.5), torch.tensor([[3, 4]], dtype=torch.int8)
    other = [0.0, 0.5, 0.0, 0.0, 0.5, 0.0, 7.0]
    for grid in (GRID, other, GRID):
        assert int8_linear(x, codes, grid, Affine(torch.ones(1))).item() == 3.5
        image, kernel = x.view(1, 2, 1, 1), codes.view(1, 2, 1, 1)
        for window in (Window((1, 1)), Window((1, 1), padding=(1, 1))):
            y = int8_conv2d(image, kernel, grid, window, Affine(torch.ones(1)))
            assert y.sum().item() == 3.5
