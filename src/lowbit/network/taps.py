"""Taps: what named modules read and give in a forward pass, without changing the network."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit.errors import LayerError, LoopError, unknown_name
from lowbit.network.graph.dataflow import Dataflow, Node
from lowbit.network.graph.trunk import residual_sums
from lowbit.network.insert import INPUT, OUTPUT

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Tap:
    """What a module reads or gives.

    Attributes:
        module: Name of the module.
        side: Which of the two.
        call: In which of its calls in one pass of the network, counted from 0; ``None``: in the last one.
    """

    module: str
    side: Side = "output"
    call: int | None = None


Place = TypeVar("Place", str, Tap)


@contextmanager
def tapped(model: nn.Module, taps: Collection[Place], side: Side = "output", *, copies: bool = False) -> Iterator[dict[Place, Tensor]]:
    """Within the context every pass of ``model`` puts features of its modules into the dictionary, by tap, with their graph.

    Each is the first floating-point tensor among a module's outputs, or among its inputs as they come, before any quantizer. A module that
    is not called leaves nothing.

    Args:
        model: The network, or a wrapper's inner one.
        taps: Names of modules, or more exact taps.
        side: What to keep of those that are names; of a module that is called several times, it is that of the last call.
        copies: Keep copies, which operations in place behind them do not change (``nn.ReLU(inplace=True)``).

    Raises:
        UnknownNameError: The network has no such module.
        LayerError: A module gives, or reads, no floating-point tensor.
        LoopError: A module runs without gradients in a pass with them, as in reentrant activation checkpointing.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with tapped(model, ["1"]) as features:
        ...     output = model(torch.rand(8, 4))
        >>> features["1"].shape, len(model[1]._forward_hooks)
        (torch.Size([8, 3]), 0)
    """
    modules = dict(model.named_modules())
    found: dict[Place, Tensor] = {}
    calls: Counter[Place] = Counter()
    records_gradients = torch.is_grad_enabled()

    def keep(key: Place, tap: Tap, value: object) -> None:
        calls[key] += 1
        if tap.call not in (None, calls[key] - 1):
            return
        if torch.is_grad_enabled() is not records_gradients:
            raise LoopError(
                f"module {tap.module!r} runs without gradients within a network that is run with them, so that nothing can be learned from its "
                f"{tap.side}. Where torch.utils.checkpoint does that, pass use_reentrant=False."
            )
        values = value if isinstance(value, (tuple, list)) else (value,)
        tensor = next((entry for entry in values if isinstance(entry, Tensor) and entry.is_floating_point()), None)
        if tensor is None:
            raise LayerError(
                f"module {tap.module!r} ({type(modules[tap.module]).__name__}) has no floating-point tensor as its {tap.side}. Name another one."
            )
        found[key] = tensor.clone() if copies else tensor

    def hook(key: Place) -> RemovableHandle:
        tap = key if isinstance(key, Tap) else Tap(key, side)
        if tap.module not in modules:
            raise unknown_name("module", tap.module, [known for known in modules if known])
        module: nn.Module = modules[tap.module]
        if tap.side == "output":
            return module.register_forward_hook(lambda _m, _args, output: keep(key, tap, output))
        return module.register_forward_pre_hook(
            lambda _m, args, kwargs: keep(key, tap, (*args, *kwargs.values())), prepend=True, with_kwargs=True
        )

    handles = [model.register_forward_pre_hook(lambda _m, _args: calls.clear(), prepend=True)]
    try:
        for key in taps:
            handles.append(hook(key))
        yield found
    finally:
        for handle in handles:
            handle.remove()


def taps_of(flow: Dataflow, node: Node) -> tuple[Tap, ...]:
    """Taps whose sum is the tensor ``node``: one where some module gives or reads it, those of its two operands where it is their sum.

    Empty where no module has it.

    Example:
        >>> import torch
        >>> from lowbit.network.graph.dataflow import capture
        >>> flow = capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), torch.rand(8, 4))
        >>> [taps_of(flow, node) for node in flow.nodes if node.op == "linear"]
        [(Tap(module='0', side='output', call=0),)]
    """
    sides: tuple[tuple[Side, str], ...] = (("output", "returned_by"), ("input", "received_by"))
    for side, field in sides:
        plain = [
            module for module in getattr(node, field) if not module.endswith((INPUT, OUTPUT))
        ]  # quantizers may be off, and do not run then
        for module in plain[:1]:
            earlier = flow.nodes[: flow.nodes.index(node)]
            return (Tap(module, side, sum(getattr(other, field).count(module) for other in earlier)),)
    operands = [taps_of(flow, flow[str(name)]) for name in node.arguments] if node.name in residual_sums(flow) else []
    return tuple(tap for taps in operands for tap in taps) if all(operands) else ()
