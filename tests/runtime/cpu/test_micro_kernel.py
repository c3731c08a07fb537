from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

numba = pytest.importorskip("numba")

from lowbit.runtime.activation import activated  # noqa: E402
from lowbit.runtime.cpu.micro_kernel import LOOKUP_WORDS, Job, Tile, copy_bytes, make_micro_kernel  # noqa: E402
from lowbit.runtime.cpu.target import processor_features  # noqa: E402

TILES = [
    Tile("count", 16, 7, 2, 16),
    Tile("count", 4, 4, 4, 4, is_masked=True),
    Tile("lookup", 16, 4, 1, 4),
    Tile("lookup", 16, 3, 2, 4, is_masked=True),
    Tile("lookup", 32, 4, 1, 8),
    Tile("lookup", 32, 2, 2, 8, is_masked=True),
    Tile("lookup", 64, 2, 1, 16),
]
NEEDED = {16: "ssse3", 32: "avx2", 64: "avx512bw"}


@functools.cache
def compiled(tile: Tile) -> Any:
    kernel = make_micro_kernel(tile)

    @numba.njit
    def run(job: Any, x: Any, totals: Any, kinds: Any, factors: Any, residual: Any, y: Any) -> None:
        given = factors.ctypes.data if factors.size else 0, residual.ctypes.data if residual.size else 0
        kernel(job.ctypes.data, x.ctypes.data, totals.ctypes.data, kinds.ctypes.data, given[0], given[1], y.ctypes.data)

    return run


RUNS = [((1, 1), 1), ((3, 2), LOOKUP_WORDS - 1), ((2, 1), 3 * LOOKUP_WORDS + 2)]


class Case:
    """Random signs and weights for a tile, the counts expected of them, and a job for the micro-kernel.

    Runs lie ``length + 1`` words apart, kernel rows twice that, and the window of each row of the tile begins a word after the former.
    """

    def __init__(self, tile: Tile, runs: tuple[int, int], length: int) -> None:
        if tile.form == "lookup" and NEEDED[tile.lanes] not in processor_features():
            pytest.skip(f"this processor has no {NEEDED[tile.lanes]}")
        self.tile, generator = tile, np.random.default_rng(0)
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
        self.counts = np.bitwise_count((windows[:, :, None] ^ weight) & mask).sum(1, dtype=np.int64)
        if tile.form == "lookup":
            spread = sum(((x.astype(np.uint64) >> np.uint64(4 * i)) & np.uint64(15)) << np.uint64(8 * i + 4) for i in range(8))
            first, second = (mask & ~weight, mask & weight) if tile.is_masked else (weight, mask)
            x, weight, mask = spread.view(np.int64), *(_bytes_apart(values) for values in (first, second))
        self.work = np.full((tile.rows, tile.channels), 5, np.int32)
        self.x, self.weight, self.mask = x, weight, mask
        self.scale, self.bias = (generator.standard_normal(tile.channels, np.float32) for _ in range(2))
        self.totals = generator.integers(-50, 50, (3, tile.channels)).astype(np.int32)
        self.kinds = generator.integers(0, 3, tile.rows)
        self.job = np.zeros(len(Job), np.int64)
        self.set(X_ROW=1, Y_RUNS=runs[0], Y_STRIDE=2 * (length + 1), X_RUNS=runs[1], X_STRIDE=length + 1, LENGTH=length, IS_FIRST=1)
        self.set(WEIGHT=weight.ctypes.data, MASK=mask.ctypes.data, COUNTS=self.work.ctypes.data, IS_LAST=1)
        self.set(SCALE=self.scale.ctypes.data, BIAS=self.bias.ctypes.data, Y_ROW=4 * (tile.channels + 3))

    def set(self, **fields: int) -> None:
        for name, value in fields.items():
            self.job[Job[name]] = value

    def run(self, factors: Any = None, residual: Any = None) -> Any:
        """The outputs; three numbers lie between two rows and stay as they are."""
        y = np.full((self.tile.rows, self.tile.channels + 3), -7, np.float32)
        nothing = np.empty(0, np.float32)
        given = (nothing if part is None else part for part in (factors, residual))
        compiled(self.tile)(self.job, self.x, self.totals, 4 * self.tile.channels * self.kinds, *given, y)
        assert (y[:, self.tile.channels :] == -7).all()
        return y[:, : self.tile.channels]

    def dots(self, counts: Any) -> Any:
        return (self.totals[self.kinds] - 2 * counts).astype(np.float32)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("runs", "length"), RUNS)
def test_outputs_are_sums_of_signs_scaled_and_shifted(tile: Tile, runs: tuple[int, int], length: int) -> None:
    case = Case(tile, runs, length)
    assert np.array_equal(case.run(), case.dots(case.counts) * case.scale + case.bias)


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_factors_residuals_and_activations_are_applied_where_given(tile: Tile) -> None:
    case, generator = Case(tile, (2, 1), 3), np.random.default_rng(1)
    factors, residual = generator.random((tile.rows, 2), np.float32), generator.standard_normal((tile.rows, tile.channels + 1), np.float32)
    table = generator.standard_normal((5, tile.channels), np.float32)
    table[3:] = np.sort(table[3:], 0)
    case.set(FACTOR_ROW=8, RESIDUAL_ROW=4 * (tile.channels + 1))
    added = residual[:, :-1]
    y = case.dots(case.counts) * case.scale + case.bias
    assert np.array_equal(case.run(residual=residual), y + added)
    scaled = case.dots(case.counts) * (case.scale * factors[:, :1]) + case.bias
    assert np.array_equal(case.run(factors), scaled)
    case.set(ACTIVATION=table.ctypes.data)
    for given, expected in (((None, None), y), ((factors, residual), scaled + added)):
        assert np.array_equal(case.run(*given), activated(torch.from_numpy(expected), torch.from_numpy(table), (-1,)).numpy())


@pytest.mark.parametrize("tile", TILES, ids=str)
def test_counts_of_several_bits_are_added_up_from_the_highest_on(tile: Tile) -> None:
    case = Case(tile, (3, 2), LOOKUP_WORDS + 1)
    case.set(IS_LAST=0)
    assert (case.run() == -7).all()
    assert np.array_equal(case.work, case.counts)
    case.set(IS_FIRST=0, SHIFT=1)
    case.run()
    assert np.array_equal(case.work, 3 * case.counts)
    case.set(IS_LAST=1, SHIFT=0)
    assert np.array_equal(case.run(), case.dots(4 * case.counts) * case.scale + case.bias)


def _bytes_apart(words: Any) -> Any:
    """``[words, channels]`` as ``[words, 4, channels]`` bytes."""
    return np.ascontiguousarray(np.moveaxis(words[..., None].view(np.uint8), -1, 1))


@pytest.mark.parametrize("count", [0, 1, 7, 40])
def test_as_many_bytes_are_copied_as_asked(count: int) -> None:
    @numba.njit
    def run(target: Any, source: Any, count: int) -> None:
        copy_bytes(target.ctypes.data, source.ctypes.data, count)

    source, target = np.arange(1, 50, dtype=np.uint8), np.zeros(50, np.uint8)
    run(target, source, count)
    assert target.tolist() == source[:count].tolist() + [0] * (50 - count)
