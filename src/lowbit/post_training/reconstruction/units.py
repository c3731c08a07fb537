"""Which parts of a network are reconstructed, in which order, and what flows from one to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LayerError
from lowbit.network.graph.blocks import Block, find_blocks
from lowbit.network.graph.dataflow import Dataflow, Node
from lowbit.network.layers import TRANSPOSED, evaluating
from lowbit.post_training.pipeline import PtqJob

# activation functions that are taken into a layer's loss; each needs only the arguments that stand in the graph
FOLLOWING = frozenset({"relu", "relu6", "hardtanh", "leaky_relu", "hardswish", "silu"})


@dataclass(frozen=True)
class PlannedUnit:
    """A module that is reconstructed as a whole.

    Attributes:
        name: The module.
        layers: Its layers with quantized weights.
        activation: The activation function that directly follows a layer, applied to its output and target.
        is_carried: Whether its only input is exactly the output of the unit before it.
        channel_axis: The axis of its output that counts channels.
        cost: Multiplications for one sample.
    """

    name: str
    layers: tuple[str, ...]
    activation: Callable[[Tensor], Tensor] | None
    is_carried: bool
    channel_axis: int
    cost: float

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The unit's output."""
        return self.finish(module(*args, **kwargs))

    def finish(self, output: Tensor) -> Tensor:
        """The unit's output, given its module's output."""
        return output if self.activation is None else self.activation(output)


@dataclass
class _Facts:
    """Facts about a module from one pass."""

    calls: int = 0
    returns_tensor: bool = False
    has_one_input: bool = False
    cost: float = 0.0


def layer_units(job: PtqJob) -> list[Block]:
    """Every layer as a unit of its own."""
    return [Block(name, (name,), "layer") for name in job.layers]


def block_units(job: PtqJob, patterns: Sequence[str]) -> list[Block]:
    """The network's blocks (or the modules that ``patterns`` name) and the layers between them; layers, with a note, where there is no block."""
    units = find_blocks(job.model, job.graph, patterns or None)
    if not any(unit.kind == "block" for unit in units):
        reason = "" if job.graph is not None else f" ({job.graph_error})"
        job.table.note(
            f"no residual or repeated block was found, so layers were reconstructed one by one{reason}; name blocks with blocks='PATTERN'"
        )
        return layer_units(job)
    return units


def plan_units(job: PtqJob, units: Sequence[Block], *, use_activations: bool = True) -> list[PlannedUnit]:
    """The units that can be reconstructed, in execution order.

    A block that runs several times, or does not return one tensor, is taken apart into its layers. A layer that runs several
    times, or never, keeps its rounding to nearest; the table says so.
    """
    modules = {unit.name for unit in units} | set(job.layers)
    facts, order = _look(job, modules)
    chosen: list[tuple[str, tuple[str, ...]]] = []
    for unit in units:
        layers = tuple(name for name in unit.layers if name in job.layers)
        if not layers:
            continue
        if unit.kind == "block" and not (facts[unit.name].calls == 1 and facts[unit.name].returns_tensor):
            job.table.note(
                f"block {unit.name!r} runs {facts[unit.name].calls} times or does not return one tensor: reconstructed layer by layer"
            )
            chosen += [(name, (name,)) for name in layers]
        else:
            chosen.append((unit.name, layers))
    planned: list[PlannedUnit] = []
    last: Node | None = None
    for name, layers in sorted(chosen, key=lambda c: order.get(c[0], len(order))):
        if facts[name].calls != 1 or not facts[name].returns_tensor:
            job.table.note(
                f"layer {name!r} is rounded to nearest: one pass calls it {facts[name].calls} times, reconstruction needs exactly one"
            )
            continue
        activation, made = None, _returned(job.graph, name)
        if use_activations and layers == (name,) and job.graph is not None:
            activation, made = following_activation(job.graph, name, made)
        is_carried = last is not None and facts[name].has_one_input and name in last.received_by
        module = job.model.get_submodule(layers[-1])
        planned.append(
            PlannedUnit(
                name, layers, activation, is_carried, -1 if isinstance(module, nn.Linear) else 1, sum(facts[n].cost for n in layers)
            )
        )
        last = made
    if not planned:
        raise LayerError(
            f"no layer of {type(job.model).__name__} runs exactly once in a pass, so none can be reconstructed. Use round_to_nearest."
        )
    return planned


def following_activation(graph: Dataflow, layer: str, made: Node | None) -> tuple[Callable[[Tensor], Tensor] | None, Node | None]:
    """The activation function that is the only reader of the layer's output, and the tensor that the pair makes."""
    nodes = graph.of_layer(layer)
    if len(nodes) != 1:
        return None, made
    node = nodes[0]
    while len(readers := graph.consumers(node)) == 1 and not graph.is_output(node):
        node = readers[0]
        if node.op in FOLLOWING:
            operator, options = getattr(torch.ops.aten, node.op), node.arguments[1:]
            return partial(_applied, operator, options), node
        if node.op != "identity":
            break
    return None, made


def _applied(operator: Callable[..., Tensor], options: tuple[object, ...], x: Tensor) -> Tensor:
    return operator(x, *options)


def _returned(graph: Dataflow | None, module: str) -> Node | None:
    """The tensor that the module returns."""
    if graph is None:
        return None
    return next((node for node in reversed(graph.nodes) if module in node.returned_by), None)


def _look(job: PtqJob, names: set[str]) -> tuple[dict[str, _Facts], dict[str, int]]:
    """Facts about modules, and when each first ends, from one pass of the float network."""
    facts = {name: _Facts() for name in names}
    order: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            fact = facts[name]
            fact.calls += 1
            fact.returns_tensor = isinstance(output, Tensor) and output.is_floating_point()
            inputs = (*args, *kwargs.values())
            fact.has_one_input = len(inputs) == 1 and isinstance(inputs[0], Tensor)
            order.setdefault(name, len(order))
            if name in job.layers and isinstance(output, Tensor):
                weight: Tensor = module.weight  # type: ignore[assignment]
                spread = inputs[0] if isinstance(module, TRANSPOSED) else output
                fact.cost += weight.numel() * spread.numel() / (weight.shape[0] * job.sample.batch_size)

        return hook

    handles = [job.reference.get_submodule(name).register_forward_hook(watch(name), with_kwargs=True) for name in names]
    try:
        with evaluating(job.reference):
            job.reference(*job.sample.args, **job.sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return facts, order
