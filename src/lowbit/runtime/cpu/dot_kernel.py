"""Generates the dot product of packed weight codes with 8-bit inputs as LLVM vector IR: codes are unpacked in registers.

A group of 64 bytes holds ``8 / b`` parts: part ``s`` is ``(byte >> s b) & (2**b - 1)`` of every byte, the codes of 64 neighbouring inputs.
Each part is multiplied by the inputs that belong to it, four products to a 32-bit lane where the processor can.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 4  # outputs that share the loaded inputs
GROUP = 64  # bytes
_DOTS = {64: "llvm.x86.avx512.vpdpbusd.512", 32: "llvm.x86.avx512.vpdpbusd.256"}
I8, I16, I32, I64 = (ir.IntType(width) for width in (8, 16, 32, 64))


def make_dot_kernel(bit_width: int, lanes: int, *, has_dot: bool) -> Any:
    """A numba intrinsic ``(codes, row, x, groups, out)``: ``out[r] = sum codes[r, k] x[k]`` for ``ROWS`` rows.

    All are integers: addresses of uint8 codes, int8 inputs and int32 results, bytes from one row of codes to the next, and groups of codes in a
    row. Sums are exact.

    Args:
        bit_width: 1, 2, 4 or 8, of the codes.
        lanes: Bytes of a vector.
        has_dot: Whether the processor adds four products of bytes to a 32-bit lane (VNNI).
    """
    parts = 8 // bit_width
    wide = lanes // 4 if has_dot else lanes
    bytes_, sums = ir.VectorType(I8, lanes), ir.VectorType(I32, wide)

    def add_products(builder: Any, total: Any, codes: Any, x: Any) -> Any:
        if has_dot:
            kind = ir.FunctionType(sums, [sums, sums, sums])
            function = cgutils.get_or_insert_function(builder.module, kind, _DOTS[lanes])
            return builder.call(function, [total, builder.bitcast(codes, sums), builder.bitcast(x, sums)])
        short = ir.VectorType(I16, lanes)  # 255 times -128 fits
        product = builder.mul(builder.zext(codes, short), builder.sext(x, short))
        return builder.add(total, builder.sext(product, sums))

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        codes, row, x, groups, out = arguments
        totals = [cgutils.alloca_once_value(builder, ir.Constant(sums, None)) for _ in range(ROWS)]
        with cgutils.for_range(builder, groups) as loop:
            for first in range(0, GROUP, lanes):
                start = builder.add(codes, builder.add(builder.mul(loop.index, I64(GROUP)), I64(first)))
                inputs = builder.add(x, builder.add(builder.mul(loop.index, I64(GROUP * parts)), I64(first)))
                loaded = [_load(builder, builder.add(start, builder.mul(row, I64(index))), bytes_) for index in range(ROWS)]
                for index in range(ROWS, 2 * ROWS):
                    _prefetch(builder, builder.add(start, builder.mul(row, I64(index))))
                for part in range(parts):
                    values = _load(builder, builder.add(inputs, I64(part * GROUP)), bytes_)
                    for total, byte in zip(totals, loaded, strict=True):
                        code = builder.lshr(byte, _splat(bytes_, part * bit_width)) if part else byte
                        code = builder.and_(code, _splat(bytes_, 2**bit_width - 1)) if bit_width < 8 else code
                        builder.store(add_products(builder, builder.load(total), code, values), total)
        reduce = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I32, [sums]), f"llvm.vector.reduce.add.v{wide}i32")
        for index, total in enumerate(totals):
            place = builder.inttoptr(builder.add(out, I64(4 * index)), I32.as_pointer())
            builder.store(builder.call(reduce, [builder.load(total)]), place)
        return cgutils.get_null_value(I8.as_pointer())

    # numba wants the arity spelled out
    def typed(context, codes, row, x, groups, out):  # type: ignore[no-untyped-def]
        return types.void(*[types.intp] * 5), generate

    return intrinsic(typed)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _prefetch(builder: Any, address: Any) -> Any:
    """Ask for what the next rows read: a processor's own prefetching does not follow several rows at once."""
    pointer = I8.as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    builder.call(function, [builder.inttoptr(address, pointer), I32(0), I32(3), I32(1)])


def _splat(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)
