"""Cycles of models of hardware against numbers worked out by hand."""

from __future__ import annotations

import pytest

from lowbit.errors import SpecError, UnknownNameError
from lowbit.measure.hardware_models import ALL_WIDTHS, analytic_table, bit_fusion, bit_serial
from lowbit.spec import LayerBits


@pytest.mark.parametrize(("weight", "activation", "cycles"), [(1, 1, 1000), (1, 8, 8000), (8, 1, 8000), (3, 5, 15_000), (8, 8, 64_000)])
def test_a_bit_serial_unit_takes_a_cycle_for_each_pair_of_bits(weight: int, activation: int, cycles: int) -> None:
    assert bit_serial(1000, weight, activation) == cycles


@pytest.mark.parametrize(
    ("weight", "activation", "in_a_cycle"),
    [(8, 8, 1), (5, 8, 1), (4, 8, 2), (8, 3, 2), (4, 4, 4), (8, 2, 4), (8, 1, 4), (2, 4, 8), (2, 2, 16), (1, 1, 16), (1, 2, 16)],
)
def test_a_fusion_unit_makes_as_many_products_in_a_cycle_as_its_bricks_allow(weight: int, activation: int, in_a_cycle: int) -> None:
    assert bit_fusion(1600, weight, activation) == 1600 / in_a_cycle


def test_wider_operands_take_a_fusion_unit_several_cycles() -> None:
    assert bit_fusion(10, 16, 8) == 20
    assert bit_fusion(10, 9, 16) == 40
    assert bit_fusion(10, 32, 32) == 160


def test_a_table_has_every_layer_at_every_pair_of_widths_and_floats_count_32_bits() -> None:
    table = analytic_table("bit_fusion", {"conv": 320.0, "embedding": 0.0})
    table.check({"conv": ALL_WIDTHS, "embedding": ALL_WIDTHS})
    assert len(table.times["conv"]) == 81
    assert (table.unit, table.facts) == ("cycles", {"model": "bit_fusion"})
    assert table.time("conv", LayerBits(4, 2)) == 40
    assert table.time("conv", LayerBits(8, None)) == 320 * 4
    assert table.time("conv", LayerBits(None, None)) == 320 * 16
    assert table.time("embedding", LayerBits(8, 8)) == 0


def test_a_table_can_have_some_widths_only() -> None:
    assert analytic_table("bit_serial", {"a": 2, "b": 3}, [LayerBits(2, 8)]).times == {"a": {"2/8": 32}, "b": {"2/8": 48}}


def test_what_is_no_model_or_no_layer_is_an_error() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'bit_serial'"):
        analytic_table("bitserial", {"a": 1})
    with pytest.raises(SpecError, match="at least 1 bit, got 5 macs, 0 and 8 bits"):
        bit_serial(5, 0, 8)
    with pytest.raises(SpecError, match="macs from 0"):
        bit_fusion(float("nan"), 8, 8)
