"""Cross-layer equalization and bias absorption: changes to the float network that make it easier to quantize but keep its function.

Paper: Nagel, van Baalen, Blankevoort, Welling 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV.
    Section 4.1 (equalization), section 4.1.3 (absorbing high biases).
Symbols: s -> scale, r -> range of a channel, beta -> mean, gamma -> std, c -> what is absorbed.

The first half is maths on tensors, the second finds the layers in the dataflow and writes the result back.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.network.graph.channels import (
    UNCHANGED,
    Channels,
    as_stored,
    block_read,
    by_output_channel,
    channels_made,
    clip_limits,
    follow,
    groups_of,
    response,
)
from lowbit.network.graph.dataflow import Dataflow, Node
from lowbit.network.layers import TRANSPOSED

RangeKind = Literal["max_abs", "max_minus_min"]
ClipKind = Literal["scale", "replace", "keep"]
ChannelKind = Literal["plain", "depthwise", "grouped"]
Activation = Literal["none", "relu"]
Statistics = dict[str, tuple[Tensor, Tensor]]

DEAD = 2.0**-23  # a channel this small against the largest is float32 noise: scaling it up would only scale up its bias
TOLERANCE = 1e-6  # scales of a sweep this close to 1 move nothing


@dataclass
class LayerState:
    """What equalization changes of a layer.

    Attributes:
        weight: ``[out, in / groups, ...]``.
        bias: ``[out]`` or ``None``.
        mean, std: Mean and deviation of each output channel before the activation, ``[out]``, or ``None`` without a batch norm.
        groups: 1, or the number of channels of a depthwise layer.
        scale: Factor by which each output channel has been divided so far, ``[out]``.
    """

    weight: Tensor
    bias: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    groups: int = 1
    scale: Tensor | float = 1.0

    def output_ranges(self, kind: RangeKind = "max_abs") -> Tensor:
        """Range of the weights of each output channel, ``[out]``."""
        return _ranges(self.weight.flatten(1), kind)

    def input_ranges(self, kind: RangeKind = "max_abs") -> Tensor:
        """Range of the weights that read each input channel, ``[in]``."""
        return self.output_ranges(kind) if self.groups > 1 else _ranges(self.weight.transpose(0, 1).flatten(1), kind)

    def divide_output(self, scale: Tensor) -> None:
        """Divide output channels, with bias and statistics, by ``scale``, ``[out]``."""
        self.weight = self.weight / _along(self.weight, 0, scale)
        self.bias, self.mean, self.std = (None if x is None else x / scale for x in (self.bias, self.mean, self.std))
        self.scale = self.scale * scale

    def multiply_input(self, scale: Tensor) -> None:
        """Multiply input channels by ``scale``, ``[in]``."""
        self.weight = self.weight * _along(self.weight, 0 if self.groups > 1 else 1, scale)


def _ranges(rows: Tensor, kind: RangeKind) -> Tensor:
    return rows.abs().amax(1) if kind == "max_abs" else rows.amax(1) - rows.amin(1)


def _along(weight: Tensor, axis: int, scale: Tensor) -> Tensor:
    return scale.reshape([-1 if dim == axis else 1 for dim in range(weight.dim())])


def pair_scales(first: Tensor, second: Tensor) -> Tensor:
    """``s = sqrt(r1 / r2)``, which makes both ranges ``sqrt(r1 r2)`` when it divides the first and multiplies the second.

    Channels that are dead in one of the layers keep 1.

    Args:
        first: Ranges of the first layer's output channels, ``[channels]``.
        second: Ranges of the second layer's input channels, ``[channels]``.

    Source: section 4.1.2, Eq. 11.
    """
    is_alive = _alive(first) & _alive(second)
    return torch.where(is_alive, (first / torch.where(is_alive, second, 1.0)).sqrt(), 1.0)


def triple_scales(first: Tensor, second: Tensor, third: Tensor) -> tuple[Tensor, Tensor]:
    """``s12 = r1 / m`` and ``s23 = m / r3`` with ``m = cbrt(r1 r2 r3)``, which make three ranges ``m``.

    ``s12`` divides the first layer, ``s12 / s23`` multiplies the depthwise layer between, ``s23`` multiplies the third. Channels
    that are dead in one of the layers keep 1.

    Source: the authors' company's toolkit (AIMET); repeated pairs reach the same point.
    """
    is_alive = _alive(first) & _alive(second) & _alive(third)
    r1, r2, r3 = (torch.where(is_alive, r, 1.0) for r in (first, second, third))
    middle = (r1 * r2 * r3).pow(1 / 3)
    return r1 / middle, middle / r3


def _alive(ranges: Tensor) -> Tensor:
    return (ranges > 0) & (ranges > DEAD * ranges.max())


def equalize_set(layers: Sequence[LayerState], kind: RangeKind = "max_abs") -> tuple[Tensor, ...]:
    """Equalize two layers, or a depthwise layer with those before and after it, in place; the scales between them."""
    if len(layers) == 2:
        first, second = layers
        scales: tuple[Tensor, ...] = (pair_scales(first.output_ranges(kind), second.input_ranges(kind)),)
    else:
        first, second, third = layers
        scales = triple_scales(first.output_ranges(kind), second.output_ranges(kind), third.input_ranges(kind))
    for scale, before, after in zip(scales, layers, layers[1:], strict=False):
        before.divide_output(scale)
        after.multiply_input(scale)
    return scales


def equalize(
    layers: Mapping[str, LayerState], sets: Sequence[tuple[str, ...]], *, kind: RangeKind = "max_abs", max_sweeps: int = 500
) -> int:
    """Equalize all ``sets`` of layer names in order, in place, repeatedly until nothing changes; returns the number of sweeps."""
    for sweep in range(1, max_sweeps + 1):
        scales = [scale for names in sets for scale in equalize_set([layers[name] for name in names], kind)]
        if not scales or max(float(scale.log().abs().max()) for scale in scales) <= TOLERANCE:
            return sweep
    return max_sweeps


def absorb_bias(
    first: LayerState, second: LayerState, *, activation: Activation = "relu", n_sigma: float = 3.0, limit: Tensor | None = None
) -> Tensor:
    """Move the part of the first layer's bias that always passes the activation into the second layer's bias, in place.

    ``c = max(0, mean - n std)`` before a ReLU (``ReLU(x - c) = ReLU(x) - c`` for ``x > c``), ``c = mean`` where nothing is between;
    ``b1 - c``, ``b2 + W2 c``, and the stored mean of the first loses ``c``. Missing biases are made. Exact where the second layer
    sees no padding. Where the activation clips at ``limit``, ``[channels]``, ``c`` does not exceed it.

    Returns:
        ``c``, ``[channels]``.

    Source: section 4.1.3; without activation as in AIMET.
    """
    assert first.mean is not None and first.std is not None
    absorbed = first.mean if activation == "none" else (first.mean - n_sigma * first.std.abs()).clamp(min=0)
    if limit is not None:
        absorbed = torch.minimum(absorbed, limit)
    first.bias = (torch.zeros_like(absorbed) if first.bias is None else first.bias) - absorbed
    first.mean = first.mean - absorbed
    moved = response(second.weight, absorbed, second.groups)
    second.bias = moved if second.bias is None else second.bias + moved
    return absorbed


def channel_kind(in_channels: int, out_channels: int, groups: int) -> ChannelKind:
    """``plain`` (one group), ``depthwise`` (as many groups as inputs and outputs) or ``grouped``, which ends a chain."""
    if groups == 1:
        return "plain"
    return "depthwise" if groups == in_channels == out_channels else "grouped"


def chain_pairs(kinds: Sequence[ChannelKind]) -> list[tuple[int, ...]]:
    """All neighbours in a chain of layers that share whole channels."""
    return [(i, i + 1) for i in range(len(kinds) - 1) if "grouped" not in kinds[i : i + 2]]


def chain_sets(kinds: Sequence[ChannelKind]) -> list[tuple[int, ...]]:
    """Pairs and triples that cover a chain of layers: (plain or depthwise, plain), (plain, depthwise, plain).

    From left to right; neighbours that are neither are left out. Source: AIMET.
    """
    sets: list[tuple[int, ...]] = []
    start = 0
    while start < len(kinds) - 1:
        is_pair = kinds[start] != "grouped" and kinds[start + 1] == "plain"
        length = 2 if is_pair else 3 if tuple(kinds[start : start + 3]) == ("plain", "depthwise", "plain") else 0
        if length:
            sets.append(tuple(range(start, start + length)))
        start += max(length - 1, 1)
    return sets


# In a network


@dataclass(frozen=True)
class Link:
    """Two layers where only the second reads the first one's output, with only positively homogeneous operations between them.

    Attributes:
        first, second: Names of the layers.
        block: Inputs of the second per channel of the first (more than one behind a flatten).
        activation: ``relu`` where the operations between change negative values.
        is_padded: Whether zeros are added to what the second layer reads.
        can_absorb: Whether a constant added to the first layer's output is a constant at the second layer's output.
        clips: Operations between that would be homogeneous without their upper limit (ReLU6).
        limit: That upper limit where it is rescaled with the channels.
    """

    first: str
    second: str
    block: int = 1
    activation: Activation = "none"
    is_padded: bool = False
    can_absorb: bool = True
    clips: tuple[Node, ...] = ()
    limit: float | None = None


def find_links(model: nn.Module, dataflow: Dataflow) -> list[Link]:
    """All neighbouring layers whose shared channels can be rescaled, in execution order; those behind a ReLU6 name it in ``clips``.

    A split, an add, a concatenation and any other operation ends the chain, and so do grouped layers that are not depthwise, layers
    that run several times, and weights that are shared or computed.
    """
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    usable = {name for name in dataflow.order() if _is_usable(model.get_submodule(name), name, dataflow, owners)}
    found = (_walk(model, dataflow, name, usable) for name in dataflow.order() if name in usable)
    return [link for link in found if link is not None]


def _is_usable(layer: nn.Module, name: str, dataflow: Dataflow, owners: Counter[int]) -> bool:
    nodes, weight = dataflow.of_layer(name), layer._parameters.get("weight")
    if weight is None or len(nodes) != 1 or dataflow.calls(name) != 1 or _kind(layer) == "grouped":
        return False
    is_shared = any(owners[id(p)] > 1 for p in layer._parameters.values() if p is not None)
    return not is_shared and all(_is_own(dataflow, dataflow[name]) for name in nodes[0].inputs if not dataflow[name].is_activation)


def _is_own(dataflow: Dataflow, node: Node) -> bool:
    """Whether a parameter goes into nothing but its layer, at most transposed."""
    if len(node.consumers) != 1:
        return False
    return node.op == "constant" or (
        node.op in ("t", "transpose", "permute") and all(_is_own(dataflow, dataflow[name]) for name in node.inputs)
    )


def _kind(layer: nn.Module) -> ChannelKind:
    weight = by_output_channel(layer, layer.weight)  # type: ignore[arg-type]
    groups = groups_of(layer)
    return channel_kind(weight.shape[1] * groups, weight.shape[0], groups)


def _walk(model: nn.Module, dataflow: Dataflow, name: str, usable: set[str]) -> Link | None:
    (node,) = dataflow.of_layer(name)
    channels = channels_made(model.get_submodule(name), node)
    link = Link(name, "")
    while channels is not None:
        readers = dataflow.consumers(node)
        if len(readers) != 1 or dataflow.is_output(node):
            return None
        reader = readers[0]
        if reader.layer is not None:
            return _finish(model, link, reader, node, channels) if reader.layer in usable and node.name in reader.inputs else None
        if is_relu(reader):
            link = replace(link, activation="relu")
        elif is_clip(reader):
            link = replace(link, activation="relu", clips=(*link.clips, reader))
        elif _pads_with_a_number(reader):
            return None
        else:
            link = replace(link, is_padded=link.is_padded or _adds_zeros(reader))
            channels = follow(reader, node, channels)
        node = reader
    return None


def _finish(model: nn.Module, link: Link, reader: Node, node: Node, channels: Channels) -> Link | None:
    layer = model.get_submodule(str(reader.layer))
    block = block_read(layer, node, channels)
    if block is None:
        return None
    padding = getattr(layer, "padding", ())
    is_padded = padding == "same" if isinstance(padding, str) else any(padding)
    # a strided transposed convolution gives each output another part of its kernel
    return replace(
        link, second=str(reader.layer), block=block, is_padded=link.is_padded or is_padded, can_absorb=not isinstance(layer, TRANSPOSED)
    )


def is_relu(node: Node) -> bool:
    """Whether the operation is positively homogeneous, ``f(s x) = s f(x)``, and leaves positive values alone."""
    return node.op in ("leaky_relu", "prelu") or clip_limits(node) == (0, math.inf)


def is_clip(node: Node) -> bool:
    """Whether the operation is a ReLU with an upper limit."""
    limits = clip_limits(node)
    return limits is not None and limits[0] == 0 and limits[1] != math.inf


def _pads_with_a_number(node: Node) -> bool:
    return node.op in ("pad", "constant_pad_nd") and bool(node.arguments[-1]) and isinstance(node.arguments[-1], (int, float))


def _adds_zeros(node: Node) -> bool:
    if node.op.startswith("avg_pool"):
        padding = node.arguments[3] if len(node.arguments) > 3 else 0
        return any(padding) if isinstance(padding, Sequence) else bool(padding)
    return node.op in ("pad", "constant_pad_nd")


class ChannelClip(nn.Module):
    """A ReLU with an upper limit for each channel, ``min(max(x, 0), limit)``: what ReLU6 is between rescaled channels.

    Args:
        limit: ``[channels]``.
        rank: Number of dimensions behind the channels in the input.

    Source: Nagel et al. 2019, section 4.1 (``f(s x) = s f^(x)`` for a piecewise linear ``f``).
    """

    def __init__(self, limit: Tensor, rank: int) -> None:
        super().__init__()
        self.limit: Tensor
        self.register_buffer("limit", limit.reshape(-1, *[1] * rank))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(torch.relu(x), self.limit)


def open_clips(model: nn.Module, dataflow: Dataflow, links: Sequence[Link], kind: ClipKind = "scale") -> tuple[list[Link], list[Node]]:
    """Treat the ``nn.ReLU6`` modules (``nn.Hardtanh`` from 0) within ``links`` so that channels can be rescaled across them.

    ``scale`` leaves the clip and names its ``limit`` in the link: ``limit_channels`` puts it in place once the scales are known, so
    that the function stays. ``replace`` makes it an ``nn.ReLU``, in place, and the dataflow alike. ``keep`` ends the chain.

    Returns:
        The links that channels can be rescaled across, and the operations that end their chains: what the network's own code computes,
        and, when scaled, a clip that is not right behind its layer or whose module runs several times.

    Source: section 5.1.1 (``replace``), section 4.1 (``scale``).
    """
    open_links: list[Link] = []
    blocked: list[Node] = []
    for link in links:
        inside = [node for node in link.clips if is_clip(node)]  # a module that is in several links was replaced with the first
        if not inside:
            open_links.append(replace(link, clips=()))
            continue
        if kind == "keep":
            continue
        fixed = [node for node in inside if not _can_change(model, dataflow, link, node, kind)]
        blocked += fixed
        if fixed:
            continue
        if kind == "scale":
            open_links.append(replace(link, limit=min(limits[1] for node in inside if (limits := clip_limits(node)) is not None)))
            continue
        for node in inside:
            _replace_module(model, dataflow, node.owner, nn.ReLU(inplace=bool(model.get_submodule(node.owner).inplace)), "relu")
        open_links.append(replace(link, clips=()))
    return open_links, blocked


def _can_change(model: nn.Module, dataflow: Dataflow, link: Link, clip: Node, kind: ClipKind) -> bool:
    if type(model.get_submodule(clip.owner)) not in (nn.ReLU6, nn.Hardtanh):
        return False
    if kind == "replace":
        return True
    (before,) = dataflow.producers(clip)
    while before.op in UNCHANGED:
        (before,) = dataflow.producers(before)
    return before.layer == link.first and dataflow.calls(clip.owner) == 1


def limit_channels(model: nn.Module, dataflow: Dataflow, link: Link, limit: Tensor) -> None:
    """Clip each channel between the layers of ``link`` at ``limit``, ``[channels]``, instead of all at one value."""
    (clip,) = {node.owner: node for node in link.clips}.values()
    channels = channels_made(model.get_submodule(link.first), dataflow.of_layer(link.first)[0])
    weight = model.get_submodule(link.first).weight
    assert channels is not None and isinstance(weight, Tensor)
    _replace_module(model, dataflow, clip.owner, ChannelClip(limit.to(weight), len(clip.shape) - channels.axis - 1), "channel_clip")


def _replace_module(model: nn.Module, dataflow: Dataflow, name: str, new: nn.Module, op: str) -> None:
    clip = model.get_submodule(name)
    new.train(clip.training)
    for place in [place for place, module in model.named_modules(remove_duplicate=False) if module is clip]:
        parent, _, child = place.rpartition(".")
        setattr(model.get_submodule(parent), child, new)
    for node in dataflow.nodes:
        if node.owner == name and is_clip(node):
            node.op, node.arguments = op, node.arguments[:1]


def sets_of(model: nn.Module, links: Sequence[Link], cover: Literal["pairs", "sets"] = "pairs") -> list[tuple[str, ...]]:
    """The sets of layers to equalize together: all linked pairs, or pairs and depthwise triples (``chain_sets``)."""
    found: list[tuple[str, ...]] = []
    for chain in _chains(links):
        kinds = [_kind(model.get_submodule(name)) for name in chain]
        chosen = chain_pairs(kinds) if cover == "pairs" else chain_sets(kinds)
        found += [tuple(chain[index] for index in indices) for indices in chosen]
    return found


def _chains(links: Sequence[Link]) -> Iterator[list[str]]:
    after = {link.first: link.second for link in links}
    for first in [name for name in after if name not in after.values()]:
        chain = [first]
        while chain[-1] in after:
            chain.append(after[chain[-1]])
        yield chain


def read_states(model: nn.Module, links: Sequence[Link], statistics: Statistics) -> dict[str, LayerState]:
    """The linked layers in float64."""
    blocks = {link.second: link.block for link in links}
    states: dict[str, LayerState] = {}
    for name in dict.fromkeys(name for link in links for name in (link.first, link.second)):
        layer = model.get_submodule(name)
        weight, bias = (None if p is None else p.detach().cpu().double() for p in (layer._parameters[key] for key in ("weight", "bias")))
        assert isinstance(weight, Tensor)
        weight = by_output_channel(layer, weight)
        if blocks.get(name, 1) > 1:
            weight = weight.unflatten(1, (-1, blocks[name]))
        mean, std = (x.detach().cpu().double() for x in statistics[name]) if name in statistics else (None, None)
        states[name] = LayerState(weight, bias, mean, std, groups_of(layer))
    return states


@torch.no_grad()
def write_states(model: nn.Module, states: Mapping[str, LayerState], statistics: Statistics) -> None:
    """Put ``states`` back into the layers and their statistics."""
    for name, state in states.items():
        layer = model.get_submodule(name)
        assert isinstance(layer.weight, nn.Parameter)
        layer.weight.copy_(as_stored(layer, state.weight).reshape(layer.weight.shape))
        if state.bias is not None:
            set_bias(layer, state.bias)
        if state.mean is not None and state.std is not None:
            statistics[name] = (state.mean.to(layer.weight), state.std.to(layer.weight))


def set_bias(layer: nn.Module, bias: Tensor) -> None:
    """Give ``layer`` the bias, a new parameter where it has none."""
    old, weight = layer._parameters["bias"], layer.weight
    if old is None:
        assert isinstance(weight, Tensor)
        layer.bias = nn.Parameter(bias.to(weight), requires_grad=weight.requires_grad)
    else:
        old.copy_(bias)
