"""Generates the innermost loop of binary products as LLVM vector IR, which numba compiles for this processor: no compiler is needed.

A tile of ``rows`` output positions times ``columns`` vectors of ``lanes`` output channels is kept in registers, and the words of 32 input
signs are gone through one after the other. There are two forms of it:

``count``: a word of signs is broadcast, combined with a vector of weight words by exclusive or, and the bits that are set are
counted in 32-bit lanes. For processors that do so in one instruction (AVX-512 with VPOPCNTDQ) or a few (NEON).

``lookup``: four signs name a table of 16 bytes, the number of differing bits for each four weight bits, and a byte shuffle looks up the four
weight bits of as many output channels as the vector has bytes. For processors whose only fast way of counting is such a shuffle anyway (SSE4.2, AVX2,
AVX-512 without VPOPCNTDQ): it needs half of the instructions of exclusive or, two shuffles over nibbles, and additions.

Then the counts become outputs, and only these are written to memory.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum, auto
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Form = Literal["count", "lookup"]
Fields = Callable[["Job"], Any]  # loads a field of the job

LOOKUP_WORDS = 7  # words whose differing bits a byte can add up

_SHUFFLES = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}

I8, I32, I64 = (ir.IntType(width) for width in (8, 32, 64))


class Job(IntEnum):
    """Places in the table of int64 that tells a micro-kernel what its tiles have in common.

    Attributes:
        X_ROW: Words between the windows of two rows of a tile.
        Y_RUNS, Y_STRIDE, X_RUNS, X_STRIDE, LENGTH: A window is ``Y_RUNS`` times ``X_RUNS`` runs of ``LENGTH`` words that follow one another;
            strides are the words between two runs.
        WEIGHT, MASK: Addresses of weight and mask.
        COUNTS: Address of ``[rows, channels]`` int32: memory to work in.
        IS_FIRST, SHIFT: Unless it is the first of several, what is counted is added to ``COUNTS << SHIFT``.
        IS_LAST: Unless it is the last of several, the sum is left in ``COUNTS``, and no outputs are computed.
        SCALE, BIAS: Addresses of ``[channels]`` float32.
        ACTIVATION: Address of ``[5, channels]`` float32, see ``lowbit.runtime.activation``; 0 for none.
        FACTOR_ROW, RESIDUAL_ROW, Y_ROW: Bytes from one row of a tile to the next.
    """

    X_ROW = 0
    Y_RUNS = auto()
    Y_STRIDE = auto()
    X_RUNS = auto()
    X_STRIDE = auto()
    LENGTH = auto()
    WEIGHT = auto()
    MASK = auto()
    COUNTS = auto()
    IS_FIRST = auto()
    SHIFT = auto()
    IS_LAST = auto()
    SCALE = auto()
    BIAS = auto()
    ACTIVATION = auto()
    FACTOR_ROW = auto()
    RESIDUAL_ROW = auto()
    Y_ROW = auto()


@dataclass(frozen=True)
class Tile:
    """Shape and arithmetic of a micro-kernel.

    Attributes:
        form: ``count`` or ``lookup``.
        lanes: Output channels of a vector: 32-bit lanes with ``count``, bytes with ``lookup``.
        rows: Output positions of a tile.
        columns: Vectors of output channels of a tile.
        floats: Numbers in a vector of float32.
        is_masked: Whether weights have a mask beside their signs, so that a weight can be zero.
    """

    form: Form
    lanes: int
    rows: int
    columns: int
    floats: int
    is_masked: bool = False

    @property
    def channels(self) -> int:
        """Output channels of a tile."""
        return self.lanes * self.columns


def make_micro_kernel(tile: Tile) -> Any:
    """A numba intrinsic ``(job, x, totals, kinds, factors, residual, y)`` for ``tile``.

    With ``count[r, c] = sum popcount(x[r, i] ^ weight[i, c])``, with a mask ``popcount((x ^ weight) & mask)``, over the words ``i`` of a
    window: ``y[r, c] = activated((total[r, c] - 2 count[r, c]) * (scale[c] * factor[r]) + bias[c] + residual[r, c])``.

    All of these are integers: addresses in bytes of a table as ``Job`` describes it, of words and of ``y``; of ``totals`` and ``kinds``,
    which give ``total[r, c]`` as int32 ``c`` at ``totals + kinds[r]``; and of ``factors`` and ``residual``, 0 for none. With

    - ``count``, a word of ``x`` is int32, ``weight`` and ``mask`` are ``[words, tile.channels]`` int32;
    - ``lookup``, a word of ``x`` is int64, each byte of it 16 times four signs, the lowest first; ``weight`` is ``[words, 4, tile.channels]`` bytes:
      the four bytes of a weight word. With a mask, ``weight`` holds ``mask & ~sign`` (-1) and ``mask`` holds ``mask & sign`` (+1).
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.call(_function(tile, builder.module), arguments)
        return cgutils.get_null_value(I8.as_pointer())

    # numba wants the arity spelled out
    def typed(context, job, x, totals, kinds, factors, residual, y):  # type: ignore[no-untyped-def]
        return types.void(*[types.intp] * 7), generate

    return intrinsic(typed)


