from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from lowbit.runtime.cpu.micro_kernel import LOOKUP_WORDS, TOGETHER, Tile, make_micro_kernel, subtract_multiple  # noqa: E402
from lowbit.runtime.cpu.target import processor_features  # noqa: E402

TILES = [
    Tile("count", 16, 7, 2),
    Tile("count", 4, 4, 4, is_masked=True),
    Tile("lookup", 16, 4, 1),
    Tile("lookup", 16, 3, 2, is_masked=True),
    Tile("lookup", 32, 4, 1),
    Tile("lookup", 32, 2, 2, is_masked=True),
    Tile("lookup", 64, 2, 1),
]
NEEDED = {16: "ssse3", 32: "avx2", 64: "avx512bw"}


@functools.cache
def compiled(tile: Tile) -> Any:
    kernel = make_micro_kernel(tile)

    @numba.njit
    def run(x: Any, y_runs: int, y_stride: int, x_runs: int, x_stride: int, length: int, weight: Any, mask: Any, out: Any) -> None:
        data = x.ctypes.data, weight.ctypes.data, mask.ctypes.data, out.ctypes.data
        kernel(data[0], 1, y_runs, y_stride, x_runs, x_stride, length, data[1], data[2], data[3])

    return run


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("runs", "length"), [((1, 1), 1), ((3, 2), LOOKUP_WORDS - 1), ((2, 1), 3 * LOOKUP_WORDS + 2)])
def test_it_counts_the_bits_that_differ(tile: Tile, runs: tuple[int, int], length: int) -> None:
    # runs lie length + 1 words apart, kernel rows twice that, and the window of each row of the tile begins a word after the former
    if tile.form == "lookup" and NEEDED[tile.lanes] not in processor_features():
        pytest.skip(f"this processor has no {NEEDED[tile.lanes]}")
    generator = np.random.default_rng(0)
    words = runs[0] * runs[1] * length
    places = [2 * (length + 1) * i + (length + 1) * j + k for i in range(runs[0]) for j in range(runs[1]) for k in range(length)]

    def random(*shape: int) -> Any:
        return generator.integers(0, 2**32, shape, dtype=np.uint32)

    x, weight, mask = random(places[-1] + tile.rows), random(words, tile.channels), random(words, tile.channels)
    weight[:, 0], x[:] = 0, np.where(generator.random(x.size) < 0.5, 2**32 - 1, x)  # the most that can differ
    mask[:, 0] = 2**32 - 1
    if not tile.is_masked:
        mask[:] = 2**32 - 1
    windows = np.stack([x[np.array(places) + row] for row in range(tile.rows)])
    expected = 2 * np.bitwise_count((windows[:, :, None] ^ weight) & mask).sum(1, dtype=np.int64)
    if tile.form == "lookup":
        spread = sum(((x.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)) << np.uint64(8 * i + 4) for i in range(8))
        first, second = (mask & ~weight, mask & weight) if tile.is_masked else (weight, mask)
        x, weight, mask = spread.view(np.int64), *(_bytes_apart(values) for values in (first, second))
    out = np.full((tile.rows, tile.channels), -7, np.int32)
    compiled(tile)(x, runs[0], 2 * (length + 1), runs[1], length + 1, length, weight, mask, out)
    assert np.array_equal(out, expected)


def _bytes_apart(words: Any) -> Any:
    """``[words, channels]`` as ``[words, 4, channels]`` bytes."""
    return np.ascontiguousarray(np.moveaxis(words[..., None].view(np.uint8), -1, 1))


@pytest.mark.parametrize("count", [0, 1, TOGETHER - 1, TOGETHER, 2 * TOGETHER + 3])
@pytest.mark.parametrize("factor", [0, 1, -2])
def test_a_multiple_is_subtracted_from_as_many_numbers_as_asked(count: int, factor: int) -> None:
    @numba.njit
    def run(target: Any, source: Any, factor: int, count: int) -> None:
        subtract_multiple(target.ctypes.data, source.ctypes.data, factor, count)

    source = np.arange(-20, 30, dtype=np.int32)
    target = np.arange(50, dtype=np.int32)
    expected = target.copy()
    expected[:count] -= factor * source[:count]
    run(target, source, factor, count)
    assert target.tolist() == expected.tolist()
