"""Places the buffers of an integer graph in one arena, so that buffers which are never needed at the same time share memory."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.formats.fixed_point.graph import IntegerGraph


@dataclass(frozen=True)
class Lifetime:
    """When a buffer is needed: from operation ``first``, which writes it, to operation ``last``, which reads it last."""

    storage: str
    size: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        """Whether both are needed at some operation."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Arena:
    """Where buffers lie.

    Attributes:
        offsets: First byte by storage.
        size: Bytes of the arena.
        needed: Largest number of bytes that are needed at once, below which no arrangement can be.
    """

    offsets: dict[str, int]
    size: int
    needed: int


def lifetimes(graph: IntegerGraph) -> list[Lifetime]:
    """The lifetimes of all buffers but the input and the output, which the caller holds."""
    outside = {graph.input.storage, graph.output.storage}
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for index, operation in enumerate(graph.operations):
        for buffer in (*operation.sources, operation.target):
            if buffer.storage not in outside:
                sizes[buffer.storage] = max(sizes.get(buffer.storage, 0), buffer.size)
                first.setdefault(buffer.storage, index)
                last[buffer.storage] = index
    return [Lifetime(storage, size, first[storage], last[storage]) for storage, size in sizes.items()]


def plan_arena(buffers: list[Lifetime]) -> Arena:
    """Place buffers, the largest first, each in the smallest gap that it fits between those needed at the same time.

    >>> plan_arena([Lifetime("a", 8, 0, 1), Lifetime("b", 4, 1, 2), Lifetime("c", 8, 2, 3)])
    Arena(offsets={'a': 0, 'c': 0, 'b': 8}, size=12, needed=12)
    """
    offsets: dict[str, int] = {}
    placed: list[Lifetime] = []
    for buffer in sorted(buffers, key=lambda found: (-found.size, found.first)):
        taken = sorted((offsets[other.storage], offsets[other.storage] + other.size) for other in placed if other.overlaps(buffer))
        gaps, end = [], 0
        for start, stop in taken:
            if start - end >= buffer.size:
                gaps.append((start - end, end))
            end = max(end, stop)
        offsets[buffer.storage] = min(gaps)[1] if gaps else end
        placed.append(buffer)
    times = range(1 + max((buffer.last for buffer in buffers), default=-1))
    needed = max((sum(buffer.size for buffer in buffers if buffer.first <= time <= buffer.last) for time in times), default=0)
    size = max((offsets[buffer.storage] + buffer.size for buffer in buffers), default=0)
    return Arena(offsets, size, needed)
