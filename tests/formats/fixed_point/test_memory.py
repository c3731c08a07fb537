from __future__ import annotations

import itertools
import random

from lowbit.formats.fixed_point.memory import Lifetime, plan_arena


def test_a_buffer_takes_the_smallest_gap_that_holds_it() -> None:
    """While f lives, a (12 bytes), c (8) and e (4) have left gaps between b and d; f of 8 fits the one of c exactly."""
    buffers = [Lifetime("b", 20, 0, 9), Lifetime("a", 12, 0, 1), Lifetime("d", 10, 0, 9), Lifetime("f", 8, 5, 9)]
    arena = plan_arena(buffers)
    assert arena.offsets == {"b": 0, "a": 20, "d": 32, "f": 20}
    assert arena.size == arena.needed == 42


def test_buffers_that_live_at_once_never_share_a_byte() -> None:
    drawn = random.Random(0)
    for _ in range(50):
        buffers = []
        for index in range(12):
            first = drawn.randrange(20)
            buffers.append(Lifetime(str(index), drawn.randrange(1, 100), first, first + drawn.randrange(6)))
        arena = plan_arena(buffers)
        for a, b in itertools.combinations(buffers, 2):
            if a.overlaps(b):
                start, other = arena.offsets[a.storage], arena.offsets[b.storage]
                assert start + a.size <= other or other + b.size <= start
        assert arena.needed <= arena.size <= 1.5 * arena.needed
