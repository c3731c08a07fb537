"""Where values that are not finite come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def gradient_is_finite(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether no gradient holds NaN or infinity."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return not gradients or bool(torch.isfinite(nn.utils.get_total_norm(gradients, norm_type=float("inf"))))


def names_not_finite(model: nn.Module) -> list[str]:
    """Parameters and buffers that hold NaN or infinity, such as masks of attention, and ranges that nothing has set yet."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, value in named if value.is_floating_point() and not bool(torch.isfinite(value).all())]


def values_not_finite(model: nn.Module, expected: Collection[str] = ()) -> str | None:
    """The first parameter or buffer that is not finite, in words; ``None`` where there is none but those ``expected``."""
    name = next((name for name in names_not_finite(model) if name not in expected), None)
    return None if name is None else f"{name!r} ({_owner(model, name)}) holds NaN or infinity"


def first_not_finite(model: nn.Module, inputs: object, run: Callable[[], object], expected: Collection[str] = ()) -> str:
    """Where values first stop being finite, in words.

    Looked at in this order: the inputs, parameters and buffers (but those ``expected``), outputs of layers while ``run`` calls
    the network, gradients from the loss backwards.
    """
    if any(not bool(torch.isfinite(tensor).all()) for tensor in _tensors(inputs)):
        return "the inputs of the batch hold NaN or infinity: check the data"
    return (
        values_not_finite(model, expected)
        or first_output_not_finite(model, run)
        or gradient_not_finite(model)
        or "every layer gives finite outputs, so it is the loss itself"
    )


def first_output_not_finite(model: nn.Module, run: Callable[[], object]) -> str | None:
    """The first layer whose output is not finite while ``run`` calls the network, in words; ``None`` where there is none."""
    found: list[str] = []

    def noting(name: str) -> Callable[[nn.Module, Any, object], None]:
        def note(module: nn.Module, _args: object, output: object) -> None:
            if not found and any(not bool(torch.isfinite(tensor).all()) for tensor in _tensors(output)):
                found.append(f"the first layer whose output is not finite is {name!r} ({_class(module)})")

        return note

    layers = {name: module for name, module in model.named_modules() if name and _is_layer(name)}
    handles = [module.register_forward_hook(noting(name)) for name, module in layers.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def gradient_not_finite(model: nn.Module) -> str | None:
    """The last parameter, which backwards comes first, whose gradient is not finite, in words; ``None`` where there is none."""
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
            return f"the gradient of the parameter {name!r} ({_owner(model, name)}) is not finite"
    return None


def _is_layer(name: str) -> bool:
    return "parametrizations" not in name.split(".")  # its layer is named instead


def _owner(model: nn.Module, name: str) -> str:
    path, _, _ = name.partition(".parametrizations.")
    return _class(model.get_submodule(path if path != name else name.rpartition(".")[0]))


def _class(module: nn.Module) -> str:
    return type(module).__name__.removeprefix("Parametrized")


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, dict):
        return [tensor for entry in value.values() for tensor in _tensors(entry)]
    return [tensor for entry in value for tensor in _tensors(entry)] if isinstance(value, (list, tuple)) else []
