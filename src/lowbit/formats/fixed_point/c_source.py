"""Writes an integer network as one C99 file and its header, for processors without floating point and without a heap."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatchmethod
from pathlib import Path

import torch
from torch import Tensor

from lowbit.errors import GraphError, SpecError
from lowbit.files import write_text
from lowbit.formats.fixed_point import c_kernels as kernels
from lowbit.formats.fixed_point.constants import layer_requantizer, pool_offset, pool_requantizers, pool_shift, sum_constants
from lowbit.formats.fixed_point.graph import (
    QMAX,
    QMIN,
    AveragePool,
    Buffer,
    Convolution,
    Copy,
    Linear,
    MaxPool,
    Operation,
    Span,
    Sum,
    Weight,
)
from lowbit.formats.fixed_point.memory import Arena, lifetimes, plan_arena
from lowbit.formats.fixed_point.network import IntegerNetwork
from lowbit.formats.fixed_point.requantize import IntegerRequantizer, Requantizer
from lowbit.formats.fixed_point.weights import code_step
from lowbit.formats.packed.packing import pack

_FIELD = 4  # bytes of a number or pointer of a table, on a processor of 32 bits
_WIDEST = 100  # columns of a line of numbers
_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True)
class MemoryUse:
    """What the network takes on the chip, its code and the stack left out.

    Attributes:
        flash_bytes: Constants: weights, biases, multipliers and tables, with pointers of 4 bytes.
        arena_bytes: RAM for the buffers between operations.
        filter_bytes: RAM for the weights of one output channel, which are unpacked there; 0 where all have 8 bits.
        io_bytes: RAM of the input and the output, which the caller holds.
        packed_bytes: Size of the ``.lowbit`` file of the same network; ``None`` where it is not known.
    """

    flash_bytes: int
    arena_bytes: int
    filter_bytes: int
    io_bytes: int
    packed_bytes: int | None = None

    @property
    def ram_bytes(self) -> int:
        """RAM that the file itself declares."""
        return self.arena_bytes + self.filter_bytes

    def __str__(self) -> str:
        beside = "" if self.packed_bytes is None else f"; the .lowbit file takes {self.packed_bytes:,} bytes"
        filters = f" + {self.filter_bytes:,} for unpacked weights" if self.filter_bytes else ""
        return (
            f"flash {self.flash_bytes:,} bytes of constants besides the code{beside}\n"
            f"RAM {self.ram_bytes:,} bytes (arena {self.arena_bytes:,}{filters}), input and output {self.io_bytes:,} more"
        )


@dataclass(frozen=True)
class CSource:
    """A generated file.

    Attributes:
        name: Prefix of everything that it offers: ``<name>_run``.
        source: Text of the C file.
        header: Text of the header.
        memory: What it takes.
    """

    name: str
    source: str
    header: str
    memory: MemoryUse

    def write(self, path: Path) -> None:
        """Write the C file to ``path``, and the header beside it."""
        write_text(path, self.source)
        write_text(path.with_suffix(".h"), self.header)


def c_source(network: IntegerNetwork, name: str) -> CSource:
    """The C file of a network.

    It includes nothing but ``stdint.h`` and ``string.h`` and offers ``int <name>_run(const int8_t *input, int8_t *output)``, which returns 0, or
    -1 where a pointer is null; the header has scale and zero point of both. Its results are those of ``network.run``.

    Args:
        network: The integer network, in fixed point or dyadic arithmetic.
        name: A C identifier.

    Raises:
        SpecError: The network's requantizer computes in float, or the name is no identifier.
        GraphError: A dimension or table is too large for the file's integers.
    """
    if network.arithmetic.kind == "onnx":
        raise SpecError("the requantizer 'onnx' multiplies in float32: a C file takes 'fixed_point' or 'dyadic'")
    if _WORD.fullmatch(name) is None:
        raise SpecError(f"{name!r} is no name for C functions: use letters, digits and underscores, and begin with a letter")
    return _Writer(network, name).write()


class _Writer:
    """Collects constants, kernels and calls."""

    def __init__(self, network: IntegerNetwork, name: str) -> None:
        self._network, self._graph, self._name = network, network.graph, name
        self._arena: Arena = plan_arena(lifetimes(network.graph))
        self._kernels: dict[str, None] = {}
        self._constants: list[str] = []
        self._calls: list[str] = []
        self._flash = 0
        self._dimensions = 1
        self._packs = any(_is_packed(weight) for weight in self._graph.weights())
        self._is_wide = any(not _fits_int8(weight.codes) for weight in self._graph.weights())
        unpacked = [weight.codes[0].numel() for weight in self._graph.weights() if self._is_wide or _is_packed(weight)]
        self._filter_type, self._filter_size = ("int16_t" if self._is_wide else "int8_t"), max(unpacked, default=0)

    def write(self) -> CSource:
        for index, operation in enumerate(self._graph.operations):
            self._calls.append(f"    /* {_comment(operation.layer)} */")
            self._emit(operation, index)
        arena = self._arena.size
        filter_bytes = self._filter_size * (2 if self._is_wide else 1)
        memory = MemoryUse(self._flash, arena, filter_bytes, self._graph.input.size + self._graph.output.size)
        return CSource(self._name, self._source(arena), self._header(memory), memory)

    def _source(self, arena: int) -> str:
        name = self._name
        body = "\n".join(self._kernels)
        wants_filters = kernels.WEIGHTS in self._kernels
        filters = f"typedef {self._filter_type} filter_t;\n#define FILTER_SIZE {max(self._filter_size, 1)}\n" if wants_filters else ""
        memory = f"static int8_t arena[{arena}];\n" if arena else ""
        dimensions = f"#define MOST_DIMENSIONS {self._dimensions}\n" if kernels.COPY in self._kernels else ""
        return (
            f"/* {name}: an integer network, {self._network.arithmetic.kind} arithmetic; written by lowbit. C99, no floating point, no heap. */\n"
            f'#include "{name}.h"\n#include <string.h>\n\n{filters}{dimensions}{memory}\n{body}\n'
            + "\n".join(self._constants)
            + f"\nint {name}_run(const int8_t *input, int8_t *output)\n{{\n    if (input == 0 || output == 0)\n        return -1;\n"
            + "\n".join(self._calls)
            + "\n    return 0;\n}\n"
        )

    def _header(self, memory: MemoryUse) -> str:
        upper, x, y = self._name.upper(), self._graph.input, self._graph.output
        shift = f"#define {upper}_INPUT_SHIFT {_float(x.grid.shift)}\n" if x.grid.shift else ""
        less = f" - {upper}_INPUT_SHIFT" if x.grid.shift else ""
        sizes = f"[{', '.join(map(str, x.shape))}]", f"[{', '.join(map(str, y.shape))}]"
        return (
            f"/* {self._name}: an integer network; written by lowbit.\n *\n"
            f" * input {sizes[0]}: code = round((x{less}) / {upper}_INPUT_SCALE) + {upper}_INPUT_ZERO_POINT, limited to\n"
            f" *     {upper}_INPUT_LOWEST ... {upper}_INPUT_HIGHEST; ties are rounded to even\n"
            f" * output {sizes[1]}: y = (code - {upper}_OUTPUT_ZERO_POINT) * {upper}_OUTPUT_SCALE\n *\n"
            f" * {memory.flash_bytes} bytes of constants, {memory.ram_bytes} bytes of RAM. Not reentrant: buffers between layers are static.\n */\n"
            f"#ifndef {upper}_H\n#define {upper}_H\n\n#include <stdint.h>\n\n"
            f"#define {upper}_INPUT_SIZE {x.size}\n#define {upper}_INPUT_SCALE {_float(float(x.grid.step))}\n"
            f"#define {upper}_INPUT_ZERO_POINT ({x.grid.origin})\n{shift}"
            f"#define {upper}_INPUT_LOWEST ({x.grid.lo})\n#define {upper}_INPUT_HIGHEST ({x.grid.hi})\n"
            f"#define {upper}_OUTPUT_SIZE {y.size}\n#define {upper}_OUTPUT_SCALE {_float(float(y.grid.scale))}\n"
            f"#define {upper}_OUTPUT_ZERO_POINT ({y.grid.zero_point})\n#define {upper}_RAM_BYTES {memory.ram_bytes}\n\n"
            '#ifdef __cplusplus\nextern "C" {\n#endif\n\n'
            f"/* the codes of the output for those of the input; 0, or -1 where a pointer is null */\n"
            f"int {self._name}_run(const int8_t *input, int8_t *output);\n\n#ifdef __cplusplus\n}}\n#endif\n\n#endif\n"
        )

    @singledispatchmethod
    def _emit(self, operation: Operation, index: int) -> None:
        raise NotImplementedError(type(operation).__name__)

    @_emit.register
    def _(self, operation: Convolution, index: int) -> None:
        window, (channels, *sizes), (out_channels, *out_sizes) = operation.window, operation.source_shape, operation.target_shape
        of_group = channels // window.groups, out_channels // window.groups
        source, target = self._read(operation.source), self._written(operation.target)
        if window.is_flat and sizes[0] == 1:
            self._use_layers(kernels.CONVOLUTION)
            places = (number for setting in (window.kernel, window.stride, window.dilation, window.padding) for number in setting[1:])
            fields = (*sizes[1:], out_channels, *out_sizes[1:], *of_group, *places)
            self._table("convolution", index, [self._weights(operation, index), *map(str, fields)])
            self._calls.append(f"    convolve(&convolution{index}, {source}, {target});")
            return
        self._use_layers(kernels.VOLUME)
        settings = (window.kernel, window.stride, window.dilation, window.padding, window.spread)
        parts = [*map(_triple, (sizes, out_sizes)), *map(str, (out_channels, *of_group)), *map(_triple, settings)]
        self._flash += _FIELD * 2 * (2 + len(settings))  # the table counts one of three
        self._table("volume", index, [self._weights(operation, index), *parts])
        self._calls.append(f"    convolve_volume(&volume{index}, {source}, {target});")

    @_emit.register
    def _(self, operation: Linear, index: int) -> None:
        self._use_layers(kernels.LINEAR)
        out_channels = len(operation.weight.codes)
        rows = operation.target.size // out_channels
        self._table("linear", index, [self._weights(operation, index), str(rows), str(out_channels)])
        self._calls.append(f"    multiply(&linear{index}, {self._read(operation.source)}, {self._written(operation.target)});")

    @_emit.register
    def _(self, operation: Sum, index: int) -> None:
        arithmetic, grid = self._network.arithmetic, operation.target.grid
        self._use_rescaling()
        self._use(kernels.sum_kernel(arithmetic))
        constants = sum_constants(operation, arithmetic)
        arrays = (
            ("zero", [operand.grid.zero_point for operand in operation.operands]),
            ("sign", operation.signs),
            ("multiplier", constants.multipliers),
            ("shift", constants.shifts),
        )
        names = [self._array(f"sum{index}_{name}", "int32_t", values) for name, values in arrays]
        fields = (constants.offset, constants.multiplier, constants.shift, grid.origin, grid.lo, grid.hi)
        self._table("sum", index, [str(len(operation.operands)), str(operation.target.size), *names, *map(str, fields)])
        sources = ", ".join(self._read(operand) for operand in operation.operands)
        self._calls.append(
            f"    {{\n        const int8_t *x[{len(operation.operands)}] = {{{sources}}};\n\n        add(&sum{index}, x, {self._written(operation.target)});\n    }}"
        )

    @_emit.register
    def _(self, operation: AveragePool, index: int) -> None:
        self._use_rescaling()
        self._use(kernels.AVERAGE_POOL)
        divisors, requantizers = pool_requantizers(operation, self._network.arithmetic)
        multipliers, shifts = zip(*(_constants(requantizer) for requantizer in requantizers), strict=True)
        places, which = torch.searchsorted(divisors, operation.divisors), "0"
        if len(divisors) > 256:
            raise GraphError(f"layer {operation.layer!r}: the windows of this pool have {len(divisors)} sizes; the C file counts up to 256")
        if len(divisors) > 1:
            which = self._array(f"pool{index}_divisor", "uint8_t", places.flatten().tolist())
        spans = self._spans(operation.rows, f"pool{index}_rows"), self._spans(operation.columns, f"pool{index}_columns")
        grid = operation.target.grid
        arrays = (
            self._array(f"pool{index}_multiplier", "int32_t", [int(m) for m in multipliers]),
            self._array(
                f"pool{index}_offset", "int32_t", [pool_offset(operation, int(divisor), self._network.arithmetic) for divisor in divisors]
            ),
            self._array(f"pool{index}_shift", "int8_t", [int(s) for s in shifts]),
        )
        sizes = (*operation.source_shape, len(operation.rows), len(operation.columns))
        ends = (pool_shift(operation, self._network.arithmetic), operation.source.grid.zero_point, grid.origin, grid.lo, grid.hi)
        self._table("average_pool", index, [*map(str, sizes), *spans, which, *arrays, *map(str, ends)])
        self._calls.append(f"    average(&average_pool{index}, {self._read(operation.source)}, {self._written(operation.target)});")

    @_emit.register
    def _(self, operation: MaxPool, index: int) -> None:
        self._use(kernels.MAX_POOL)
        steps = operation.rows[0].step, operation.columns[0].step
        sizes = (*operation.source_shape, len(operation.rows), len(operation.columns), *steps)
        spans = self._spans(operation.rows, f"pool{index}_rows"), self._spans(operation.columns, f"pool{index}_columns")
        self._table("max_pool", index, [*map(str, sizes), *spans])
        self._calls.append(f"    largest(&max_pool{index}, {self._read(operation.source)}, {self._written(operation.target)});")

    @_emit.register
    def _(self, operation: Copy, index: int) -> None:
        source, target = self._read(operation.source), self._written(operation.target)
        if operation.fill is not None:
            self._calls.append(f"    memset({target}, {operation.fill}, {operation.target.size});")
        shape, strides, to = _merged(operation)
        if (strides, to) in (((1,), (1,)), ((), ())):
            size = shape[0] if shape else 1
            self._calls.append(f"    memcpy({target} + {operation.target_offset}, {source} + {operation.offset}, {size});")
            return
        self._use(kernels.COPY)
        self._dimensions = max(self._dimensions, len(shape))
        names = [
            self._array(f"copy{index}_{part}", "int32_t", values) for part, values in (("shape", shape), ("from", strides), ("to", to))
        ]
        self._table("copy", index, [str(len(shape)), *names, str(operation.offset), str(operation.target_offset)])
        self._calls.append(f"    copy(&copy{index}, {source}, {target});")

    def _weights(self, operation: Convolution | Linear, index: int) -> str:
        """The initializer of ``struct weights``."""
        weight, grid = operation.weight, operation.target.grid
        step, lowest, bits = code_step(weight.codes), int(weight.codes.min()), weight.bit_width
        packed, plain = "0", "0"
        if _is_packed(weight):
            if bits > 8:
                raise GraphError(
                    f"layer {operation.layer!r}: the codes of its weight span {int(weight.codes.max()) - lowest:,}; the C file stores up to 8 bits each. "
                    "Use a method whose weights have a zero point among their codes."
                )
            stored = ((weight.codes.long() - lowest) // step).to(torch.uint8)
            packed = self._array(f"weight{index}", "uint8_t", pack(stored.flatten(), bits).tolist())
        else:
            plain = self._array(f"weight{index}", "int8_t", weight.codes.flatten().tolist())
        is_same = bool((weight.factor == weight.factor[0]).all())
        factor = self._array(f"factor{index}", "int32_t", weight.factor[:1].tolist() if is_same else weight.factor.tolist())
        multiplier, shift = (
            t.expand(len(weight.bias)).tolist() for t in _constants(layer_requantizer(operation, self._network.arithmetic))
        )
        names = (
            self._array(f"bias{index}", "int32_t", weight.bias.tolist()),
            self._array(f"multiplier{index}", "int32_t", multiplier),
            self._array(f"shift{index}", "int8_t", shift),
        )
        fields = (weight.codes[0].numel(), bits, step, lowest)
        ends = (operation.source.grid.zero_point, grid.origin, grid.lo, grid.hi)
        parts = [packed, plain, *map(str, fields), factor, str(int(not is_same)), *names, *map(str, ends)]
        self._flash += _FIELD * (len(parts) - 1)  # the table counts one
        return "{" + ", ".join(parts) + "}"

    def _use_layers(self, kernel: str) -> None:
        self._use_rescaling()
        self._use(kernels.WEIGHTS)
        self._use(kernels.FILTER_WIDE if self._is_wide else kernels.FILTER_PACKED if self._packs else kernels.FILTER_PLAIN)
        self._use(kernels.FINISH)
        self._use(kernel)

    def _use_rescaling(self) -> None:
        self._use(kernels.FLOOR_SHIFT)
        if self._network.arithmetic.kind == "dyadic":
            self._use(kernels.HALF_EVEN_SHIFT)
        self._use(kernels.rescale_kernel(self._network.arithmetic))
        self._use(kernels.CLAMP)

    def _use(self, kernel: str) -> None:
        self._kernels.setdefault(kernel)

    def _spans(self, spans: Sequence[Span], name: str) -> str:
        ends = [end for span in spans for end in (span.start, span.stop)]
        if max(ends) >= 2**16:
            raise GraphError(f"{name}: a pool over {max(ends)} inputs; the C file counts them with 16 bits")
        return self._array(name, "uint16_t", ends)

    def _array(self, name: str, kind: str, values: Sequence[int]) -> str:
        """Add an array of constants and return its name."""
        self._flash += len(values) * {"int8_t": 1, "uint8_t": 1, "uint16_t": 2, "int32_t": 4}[kind]
        lines, line = [], "   "
        for value in values:
            if len(line) + len(str(value)) > _WIDEST:
                lines.append(line)
                line = "   "
            line += f" {value},"
        self._constants.append(f"static const {kind} {name}[{len(values)}] = {{\n" + "\n".join([*lines, line.rstrip(",")]) + "\n};")
        return name

    def _table(self, kind: str, index: int, fields: Sequence[str]) -> None:
        self._flash += _FIELD * len(fields)
        self._constants.append(f"static const struct {kind} {kind}{index} = {{{', '.join(fields)}}};\n")

    def _read(self, buffer: Buffer) -> str:
        return "input" if buffer.storage == self._graph.input.storage else self._written(buffer)

    def _written(self, buffer: Buffer) -> str:
        return "output" if buffer.storage == self._graph.output.storage else f"arena + {self._arena.offsets[buffer.storage]}"


def _is_packed(weight: Weight) -> bool:
    """Whether codes are stored with fewer than 8 bits each, or do not fit int8 as they are."""
    return weight.bit_width < 8 or not _fits_int8(weight.codes)


def _fits_int8(codes: Tensor) -> bool:
    return codes.numel() == 0 or (int(codes.min()) >= QMIN and int(codes.max()) <= QMAX)


def _triple(numbers: Sequence[int]) -> str:
    return "{" + ", ".join(map(str, numbers)) + "}"


def _constants(requantizer: Requantizer) -> tuple[Tensor, Tensor]:
    assert isinstance(requantizer, IntegerRequantizer)
    return requantizer.multiplier, requantizer.shift


def _merged(operation: Copy) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a copy without dimensions of size 1, and with those merged that run on in both tensors."""
    merged: list[list[int]] = []
    for size, stride, to in zip(operation.shape, operation.strides, operation.target_strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size and merged[-1][2] == to * size:
            merged[-1] = [merged[-1][0] * size, stride, to]
        else:
            merged.append([size, stride, to])
    shape, strides, targets = (tuple(part[place] for part in merged) for place in range(3))
    return shape, strides, targets


def _float(value: float) -> str:
    text = f"{value:.9g}"
    return f"({text if any(mark in text for mark in '.en') else text + '.0'}f)"


def _comment(text: str) -> str:
    """The name of a layer, in which files can hold any characters, with those that could end a comment or hide text replaced."""
    return re.sub(r"[^A-Za-z0-9_.\-]", "_", text)
