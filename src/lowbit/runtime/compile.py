"""``lowbit.compile_runtime``: a network whose binary and ternary layers run on the kernels.

It works on the graph of a packed file, so that a trained network and one that was loaded are the same to it. A layer is
converted where its input is a sign and its weight holds ``-s``, ``+s`` and perhaps 0 for each output channel. What follows it goes along: the bias, a
batch norm, and a sum with another tensor of the same shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from lowbit.errors import LayerError, SpecError
from lowbit.export.graph import Graph, Node, Result, Stored, references
from lowbit.export.load import PackedNetwork
from lowbit.export.packed_file import Package, package
from lowbit.export.packed_tensor import PackedTensor
from lowbit.export.program import export_program
from lowbit.network.record import record_of
from lowbit.quantizers import QTensor
from lowbit.runtime.binary_conv import binary_conv2d, binary_linear, compiled_loops, pack_conv_weight
from lowbit.runtime.target import active_target

_SIGN = "lowbit.fake_quantize_codebook.default"
_NORM = "aten._native_batch_norm_legit_no_training.default"
_LAYERS = {"aten.conv2d.default": "lowbit.binary_conv2d.default", "aten.linear.default": "lowbit.binary_linear.default"}
_FUNCTIONS: dict[str, Callable[..., object]] = {
    "lowbit.binary_conv2d.default": binary_conv2d,
    "lowbit.binary_linear.default": binary_linear,
}


@dataclass(frozen=True)
class LayerPath:
    """What a layer runs on.

    Attributes:
        name: Of the layer.
        kernel: ``binary`` or ``ternary`` on the kernels, ``float`` as before.
        fused: What is computed along with it.
        reason: Why it stayed in float.
    """

    name: str
    kernel: str
    fused: tuple[str, ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        along = f" with {', '.join(self.fused)}" if self.fused else ""
        return f"{self.name}: {self.kernel}{along}{f' ({self.reason})' if self.reason else ''}"


@dataclass(frozen=True)
class RuntimeReport:
    """What runs on what.

    Attributes:
        target: The kernels in use.
        why: Why these.
        layers: One entry for each layer.
    """

    target: str
    why: str
    layers: tuple[LayerPath, ...]

    def __str__(self) -> str:
        converted = sum(layer.kernel != "float" for layer in self.layers)
        return "\n".join([f"{converted} of {len(self.layers)} layers on {self.target} kernels: {self.why}", *map(str, self.layers)])


class RuntimeNetwork(PackedNetwork):
    """A packed network in which layers were replaced by the runtime's operators.

    Attributes:
        report: What runs on what.
    """

    def __init__(self, content: Package) -> None:
        super().__init__(content)
        stored = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        conversion = _Conversion(self.packed_graph, stored, self.packed_codes)
        super().__init__(replace(content, graph=conversion.graph(), tensors={**_still_read(content, conversion), **conversion.tensors}))
        target, why = active_target()
        if target.lanes and compiled_loops() is None:
            why = "the kernels could not be compiled, so the reference runs"
        self.report = RuntimeReport(target.name, why, tuple(conversion.paths))

    def function_of(self, operator: str) -> Callable[..., object]:
        """The runtime's operators beside those of packed files."""
        return _FUNCTIONS.get(operator) or super().function_of(operator)


