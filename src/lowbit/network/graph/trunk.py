"""The trunk of a network: the tensors that everything passes through, and those of them that stand before an activation function."""

from __future__ import annotations

from lowbit.network.graph.dataflow import LAYER_OPS, Dataflow, Node

ACTIVATIONS = frozenset({
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish",
    "hardswish", "softplus", "sigmoid", "hardsigmoid", "tanh", "channel_clip",
})  # fmt: skip
_CHANNELS_FIRST = frozenset({"batch_norm", "instance_norm", "group_norm"})
_CHANNELS_LAST = frozenset({"linear", "addmm", "mm", "layer_norm", "rms_norm", "embedding"})
_MOVING_AXES = frozenset({"permute", "transpose", "view", "reshape", "movedim", "einsum", "matmul", "bmm"})


def trunk(flow: Dataflow) -> list[Node]:
    """The tensors that lie on every path from the network's inputs to its outputs, in execution order.

    In a residual network these are the stem, the sums at the ends of blocks and what is computed from one sum alone; what has a shortcut
    around it is not.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lowbit.network.graph.dataflow import capture
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.stem, self.inner = nn.Linear(3, 4), nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         y = self.stem(x)
        ...         return self.inner(y).relu() + y
        >>> [node.op for node in trunk(capture(Block(), torch.rand(2, 3)))]
        ['linear', 'add']
    """
    reached, leading = _from_inputs(flow), set[str]()
    for node in reversed(flow.nodes):
        if flow.is_output(node) or not leading.isdisjoint(node.consumers):
            leading.add(node.name)
    order = [node for node in flow.nodes if node.name in reached & leading]
    places = {node.name: place for place, node in enumerate(order)}

    def reach(node: Node) -> int:
        """The last place at which the tensor is read; behind all others where the network returns it."""
        read = [places[name] for name in node.consumers if name in places]
        return len(order) if flow.is_output(node) else max(read, default=-1)

    inputs = [node for node in order if node.op == "input"]
    furthest, found = max(map(reach, inputs), default=-1), []
    for place, node in enumerate(order):
        if node.op == "input":
            continue
        if furthest <= place:  # nothing that was made before is read behind it
            found.append(node)
        furthest = max(furthest, reach(node))
    return found


def before_activations(flow: Dataflow) -> list[Node]:
    """The tensors of the trunk that end a block or a layer, before an activation function changes them, in execution order.

    They are the sums of two tensors that come from the inputs, and what an activation function reads that is not the network's last step: the
    output of a convolution and its norm where it has no shortcut. Of several without a layer between them it is the first.
    """
    sums, found, has_layer = set(residual_sums(flow)), [], False
    candidates = {node.name for node in trunk(flow) if not flow.is_output(node) and node.op not in ACTIVATIONS}
    for node in flow.nodes:
        has_layer |= node.op in LAYER_OPS
        if has_layer and node.name in candidates and (node.name in sums or _is_activated(flow, node)):
            found.append(node)
            has_layer = False
    return found


def residual_sums(flow: Dataflow) -> list[str]:
    """The tensors that are the sum of two others, both of which come from the network's inputs."""
    reached = _from_inputs(flow)
    return [
        node.name for node in flow.nodes if node.op == "add" and len(node.arguments) == 2 and reached.issuperset(map(str, node.arguments))
    ]


def _is_activated(flow: Dataflow, node: Node) -> bool:
    readers = [reader for reader in flow.consumers(node) if reader.op in ACTIVATIONS]
    return bool(readers) and not any(flow.is_output(reader) for reader in readers)


def _from_inputs(flow: Dataflow) -> set[str]:
    """The names of the inputs and of all that comes from them; unlike ``Node.is_activation`` from tokens as well."""
    found = {node.name for node in flow.nodes if node.op == "input"}
    for node in flow.nodes:
        if not found.isdisjoint(node.inputs):
            found.add(node.name)
    return found


def channel_axis(flow: Dataflow, node: Node) -> int | None:
    """The dimension over channels of a tensor with samples in dimension 0: 1 behind convolutions, the last one behind linear layers.

    ``None`` where the layer it comes from cannot be told, because dimensions were moved since.
    """
    pending, seen = [node], set()
    while pending:
        before = pending.pop(0)
        if before.name in seen or before.op in _MOVING_AXES or len(before.shape) != len(node.shape):
            continue
        seen.add(before.name)
        if before.op in _CHANNELS_LAST:
            return len(node.shape) - 1
        if before.op in _CHANNELS_FIRST or before.op in LAYER_OPS:
            return 1
        pending += [flow[name] for name in before.inputs]
    return None