def _function(tile: Tile, module: Any) -> Any:
    """The micro-kernel as a function: inlined, it would have to share the registers with the loops around it."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 7), module.get_unique_name("lowbit.micro_kernel"))
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    table, x, totals, kinds, factors, residual, y = function.args

    def job(place: Job) -> Any:
        return _load(builder, table, I64, 8 * place)

    form = _FORMS[tile.form](tile, builder, job)
    size = I64(form.word_bytes)
    with cgutils.for_range(builder, job(Job.Y_RUNS)) as vertical, cgutils.for_range(builder, job(Job.X_RUNS)) as horizontal:
        words = builder.add(builder.mul(vertical.index, job(Job.Y_STRIDE)), builder.mul(horizontal.index, job(Job.X_STRIDE)))
        form.add_run(builder.add(x, builder.mul(words, size)), builder.mul(job(Job.X_ROW), size), job(Job.LENGTH))
    form.stop()
    with builder.if_else(_is_there(builder, job(Job.IS_LAST))) as (then, otherwise):
        with then:
            for rows in form.together:
                _finish(builder, tile, job, rows, [form.counts_of(row) for row in rows], totals, kinds, factors, residual, y)
        with otherwise:
            form.keep()
    builder.ret_void()
    return function


def _finish(
    builder: Any, tile: Tile, job: Fields, rows: Sequence[int], counts: list[list[Any]], totals: Any, kinds: Any, factors: Any,
    residual: Any, y: Any,
) -> None:  # fmt: skip
    """Write the outputs of some rows of a tile. All is read before anything is written: what rows share stays in registers."""
    integers, floats = ir.VectorType(I32, tile.floats), ir.VectorType(ir.FloatType(), tile.floats)
    offsets = [4 * tile.floats * index for index in range(len(counts[0]))]
    cells = [(row, index) for row in rows for index in range(len(offsets))]

    def shared(base: Any, first: int = 0) -> list[Any]:
        return [_load(builder, base, floats, first + offset) for offset in offsets]

    def of_row(base: Any, step: Job, row: int) -> Any:
        return builder.add(base, builder.mul(job(step), I64(row)))

    def each(values: list[Any], change: Callable[[Any, int, int], Any]) -> list[Any]:
        return [change(value, *cell) for value, cell in zip(values, cells, strict=True)]

    def either(condition: Any, values: list[Any], change: Callable[[list[Any]], list[Any]], other: Callable[[list[Any]], list[Any]]) -> Any:
        """``change(values)`` where the condition holds, else ``other(values)``."""
        places = [cgutils.alloca_once(builder, floats) for _ in values]
        with builder.if_else(condition) as branches:
            for branch, function in zip(branches, (change, other), strict=True):
                with branch:
                    for place, value in zip(places, function(values), strict=True):
                        builder.store(value, place)
        return [builder.load(place) for place in places]

    def by_factor(values: list[Any]) -> list[Any]:
        numbers = {row: _load(builder, of_row(factors, Job.FACTOR_ROW, row), ir.VectorType(ir.FloatType(), 1)) for row in rows}
        numbers = {row: _repeated(builder, number, tile.floats) for row, number in numbers.items()}
        return each(values, lambda value, row, index: builder.fmul(value, builder.fmul(scales[index], numbers[row])))

    def add_residual(values: list[Any]) -> list[Any]:
        places = {row: of_row(residual, Job.RESIDUAL_ROW, row) for row in rows}
        return each(values, lambda value, row, index: builder.fadd(value, _load(builder, places[row], floats, offsets[index])))

    def activate(values: list[Any]) -> list[Any]:
        table = [shared(job(Job.ACTIVATION), 4 * tile.channels * step) for step in range(5)]
        return each(values, lambda value, _row, index: _activated(builder, value, *(step[index] for step in table)))

    scales, biases = shared(job(Job.SCALE)), shared(job(Job.BIAS))
    places = {row: builder.add(totals, _load(builder, kinds, I64, 8 * row)) for row in rows}
    values = each(
        [count for of_one in counts for count in of_one],
        lambda value, row, index: builder.sub(_load(builder, places[row], integers, offsets[index]), builder.add(value, value)),
    )
    values = [builder.sitofp(value, floats) for value in values]
    by_scale = functools.partial(each, change=lambda value, _row, index: builder.fmul(value, scales[index]))
    values = either(_is_there(builder, factors), values, by_factor, by_scale)
    values = each(values, lambda value, _row, index: builder.fadd(value, biases[index]))
    values = either(_is_there(builder, residual), values, add_residual, list)
    values = either(_is_there(builder, job(Job.ACTIVATION)), values, activate, list)
    places = {row: of_row(y, Job.Y_ROW, row) for row in rows}
    for value, (row, index) in zip(values, cells, strict=True):
        builder.store(value, _pointer(builder, builder.add(places[row], I64(offsets[index])), floats), align=4)


class _Form(abc.ABC):
    """Counts the differing bits, for each cell (row, column) of a tile."""

    word_bytes: int
    kind: Any  # vector of weights
    together: list[Sequence[int]]  # rows whose outputs are computed at once

    def __init__(self, tile: Tile, builder: Any, job: Fields) -> None:
        self.tile, self.builder, self.job = tile, builder, job
        weights = [job(place) for place in ((Job.WEIGHT, Job.MASK) if tile.is_masked else (Job.WEIGHT,))]
        self.weights = [cgutils.alloca_once_value(builder, address) for address in weights]  # where the next ones are read
        cells = [(row, column) for row in range(tile.rows) for column in range(tile.columns)]
        self.sums = {cell: cgutils.alloca_once_value(builder, ir.Constant(self.kind, None)) for cell in cells}
        places = {(row, column): I64(4 * (row * tile.channels + column * tile.lanes)) for row, column in cells}
        kind = ir.VectorType(I32, tile.lanes)
        self.kept = {cell: _pointer(builder, builder.add(job(Job.COUNTS), place), kind) for cell, place in places.items()}

    def kept_counts(self, cell: tuple[int, int]) -> Any:
        """What was counted before, shifted as the job says."""
        shift = self.builder.bitcast(self.builder.trunc(self.job(Job.SHIFT), I32), ir.VectorType(I32, 1))
        return self.builder.shl(self.builder.load(self.kept[cell], align=4), _repeated(self.builder, shift, self.tile.lanes))

    def add_run(self, x: Any, row_bytes: Any, length: Any) -> None:
        """Continue with ``length`` words from address ``x``; those of the next row are ``row_bytes`` behind."""
        with cgutils.for_range(self.builder, length) as loop:
            self.add_word(self.builder.add(x, self.builder.mul(loop.index, I64(self.word_bytes))), row_bytes)

    @abc.abstractmethod
    def add_word(self, x: Any, row_bytes: Any) -> None:
        """Count what differs in the word at address ``x`` and in those of the other rows."""

    @abc.abstractmethod
    def stop(self) -> None:
        """All words were counted."""

    @abc.abstractmethod
    def keep(self) -> None:
        """Leave the counts in memory."""

    @abc.abstractmethod
    def counts_of(self, row: int) -> list[Any]:
        """The counts of a row, in vectors of as many as there are float32 in one."""

    def next_weights(self) -> list[list[Any]]:
        """A vector for each column, of the weight and of the mask."""
        builder, size = self.builder, self.kind.element.width // 8 * self.kind.count
        loaded = []
        for place in self.weights:
            start = builder.load(place)
            loaded.append([_load(builder, start, self.kind, column * size, 1) for column in range(self.tile.columns)])
            builder.store(builder.add(start, I64(self.tile.columns * size)), place)
        return loaded

    def increase(self, place: Any, value: Any) -> None:
        self.builder.store(self.builder.add(self.builder.load(place), value), place)


class _Count(_Form):
    word_bytes = 4

    def __init__(self, tile: Tile, builder: Any, job: Fields) -> None:
        self.kind, self.together = ir.VectorType(I32, tile.lanes), [range(tile.rows)]
        super().__init__(tile, builder, job)
        with builder.if_then(builder.not_(_is_there(builder, job(Job.IS_FIRST)))):
            for cell, count in self.sums.items():
                builder.store(self.kept_counts(cell), count)

    def add_word(self, x: Any, row_bytes: Any) -> None:
        builder = self.builder
        signs, *masks = self.next_weights()
        for row in range(self.tile.rows):
            word = _load(builder, builder.add(x, builder.mul(row_bytes, I64(row))), ir.VectorType(I32, 1))
            word = _repeated(builder, word, self.tile.lanes)
            for column in range(self.tile.columns):
                bits = builder.xor(word, signs[column])
                for mask in masks:
                    bits = builder.and_(bits, mask[column])
                self.increase(self.sums[row, column], _call(builder, f"llvm.ctpop.v{self.tile.lanes}i32", self.kind, bits))

    def stop(self) -> None:
        pass

    def keep(self) -> None:
        for cell, count in self.sums.items():
            self.builder.store(self.builder.load(count), self.kept[cell], align=4)

    def counts_of(self, row: int) -> list[Any]:
        assert self.tile.floats == self.tile.lanes
        return [self.builder.load(self.sums[row, column]) for column in range(self.tile.columns)]


class _Lookup(_Form):
    """Adds up in bytes, and adds these to the counts in memory before they can overflow."""

    word_bytes = 8

    def __init__(self, tile: Tile, builder: Any, job: Fields) -> None:
        self.kind, self.together = ir.VectorType(I8, tile.lanes), [[row] for row in range(tile.rows)]
        super().__init__(tile, builder, job)
        with builder.if_else(_is_there(builder, job(Job.IS_FIRST))) as (then, otherwise):
            with then:
                for place in self.kept.values():
                    builder.store(ir.Constant(place.type.pointee, None), place, align=4)
            with otherwise:
                for cell, place in self.kept.items():
                    builder.store(self.kept_counts(cell), place, align=4)
        self.filled = cgutils.alloca_once_value(builder, I64(0))  # words in the bytes
        ones = [bits.bit_count() for bits in range(16)]
        if tile.is_masked:
            self.inputs = self._table([x for x in range(16) for _ in range(16)])
            self.ones = _repeated(builder, ir.Constant(ir.VectorType(I8, 16), ones), tile.lanes)
        else:
            self.differing = self._table([ones[x ^ w] for x in range(16) for w in range(16)])

    def _table(self, counts: list[int]) -> Any:
        constant = ir.Constant(ir.ArrayType(I8, 256), bytearray(counts))
        variable = cgutils.global_constant(self.builder, "lowbit.counts", constant)
        variable.align = 16
        return self.builder.ptrtoint(variable, I64)

    def add_run(self, x: Any, row_bytes: Any, length: Any) -> None:
        builder, limit = self.builder, I64(LOOKUP_WORDS)
        pieces = builder.sdiv(builder.add(length, I64(LOOKUP_WORDS - 1)), limit)
        with cgutils.for_range(builder, pieces) as piece:
            first = builder.mul(piece.index, limit)
            left = builder.sub(length, first)
            size = builder.select(builder.icmp_signed("<", left, limit), left, limit)
            with builder.if_then(builder.icmp_signed(">", builder.add(builder.load(self.filled), size), limit)):
                self.stop()
            super().add_run(builder.add(x, builder.mul(first, I64(self.word_bytes))), row_bytes, size)
            self.increase(self.filled, size)

    def add_word(self, x: Any, row_bytes: Any) -> None:
        builder, lanes = self.builder, self.tile.lanes
        for byte in range(4):
            weights = self.next_weights()
            for half in range(2):
                nibbles = [[self._nibble(bits, half) for bits in columns] for columns in weights]
                for row in range(self.tile.rows):
                    address = builder.add(builder.add(x, builder.mul(row_bytes, I64(row))), I64(2 * byte + half))
                    which = builder.zext(_load(builder, address, I8), I64)
                    table = self.inputs if self.tile.is_masked else self.differing
                    entries = _load(builder, builder.add(table, which), ir.VectorType(I8, 16), align=16)
                    entries = _repeated(builder, entries, lanes)
                    for column in range(self.tile.columns):
                        if self.tile.is_masked:  # weights of -1 differ where x, and those of +1 where not x
                            negative, positive = (columns[column] for columns in nibbles)
                            table, index = self.ones, builder.xor(builder.and_(entries, builder.or_(negative, positive)), positive)
                        else:
                            table, index = entries, nibbles[0][column]
                        self.increase(self.sums[row, column], _call(builder, _SHUFFLES[lanes], self.kind, table, index))

    def _nibble(self, bits: Any, half: int) -> Any:
        shifted = self.builder.lshr(bits, _splat(self.kind, 4)) if half else bits
        return self.builder.and_(shifted, _splat(self.kind, 15))

    def stop(self) -> None:
        builder = self.builder
        for cell, count in self.sums.items():
            kept = self.kept[cell]
            counted = builder.zext(builder.load(count), kept.type.pointee)
            builder.store(builder.add(builder.load(kept, align=4), counted), kept, align=4)
            builder.store(ir.Constant(self.kind, None), count)
        builder.store(I64(0), self.filled)

    def keep(self) -> None:
        pass

    def counts_of(self, row: int) -> list[Any]:
        tile, kind = self.tile, ir.VectorType(I32, self.tile.floats)
        first = 4 * row * tile.channels
        return [_load(self.builder, self.job(Job.COUNTS), kind, first + 4 * place) for place in range(0, tile.channels, tile.floats)]


_FORMS: dict[Form, type[_Form]] = {"count": _Count, "lookup": _Lookup}


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _load(builder: Any, address: Any, kind: Any, offset: int = 0, align: int | None = None) -> Any:
    """What lies ``offset`` bytes behind an address; vectors are aligned as their elements are, unless ``align`` says otherwise."""
    if align is None and isinstance(kind, ir.VectorType):
        align = 4
    return builder.load(_pointer(builder, builder.add(address, I64(offset)) if offset else address, kind), align=align)


def _is_there(builder: Any, number: Any) -> Any:
    """Whether a number is not 0."""
    return builder.icmp_signed("!=", number, I64(0))


def _splat(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _repeated(builder: Any, vector: Any, lanes: int) -> Any:
    """``vector`` again and again, up to ``lanes``."""
    order = ir.Constant(ir.VectorType(I32, lanes), [lane % vector.type.count for lane in range(lanes)])
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def _call(builder: Any, name: str, kind: Any, *arguments: Any) -> Any:
    """An LLVM function of vectors of one type."""
    function = ir.FunctionType(kind, [kind] * len(arguments))
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


def _pack_bits(_context, x, threshold, stride, first, levels, step):  # type: ignore[no-untyped-def]
    """``(x, threshold, stride, first, levels, step)``: a word whose bit ``i`` is the exclusive or of ``x[i] >= threshold[level, i]``.

    Addresses of 32 floats, the bytes from one level to the next, and which levels: ``first``, ``first + step``, ... below ``levels``.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, threshold, stride, first, levels, step = arguments
        floats, bits = ir.VectorType(ir.FloatType(), 32), ir.VectorType(ir.IntType(1), 32)
        values = _load(builder, x, floats)
        found = cgutils.alloca_once_value(builder, ir.Constant(bits, None))
        with cgutils.for_range_slice(builder, first, levels, step, I64) as (level, _):
            limits = _load(builder, builder.add(threshold, builder.mul(level, stride)), floats)
            builder.store(builder.xor(builder.load(found), builder.fcmp_ordered(">=", values, limits)), found)
        return builder.bitcast(builder.load(found), I32)

    return types.int32(*[types.intp] * 6), generate


