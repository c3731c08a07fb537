from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from lowbit.runtime.cpu.dot_kernel import UNIT, VECTORS, make_dot_kernel  # noqa: E402
from lowbit.runtime.cpu.target import processor_features  # noqa: E402

FORMS = [(16, False), (32, False), (32, True), (64, False), (64, True)]


@functools.cache
def compiled(rows: int, lanes: int, has_dot: bool) -> Any:
    kernel = make_dot_kernel(rows, lanes, has_dot=has_dot)

    @numba.njit
    def run(codes: Any, bit_width: int, units: int, x: Any, out: Any) -> None:
        data = codes.ctypes.data, x.ctypes.data, out.ctypes.data
        kernel(data[0], bit_width, units, codes.shape[1], data[1], x.shape[1], data[2], 4 * out.shape[1])

    return run


@pytest.mark.parametrize(("lanes", "has_dot"), FORMS)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("bit_width", [1, 2, 4, 8])
def test_it_adds_up_the_products_of_codes_and_inputs(bit_width: int, rows: int, lanes: int, has_dot: bool) -> None:
    if has_dot and not {"avx512vnni", "avx512vl"} <= processor_features():
        pytest.skip("this processor has no VNNI")
    generator, groups, outputs = np.random.default_rng(0), 3, VECTORS * lanes // 4
    units, parts = -(-outputs // UNIT), 8 // bit_width
    words = generator.integers(0, 256, (units, groups, UNIT, 4), dtype=np.uint8)
    words[0, :, 0] = 255  # the largest sums
    x = generator.integers(-127, 128, (rows, groups * parts * 4)).astype(np.int8)
    x[0] = -128
    codes = np.stack([words >> (part * bit_width) & (2**bit_width - 1) for part in range(parts)], 2)  # [units, groups, parts, UNIT, 4]
    expected = np.einsum("ugprk,mgpk->mur", codes.astype(np.int64), x.reshape(rows, groups, parts, 4).astype(np.int64)).reshape(rows, -1)
    out = np.full((rows, outputs), -7, np.int32)
    run = compiled(rows, lanes, has_dot)
    run(words.reshape(units, groups, -1), bit_width, units, x, out)
    assert np.array_equal(out, expected[:, :outputs])
    run(words.reshape(units, groups, -1), bit_width, 1, x, out)
    assert np.array_equal(out[:, :UNIT], expected[:, : min(UNIT, outputs)])
