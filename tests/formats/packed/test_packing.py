from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st

from lowbit.errors import SpecError
from lowbit.formats.packed.packing import pack, packed_size, unpack

bit_widths = pytest.mark.parametrize("bit_width", range(1, 9))


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 8), st.data())
def test_unpacking_gives_back_what_was_packed(bit_width: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bit_width - 1), max_size=70))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bit_width)
    assert packed.dtype == torch.uint8
    assert packed.numel() == packed_size(len(codes), bit_width) == -(-len(codes) * bit_width // 8)
    assert unpack(packed, bit_width, len(codes)).tolist() == codes


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.data())
def test_the_bytes_are_one_little_endian_stream_of_bits(bit_width: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bit_width - 1), max_size=40))
    stream = sum(code << (index * bit_width) for index, code in enumerate(codes))
    expected = stream.to_bytes(packed_size(len(codes), bit_width), "little")
    assert bytes(pack(torch.tensor(codes, dtype=torch.int64), bit_width).tolist()) == expected


def test_three_bit_codes_cross_byte_borders() -> None:
    # 1 | 2 << 3 | 3 << 6 | 4 << 9 | 5 << 12 | 6 << 15 | 7 << 18 | 0 << 21
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0]), 3).tolist() == [0b11010001, 0b01011000, 0b00011111]


@bit_widths
def test_codes_of_any_shape_type_and_layout_are_packed_in_row_major_order(bit_width: int) -> None:
    codes = torch.randint(0, 2**bit_width, (5, 3, 7))
    expected = pack(codes.reshape(-1), bit_width)
    for same in (codes.to(torch.uint8), codes.to(torch.int16), codes.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        assert torch.equal(pack(same, bit_width), expected)


@bit_widths
def test_the_ends_of_the_range_survive_and_nothing_is_needed_for_no_codes(bit_width: int) -> None:
    codes = torch.tensor([0, 2**bit_width - 1] * 9)
    assert unpack(pack(codes, bit_width), bit_width, 18).tolist() == codes.tolist()
    assert pack(torch.empty(0, dtype=torch.uint8), bit_width).numel() == 0
    assert unpack(torch.empty(0, dtype=torch.uint8), bit_width, 0).numel() == 0


@pytest.mark.parametrize("code", [-1, 8])
def test_codes_that_do_not_fit_are_refused(code: int) -> None:
    with pytest.raises(SpecError, match=r"3-bit codes must lie in 0\.\.7, got"):
        pack(torch.tensor([0, code, 7]), 3)


def test_floats_bit_widths_and_sizes_are_checked() -> None:
    with pytest.raises(SpecError, match=r"must be integers, got torch\.float32"):
        pack(torch.zeros(3), 3)
    for bit_width in (0, 9):
        with pytest.raises(SpecError, match="from 1 to 8"):
            pack(torch.zeros(3, dtype=torch.uint8), bit_width)
    with pytest.raises(SpecError, match=r"9 codes of 3 bits need a uint8 vector of 4 bytes, got torch\.uint8 of shape \(3,\)"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 9)
    with pytest.raises(SpecError, match=r"torch\.int8"):
        unpack(torch.zeros(4, dtype=torch.int8), 3, 9)
