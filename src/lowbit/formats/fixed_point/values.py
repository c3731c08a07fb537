"""What the lowering knows about a tensor of the program: that it holds codes, or which float values a quantizer is still to see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import fx

from lowbit.formats.fixed_point.graph import Buffer, Span, Window
from lowbit.formats.onnx.grid import Grid

OFF_GRID = 1e-3  # in steps: farther from a level, a bound or a filling is not one
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Codes:
    """A tensor whose values are codes of a buffer."""

    buffer: Buffer

    @property
    def moved_shape(self) -> tuple[int, ...]:
        """Sizes without the batch."""
        return self.buffer.shape


@dataclass(frozen=True)
class FromInput:
    """The network's input, which the caller quantizes."""

    name: str


@dataclass(frozen=True)
class FromLayer:
    """The accumulators of a convolution (with a ``window``) or of a linear layer; ``is_transposed``: its weight is that of a transposed one."""

    layer: str
    source: Buffer
    parameter: str
    bias: Doubles | None
    window: Window | None = None
    is_transposed: bool = False


@dataclass(frozen=True)
class FromSum:
    """A sum of tensors of codes."""

    layer: str
    operands: tuple[Buffer, ...]
    signs: tuple[int, ...]


@dataclass(frozen=True)
class FromPool:
    """Means over windows."""

    layer: str
    source: Buffer
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]
    source_shape: tuple[int, int, int]
    is_global: bool


@dataclass(frozen=True)
class FromConcatenation:
    """Tensors side by side along ``axis``, which does not count the batch; those that are still float are quantized with the whole."""

    layer: str
    parts: tuple[Value, ...]
    axis: int


Source = FromInput | FromLayer | FromSum | FromPool | FromConcatenation


@dataclass(frozen=True)
class Unquantized:
    """Float values that a quantizer behind them turns into codes: ``clip(factor * source + shift)``, then moved.

    Attributes:
        source: What computes them.
        name: Name of the program's node that the source is.
        shape: Sizes of the source without the batch.
        factor, shift: A number for each channel of a layer, or one; ``None`` where nothing was scaled.
        clips: Bounds, from the first on.
        moves: Nodes that move values or take the largest ones; quantizing before them is the same.
        last: Name of the last node, for messages.
    """

    source: Source
    name: str
    shape: tuple[int, ...]
    factor: Doubles | None = None
    shift: Doubles | None = None
    clips: tuple[tuple[float, float], ...] = ()
    moves: tuple[fx.Node, ...] = field(default=())
    last: str = ""

    def clipped(self, lo: float, hi: float) -> Unquantized:
        """The values limited to ``lo`` to ``hi``."""
        return replace(self, clips=(*self.clips, (lo, hi)))

    def scaled(self, factor: Doubles, shift: Doubles) -> Unquantized:
        """The values times ``factor``, plus ``shift``."""
        if self.factor is None or self.shift is None:
            return replace(self, factor=factor, shift=shift)
        return replace(self, factor=self.factor * factor, shift=self.shift * factor + shift)

    @property
    def is_open(self) -> bool:
        """Whether nothing has been clipped or moved, so that it can still be scaled."""
        return not self.clips and not self.moves

    @property
    def moved_shape(self) -> tuple[int, ...]:
        """Sizes behind the moves, without the batch."""
        return sizes_of(self.moves[-1]) if self.moves else self.shape

    @property
    def natural_grid(self) -> Grid | None:
        """The grid that the values lie on without being rounded; ``None`` if there is none."""
        held: tuple[Buffer, ...] = ()
        if isinstance(self.source, FromConcatenation):
            held = tuple(part.buffer for part in self.source.parts if isinstance(part, Codes))
            held = held if len(held) == len(self.source.parts) else ()
        elif isinstance(self.source, FromSum):
            held = self.source.operands
        grids = [plain(buffer.grid) for buffer in held]
        is_sum = isinstance(self.source, FromSum) and (len(grids) > 1 or self.source.signs != (1,))
        if (
            not grids
            or is_sum
            or self.factor is not None
            or any((g.scale, g.zero_point) != (grids[0].scale, grids[0].zero_point) for g in grids)
        ):
            return None
        grid = grids[0].within(min(g.lo for g in grids), max(g.hi for g in grids))
        bounds = [bound / float(grid.scale) for clip in self.clips for bound in clip if math.isfinite(bound)]
        return grid if all(abs(bound - round(bound)) <= OFF_GRID for bound in bounds) else None


Value = Codes | Unquantized


def sizes_of(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a node's result, or of the first of its results, without the batch."""
    made = node.meta["val"]
    return tuple(int(size) for size in (made[0] if isinstance(made, (tuple, list)) else made).shape[1:])


def plain(grid: Grid) -> Grid:
    """The grid on which codes that exist already stay what they are."""
    return Grid.plain(grid.scale, grid.zero_point, grid.lo, grid.hi)


def picture(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """``[channels, height, width]`` of a picture, of a sequence ``[channels, length]`` or of numbers ``[channels]``."""
    channels, *sizes = shape
    return (channels, *(1,) * (2 - len(sizes)), *sizes)  # type: ignore[return-value]


def volume(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """``[channels, depth, height, width]`` of a volume, or of a ``picture`` with a depth of 1."""
    channels, *sizes = shape
    return (channels, *(1,) * (3 - len(sizes)), *sizes)  # type: ignore[return-value]


def limited(grid: Grid, clips: Sequence[tuple[float, float]]) -> Grid:
    """``grid`` with the codes that are left when values are clipped, the last clip first, before they are rounded."""
    for bounds in reversed(clips):
        lo, hi = (min(max(grid.code(bound), grid.lo), grid.hi) for bound in bounds)
        grid = grid.within(lo, hi)
    return grid


def window_spans(
    size: int, kernel: int, stride: int, padding: int, outputs: int, *, dilation: int = 1, counts_padding: bool = False
) -> tuple[Span, ...]:
    """The windows of a pool along a dimension of ``size`` inputs; places of padding are left out, and counted only if ``counts_padding``.

    >>> window_spans(4, 3, 2, 1, 2)
    (Span(start=0, stop=2, count=2, step=1), Span(start=1, stop=4, count=3, step=1))
    """
    spans = []
    for output in range(outputs):
        first = output * stride - padding
        last = min(first + dilation * (kernel - 1) + 1, size + padding)
        start = first + dilation * math.ceil(max(-first, 0) / dilation)
        stop = min(last, size)
        spans.append(Span(start, stop, last - first if counts_padding else stop - start, dilation))
    return tuple(spans)


def adaptive_spans(size: int, outputs: int) -> tuple[Span, ...]:
    """The windows of an adaptive pool along a dimension.

    >>> adaptive_spans(5, 2)
    (Span(start=0, stop=3, count=3, step=1), Span(start=2, stop=5, count=3, step=1))
    """
    starts = [output * size // outputs for output in range(outputs)]
    stops = [-(-(output + 1) * size // outputs) for output in range(outputs)]
    return tuple(Span(start, stop, stop - start) for start, stop in zip(starts, stops, strict=True))
