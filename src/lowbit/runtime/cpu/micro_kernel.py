"""Generates the innermost loop of binary products as LLVM vector IR, which numba compiles for this processor: no compiler is needed.

A tile of ``rows`` output positions times ``columns`` vectors of ``lanes`` output channels is kept in registers, and the words of 32 input
signs are gone through one after the other. There are two forms of it:

``count``: a word of signs is broadcast, combined with a vector of weight words by exclusive or, and the bits that are set are
counted in 32-bit lanes. For processors that do so in one instruction (AVX-512 with VPOPCNTDQ) or a few (NEON).

``lookup``: four signs name a table of 16 bytes, the number of differing bits for each four weight bits, and a byte shuffle looks up the four
weight bits of as many output channels as the vector has bytes. For processors whose only fast way of counting is such a shuffle anyway (SSE4.2, AVX2,
AVX-512 without VPOPCNTDQ): it needs half of the instructions of exclusive or, two shuffles over nibbles, and additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Form = Literal["count", "lookup"]

LOOKUP_WORDS = 7  # words whose differing bits a byte can add up
TOGETHER = 16  # int32 that are subtracted at once

_SHUFFLES = {16: "llvm.x86.ssse3.pshuf.b.128", 32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}

I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


@dataclass(frozen=True)
class Tile:
    """Shape and arithmetic of a micro-kernel.

    Attributes:
        form: ``count`` or ``lookup``.
        lanes: Output channels of a vector: 32-bit lanes with ``count``, bytes with ``lookup``.
        rows: Output positions of a tile.
        columns: Vectors of output channels of a tile.
        is_masked: Whether weights have a mask beside their signs, so that a weight can be zero.
    """

    form: Form
    lanes: int
    rows: int
    columns: int
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
    windows of two rows, ``y_stride`` and ``x_stride`` between runs) and counts. ``out`` is ``[tile.rows, tile.channels]`` int32. With

    - ``count``, a word of ``x`` is int32, ``weight`` and ``mask`` are ``[words, tile.channels]`` int32;
    - ``lookup``, a word of ``x`` is int64, each byte of it 16 times four signs, the lowest first; ``weight`` is ``[words, 4, tile.channels]`` bytes:
      the four bytes of a weight word. With a mask, ``weight`` holds ``mask & ~sign`` (-1) and ``mask`` holds ``mask & sign`` (+1).
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.call(_function(tile, builder.module), arguments)
        return cgutils.get_null_value(I8.as_pointer())

    # numba wants the arity spelled out
    def typed(context, x, x_row, y_runs, y_stride, x_runs, x_stride, length, weight, mask, out):  # type: ignore[no-untyped-def]
        return types.void(*[types.intp] * 10), generate

    return intrinsic(typed)


def _function(tile: Tile, module: Any) -> Any:
    """The micro-kernel as a function: inlined, it would have to share the registers with the loops around it."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 10), module.get_unique_name("lowbit.micro_kernel"))
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    x, x_row, y_runs, y_stride, x_runs, x_stride, length, weight, mask, out = function.args
    form = _FORMS[tile.form](tile, builder, (weight, mask) if tile.is_masked else (weight,), out)
    size = I64(form.word_bytes)
    with cgutils.for_range(builder, y_runs) as vertical, cgutils.for_range(builder, x_runs) as horizontal:
        words = builder.add(builder.mul(vertical.index, y_stride), builder.mul(horizontal.index, x_stride))
        form.add_run(builder.add(x, builder.mul(words, size)), builder.mul(x_row, size), length)
    form.finish()
    builder.ret_void()
    return function