def compile_runtime(model: nn.Module, *, sample: object = None) -> RuntimeNetwork:
    """A network that computes what ``model`` computes, its binary and ternary layers on few-bit kernels.

    Args:
        model: A network with quantizers, or one from ``lowbit.load``; it is not changed.
        sample: Inputs of one call, needed for the first kind.

    Returns:
        A module in evaluation mode; ``.report`` lists every layer with what it runs on, or why it stayed in float.

    Raises:
        SpecError: ``sample`` is missing.
        LayerError: No layer could be converted; says why for each.
        GraphError: The network cannot be exported.
    """
    if isinstance(model, PackedNetwork):
        content = model.packed_content
    elif sample is None:
        raise SpecError("compile_runtime needs a sample to see what the network computes: compile_runtime(model, sample=images)")
    else:
        content = package(export_program(model, sample), record_of(model))
    network = RuntimeNetwork(content).eval()
    if all(layer.kernel == "float" for layer in network.report.layers):
        reasons = "; ".join(str(layer) for layer in network.report.layers) or "there is no convolution or linear layer"
        raise LayerError(
            f"no layer can run on few-bit kernels: {reasons}. They need inputs that are signs and weights of one bit (or -1, 0, 1): train with "
            "weight_bits=1, activation_bits=1."
        )
    return network


def _still_read(content: Package, conversion: _Conversion) -> dict[str, Tensor | PackedTensor]:
    used = conversion.graph().tensors
    return {name: tensor for name, tensor in content.tensors.items() if name in used}


