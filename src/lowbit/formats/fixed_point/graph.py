"""The integer network: a list of operations on buffers of codes, which the interpreter runs and the C writer prints.

Every buffer holds int8 codes of one sample, in the order of its dimensions (``[channels, height, width]`` of a picture), without gaps. Scales
are real numbers that belong to an operation; how they become integers is the requantizer's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.formats.onnx.grid import Grid

QMIN, QMAX = -128, 127  # int8
Triple = tuple[int, int, int]  # for depth, height and width


@dataclass(frozen=True)
class Buffer:
    """A tensor of codes.

    Attributes:
        name: Name of the program's node that it holds the result of.
        shape: Sizes without the batch.
        grid: What the codes stand for, ``(code - zero_point) * scale``, and which of them occur, ``lo`` to ``hi``.
        storage: Name of the buffer whose memory it is; another one's for a view.
    """

    name: str
    shape: tuple[int, ...]
    grid: Grid
    storage: str

    @property
    def size(self) -> int:
        """Number of codes of a sample, which is also its number of bytes."""
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Weight:
    """The weight and bias of a layer in integers: an accumulator is ``factor * sum(codes * (x - zero_point)) + bias``.

    Attributes:
        name: Name of the parameter.
        codes: Whole numbers ``[out, ...]``, int16: the zero point is subtracted, and no row has a common divisor.
        factor: int64 ``[out]``; makes the unit of the accumulator so fine that the bias is a whole number of it.
        bias: int64 ``[out]``, within int32.
        scale: float32 ``[out]``: a code times its factor, times this, is the real weight.
        bit_width: Bits of the stored codes.
        largest: Largest magnitude that an accumulator can have.
    """

    name: str
    codes: Tensor
    factor: Tensor
    bias: Tensor
    scale: Tensor
    bit_width: int
    largest: int


@dataclass(frozen=True)
class Window:
    """Where a convolution's kernel lies: numbers for depth, height and width each, those of a picture with a depth of 1.

    Attributes:
        kernel, stride, dilation: Sizes.
        padding: Zeros before the input; below 0, as many of its first places are left out.
        groups: Number of groups of channels.
        spread: Input ``i`` lies at place ``i * spread``, with zeros between; above 1 where a transposed convolution has a stride.
    """

    kernel: Triple
    stride: Triple
    dilation: Triple
    padding: Triple
    groups: int
    spread: Triple = (1, 1, 1)

    @property
    def is_flat(self) -> bool:
        """Whether it is a window over a picture without zeros between."""
        return self.kernel[0] == self.stride[0] == 1 and self.padding[0] == 0 and self.spread == (1, 1, 1)


@dataclass(frozen=True)
class Span:
    """The inputs along one dimension that a pooled output takes: ``start, start + step, ...`` below ``stop``, which count as ``count``."""

    start: int
    stop: int
    count: int
    step: int = 1

    @property
    def indices(self) -> range:
        """The inputs."""
        return range(self.start, self.stop, self.step)


@dataclass(frozen=True)
class Operation:
    """One step of the network.

    Attributes:
        layer: The module that the operation comes from, for messages.
        target: Where the result goes.
    """

    layer: str
    target: Buffer

    @property
    def sources(self) -> tuple[Buffer, ...]:
        """The buffers that it reads."""
        return ()


@dataclass(frozen=True)
class Convolution(Operation):
    """``code = requantize(factor * sum(w (x - zero_point)) + bias)`` of convolutions, transposed ones as those over an input that is spread.

    Attributes:
        source_shape, target_shape: Channels, depth, height and width.
    """

    source: Buffer
    weight: Weight
    window: Window
    source_shape: tuple[int, int, int, int]
    target_shape: tuple[int, int, int, int]

    @property
    def sources(self) -> tuple[Buffer, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Linear(Operation):
    """The same of a linear layer, for each row of the last dimension."""

    source: Buffer
    weight: Weight

    @property
    def sources(self) -> tuple[Buffer, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Sum(Operation):
    """``code = round(sum of sign (code - zero_point) scale, less the shift of the target's grid, / step) + origin``.

    A sum of one operand moves codes to another grid, or clips them.
    """

    operands: tuple[Buffer, ...]
    signs: tuple[int, ...]

    @property
    def sources(self) -> tuple[Buffer, ...]:
        return self.operands


@dataclass(frozen=True)
class AveragePool(Operation):
    """``code = requantize(sum(x - zero_point))`` over windows; the divisor ``rows count * columns count`` is part of the multiplier."""

    source: Buffer
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    source_shape: tuple[int, int, int]
    is_global: bool = False

    @property
    def sources(self) -> tuple[Buffer, ...]:
        return (self.source,)

    @property
    def divisors(self) -> Tensor:
        """How many inputs each output counts, int64 ``[rows, columns]``."""
        return torch.tensor([[row.count * column.count for column in self.columns] for row in self.rows])


@dataclass(frozen=True)
class MaxPool(Operation):
    """The largest code in each window."""

    source: Buffer
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    source_shape: tuple[int, int, int]

    @property
    def sources(self) -> tuple[Buffer, ...]:
        return (self.source,)


@dataclass(frozen=True)
class Copy(Operation):
    """Codes moved without a change: ``target[target_offset + i . target_strides] = source[offset + i . strides]`` for ``i`` in ``shape``.

    Attributes:
        fill: The code of what no element is moved to; ``None`` where another copy fills it, or nothing is left.
    """

    source: Buffer
    shape: tuple[int, ...]
    offset: int
    strides: tuple[int, ...]
    target_offset: int
    target_strides: tuple[int, ...]
    fill: int | None = None

    @property
    def sources(self) -> tuple[Buffer, ...]:
        return (self.source,)


@dataclass(frozen=True)
class IntegerGraph:
    """A network of integers.

    Attributes:
        input: Its codes are what the caller quantizes.
        output: Its codes are the result.
        operations: In order.
        notes: Remarks for the user.
    """

    input: Buffer
    output: Buffer
    operations: tuple[Operation, ...]
    notes: tuple[str, ...] = ()

    def weights(self) -> Iterator[Weight]:
        """The weights of the layers, in order."""
        for operation in self.operations:
            if isinstance(operation, (Convolution, Linear)):
                yield operation.weight


def contiguous_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a tensor without gaps.

    >>> contiguous_strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(int(torch.Size(shape[index + 1 :]).numel()) for index in range(len(shape)))
