from __future__ import annotations

import pytest
import torch

from lowbit.runtime.cpu.bits import pack_signs, unpack_bits, unpack_signs, words_for


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_unpacking_undoes_packing(count: int, dim: int) -> None:
    shape = [3, 4, 5]
    shape[dim] = count
    x = torch.randn(shape)
    words = pack_signs(x, dim)
    assert words.dtype == torch.int32
    assert words.shape[dim] == words_for(count) == -(-count // 32)
    assert torch.equal(unpack_signs(words, count, dim), torch.where(x >= 0, 1.0, -1.0))
    assert torch.equal(unpack_bits(words, count, dim), x >= 0)


def test_bits_lie_from_the_lowest_and_zero_is_positive_and_nan_is_not() -> None:
    x = torch.full((32,), -1.0)
    x[0], x[5], x[31] = 0.0, 3.0, -0.0
    assert pack_signs(x).tolist() == [1 + 2**5 - 2**31]
    x[5] = float("nan")
    assert pack_signs(x).tolist() == [1 - 2**31]


def test_bits_beyond_the_count_are_zero() -> None:
    assert pack_signs(torch.ones(33)).tolist() == [-1, 1]
