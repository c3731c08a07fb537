"""Taps: what named layers read and give in a forward pass, without changing the network."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Literal

from torch import Tensor, nn

from lowbit.errors import LayerError, unknown_name

Side = Literal["input", "output"]


@contextmanager
def tapped(model: nn.Module, names: Collection[str], side: Side = "output") -> Iterator[dict[str, Tensor]]:
    """Within the context every call of ``model`` puts the features of these modules into the dictionary, by name, with their graph.

    Each is the first floating-point tensor among a module's outputs, or among its inputs as they come, before any quantizer. A module that
    is called several times leaves those of its last call; one that is not called leaves nothing.

    Args:
        model: The network, or a wrapper's inner one.
        names: Names of modules.
        side: What to keep.

    Raises:
        UnknownNameError: The network has no such module.
        LayerError: A module gives, or reads, no floating-point tensor.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with tapped(model, ["1"]) as features:
        ...     output = model(torch.rand(8, 4))
        >>> features["1"].shape, len(model[1]._forward_hooks)
        (torch.Size([8, 3]), 0)
    """
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}

    def keep(name: str, value: object) -> None:
        values = value if isinstance(value, (tuple, list)) else (value,)
        tensor = next((entry for entry in values if isinstance(entry, Tensor) and entry.is_floating_point()), None)
        if tensor is None:
            raise LayerError(
                f"module {name!r} ({type(modules[name]).__name__}) has no floating-point tensor as its {side}. Name another one."
            )
        found[name] = tensor

    handles = []
    try:
        for name in names:
            if name not in modules:
                raise unknown_name("module", name, [known for known in modules if known])
            if side == "output":
                handles.append(modules[name].register_forward_hook(lambda _m, _args, output, name=name: keep(name, output)))
            else:
                handles.append(modules[name].register_forward_pre_hook(lambda _m, args, name=name: keep(name, args), prepend=True))
        yield found
    finally:
        for handle in handles:
            handle.remove()
