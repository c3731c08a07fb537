"""Loops split over as many threads as torch uses, for tensors large enough to gain from it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

LEAST = 2**17  # elements that one thread gets; below, starting it costs more than it saves
GRAIN = 4096  # pieces start at multiples of it, so that sums do not depend on the number of threads

_pools: dict[int, ThreadPoolExecutor] = {}


def shared(run: Callable[[int, int, int], None], rows: int, columns: int) -> None:
    """Call ``run(first, last, piece)`` for ``pieces_of(rows, columns)`` pieces of ``range(columns)``, each in a thread of its own."""
    count = pieces_of(rows, columns)
    if count not in _pools:
        _pools[count] = ThreadPoolExecutor(max(count - 1, 1), "lowbit-kernels")
    ends = [columns * piece // count // GRAIN * GRAIN for piece in range(count)] + [columns]
    waiting = [_pools[count].submit(run, ends[piece], ends[piece + 1], piece) for piece in range(1, count)]
    run(0, ends[1], 0)
    for done in waiting:
        done.result()


def pieces_of(rows: int, columns: int) -> int:
    """How many pieces ``shared`` makes of a matrix: at most as many as torch has threads, and one where it has many rows (a weight)."""
    return 1 if rows > 1 or columns < 2 * LEAST else max(min(torch.get_num_threads(), columns // LEAST), 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork
