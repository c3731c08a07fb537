from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch.library import opcheck

from lowbit.errors import SpecError
from lowbit.runtime.layers.packed import (
    pack_linear_weight,
    packed_linear,
    packed_linear_reference,
    packed_loops,
    quantize_rows,
    unpack_linear_weight,
)

needs_kernels = pytest.mark.skipif(packed_loops() is None, reason="there are no compiled kernels here")


def a_layer(
    bits: int, inputs: int, outputs: int, *, is_even: bool = True, rows: int = 3
) -> tuple[torch.Tensor, tuple[object, ...], torch.Tensor]:
    """An input, the arguments behind it, and the weight."""
    codes = torch.randint(0, 2**bits, (outputs, inputs))
    steps, lowest = torch.rand(outputs, 1) + 0.1, torch.randn(outputs, 1)
    table = lowest + steps * torch.arange(2**bits) if is_even else torch.randn(outputs, 2**bits)
    packed = pack_linear_weight(codes, table, bits)
    weight = table.gather(1, codes)
    return torch.randn(rows, inputs), (packed.words, packed.table, torch.randn(outputs), packed.bit_width, inputs, outputs), weight


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bits=st.integers(1, 8), inputs=st.integers(1, 700), outputs=st.integers(1, 9), is_even=st.booleans())
def test_packing_keeps_every_weight_and_float_arithmetic_is_the_plain_product(bits: int, inputs: int, outputs: int, is_even: bool) -> None:
    x, arguments, weight = a_layer(bits, inputs, outputs, is_even=is_even)
    words, table, bias, width, *_ = arguments
    assert table.shape[1] == (2 if is_even or bits == 1 else 2**width)  # type: ignore[attr-defined]
    got = unpack_linear_weight(words, table, width, outputs, inputs)  # type: ignore[arg-type]
    torch.testing.assert_close(got, weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed_linear(x, *arguments), torch.nn.functional.linear(x, weight, bias), rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


@needs_kernels
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bits=st.integers(1, 8), inputs=st.integers(1, 1500), outputs=st.integers(1, 13), rows=st.integers(1, 4))
def test_the_kernel_gives_the_sums_of_the_reference(bits: int, inputs: int, outputs: int, rows: int) -> None:
    x, (words, _, _, width, *_), _ = a_layer(bits, inputs, outputs, rows=rows)
    whole = torch.tensor([[0.0, 1.0]])  # codes stand for themselves: sums are integers
    x = x.sign() * (x.abs() * 50).round().clamp(max=127)
    x[:, 0] = 127  # the scale is 1
    got = packed_linear(x, words, whole, None, width, inputs, outputs, "int8")  # type: ignore[arg-type]
    assert torch.equal(got, packed_linear_reference(x.double(), words, whole.double(), None, width, inputs, outputs).float())  # type: ignore[arg-type]


@needs_kernels
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_int8_arithmetic_is_close_to_float_and_equal_to_its_reference(bits: int) -> None:
    torch.manual_seed(0)
    x, arguments, weight = a_layer(bits, 512, 64)
    got = packed_linear(x, *arguments, "int8")  # type: ignore[arg-type]
    torch.testing.assert_close(got, packed_linear_reference(x, *arguments, "int8"), rtol=1e-4, atol=1e-3)  # type: ignore[arg-type]
    expected = torch.nn.functional.linear(x, weight, arguments[2])  # type: ignore[arg-type]
    assert float((got - expected).norm() / expected.norm()) < 0.01


def test_rows_are_rounded_to_8_bits_and_rows_of_zeros_stay_zero() -> None:
    codes, scale = quantize_rows(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert scale.flatten().tolist() == pytest.approx([2 / 127, 1.0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_gives_nan_and_the_others_stay(bad: float) -> None:
    x, arguments, _ = a_layer(4, 100, 8)
    expected = packed_linear(x, *arguments, "int8")  # type: ignore[arg-type]
    x[1, 40] = bad
    for function in (packed_linear, packed_linear_reference):
        got = function(x, *arguments, "int8")  # type: ignore[operator]
        assert got[1].isnan().all()
        torch.testing.assert_close(got[[0, 2]], expected[[0, 2]], rtol=1e-5, atol=1e-4)


def test_it_is_an_operator_and_takes_no_rows_too() -> None:
    x, arguments, _ = a_layer(2, 30, 5)
    opcheck(torch.ops.lowbit.packed_linear.default, (x, *arguments), test_utils=("test_schema", "test_faketensor"))
    assert packed_linear(x[:0], *arguments, "int8").shape == (0, 5)  # type: ignore[arg-type]
    assert packed_linear(x[None], *arguments).shape == (1, 3, 5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda a: (a[0].double(), *a[1:]), "takes float32"),
        (lambda a: (a[0], a[1][:, :-1], *a[2:]), "packed weights must be uint8"),
        (lambda a: (a[0], a[1], a[2][:, :1], *a[3:]), "table must be"),
        (lambda a: (*a, "int9"), "arithmetic must be"),
        (lambda a: (*a[:4], 3, *a[5:]), "containers of 1, 2, 4 or 8"),
        (lambda a: (*a[:3], a[3][:1], *a[4:]), "bias must be"),
    ],
)
def test_what_does_not_fit_is_refused(change: object, told: str) -> None:
    x, arguments, _ = a_layer(4, 30, 5)
    with pytest.raises(SpecError, match=told):
        packed_linear(*change((x, *arguments)))  # type: ignore[operator]


def test_codes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(SpecError, match=r"0\.\.3"):
        pack_linear_weight(torch.tensor([[4]]), torch.zeros(1, 4), 2)
    with pytest.raises(SpecError, match="table must be"):
        pack_linear_weight(torch.tensor([[3]]), torch.zeros(1, 5), 2)
