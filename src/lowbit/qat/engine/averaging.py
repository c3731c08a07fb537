"""An exponential moving average of a network's weights, which often classifies better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """``average = decay * average + (1 - decay) * value`` for every floating-point parameter and buffer, after every step.

    Other buffers, tensors that change their shape, and parameters that a method replaces by new ones count as they are.

    Attributes:
        tensors: The averages by name.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.tensors = {name: tensor.detach().clone() for name, tensor in _named(model)}
        self._parameters: dict[str, nn.Parameter] = {}  # those of the last update

    def resume(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        """Go on from these averages of ``model``, which has been loaded."""
        self.tensors, self._parameters = tensors, dict(model.named_parameters())

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the current values."""
        fresh: dict[str, Tensor] = {}
        for name, value in _named(model):
            average = self.tensors.get(name)
            is_replaced = self._parameters.get(name, value) is not value
            if average is None or average.shape != value.shape or is_replaced:
                fresh[name] = value.detach().clone()
            else:
                fresh[name] = average.lerp_(value.detach(), 1 - self.decay)
        self.tensors, self._parameters = fresh, dict(model.named_parameters())

    @torch.no_grad()
    def apply(self, model: nn.Module) -> dict[str, Tensor]:
        """Put the averages into ``model``; gives the values that were there."""
        before = {name: value.detach().clone() for name, value in _named(model)}
        for name, value in _named(model):
            value.data.copy_(self.tensors[name])
        return before

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within the context ``model`` has the averages."""
        before = self.apply(model)
        try:
            yield
        finally:
            for name, value in _named(model):
                value.data.copy_(before[name])


def _named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, parameter) for name, parameter in model.named_parameters() if parameter.is_floating_point())
    yield from ((name, buffer) for name, buffer in model.named_buffers() if buffer.is_floating_point())