class _Form:
    """Adds up twice the differing bits, for each cell (row, column) of a tile."""

    word_bytes: int
    kind: Any  # vector of weights

    def __init__(self, tile: Tile, builder: Any, weights: tuple[Any, ...], out: Any) -> None:
        self.tile, self.builder = tile, builder
        self.weights = [cgutils.alloca_once_value(builder, address) for address in weights]  # where the next ones are read
        cells = [(row, column) for row in range(tile.rows) for column in range(tile.columns)]
        self.sums = {cell: cgutils.alloca_once_value(builder, ir.Constant(self.kind, None)) for cell in cells}
        places = {(row, column): I64(4 * (row * tile.channels + column * tile.lanes)) for row, column in cells}
        self.totals = {cell: _pointer(builder, builder.add(out, place), ir.VectorType(I32, tile.lanes)) for cell, place in places.items()}

    def add_run(self, x: Any, row_bytes: Any, length: Any) -> None:
        """Continue with ``length`` words from address ``x``; those of the next row are ``row_bytes`` behind."""
        with cgutils.for_range(self.builder, length) as loop:
            self.add_word(self.builder.add(x, self.builder.mul(loop.index, I64(self.word_bytes))), row_bytes)

    def add_word(self, x: Any, row_bytes: Any) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Write the totals."""
        raise NotImplementedError

    def next_weights(self) -> list[list[Any]]:
        """A vector for each column, of the weight and of the mask."""
        builder, size = self.builder, self.kind.element.width // 8 * self.kind.count
        loaded = []
        for place in self.weights:
            start = builder.load(place)
            addresses = [builder.add(start, I64(column * size)) for column in range(self.tile.columns)]
            loaded.append([builder.load(_pointer(builder, address, self.kind), align=1) for address in addresses])
            builder.store(builder.add(start, I64(self.tile.columns * size)), place)
        return loaded

    def increase(self, place: Any, value: Any) -> None:
        self.builder.store(self.builder.add(self.builder.load(place), value), place)


class _Count(_Form):
    word_bytes = 4

    def __init__(self, tile: Tile, builder: Any, weights: tuple[Any, ...], out: Any) -> None:
        self.kind = ir.VectorType(I32, tile.lanes)
        super().__init__(tile, builder, weights, out)

    def add_word(self, x: Any, row_bytes: Any) -> None:
        builder = self.builder
        signs, *masks = self.next_weights()
        for row in range(self.tile.rows):
            word = builder.load(_pointer(builder, builder.add(x, builder.mul(row_bytes, I64(row))), I32))
            word = _repeated(builder, builder.bitcast(word, ir.VectorType(I32, 1)), self.tile.lanes)
            for column in range(self.tile.columns):
                bits = builder.xor(word, signs[column])
                for mask in masks:
                    bits = builder.and_(bits, mask[column])
                self.increase(self.sums[row, column], _call(builder, f"llvm.ctpop.v{self.tile.lanes}i32", self.kind, bits))

    def finish(self) -> None:
        for cell, count in self.sums.items():
            counted = self.builder.load(count)
            self.builder.store(self.builder.add(counted, counted), self.totals[cell], align=4)


class _Lookup(_Form):
    """Adds up in bytes, and adds these to the totals before they can overflow."""

    word_bytes = 8

    def __init__(self, tile: Tile, builder: Any, weights: tuple[Any, ...], out: Any) -> None:
        self.kind = ir.VectorType(I8, tile.lanes)
        super().__init__(tile, builder, weights, out)
        for total in self.totals.values():
            builder.store(ir.Constant(total.type.pointee, None), total, align=4)
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
                self.finish()
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
                    which = builder.zext(builder.load(_pointer(builder, address, I8)), I64)
                    table = self.inputs if self.tile.is_masked else self.differing
                    entries = builder.load(_pointer(builder, builder.add(table, which), ir.VectorType(I8, 16)), align=16)
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

    def finish(self) -> None:
        builder = self.builder
        for cell, count in self.sums.items():
            total = self.totals[cell]
            counted = builder.zext(builder.load(count), total.type.pointee)
            builder.store(builder.add(builder.load(total, align=4), builder.add(counted, counted)), total, align=4)
            builder.store(ir.Constant(self.kind, None), count)
        builder.store(I64(0), self.filled)


_FORMS: dict[Form, type[_Form]] = {"count": _Count, "lookup": _Lookup}


def _pointer(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


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


def _subtract_multiple(_context: Any, target: Any, source: Any, factor: Any, count: Any) -> Any:
    """``(target, source, factor, count)``: ``target -= factor * source`` for ``count`` int32 at these addresses."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        target, source, factor, count = arguments
        whole = builder.and_(count, I64(-TOGETHER))
        single = builder.insert_element(ir.Constant(ir.VectorType(I32, 1), ir.Undefined), builder.trunc(factor, I32), I32(0))
        for first, end, lanes in ((I64(0), whole, TOGETHER), (whole, count, 1)):
            kind, factors = ir.VectorType(I32, lanes), _repeated(builder, single, lanes)
            with cgutils.for_range_slice(builder, first, end, I64(lanes), I64) as (place, _):
                there, here = (_pointer(builder, builder.add(base, builder.shl(place, I64(2))), kind) for base in (target, source))
                product = builder.mul(builder.load(here, align=4), factors)
                builder.store(builder.sub(builder.load(there, align=4), product), there, align=4)
        return cgutils.get_null_value(I8.as_pointer())

    return types.void(*[types.intp] * 4), generate


subtract_multiple: Any = intrinsic(_subtract_multiple)


