"""How much a step of training unsettles what a convolution computes, because few weights changed their code (AIWQ).

Source: Park, Yoo 2020, "PROFIT: A Novel Training Method for sub-4-bit MobileNet Models", section 4.1: activation instability induced by
weight quantization. Its authors' code averages it over training as here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from lowbit.network.calls import input_of
from lowbit.network.layers import CONVOLUTIONS, WEIGHT

_CONVOLVE: tuple[Callable[..., Tensor], ...] = (functional.conv1d, functional.conv2d, functional.conv3d)


def output_divergence(new: Tensor, old: Tensor) -> Tensor:
    """The mean over channels of ``log(s' / s) + (s^2 + (m - m')^2) / (2 s'^2) - 1/2``, shape ``()``; 0 or more.

    It is the KL divergence between normal distributions with the mean and the (unbiased) standard deviation that each output channel has
    over batch and space: ``m`` and ``s`` of ``new``, ``m'`` and ``s'`` of ``old``. Channels where one of the deviations is 0 are left
    out; NaN where none remains.

    Args:
        new, old: Outputs ``[N, channels, ...]`` for the same inputs, with current and earlier weights.

    >>> x = torch.tensor([[[0.0, 2.0]], [[4.0, 2.0]]])
    >>> output_divergence(x, x), output_divergence(x + 1, x)
    (tensor(0.), tensor(0.1875))
    """
    (deviation, mean), (deviation_old, mean_old) = (torch.std_mean(y.float().transpose(0, 1).flatten(1), 1) for y in (new, old))
    terms = (deviation_old / deviation).log() + (deviation.square() + (mean - mean_old).square()) / (2 * deviation_old.square()) - 0.5
    return terms[(deviation > 0) & (deviation_old > 0)].mean()


@dataclass
class InstabilityMeter:
    """The divergence of each convolution's outputs between the weights of a step and those of the step before, averaged over training.

    Works on any network, quantized or not, in any loop::

        with meter.watching(model):
            loss = criterion(model(x), target)
        loss.backward()
        optimizer.step()
        meter.step()

    Attributes:
        decay: Of the running mean: ``decay * mean + (1 - decay) * divergence``, from 0 on.
        limit: A divergence above it does not count.
        metric: The running mean of each convolution by name.
        previous, current: Weights of the step before, and of this one, as the convolutions see them.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3))
        >>> meter = InstabilityMeter()
        >>> for _ in range(2):
        ...     with meter.watching(model):
        ...         loss = model(torch.rand(4, 1, 8, 8)).square().mean()
        ...     loss.backward()
        ...     with torch.no_grad():
        ...         _ = model[0].weight.sub_(0.1 * model[0].weight.grad)
        ...     meter.step()
        >>> list(meter.metric), meter.metric["0"] > 0
        (['0'], True)
    """

    decay: float = 0.999
    limit: float = 1.0
    metric: dict[str, float] = field(default_factory=dict)
    previous: dict[str, Tensor] = field(default_factory=dict)
    current: dict[str, Tensor] = field(default_factory=dict)

    @contextmanager
    def watching(self, model: nn.Module, reduce_mean: Callable[[Tensor], None] = lambda _: None) -> Iterator[None]:
        """Within the context calls of ``model`` are measured; ``reduce_mean`` averages a tensor over processes in place."""
        found: dict[str, list[Tensor]] = {}
        handles = []
        for name, layer in model.named_modules():
            if isinstance(layer, CONVOLUTIONS):
                handles += self._hooks(name, layer, found)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        if found:
            means = torch.stack([torch.stack(values).mean() for values in found.values()])
            reduce_mean(means)
            self._add(dict(zip(found, means.tolist(), strict=True)))

    def step(self) -> None:
        """The weights have changed: those that were current are the previous ones."""
        self.previous, self.current = self.current, {}

    def forget(self) -> None:
        """Measure nothing in the next step, which has no step before it."""
        self.previous, self.current = {}, {}

    def _hooks(self, name: str, layer: nn.Module, found: dict[str, list[Tensor]]) -> list[Any]:
        def note_weight(_module: nn.Module, _args: tuple[Any, ...], weight: Tensor) -> None:
            self.current[name] = weight.detach().clone()

        def measure(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Tensor) -> None:
            if not is_computed:
                self.current[name] = layer.weight.detach().clone()  # type: ignore[operator]
            x = input_of(args, kwargs)
            if name in self.previous and x is not None:
                outputs = (convolve(layer, x, weights[name]) for weights in (self.current, self.previous))
                found.setdefault(name, []).append(output_divergence(*outputs))

        is_computed = parametrize.is_parametrized(layer, WEIGHT)
        hooks = [layer.register_forward_hook(measure, with_kwargs=True)]
        if is_computed:
            hooks.append(layer.parametrizations[WEIGHT].register_forward_hook(note_weight))  # type: ignore[index, union-attr]
        return hooks

    def _add(self, found: Mapping[str, float]) -> None:
        for name, divergence in found.items():
            mean = self.metric.setdefault(name, 0.0)
            if divergence <= self.limit:  # and not NaN
                self.metric[name] = self.decay * mean + (1 - self.decay) * divergence


@torch.no_grad()
def convolve(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What the convolution ``layer`` gives for its input ``x`` with another weight, without its bias, in float32."""
    assert isinstance(layer, CONVOLUTIONS)
    x = x.detach() if x.dim() == weight.dim() else x.detach().unsqueeze(0)
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        pads = [size for size in reversed(_sizes(layer)) for _ in range(2)]
        x, padding = functional.pad(x, pads, mode=layer.padding_mode), 0
    with torch.autocast(x.device.type, enabled=False):
        return _CONVOLVE[weight.dim() - 3](x.float(), weight.float(), None, layer.stride, padding, layer.dilation, layer.groups)


def _sizes(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> list[int]:
    if isinstance(layer.padding, str):
        is_same = layer.padding == "same"
        return [d * (k - 1) // 2 if is_same else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return list(layer.padding)
