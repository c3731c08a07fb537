"""What a module reads in a call, whether it is given by position or by keyword."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments by position and by keyword


def input_place(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Where the module's input stands: the position or the keyword of the first floating-point tensor; ``None`` where there is none.

    >>> import torch
    >>> x = torch.zeros(1)
    >>> input_place((3, x), {}), input_place((), {"input": x}), input_place((3,), {})
    (1, 'input', None)
    """
    places: tuple[tuple[int | str, Any], ...] = (*enumerate(args), *kwargs.items())
    return next((place for place, value in places if isinstance(value, Tensor) and value.is_floating_point()), None)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The module's input: the first floating-point tensor of a call, if there is one."""
    place = input_place(args, kwargs)
    if place is None:
        return None
    x: Tensor = args[place] if isinstance(place, int) else kwargs[place]
    return x


def with_input(args: tuple[Any, ...], kwargs: dict[str, Any], x: object) -> Call:
    """The same call of another input ``x``, which takes the place of the first floating-point tensor."""
    place = input_place(args, kwargs)
    if isinstance(place, int):
        return (*args[:place], x, *args[place + 1 :]), kwargs
    return args, kwargs if place is None else {**kwargs, place: x}


def on_input(module: nn.Module, see: Callable[[Tensor], None], *, prepend: bool = False) -> RemovableHandle:
    """Call ``see(x)`` with the input of each call of ``module`` that has one; ``prepend`` puts it before other hooks."""

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = input_of(args, kwargs)
        if x is not None:
            see(x)

    return module.register_forward_pre_hook(hook, prepend=prepend, with_kwargs=True)
