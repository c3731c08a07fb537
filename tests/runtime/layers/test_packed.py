from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.library import opcheck

from lowbit.errors import SpecError
from lowbit.runtime.arguments import Window
from lowbit.runtime.layers.packed import (
    PackedWeight,
    pack_linear_weight,
    packed_conv2d,
    packed_linear,
    packed_linear_reference,
    packed_loops,
    quantize_rows,
    unpack_linear_weight,
)

needs_kernels = pytest.mark.skipif(packed_loops() is None, reason="there are no compiled kernels here")


def a_layer(
    bits: int, inputs: int, outputs: int, *, is_even: bool = True, rows: int = 3
) -> tuple[torch.Tensor, PackedWeight[torch.Tensor], torch.Tensor, torch.Tensor]:
    """An input, a packed weight, a bias, and the weight."""
    codes = torch.randint(0, 2**bits, (outputs, inputs))
    steps, lowest = torch.rand(outputs, 1) + 0.1, torch.randn(outputs, 1)
    table = lowest + steps * torch.arange(2**bits) if is_even else torch.randn(outputs, 2**bits)
    return torch.randn(rows, inputs), pack_linear_weight(codes, table, bits), torch.randn(outputs), table.gather(1, codes)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bits=st.integers(1, 8), inputs=st.integers(1, 700), outputs=st.integers(1, 9), is_even=st.booleans())
def test_packing_keeps_every_weight_and_float_arithmetic_is_the_plain_product(bits: int, inputs: int, outputs: int, is_even: bool) -> None:
    x, packed, bias, weight = a_layer(bits, inputs, outputs, is_even=is_even)
    assert packed.table.shape[1] == (2 if is_even or bits == 1 else 2**packed.bit_width)
    torch.testing.assert_close(unpack_linear_weight(packed), weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_linear(x, packed, bias), torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)


@needs_kernels
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bits=st.integers(1, 8), inputs=st.integers(1, 1500), outputs=st.integers(1, 150), rows=st.integers(1, 140))
def test_the_kernel_gives_the_sums_of_the_reference(bits: int, inputs: int, outputs: int, rows: int) -> None:
    x, packed, _, _ = a_layer(bits, inputs, outputs, rows=rows)
    whole = replace(packed, table=torch.tensor([[0.0, 1.0]]))  # codes stand for themselves: sums are integers
    x = x.sign() * (x.abs() * 50).round().clamp(max=127)
    x[:, 0] = 127  # the scale is 1
    expected = packed_linear_reference(x.double(), replace(whole, table=whole.table.double()), None)
    assert torch.equal(packed_linear(x, whole, None, "int8"), expected.float())


@needs_kernels
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(bits: int) -> None:
    x, packed, bias, _ = a_layer(bits, 700, 300, rows=67)
    together = packed_linear(x, packed, bias, "int8")
    assert torch.equal(together, torch.cat([packed_linear(row[None], packed, bias, "int8") for row in x]))


@needs_kernels
def test_sums_that_32_bits_cannot_hold_do_not_wrap_around() -> None:
    inputs = 2**31 // (255 * 127) + 1
    packed = pack_linear_weight(torch.full((1, inputs), 255), torch.arange(256.0)[None], 8)
    found = packed_linear(torch.ones(1, inputs), packed, None, "int8")
    assert float(found) == pytest.approx(255 * inputs, rel=1e-4)


@needs_kernels
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_int8_arithmetic_is_close_to_float_and_equal_to_its_reference(bits: int) -> None:
    torch.manual_seed(0)
    x, packed, bias, weight = a_layer(bits, 512, 64)
    got = packed_linear(x, packed, bias, "int8")
    torch.testing.assert_close(got, packed_linear_reference(x, packed, bias, "int8"), rtol=1e-4, atol=1e-3)
    expected = torch.nn.functional.linear(x, weight, bias)
    assert float((got - expected).norm() / expected.norm()) < 0.01


def test_rows_are_rounded_to_8_bits_and_rows_of_zeros_stay_zero() -> None:
    codes, scale = quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([2 / 127, 1.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_the_others_stay(bad: float) -> None:
    x, packed, bias, _ = a_layer(4, 100, 8)
    expected = packed_linear(x, packed, bias, "int8")
    x[1, 40] = bad
    for function in (packed_linear, packed_linear_reference):
        got = function(x, packed, bias, "int8")
        assert got[1].isnan().all()
        torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-4)


def test_it_is_an_operator_and_takes_no_rows_too() -> None:
    x, packed, bias, _ = a_layer(2, 30, 5)
    arguments = packed_linear.flatten(x, packed, bias)
    opcheck(torch.ops.lowbit.packed_linear.default, (), arguments, test_utils=("test_schema", "test_faketensor"))
    assert packed_linear(x[:0], packed, bias, "int8").shape == (0, 5)
    assert packed_linear(x[None], packed, bias).shape == (1, 3, 5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: {"x": a["x"].double()}, "takes float32"),
        (lambda a: {"words": a["words"][:, :-1]}, "packed weights must be uint8"),
        (lambda a: {"table": a["table"][:, :1]}, "table must be"),
        (lambda a: {"arithmetic": "int9"}, "arithmetic must be"),
        (lambda a: {"bit_width": 3}, "containers of 1, 2, 4 or 8"),
        (lambda a: {"bias": a["bias"][:1]}, "bias must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[dict[str, Any]], dict[str, object]], told: str) -> None:
    x, packed, bias, _ = a_layer(4, 30, 5)
    arguments = packed_linear.flatten(x, packed, bias)
    with pytest.raises(SpecError, match=told):
        packed_linear.flat(**arguments | change(arguments))


@pytest.mark.parametrize(("bits", "groups"), [(1, 1), (3, 2)])
def test_a_convolution_decodes_its_weight_for_the_call(bits: int, groups: int) -> None:
    window = Window((3, 2), (2, 1), (1, 0), (1, 2), groups)
    _, packed, bias, weight = a_layer(bits, 4 * 3 * 2, 6, is_even=False)
    x = torch.randn(2, 4 * groups, 9, 8)
    expected = torch.nn.functional.conv2d(x, weight.view(6, 4, 3, 2), bias, (2, 1), (1, 0), (1, 2), groups)
    got = packed_conv2d(x, packed, bias, window)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(SpecError, match="do not fit a window of"):
        packed_conv2d(x, packed, bias, replace(window, kernel_size=(5, 1)))
    with pytest.raises(SpecError, match=rf"takes float32 \[N, {4 * groups}, H, W\]"):
        packed_conv2d(x[:, 1:], packed, bias, window)
    opcheck(torch.ops.lowbit.packed_conv2d.default, (), packed_conv2d.flatten(x, packed, bias, window), test_utils=("test_faketensor",))


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match=r"0\.\.3"):
        pack_linear_weight(torch.tensor([[4]]), torch.zeros(1, 4), 2)
    with pytest.raises(SpecError, match="table must be"):
        pack_linear_weight(torch.tensor([[3]]), torch.zeros(1, 5), 2)
