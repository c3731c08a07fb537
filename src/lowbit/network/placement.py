"""Where activation quantizers sit.

With the dataflow, a quantizer belongs to a *tensor*: everything that reads it, residual adds included, sees quantized
values, so that a runtime can compute the whole block in integers. It is hooked at the output of a module that returns the
tensor, else at the inputs of the modules that receive it. Without the dataflow it sits at each quantized layer's input.

Tensors between a layer and the activation function fused with it stay float, and so does the network's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from lowbit.network.graph.dataflow import Dataflow, Node

MERGE_BIT_WIDTH = 8  # tensors that only feed adds, concatenations and average pooling
MERGES = frozenset({"add", "cat"})
POOLS = frozenset({"mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"})
FUSED = frozenset(
    {
        "relu",
        "hardtanh",
        "relu6",
        "clamp",
        "clamp_min",
        "leaky_relu",
        "prelu",
        "silu",
        "hardswish",
        "gelu",
        "elu",
        "sigmoid",
        "hardsigmoid",
        "tanh",
    }
)
# quantizing before or after these is the same: they only move values, pick among them, or add zeros
TRANSPARENT = frozenset({
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "view", "reshape", "flatten", "permute", "transpose",
    "squeeze", "unsqueeze", "slice", "select", "expand", "contiguous", "clone", "alias", "detach", "dropout", "pad", "constant_pad_nd", "identity",
    "unflatten", "narrow", "t", "channel_shuffle", "pixel_shuffle", "pixel_unshuffle", "_unsafe_view", "mark", "chunk", "split", "getitem",
})  # fmt: skip


@dataclass(frozen=True)
class Site:
    """One hook: the input or the output of a module."""

    module: str
    side: Literal["input", "output"]

    def __str__(self) -> str:
        return f"{self.module}.{self.side}" if self.module else self.side


@dataclass(frozen=True)
class Placement:
    """One quantizer: the sites it is hooked at, its bit-width, the layers whose input it quantizes, and its tensor's name in the dataflow.

    Without a name it quantizes whatever its layers get.
    """

    sites: tuple[Site, ...]
    bit_width: int
    layers: tuple[str, ...]
    tensor: str = ""

    @property
    def name(self) -> str:
        """Name of the first site."""
        return str(self.sites[0])


def place_at_layers(bits: Mapping[str, int]) -> list[Placement]:
    """One quantizer at the input of each layer of ``bits`` (layer name to activation bit-width)."""
    return [Placement((Site(name, "input"),), bit_width, (name,)) for name, bit_width in bits.items()]


def place_at_tensors(dataflow: Dataflow, bits: Mapping[str, int], *, merges: bool = True) -> list[Placement]:
    """One quantizer for each tensor that a layer of ``bits`` reads, and (``merges``) for the operands and
    results of adds and concatenations and the operands of average pooling.
    """
    readers: dict[str, dict[str, int]] = {}
    unplaced = dict(bits)
    for node in dataflow.nodes:
        if node.layer is not None and node.layer in bits and node.inputs and dataflow.calls(node.layer) == 1:
            readers.setdefault(_source(dataflow, node.inputs[0]).name, {})[node.layer] = bits[node.layer]
            unplaced.pop(node.layer, None)
    merged: dict[str, None] = {}
    if merges:
        for node in dataflow.nodes:
            operands = [dataflow[name] for name in node.inputs]
            if node.op in MERGES and sum(_is_activation(operand) for operand in operands) >= 2:
                merged.update((_source(dataflow, operand.name).name, None) for operand in operands if _is_activation(operand))
                merged[_result(dataflow, node).name] = None
            elif node.op in POOLS and _is_activation(operands[0]) and node.shape[:2] == operands[0].shape[:2]:
                # the layer before it can end in integers; a mean over channels is no pooling
                merged[_source(dataflow, operands[0].name).name] = None

    placements: list[Placement] = []
    for tensor in dict.fromkeys([*(node.name for node in dataflow.nodes if node.name in readers or node.name in merged)]):
        layers = readers.get(tensor, {})
        node = dataflow[tensor]
        if not layers and (dataflow.is_output(node) or not _is_activation(node)):
            continue
        width = max(layers.values(), default=MERGE_BIT_WIDTH)
        fewer = {name: b for name, b in layers.items() if b < width}
        sites = _sites(dataflow, node, layers)
        if sites:
            placements.append(Placement(sites, width, tuple(name for name in layers if name not in fewer), tensor))
            placements += place_at_layers(fewer)
        else:
            placements += place_at_layers(layers)
    return placements + place_at_layers(unplaced)


def _source(dataflow: Dataflow, name: str) -> Node:
    """The tensor that ``name`` is a rearrangement of."""
    node = dataflow[name]
    while node.op in TRANSPARENT and node.inputs and _is_activation(dataflow[node.inputs[0]]):
        node = dataflow[node.inputs[0]]
    return node


def _result(dataflow: Dataflow, node: Node) -> Node:
    """What becomes of a merge: the output of the activation function behind it if that is its only reader."""
    readers = dataflow.consumers(node)
    return readers[0] if len(readers) == 1 and readers[0].op in FUSED else node


def _is_activation(node: Node) -> bool:
    return node.is_activation and len(node.shape) >= 2


def _sites(dataflow: Dataflow, node: Node, layers: Mapping[str, int]) -> tuple[Site, ...]:
    """Hooks after which every module that reads the tensor sees it quantized; empty when a layer would be missed."""
    for module in node.returned_by:  # innermost first, so that the quantizer belongs to the block that made it
        if dataflow.can_hold_quantizer(module):
            return (Site(module, "output"),)
    sites: list[Site] = []
    waiting = dataflow.consumers(node)
    for module in reversed(node.received_by):  # outermost first: one hook covers all readers inside
        inside = [reader for reader in waiting if reader.owner == module or reader.owner.startswith(f"{module}.")]
        if inside and dataflow.can_hold_quantizer(module):
            sites.append(Site(module, "input"))
            waiting = [reader for reader in waiting if reader not in inside]
    covered = all(any(name == site.module or name.startswith(f"{site.module}.") for site in sites) for name in layers)
    return tuple(sites) if covered else ()
