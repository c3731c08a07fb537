"""Where activation quantizers sit.

With the dataflow, a quantizer belongs to a *tensor*: everything that reads it, residual adds included, sees quantized
values, so that a runtime can compute the whole block in integers. It is hooked at the output of a module that returns the
tensor, else at the inputs of the modules that receive it. Without the dataflow it sits at each quantized layer's input.

Tensors between a layer and the activation function fused with it stay float, and so does the network's output, unless the
policy asks for the output of that very layer: it is then quantized right where the layer makes it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lowbit.network.graph.dataflow import Dataflow, Node

Purpose = Literal["weight", "input", "output", "sum", "concatenation", "pool", "gate"]

MERGES: dict[str, Purpose] = {"add": "sum", "sub": "sum", "cat": "concatenation"}
POOLS = frozenset({"mean", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"})
CLIPS = frozenset({"relu", "hardtanh", "relu6", "clamp", "clamp_min"})  # clips of the codes in a kernel
FUNCTIONS = frozenset({
    "leaky_relu", "prelu", "silu", "hardswish", "gelu", "elu", "sigmoid", "hardsigmoid", "tanh", "mish", "softplus", "selu", "celu",
})  # fmt: skip
FUSED = CLIPS | FUNCTIONS
GATES = frozenset({"sigmoid", "hardsigmoid"})  # functions whose product with a tensor has an integer kernel
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
    """One quantizer: where it is hooked and what it quantizes.

    Attributes:
        sites: Its hooks.
        bit_width: Its bits.
        layers: The layers whose input it quantizes.
        tensor: Its tensor's name in the dataflow; without one it quantizes whatever its layers get or give.
        purpose: What it quantizes: the ``input`` of ``layers``, the ``output`` of ``output_of``, else an operand of that kind of merge.
        output_of: The layer whose output it quantizes because the policy asks for it.
        operand_of: The sums and concatenations that read the tensor, by their names in the dataflow.
        result_of: The sum or concatenation that the tensor comes from, or "".
    """

    sites: tuple[Site, ...]
    bit_width: int
    layers: tuple[str, ...] = ()
    tensor: str = ""
    purpose: Purpose = "input"
    output_of: str | None = None
    operand_of: tuple[str, ...] = ()
    result_of: str = ""

    @property
    def name(self) -> str:
        """Name of the first site."""
        return str(self.sites[0])

    @property
    def layer(self) -> str | None:
        """The layer whose output it quantizes, else the first of those whose input it does; ``None`` between layers."""
        return self.output_of if self.output_of is not None else next(iter(self.layers), None)


def place_at_layers(inputs: Mapping[str, int], outputs: Mapping[str, int] | None = None) -> list[Placement]:
    """One quantizer at the input of each layer of ``inputs`` and at the output of each of ``outputs`` (layer name to bits)."""
    return [
        *(Placement((Site(name, "input"),), bit_width, (name,)) for name, bit_width in inputs.items()),
        *(Placement((Site(name, "output"),), bit_width, purpose="output", output_of=name) for name, bit_width in (outputs or {}).items()),
    ]


def place_at_tensors(
    dataflow: Dataflow, inputs: Mapping[str, int], outputs: Mapping[str, int] | None = None, *, merge_bits: int | None = None
) -> list[Placement]:
    """One quantizer for each tensor that has to be quantized, whatever the number of its readers.

    Args:
        dataflow: Dataflow of the network without quantizers.
        inputs: Layers whose input is quantized, with the bits.
        outputs: Layers whose output is quantized, with the bits.
        merge_bits: Bits of the operands and results of sums and concatenations, of the operands of average pooling and of gates (sigmoids
            that are multiplied with a quantized tensor to give another one), where they are neither read by a layer of ``inputs`` nor
            the result of one of ``outputs``; ``None`` leaves them in float.
    """
    outputs = outputs or {}
    placed_outputs = {dataflow.of_layer(name)[0].name: name for name in outputs if _runs_once(dataflow, name)}
    readers: dict[str, dict[str, int]] = {}
    for node in dataflow.nodes:
        if node.layer is not None and node.layer in inputs and node.inputs and _runs_once(dataflow, node.layer):
            readers.setdefault(source_of(dataflow, node.inputs[0]).name, {})[node.layer] = inputs[node.layer]
    merges = {} if merge_bits is None else _merges(dataflow)
    for gate in _gates(dataflow, {*placed_outputs, *readers, *merges}):
        merges.setdefault(gate.name, _Merge("gate"))

    placements: list[Placement] = []
    layer: str | None
    purpose: Purpose
    sites: tuple[Site, ...]
    for node in dataflow.nodes:
        tensor, layers, merge = node.name, readers.get(node.name, {}), merges.get(node.name, _Merge())
        if tensor in placed_outputs:
            layer = placed_outputs[tensor]
            width, purpose = outputs[layer], "output"
            sites = (Site(layer, "output"),)
        elif layers:
            layer, width, purpose = None, max(layers.values()), "input"
            sites = _sites(dataflow, node, layers, has_merges=merge.purpose is not None)
        elif merge_bits is not None and merge.purpose is not None and _is_activation(node) and not dataflow.is_output(node):
            layer, width, purpose = None, merge_bits, merge.purpose
            sites = _sites(dataflow, node, layers, has_merges=True)
        else:
            continue
        fed = tuple(name for name, bits in layers.items() if bits == width) if sites else ()
        if sites:
            placements.append(Placement(sites, width, fed, tensor, purpose, layer, tuple(merge.operand_of), merge.result_of))
        placements += place_at_layers({name: bits for name, bits in layers.items() if name not in fed})
    placed = {name for placement in placements for name in placement.layers}
    return placements + place_at_layers(_without(inputs, placed), _without(outputs, placed_outputs.values()))


def before_functions(dataflow: Dataflow, layers: Collection[str]) -> list[str]:
    """Those of ``layers`` whose output is read by nothing but activation functions that integer kernels do not take in.

    Such a function may be written as a product of the output with a function of it, as SiLU is.
    """
    return [
        name
        for name in layers
        if _runs_once(dataflow, name)
        and _is_before_function(dataflow, dataflow.of_layer(name)[0])
        and not dataflow.is_output(dataflow.of_layer(name)[0])
    ]


def _is_before_function(dataflow: Dataflow, node: Node) -> bool:
    while len(readers := dataflow.consumers(node)) == 1 and readers[0].op in TRANSPARENT:
        node = readers[0]
    functions = {reader.name for reader in readers if reader.op in FUNCTIONS}
    return bool(functions) and all(
        reader.name in functions or (reader.op == "mul" and functions.intersection(reader.inputs)) for reader in readers
    )


@dataclass
class _Merge:
    """The role of a tensor in merges: the first kind, the merges that read it and the one that it comes from."""

    purpose: Purpose | None = None
    operand_of: list[str] = field(default_factory=list)
    result_of: str = ""


def _merges(dataflow: Dataflow) -> dict[str, _Merge]:
    """Operands and results of sums and concatenations, and operands of average pooling, by tensor."""
    found: dict[str, _Merge] = {}

    def take_part(tensor: Node, purpose: Purpose) -> _Merge:
        merge = found.setdefault(tensor.name, _Merge())
        merge.purpose = merge.purpose or purpose
        return merge

    for node in dataflow.nodes:
        operands = [dataflow[name] for name in node.inputs]
        if node.op in MERGES and sum(_is_activation(operand) for operand in operands) >= 2:
            for source in dict.fromkeys(source_of(dataflow, operand.name).name for operand in operands if _is_activation(operand)):
                take_part(dataflow[source], MERGES[node.op]).operand_of.append(node.name)
            take_part(_result(dataflow, node), MERGES[node.op]).result_of = node.name
        elif node.op in POOLS and _is_activation(operands[0]) and node.shape[:2] == operands[0].shape[:2]:
            # the layer before it can end in integers; a mean over channels is no pooling
            take_part(source_of(dataflow, operands[0].name), "pool")
    return found


def _gates(dataflow: Dataflow, quantized: Collection[str]) -> list[Node]:
    """Gates whose products runtimes compute in integers, because the other factor and the result are ``quantized``."""
    found = []
    for node in dataflow.nodes:
        if node.op in ("mul", "silu") and len(node.inputs) == 2 and node.name in quantized:
            sources = [source_of(dataflow, name) for name in node.inputs]
            for gate, factor in (sources, sources[::-1]):
                if gate.op in GATES and factor.name in quantized and dataflow.consumers(gate) == [node]:
                    found.append(gate)
    return found


def _runs_once(dataflow: Dataflow, layer: str) -> bool:
    return dataflow.calls(layer) == 1 and bool(dataflow.of_layer(layer))


def _without(bits: Mapping[str, int], names: Collection[str]) -> dict[str, int]:
    return {name: value for name, value in bits.items() if name not in names}


def source_of(dataflow: Dataflow, name: str) -> Node:
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


def _sites(dataflow: Dataflow, node: Node, layers: Mapping[str, int], *, has_merges: bool) -> tuple[Site, ...]:
    """Hooks after which every module that reads the tensor sees it quantized; empty when a layer would be missed.

    The network's own input sits at the network where merges of its own code read it too.
    """
    waiting = dataflow.consumers(node)
    for module in node.returned_by:  # innermost first, so that the quantizer belongs to the block that made it
        is_made_inside = _is_within(node.owner, module)  # others pass it on, while it is read beside them as well
        if is_made_inside and dataflow.can_hold_quantizer(module) and not any(_is_within(reader.owner, module) for reader in waiting):
            return (Site(module, "output"),)
    sites: list[Site] = []
    covered: list[Node] = []
    for module in reversed(node.received_by):  # outermost first: one hook covers all readers inside
        inside = [reader for reader in waiting if _is_within(reader.owner, module)]
        if inside and dataflow.can_hold_quantizer(module):
            sites.append(Site(module, "input"))
            covered += inside
            waiting = [reader for reader in waiting if reader not in inside]
    if waiting and has_merges and dataflow.is_first_input(node) and dataflow.can_hold_quantizer(""):
        return (Site("", "input"),)
    firsts = [_first_reader(dataflow, dataflow.of_layer(name)[0], node) for name in layers]
    return tuple(sites) if all(first in covered for first in firsts) else ()


def _is_within(owner: str, module: str) -> bool:
    return owner == module or owner.startswith(f"{module}.")


def _first_reader(dataflow: Dataflow, reader: Node, tensor: Node) -> Node:
    """What reads ``tensor`` itself, on the way to ``reader``, which reads a rearrangement of it."""
    while reader.inputs[0] != tensor.name:
        reader = dataflow[reader.inputs[0]]
    return reader