pack_bits_of_32: Any = intrinsic(_pack_bits)


def _pack_pixels(_context, x, x_step, threshold, count, words, step):  # type: ignore[no-untyped-def]
    """``(x, x_step, threshold, count, words, step)``: ``count`` words whose bits ``i`` are ``x[i] >= threshold[i]``.

    Addresses of 32 floats, the bytes from one pixel to the next, and the same for the words that are written.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, x_step, threshold, count, words, step = arguments
        floats = ir.VectorType(ir.FloatType(), 32)
        limits = _load(builder, threshold, floats)
        with cgutils.for_range(builder, count) as loop:
            values = _load(builder, builder.add(x, builder.mul(loop.index, x_step)), floats)
            word = builder.bitcast(builder.fcmp_ordered(">=", values, limits), I32)
            builder.store(word, _pointer(builder, builder.add(words, builder.mul(loop.index, step)), I32))
        return cgutils.get_null_value(I8.as_pointer())

    return types.void(*[types.intp] * 6), generate


pack_signs_of_32: Any = intrinsic(_pack_pixels)


def _pointer_to(_context, address):  # type: ignore[no-untyped-def]
    """The pointer to an address, as ``numba.carray`` takes it."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.intp), generate


pointer_to: Any = intrinsic(_pointer_to)


def _copy(_context, target, source, count):  # type: ignore[no-untyped-def]
    """``(target, source, count)``: copy ``count`` bytes from one address to another."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        target, source, count = arguments
        cgutils.raw_memcpy(builder, _pointer(builder, target, I8), _pointer(builder, source, I8), count, 1)
        return cgutils.get_null_value(I8.as_pointer())

    return types.void(*[types.intp] * 3), generate


copy_bytes: Any = intrinsic(_copy)


def _activated(builder: Any, y: Any, before: Any, slope: Any, after: Any, low: Any, high: Any) -> Any:
    """``lowbit.runtime.activation.activated`` for vectors."""
    z = builder.fadd(y, before)
    is_positive = builder.fcmp_ordered(">=", z, ir.Constant(z.type, None))
    z = builder.fadd(builder.select(is_positive, z, builder.fmul(z, slope)), after)
    z = builder.select(builder.fcmp_ordered("<", z, low), low, z)
    return builder.select(builder.fcmp_ordered(">", z, high), high, z)