def _pack_bits(_context, x, threshold, stride, first, levels, step):  # type: ignore[no-untyped-def]
    """``(x, threshold, stride, first, levels, step)``: a word whose bit ``i`` is the exclusive or of ``x[i] >= threshold[level, i]``.

    Addresses of 32 floats, the bytes from one level to the next, and which levels: ``first``, ``first + step``, ... below ``levels``.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        x, threshold, stride, first, levels, step = arguments
        floats, bits = ir.VectorType(ir.FloatType(), 32), ir.VectorType(ir.IntType(1), 32)
        values = builder.load(_pointer(builder, x, floats), align=4)
        found = cgutils.alloca_once_value(builder, ir.Constant(bits, None))
        with cgutils.for_range_slice(builder, first, levels, step, I64) as (level, _):
            limits = builder.load(_pointer(builder, builder.add(threshold, builder.mul(level, stride)), floats), align=4)
            builder.store(builder.xor(builder.load(found), builder.fcmp_ordered(">=", values, limits)), found)
        return builder.bitcast(builder.load(found), I32)

    return types.int32(*[types.intp] * 6), generate


pack_bits_of_32: Any = intrinsic(_pack_bits)


def make_finish(lanes: int) -> Any:
    """A numba intrinsic that turns what a micro-kernel found into outputs, ``lanes`` of them at once.

    ``(found, found_row, total, scale, bias, factors, factors_row, added, added_row, activation, activation_row, y, y_row, rows, count)``:
    ``y = activated((total - found) * (scale * factor) + bias + added)`` for ``count`` outputs of each of ``rows`` positions.

    All are integers: addresses of int32 (``found``, ``total``) and float32; the bytes from one position to the next of ``found``,
    ``factors``, ``added`` and ``y``, and from one row of the table ``activation`` to the next. ``factors`` holds one for each
    position; the factor is 1, nothing is added and nothing activated where the address is 0.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        found, found_row, total, scale, bias, factors, factors_row, added, added_row, activation, activation_row, y, y_row, rows, count = (
            arguments
        )
        whole = builder.and_(count, I64(-lanes))

        def outputs(place: Any, width: int, has_factor: bool, is_adding: bool, is_active: bool) -> None:
            integers, floats = ir.VectorType(I32, width), ir.VectorType(ir.FloatType(), width)
            offset = builder.shl(place, I64(2))

            def load(base: Any, kind: Any) -> Any:
                return builder.load(_pointer(builder, builder.add(base, offset), kind), align=4)

            totals, scales, biases = load(total, integers), load(scale, floats), load(bias, floats)
            places = (builder.add(activation, builder.mul(activation_row, I64(row))) for row in range(5 if is_active else 0))
            table = [load(row, floats) for row in places]
            with cgutils.for_range(builder, rows) as row:
                there, here = builder.mul(row.index, y_row), builder.mul(row.index, found_row)
                other = builder.mul(row.index, added_row)
                difference = builder.sub(totals, load(builder.add(found, here), integers))
                scaled = scales
                if has_factor:
                    address = builder.add(factors, builder.mul(row.index, factors_row))
                    factor = builder.load(_pointer(builder, address, ir.VectorType(ir.FloatType(), 1)), align=4)
                    scaled = builder.fmul(scales, _repeated(builder, factor, width))
                value = builder.fadd(builder.fmul(builder.sitofp(difference, floats), scaled), biases)
                if is_adding:
                    value = builder.fadd(value, load(builder.add(added, other), floats))
                if is_active:
                    value = _activated(builder, value, *table)
                builder.store(value, _pointer(builder, builder.add(builder.add(y, there), offset), floats), align=4)

        def all_outputs(has_factor: bool, is_adding: bool, is_active: bool) -> None:
            for first, end, width in ((I64(0), whole, lanes), (whole, count, 1)):
                with cgutils.for_range_slice(builder, first, end, I64(width), I64) as (place, _):
                    outputs(place, width, has_factor, is_adding, is_active)

        def branch(*wanted: bool) -> None:
            """Ask for one address after the other whether it is there."""
            addresses = factors, added, activation
            if len(wanted) == len(addresses):
                all_outputs(*wanted)
                return
            is_there = builder.icmp_signed("!=", addresses[len(wanted)], I64(0))
            with builder.if_else(is_there) as (then, otherwise):
                with then:
                    branch(*wanted, True)
                with otherwise:
                    branch(*wanted, False)

        branch()
        return cgutils.get_null_value(I8.as_pointer())

    # numba wants the arity spelled out
    def typed(  # type: ignore[no-untyped-def]
        context,
        found,
        found_row,
        total,
        scale,
        bias,
        factors,
        factors_row,
        added,
        added_row,
        activation,
        activation_row,
        y,
        y_row,
        rows,
        count,
    ):
        return types.void(*[types.intp] * 15), generate

    return intrinsic(typed)


def _activated(builder: Any, y: Any, before: Any, slope: Any, after: Any, low: Any, high: Any) -> Any:
    """``lowbit.runtime.activation.activated`` for vectors."""
    z = builder.fadd(y, before)
    is_positive = builder.fcmp_ordered(">=", z, ir.Constant(z.type, None))
    z = builder.fadd(builder.select(is_positive, z, builder.fmul(z, slope)), after)
    z = builder.select(builder.fcmp_ordered("<", z, low), low, z)
    return builder.select(builder.fcmp_ordered(">", z, high), high, z)
