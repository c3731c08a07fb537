"""Where a tensor keeps its channels, from the layer that makes them to the layer that reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor, nn

from lowbit.network.graph.dataflow import Node
from lowbit.network.layers import CONVOLUTIONS, TRANSPOSED

UNCHANGED = frozenset({"identity", "dropout", "clone", "contiguous", "detach", "alias"})
# each output value is made of the values of one channel: picked, averaged, repeated, or zeros added
SPATIAL = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "pad", "constant_pad_nd", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d",
})  # fmt: skip
RESHAPING = frozenset({"view", "reshape", "flatten", "squeeze", "unsqueeze", "unflatten", "_unsafe_view"})
MOVING = UNCHANGED | SPATIAL | RESHAPING | {"mean", "permute", "transpose"}


@dataclass(frozen=True)
class Channels:
    """``count`` channels along ``axis``; each takes ``block`` consecutive places there (more than one behind a flatten)."""

    axis: int
    count: int
    block: int = 1


def channels_made(layer: nn.Module, node: Node) -> Channels | None:
    """Output channels in ``node``, the result of ``layer``; ``None`` for a convolution without batch dimension."""
    rank = len(node.shape)
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        return Channels(1, layer.out_channels) if rank == len(layer.kernel_size) + 2 else None
    return Channels(rank - 1, node.shape[-1]) if rank >= 2 else None


def block_read(layer: nn.Module, node: Node, channels: Channels) -> int | None:
    """Number of inputs of ``layer`` per channel of ``node``, its input; ``None`` where the inputs are not whole channels."""
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        fits = channels.axis == 1 and channels.block == 1 and channels.count == layer.in_channels
        return 1 if fits and len(node.shape) == len(layer.kernel_size) + 2 else None
    fits = channels.axis == len(node.shape) - 1 and channels.count * channels.block == layer.in_features
    return channels.block if fits else None


def follow(node: Node, before: Node, channels: Channels) -> Channels | None:
    """The channels of ``before`` in ``node``, the result of an operation of ``MOVING``; ``None`` where channels are mixed."""
    if node.op in UNCHANGED:
        return channels
    if node.op in SPATIAL:
        return channels if channels.axis == 1 and channels.block == 1 and node.shape[:2] == before.shape[:2] else None
    if node.op == "mean":
        return _averaged(node, before, channels)
    if node.op in RESHAPING:
        return _reshaped(node, before, channels)
    order = _order(node, len(before.shape))
    return None if order is None else Channels(order.index(channels.axis), channels.count, channels.block)


def _averaged(node: Node, before: Node, channels: Channels) -> Channels | None:
    wanted = node.arguments[1] if len(node.arguments) > 1 else None
    if not isinstance(wanted, Sequence):
        return None  # the mean of everything
    dims = {int(dim) % len(before.shape) for dim in wanted}
    if channels.axis in dims or 0 in dims:
        return None
    dropped = 0 if len(node.shape) == len(before.shape) else sum(dim < channels.axis for dim in dims)
    return Channels(channels.axis - dropped, channels.count, channels.block)


def _reshaped(node: Node, before: Node, channels: Channels) -> Channels | None:
    """Rows stay in order, so equal sizes of the first axes, or of the last one, mean equal places."""
    if len(node.shape) < 2:
        return None
    if channels.axis == 1 and node.shape[0] == before.shape[0]:
        if node.shape[1] == before.shape[1]:
            return channels
        if len(node.shape) == 2:
            return Channels(1, channels.count, channels.block * math.prod(before.shape[2:]))
    is_last = channels.axis == len(before.shape) - 1 and node.shape[-1] == before.shape[-1]
    return Channels(len(node.shape) - 1, channels.count, channels.block) if is_last else None


def _order(node: Node, rank: int) -> list[int] | None:
    """Which old axis each new axis is."""
    if node.op == "permute" and isinstance(node.arguments[1], Sequence):
        return [int(dim) % rank for dim in node.arguments[1]]
    if node.op == "transpose":
        first, second = (int(dim) % rank for dim in node.arguments[1:3])  # type: ignore[call-overload]
        order = list(range(rank))
        order[first], order[second] = second, first
        return order
    return None


def by_output_channel(layer: nn.Module, weight: Tensor) -> Tensor:
    """``weight`` as ``[out, in / groups, ...]``, which it is already unless the layer is a transposed convolution."""
    return _swapped(weight, layer.groups) if isinstance(layer, TRANSPOSED) else weight


def as_stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """The inverse of ``by_output_channel``."""
    return _swapped(weight, layer.groups) if isinstance(layer, TRANSPOSED) else weight


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """``[groups * a, b, ...]`` as ``[groups * b, a, ...]``."""
    split: Tensor = weight.unflatten(0, (groups, -1))
    return split.transpose(1, 2).flatten(0, 1)


def groups_of(layer: nn.Module) -> int:
    """Groups of a convolution; 1 for a linear layer."""
    return layer.groups if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else 1


def response(weight: Tensor, values: Tensor, groups: int = 1) -> Tensor:
    """Output of a layer without bias whose input channels are constant: ``sum_ci (sum_kernel weight[co, ci]) values[ci]``.

    Args:
        weight: ``[out, in / groups, ...]``.
        values: ``[in]``.
        groups: Groups of the layer; depthwise where that is ``in``.

    Returns:
        ``[out]``.
    """
    rows = weight.flatten(1) if weight.dim() == 2 else weight.flatten(2).sum(2)
    return (rows.reshape(groups, -1, rows.shape[1]) @ values.reshape(groups, -1, 1)).flatten()


def clip_limits(node: Node) -> tuple[float, float] | None:
    """Where a clipping operation clips, infinite for no limit; ``None`` for any other operation."""
    given = list(node.arguments[1:3])
    if node.op in ("relu", "relu6"):
        return 0.0, 6.0 if node.op == "relu6" else math.inf
    if node.op == "hardtanh":
        given += [-1.0, 1.0][len(given) :]
    elif node.op not in ("clamp", "clamp_min"):
        return None
    given += [None, None][len(given) :]
    low, high = given
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    return (float(low), float(high)) if isinstance(low, Real) and isinstance(high, Real) else None
