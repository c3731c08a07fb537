"""Lowers pools, concatenations and operators that only move values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from lowbit.formats.fixed_point.context import Context, kind_of
from lowbit.formats.fixed_point.graph import QMAX, QMIN, Buffer, Copy, MaxPool, Span, contiguous_strides
from lowbit.formats.fixed_point.lower_layers import numbers_of
from lowbit.formats.fixed_point.values import (
    OFF_GRID,
    Codes,
    FromConcatenation,
    FromPool,
    Unquantized,
    Value,
    adaptive_spans,
    picture,
    sizes_of,
    volume,
    window_spans,
)
from lowbit.formats.onnx.grid import Grid

Spans = tuple[Span, ...]


def lower_average_pool(context: Context, node: fx.Node) -> Value:
    """An average pool with windows or to a given size."""
    is_whole = kind_of(node).startswith("adaptive") and set(sizes_of(node)[1:]) == {1}
    if not is_whole and len(sizes_of(node)) == 4:
        raise context.refused(
            node, "of average pools over 3 dimensions, the mean over the whole volume has an integer form, windows have not"
        )
    x = context.codes(node, 0)
    if is_whole:
        return _whole_mean(context, node, x)
    rows, columns = _windows(node, x)
    return context.result(node, FromPool(context.layer(node), x, rows, columns, picture(x.shape), len(rows) * len(columns) == 1))


def lower_mean(context: Context, node: fx.Node) -> Value:
    """A mean over all dimensions behind the channels."""
    x = context.codes(node, 0)
    rank = len(x.shape) + 1
    dims = sorted(dim % rank for dim in cast(Sequence[int], node.args[1] or ()))
    if rank not in (3, 4, 5) or dims != list(range(2, rank)):
        raise context.refused(node, "of means, those over all dimensions behind the channels have an integer form")
    return _whole_mean(context, node, x)


def _whole_mean(context: Context, node: fx.Node, x: Buffer) -> Value:
    """The mean over all dimensions behind the channels, for which a volume is as good as a picture of its planes one below the other."""
    channels, depth, height, width = volume(x.shape)
    shape = channels, depth * height, width
    rows, columns = (Span(0, shape[1], shape[1]),), (Span(0, width, width),)
    return context.result(node, FromPool(context.layer(node), x, rows, columns, shape, is_global=True))


def lower_max_pool(context: Context, node: fx.Node) -> Any:
    """A max pool; the largest code is the code of the largest value."""
    value = context.value(node, 0)
    if isinstance(value, Unquantized) and value.natural_grid is None:
        pooled: Value = replace(value, moves=(*value.moves, node), last=node.name)
    else:
        pooled = move_codes(context, node, context.settled(node, value), node.name)
    return (pooled,) if isinstance(node.meta["val"], (tuple, list)) else pooled


def lower_move(context: Context, node: fx.Node) -> Value:
    """An operator whose result consists of values of its input."""
    value = context.value(node, 0)
    if isinstance(value, Unquantized) and value.natural_grid is None:
        return replace(value, moves=(*value.moves, node), last=node.name)
    return move_codes(context, node, context.settled(node, value), node.name)


def lower_split(context: Context, node: fx.Node) -> tuple[Value, ...]:
    """An operator that takes a tensor apart."""
    x = context.codes(node, 0)
    return tuple(_moved(context, node, x, f"{node.name}.{part}", part) for part in range(len(node.meta["val"])))


def lower_concatenation(context: Context, node: fx.Node) -> Value:
    """A concatenation; the quantizer behind it brings its parts to one grid."""
    values = [context.values[source] for source in cast(Sequence[fx.Node], node.args[0])]
    rank = len(sizes_of(node)) + 1
    axis = cast(int, node.args[1] if len(node.args) > 1 else 0) % rank - 1
    if axis < 0 or not all(isinstance(value, (Codes, Unquantized)) for value in values):
        raise context.refused(node, "it concatenates samples, or constants")
    return context.result(node, FromConcatenation(context.layer(node), tuple(cast("list[Value]", values)), axis))


def lower_padding(context: Context, node: fx.Node) -> Value:
    """A tensor surrounded by a constant: one of its levels, or what a quantizer behind makes of it."""
    mode, fill, pads = _padding(node)
    if mode != "constant":
        raise context.refused(node, f"padding with {mode!r} values has no integer form, only padding with a constant")
    value = context.value(node, 0)
    if min(pads) < 0 or len(pads) > 2 * len(value.moved_shape):
        raise context.refused(node, f"padding of {pads} has no integer form: it takes values away, or adds samples")
    if isinstance(value, Unquantized) and value.natural_grid is None:
        return replace(value, moves=(*value.moves, node), last=node.name)
    x = context.settled(node, value)
    level = fill / float(x.grid.scale)
    code = round(level) + x.grid.zero_point
    if not QMIN <= code <= QMAX or abs(level - round(level)) > OFF_GRID:
        raise context.refused(node, f"{fill:g}, with which it pads, is none of the levels of its input")
    return _padded(context, node, x, node.name, code)


def _padding(node: fx.Node) -> tuple[str, float, list[int]]:
    """Mode, filling, and elements before and behind, the last dimension first."""
    pads, *rest = cast(Sequence[Any], node.args[1:])
    mode, *fill = rest if kind_of(node) == "pad" and rest else ("constant", *rest)
    return mode, float(fill[0]) if fill and fill[0] is not None else 0.0, [int(pad) for pad in pads]


def _padded(context: Context, node: fx.Node, x: Buffer, name: str, code: int) -> Codes:
    pads, shape = _padding(node)[2], sizes_of(node)
    before = [pads[2 * place] if 2 * place < len(pads) else 0 for place in reversed(range(len(x.shape)))]
    strides = contiguous_strides(shape)
    offset = sum(margin * stride for margin, stride in zip(before, strides, strict=True))
    target = Buffer(name, shape, _moved_grid(x.grid), name)
    context.operations.append(Copy(context.layer(node), target, x, x.shape, 0, contiguous_strides(x.shape), offset, strides, fill=code))
    return Codes(target)


def move_codes(context: Context, node: fx.Node, x: Buffer, name: str, grid: Grid | None = None) -> Codes:
    """The result of a move, or of a max pool, on codes, in a buffer called ``name``; of a padding, if ``grid`` is that of the quantizer behind."""
    if grid is not None and "pad" in kind_of(node):
        return _padded(context, node, x, name, min(max(grid.code(_padding(node)[1]), grid.lo), grid.hi))
    if "max_pool" not in kind_of(node):
        return _moved(context, node, x, name)
    *planes, rows, columns = _windows(node, x)
    target = Buffer(name, sizes_of(node), _moved_grid(x.grid), name)
    if planes:  # within the planes of a volume first, then across them
        channels, depth, height, width = x.shape
        within = Buffer(f"{name}.planes", (channels, depth, len(rows), len(columns)), target.grid, f"{name}.planes")
        context.operations.append(MaxPool(context.layer(node), within, x, rows, columns, (channels * depth, height, width)))
        pixels = len(rows) * len(columns)
        rows, columns, x = planes[0], tuple(Span(pixel, pixel + 1, 1) for pixel in range(pixels)), within
        context.operations.append(MaxPool(context.layer(node), target, x, rows, columns, (channels, depth, pixels)))
        return Codes(target)
    context.operations.append(MaxPool(context.layer(node), target, x, rows, columns, picture(x.shape)))
    return Codes(target)


def copy_codes(context: Context, layer: str, x: Buffer, target: Buffer, offset: int) -> None:
    """Copy ``x`` into a part of ``target``, with the strides of ``target``."""
    strides = contiguous_strides(target.shape)
    context.operations.append(Copy(layer, target, x, x.shape, 0, contiguous_strides(x.shape), offset, strides))


def _moved(context: Context, node: fx.Node, x: Buffer, name: str, part: int | None = None) -> Codes:
    """The result of an operator that only moves values, found by moving the indices of elements."""
    elements = torch.arange(context.batch * x.size).reshape(context.batch, *x.shape)
    result = node.target(*context.arguments(node, elements), **node.kwargs)  # type: ignore[operator]
    moved = cast(Tensor, result if part is None else result[part])
    is_by_sample = moved.dim() > 0 and moved.shape[0] == context.batch
    if not is_by_sample or any(not torch.equal(moved[sample], moved[0] + sample * x.size) for sample in range(1, context.batch)):
        raise context.refused(node, "it mixes the samples of a batch")
    shape = tuple(moved.shape[1:])
    if torch.equal(moved[0].flatten(), torch.arange(x.size)):
        return Codes(Buffer(name, shape, _moved_grid(x.grid), x.storage))
    offset = int(moved[0].flatten()[0])
    axes = (moved[0][tuple(slice(None) if other == axis else 0 for other in range(len(shape)))] for axis in range(len(shape)))
    steps = [step for positions in axes for step in _steps(positions)]
    sizes, strides = tuple(size for size, _ in steps), tuple(stride for _, stride in steps)
    if not torch.equal(moved[0].flatten(), elements.flatten().as_strided(sizes, strides, offset).flatten()):
        raise context.refused(node, "it moves values in an order that strides cannot describe: write it with view and permute")
    target = Buffer(name, shape, _moved_grid(x.grid), name)
    context.operations.append(Copy(context.layer(node), target, x, sizes, offset, strides, 0, contiguous_strides(sizes)))
    return Codes(target)


def _steps(positions: Tensor) -> list[tuple[int, int]]:
    """Sizes and strides of the axes that positions along one axis run through, the innermost last.

    >>> _steps(torch.tensor([0, 6, 2, 8, 4, 10]))
    [(3, 2), (2, 6)]
    """
    if len(positions) < 2:
        return []
    differences = positions.diff()
    changes = (differences != differences[0]).nonzero()
    run = int(changes[0]) + 1 if len(changes) and len(positions) % (int(changes[0]) + 1) == 0 else len(positions)
    return [*_steps(positions[::run]), (run, int(differences[0]))]


def _moved_grid(grid: Grid) -> Grid:
    """The grid of codes that were moved, as ONNX files quantize them again: with all codes of the container."""
    return Grid.plain(grid.scale, grid.zero_point, QMIN, QMAX)


def _windows(node: fx.Node, x: Buffer) -> tuple[Spans, ...]:
    """The rows and columns that each output of a pool takes; in volumes its planes before them."""
    kind, dims = kind_of(node), len(x.shape) - 1
    of = volume if dims == 3 else picture
    sizes, outputs = of(x.shape)[1:], of(sizes_of(node))[1:]
    if kind.startswith("adaptive"):
        return tuple(adaptive_spans(size, output) for size, output in zip(sizes, outputs, strict=True))
    is_average = kind.startswith("avg")
    names = (
        ("kernel", "stride", "padding", "ceil", "padded", "divisor") if is_average else ("kernel", "stride", "padding", "dilation", "ceil")
    )
    given: dict[str, Any] = {"padding": 0, "dilation": 1, "padded": True, "divisor": None} | dict(zip(names, node.args[1:], strict=False))
    kernel, stride = (numbers_of(value, dims, len(sizes)) for value in (given["kernel"], given.get("stride") or given["kernel"]))
    padding, dilation = numbers_of(given["padding"], dims, len(sizes), filler=0), numbers_of(given["dilation"], dims, len(sizes))
    spans = tuple(
        window_spans(
            sizes[i],
            kernel[i],
            stride[i],
            padding[i],
            outputs[i],
            dilation=dilation[i],
            counts_padding=is_average and bool(given["padded"]),
        )
        for i in range(len(sizes))
    )
    if given["divisor"] is None:
        return spans
    rows, columns = spans
    return tuple(replace(row, count=int(given["divisor"])) for row in rows), tuple(replace(column, count=1) for column in columns)