class _Conversion:
    """Goes through a graph and replaces layers; keeps the new tensors and a path for each layer."""

    def __init__(self, graph: Graph, stored: dict[str, Tensor], codes: dict[str, QTensor]) -> None:
        self._graph, self._stored = graph, stored
        self._nodes = {node.name: node for node in graph.nodes}
        self._readers: dict[str, list[Node]] = {}
        for node in graph.nodes:
            for value in (*node.args, *node.kwargs.values()):
                for reference in references(value):
                    if isinstance(reference, Result):
                        self._readers.setdefault(reference.name, []).append(node)
        self._returned = {r.name for output in graph.outputs for r in references(output) if isinstance(r, Result)}
        self._new: dict[str, Node | None] = {}  # what stands in the place of a node; None: nothing
        self.tensors: dict[str, Tensor] = {}
        self.paths: list[LayerPath] = []
        for node in graph.nodes:
            if node.operator in _LAYERS:
                self._convert(node)
            elif node.operator.startswith(("aten.conv", "aten.matmul", "aten.addmm")):
                self.paths.append(LayerPath(node.name, "float", reason=f"there is no kernel for {node.operator}"))

    def graph(self) -> Graph:
        """The graph with the replacements, without what nothing reads any more."""
        nodes = [self._new.get(node.name, node) for node in self._graph.nodes]
        kept: list[Node] = []
        needed = set(self._returned)
        for node in reversed([node for node in nodes if node is not None]):
            if node.name in needed:
                kept.append(node)
                needed |= {r.name for value in (*node.args, *node.kwargs.values()) for r in references(value) if isinstance(r, Result)}
        return replace(self._graph, nodes=tuple(reversed(kept)))

    def _convert(self, node: Node) -> None:
        weight = node.args[1]
        name = weight.name.removesuffix(".weight") if isinstance(weight, Stored) else node.name
        source = self._nodes.get(node.args[0].name) if isinstance(node.args[0], Result) else None
        if not isinstance(weight, Stored):
            return self._stay(name, "its weight is computed")
        if source is None or not self._is_sign(source):
            return self._stay(name, "its input is no sign")
        values = self._stored[weight.name].detach().float()
        scale = values.abs().flatten(1).amax(1)
        units = values / torch.where(scale > 0, scale, torch.ones_like(scale)).reshape(-1, *(1,) * (values.dim() - 1))
        if not bool(((units == 0) | (units.abs() == 1)).all()):
            return self._stay(name, "its weight has more levels than -s, 0 and s")
        arguments = dict(zip(("bias", "stride", "padding", "dilation", "groups"), node.args[2:], strict=False))
        if isinstance(arguments.get("padding"), str):
            return self._stay(name, "its padding is given as a word")
        bias = arguments.get("bias")
        offset = self._stored[bias.name].detach().float() if isinstance(bias, Stored) else torch.zeros_like(scale)
        last, fused = node, []
        found = self._norm_behind(node)
        if found is not None:
            norm, last = found
            factor, shift = self._norm_parameters(norm)
            scale, offset = scale * factor, offset * factor + shift
            fused.append("batch norm")
        residual = self._sum_behind(last)
        if residual is not None:
            last, other = residual
            fused.append("sum")
        groups = cast(int, arguments.get("groups", 1))
        words, mask = pack_conv_weight(units, groups)
        for part, tensor in (("words", words), ("mask", mask), ("scale", scale), ("offset", offset)):
            if tensor is not None:
                self.tensors[f"{name}.{part}"] = tensor.contiguous()

        def stored(part: str) -> object:
            return Stored(f"{name}.{part}") if f"{name}.{part}" in self.tensors else None

        channels = values.shape[1] * groups
        common: tuple[object, ...] = (source.args[0], stored("words"), stored("mask"), stored("scale"), stored("offset"), channels)
        options: dict[str, object] = {} if residual is None else {"residual": other}
        if node.operator == "aten.conv2d.default":
            sizes = [_pair(arguments.get(key, default)) for key, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
            common = (*common, list(values.shape[2:]), *sizes, groups)
        for replaced in self._between(node, last):
            self._new[replaced] = None
        self._new[last.name] = Node(last.name, _LAYERS[node.operator], common, options)
        self.paths.append(LayerPath(name, "binary" if mask is None else "ternary", tuple(fused)))
        return None

    def _stay(self, name: str, reason: str) -> None:
        self.paths.append(LayerPath(name, "float", reason=reason))

    def _is_sign(self, node: Node) -> bool:
        """Whether a node gives -1 below zero and +1 from zero on."""
        if node.operator != _SIGN or not all(isinstance(value, Stored) for value in node.args[1:3]):
            return False
        boundaries, levels = (self._stored[cast(Stored, value).name].flatten().tolist() for value in node.args[1:3])
        smallest = torch.finfo(torch.float32).smallest_normal
        return levels == [-1.0, 1.0] and len(boundaries) == 1 and -smallest < boundaries[0] < 0

    def _only_reader(self, node: Node) -> Node | None:
        readers = self._readers.get(node.name, [])
        return readers[0] if len(readers) == 1 and node.name not in self._returned else None

    def _norm_behind(self, node: Node) -> tuple[Node, Node] | None:
        """A batch norm that alone reads ``node``, and the node that takes its first result."""
        norm = self._only_reader(node)
        if norm is None or norm.operator != _NORM or not all(isinstance(value, Stored) for value in norm.args[1:5]):
            return None
        item = self._only_reader(norm)
        return (norm, item) if item is not None and item.operator == "getitem" and item.args[1] == 0 else None

    def _norm_parameters(self, norm: Node) -> tuple[Tensor, Tensor]:
        """Factor and shift of a batch norm."""
        weight, bias, mean, variance = (self._stored[cast(Stored, value).name].detach().float() for value in norm.args[1:5])
        factor = weight / torch.sqrt(variance + cast(float, norm.args[6]))
        return factor, bias - mean * factor

    def _sum_behind(self, node: Node) -> tuple[Node, Result] | None:
        """A sum that alone reads ``node``, and what is added."""
        total = self._only_reader(node)
        if total is None or total.operator != "aten.add.Tensor" or total.kwargs or len(total.args) != 2 or total.name in self._new:
            return None
        others = [value for value in total.args if value != Result(node.name)]
        return (total, others[0]) if len(others) == 1 and isinstance(others[0], Result) else None

    def _between(self, first: Node, last: Node) -> list[str]:
        """Names of the nodes from ``first`` to the one before ``last``, each the only reader of the one before."""
        names: list[str] = []
        node: Node | None = first
        while node is not None and node.name != last.name:
            names.append(node.name)
            node = self._only_reader(node)
        return names


def _pair(value: object) -> list[int]:
    return list(value) if isinstance(value, (list, tuple)) else [cast(int, value)] * 2
