"""Generates the innermost loop of binary products as LLVM vector IR, which numba compiles for this processor: no compiler is needed.

A tile of ``rows`` output positions times ``columns`` vectors of ``lanes`` output channels is kept in registers. Each step broadcasts one
word of 32 input signs for every row, combines it with a vector of weight words, and counts the bits that are set.

Where the processor counts bits in 32-bit lanes in one instruction (``count_lane = 32``: AVX-512 with VPOPCNTDQ, NEON by LLVM's best
form) counts are added up there. Elsewhere (``count_lane = 8``) they are counted and added up in bytes, which a table of nibbles in a register
does, and widened to 32 bits before a byte can overflow, after at most 31 words.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

BYTE_STEPS = 31  # words of 8 counts at most that a byte can add up

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


@dataclass(frozen=True)
class Tile:
    """Shape and arithmetic of a micro-kernel.

    Attributes:
        lanes: 32-bit lanes of a vector: 16 (AVX-512), 8 (AVX2), 4 (SSE, NEON).
        rows: Output positions of a tile.
        columns: Vectors of output channels of a tile.
        count_lane: Width of the lanes in which bits are counted, 32 or 8.
        is_masked: Whether weights have a mask beside their signs, so that a weight can be zero.
    """

    lanes: int
    rows: int
    columns: int
    count_lane: int
    is_masked: bool = False

    @property
    def channels(self) -> int:
        """Output channels of a tile."""
        return self.lanes * self.columns


def make_micro_kernel(tile: Tile) -> Any:
    """A numba intrinsic ``(x, x_row, y_runs, y_stride, x_runs, x_stride, length, weight, mask, out)`` for ``tile``.

    ``out[r, c] = 2 sum popcount(x[r, i] ^ weight[i, c])``, with a mask ``popcount((x ^ weight) & mask)``, over the words ``i`` of a window:
    ``y_runs`` times ``x_runs`` runs of ``length`` words that follow one another.

    All of these are integers: addresses in bytes (``x``, ``weight``, ``mask``, ``out``), strides in words (``x_row`` between the
    windows of two rows, ``y_stride`` and ``x_stride`` between runs) and counts. ``weight`` and ``mask`` are
    ``[words, tile.channels]`` int32, ``out`` is ``[tile.rows, tile.channels]`` int32; all without gaps.
    """

    def kernel(context: Any, *_arguments: Any) -> Any:
        return types.void(*[types.intp] * 10), lambda _c, builder, _s, arguments: _generate(tile, builder, arguments)

    # numba wants the arity spelled out
    def typed(context, x, x_row, y_runs, y_stride, x_runs, x_stride, length, weight, mask, out):  # type: ignore[no-untyped-def]
        return kernel(context)

    return intrinsic(typed)


def _generate(tile: Tile, builder: Any, arguments: Any) -> Any:
    x, x_row, y_runs, y_stride, x_runs, x_stride, length, weight, mask, out = arguments
    words = ir.VectorType(I32, tile.lanes)
    cells = [(row, column) for row in range(tile.rows) for column in range(tile.columns)]
    totals = {cell: cgutils.alloca_once_value(builder, ir.Constant(words, None)) for cell in cells}
    add = _byte_counter(tile, builder, totals) if tile.count_lane == 8 else _word_counter(builder, totals)
    position = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))  # words of the weight that have been read

    def load_weight(base: Any, column: int) -> Any:
        index = builder.add(builder.mul(builder.load(position), I64(tile.channels)), I64(column * tile.lanes))
        pointer = builder.inttoptr(builder.add(base, builder.shl(index, I64(2))), words.as_pointer())
        return builder.load(pointer, align=4)

    def step(offset: Any) -> None:
        weights = [load_weight(weight, column) for column in range(tile.columns)]
        masks = [load_weight(mask, column) for column in range(tile.columns)] if tile.is_masked else []
        for row in range(tile.rows):
            index = builder.add(offset, builder.mul(x_row, I64(row)))
            word = builder.load(builder.inttoptr(builder.add(x, builder.shl(index, I64(2))), I32.as_pointer()))
            for column in range(tile.columns):
                bits = builder.xor(_broadcast(builder, word, tile.lanes), weights[column])
                add((row, column), builder.and_(bits, masks[column]) if tile.is_masked else bits)
        builder.store(builder.add(builder.load(position), I64(1)), position)

    with cgutils.for_range(builder, y_runs) as vertical, cgutils.for_range(builder, x_runs) as horizontal:
        start = builder.add(builder.mul(vertical.index, y_stride), builder.mul(horizontal.index, x_stride))
        add.each_word(length, lambda index: step(builder.add(start, index)))
    add.finish()
    for row, column in cells:
        offset = 4 * (row * tile.channels + column * tile.lanes)
        twice = builder.shl(builder.load(totals[row, column]), _splat(words, 1))
        builder.store(twice, builder.inttoptr(builder.add(out, I64(offset)), words.as_pointer()), align=4)
    return cgutils.get_null_value(I8.as_pointer())


class _word_counter:
    """Counts in 32-bit lanes."""

    def __init__(self, builder: Any, totals: dict[tuple[int, int], Any]) -> None:
        self.builder, self.totals = builder, totals

    def __call__(self, cell: tuple[int, int], bits: Any) -> None:
        total = self.builder.load(self.totals[cell])
        self.builder.store(self.builder.add(total, _count_bits(self.builder, bits)), self.totals[cell])

    def each_word(self, length: Any, step: Callable[[Any], None]) -> None:
        with cgutils.for_range(self.builder, length) as loop:
            step(loop.index)

    def finish(self) -> None:
        """Nothing is left to add."""


class _byte_counter:
    """Counts in bytes, and adds them to the totals before they overflow."""

    def __init__(self, tile: Tile, builder: Any, totals: dict[tuple[int, int], Any]) -> None:
        self.builder, self.totals, self.lanes = builder, totals, tile.lanes
        self.bytes = ir.VectorType(I8, 4 * tile.lanes)
        self.counts = {cell: cgutils.alloca_once_value(builder, ir.Constant(self.bytes, None)) for cell in totals}
        self.filled = cgutils.alloca_once_value(builder, ir.Constant(I64, 0))

    def __call__(self, cell: tuple[int, int], bits: Any) -> None:
        builder = self.builder
        found = _count_bits(builder, builder.bitcast(bits, self.bytes))
        builder.store(builder.add(builder.load(self.counts[cell]), found), self.counts[cell])

    def each_word(self, length: Any, step: Callable[[Any], None]) -> None:
        """Pieces of at most ``BYTE_STEPS`` words, each behind a look at whether it still fits into the bytes."""
        builder, limit = self.builder, I64(BYTE_STEPS)
        pieces = builder.sdiv(builder.add(length, I64(BYTE_STEPS - 1)), limit)
        with cgutils.for_range(builder, pieces) as piece:
            first = builder.mul(piece.index, limit)
            left = builder.sub(length, first)
            size = builder.select(builder.icmp_signed("<", left, limit), left, limit)
            after = builder.add(builder.load(self.filled), size)
            with builder.if_then(builder.icmp_signed(">", after, limit)):
                self.finish()
            with cgutils.for_range(builder, size) as loop:
                step(builder.add(first, loop.index))
            builder.store(builder.add(builder.load(self.filled), size), self.filled)

    def finish(self) -> None:
        builder = self.builder
        words = ir.VectorType(I32, self.lanes)
        for cell, count in self.counts.items():
            values = builder.bitcast(builder.load(count), words)
            total = builder.load(self.totals[cell])
            for shift in range(0, 32, 8):
                lane = builder.and_(builder.lshr(values, _splat(words, shift)), _splat(words, 255))
                total = builder.add(total, lane)
            builder.store(total, self.totals[cell])
            builder.store(ir.Constant(self.bytes, None), count)
        builder.store(I64(0), self.filled)


def _splat(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _broadcast(builder: Any, word: Any, lanes: int) -> Any:
    vector = ir.VectorType(I32, lanes)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), word, I32(0))
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), ir.Constant(vector, None))


def _count_bits(builder: Any, bits: Any) -> Any:
    name = f"llvm.ctpop.v{bits.type.count}i{bits.type.element.width}"
    return builder.call(cgutils.get_or_insert_function(builder.module, ir.FunctionType(bits.type, [bits.type]), name), [bits])


def _pack_signs(_context: Any, x: Any, threshold: Any) -> Any:
    """``(x, threshold)``, addresses of 32 floats each: a word whose bit ``i`` is ``x[i] >= threshold[i]``."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        floats = ir.VectorType(ir.FloatType(), 32)
        values, limits = (builder.load(builder.inttoptr(address, floats.as_pointer()), align=4) for address in arguments)
        return builder.bitcast(builder.fcmp_ordered(">=", values, limits), I32)

    return types.int32(types.intp, types.intp), generate


pack_signs_of_32: Any = intrinsic(_pack_signs)
