"""Loops shared among threads: as many as torch uses, for tensors that are worth it."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

LEAST = 2**17  # elements that one thread gets; below, starting it costs more than it saves
GRAIN = 4096  # pieces start at multiples of it, so that sums do not depend on the number of threads

_pools: dict[int, ThreadPoolExecutor] = {}


def shared(run: Callable[[int, int, int], None], size: int) -> None:
    """Call ``run(first, last, piece)`` for ``pieces_of(size)`` pieces of ``range(size)``, each in a thread of its own."""
    count = pieces_of(size)
    if count == 1:
        run(0, size, 0)
        return
    if count not in _pools:
        _pools[count] = ThreadPoolExecutor(count - 1, "lowbit-kernels")
    ends = [size * piece // count // GRAIN * GRAIN for piece in range(count)] + [size]
    waiting = [_pools[count].submit(run, ends[piece], ends[piece + 1], piece) for piece in range(1, count)]
    run(0, ends[1], 0)
    for done in waiting:
        done.result()


def pieces_of(size: int) -> int:
    """How many pieces ``shared`` makes of ``range(size)``: at most as many as torch has threads."""
    return max(min(torch.get_num_threads(), size // LEAST), 1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pools.clear)  # threads do not survive a fork
