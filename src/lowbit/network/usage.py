"""Which weights one call of a network uses, also where it does not call the layers that hold them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.inputs import tensors_of
from lowbit.network.insert import WeightSite


class WeightsUsed(TorchDispatchMode):
    """Within the context, ``names`` gathers the weights that some operation reads.

    A parametrized weight counts where its parametrization is evaluated. Sites that share a weight are used together, and so are
    weights that lie one behind the other in one piece of memory.

    >>> import torch
    >>> from torch import nn
    >>> layer = nn.Linear(2, 3)
    >>> with WeightsUsed({"layer": WeightSite(layer), "other": WeightSite(nn.Linear(2, 3))}) as used:
    ...     y = nn.functional.linear(torch.ones(1, 2), layer.weight)
    >>> used.names
    {'layer'}
    """

    def __init__(self, sites: Mapping[str, WeightSite]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._at: dict[int, list[str]] = {}
        for name, site in sites.items():
            self._at.setdefault(site.original.data_ptr(), []).append(name)
        self._at.pop(0, None)  # tensors without memory of their own

    def __torch_dispatch__(
        self, function: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        kwargs = kwargs or {}
        for tensor in tensors_of((args, kwargs)):
            self.names.update(self._at.get(tensor.data_ptr(), ()))
        return function(*args, **kwargs)
