"""Generates the product of packed weight codes with rows of 8-bit inputs as LLVM vector IR, which unpacks the codes in registers.

Each 32-bit lane of a vector belongs to one output, and each of its bytes holds ``8 / b`` codes: part ``s`` of the lane is ``(byte >> s b) &
(2**b - 1)`` of its four bytes, the codes of four neighbouring inputs. Four inputs of a row are broadcast to all lanes and multiplied by
these codes, in one instruction where the processor has one (VNNI). The sums of a tile of rows and outputs stay in registers, so that the
rows share the unpacking, and nothing has to be added up across lanes.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VECTORS = 4  # vectors of outputs in a tile
UNIT = 16  # outputs whose codes are interleaved: those of a vector of 64 bytes
_DOTS = {64: "llvm.x86.avx512.vpdpbusd.512", 32: "llvm.x86.avx512.vpdpbusd.256"}
I8, I32, I64 = (ir.IntType(width) for width in (8, 32, 64))


def make_dot_kernel(rows: int, lanes: int, *, has_dot: bool) -> Any:
    """A numba intrinsic ``(codes, bit_width, units, groups, x, x_row, out, out_row)``: ``out[m, r] = sum codes[r, k] x[m, k]``.

    It computes ``rows`` rows of inputs times ``VECTORS`` vectors of outputs. All arguments are integers: the addresses of uint8 codes
    ``[units, groups, 4 * UNIT]`` of 1, 2, 4 or 8 bits, of int8 inputs and of int32 results, the number of units, and the bytes from one
    row to the next. Results beyond the last unit repeat those of the last one. Sums are exact.

    Args:
        rows: Rows of inputs.
        lanes: Bytes in a vector.
        has_dot: Whether the processor adds four products of bytes to a 32-bit lane.
    """

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        builder.call(_function(rows, lanes, has_dot, builder.module), arguments)
        return cgutils.get_null_value(I8.as_pointer())

    # numba needs explicit parameters
    def typed(context, codes, bit_width, units, groups, x, x_row, out, out_row):  # type: ignore[no-untyped-def]
        return types.void(*[types.intp] * 8), generate

    return intrinsic(typed)


def _function(rows: int, lanes: int, has_dot: bool, module: Any) -> Any:
    """The kernel as a function of its own: inlined, it would share the registers with the loops around it."""
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 8), module.get_unique_name("lowbit.dot_kernel"))
    function.linkage = "internal"
    function.attributes.add("noinline")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    codes, bit_width, units, groups, x, x_row, out, out_row = function.args
    sums, last, parts = ir.VectorType(I32, lanes // 4), builder.sub(units, I64(1)), builder.udiv(I64(8), bit_width)
    starts = []
    for vector in range(VECTORS):
        wanted = I64(vector * lanes // (4 * UNIT))
        unit = builder.select(builder.icmp_signed("<", wanted, last), wanted, last)
        offset = builder.mul(builder.mul(unit, groups), I64(4 * UNIT))
        starts.append(builder.add(builder.add(codes, offset), I64(vector * lanes % (4 * UNIT))))
    cells = [(row, vector) for row in range(rows) for vector in range(VECTORS)]
    totals = {cell: cgutils.alloca_once_value(builder, ir.Constant(sums, None)) for cell in cells}
    left = [cgutils.alloca_once(builder, sums) for _ in range(VECTORS)]  # parts that are not yet unpacked
    # whole lanes are shifted; the mask removes the bits that arrive from neighbouring bytes
    bits = builder.trunc(bit_width, I32)
    shift, ones = _spread(builder, bits, sums), builder.sub(builder.shl(I32(1), bits), I32(1))
    mask = _spread(builder, builder.mul(ones, I32(0x01010101)), sums)
    add_products = _add_products_at_once if has_dot else _add_products
    with cgutils.for_range(builder, groups) as group:
        for start, place in zip(starts, left, strict=True):
            builder.store(_load(builder, builder.add(start, builder.mul(group.index, I64(4 * UNIT))), sums), place)
        with cgutils.for_range(builder, parts) as part:
            values = []
            for place in left:
                packed = builder.load(place)
                values.append(builder.and_(packed, mask))
                builder.store(builder.lshr(packed, shift), place)
            four = builder.shl(builder.add(builder.mul(group.index, parts), part.index), I64(2))
            for row in range(rows):
                inputs = _load(builder, builder.add(builder.add(x, builder.mul(x_row, I64(row))), four), I32)
                inputs = _spread(builder, inputs, sums)
                for vector in range(VECTORS):
                    total = totals[row, vector]
                    builder.store(add_products(builder, builder.load(total), values[vector], inputs), total)
    for (row, vector), total in totals.items():
        place = builder.add(builder.add(out, builder.mul(out_row, I64(row))), I64(vector * lanes))
        builder.store(builder.load(total), builder.inttoptr(place, sums.as_pointer()), align=4)
    builder.ret_void()
    return function


def _spread(builder: Any, number: Any, kind: Any) -> Any:
    """A vector with ``number`` in all lanes."""
    single = builder.insert_element(ir.Constant(kind, ir.Undefined), number, I32(0))
    return builder.shuffle_vector(single, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, kind.count), None))


def _add_products_at_once(builder: Any, total: Any, codes: Any, inputs: Any) -> Any:
    kind = total.type
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), _DOTS[4 * kind.count])
    return builder.call(function, [total, codes, inputs])


def _add_products(builder: Any, total: Any, codes: Any, inputs: Any) -> Any:
    """Add products byte by byte, in 32-bit lanes."""
    for byte in range(4):
        code = builder.and_(builder.lshr(codes, _splat(codes.type, 8 * byte)), _splat(codes.type, 255))
        value = builder.ashr(builder.shl(inputs, _splat(codes.type, 24 - 8 * byte)), _splat(codes.type, 24))
        total = builder.add(total, builder.mul(code, value))
    return total


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _splat(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)
