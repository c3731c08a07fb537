"""How far inputs are from those that a network was trained on, by the statistics that its first batch norm has kept."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from lowbit.inputs import Inputs
from lowbit.network.calls import on_input
from lowbit.network.layers import evaluating

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
LIVE = 1e-4  # part of the largest variance below which a channel says nothing: any change of it is large


@dataclass(frozen=True)
class NormShift:
    """Inputs of the first batch norm compared with its statistics from training; medians over its channels.

    Attributes:
        name: The batch norm.
        variance_ratio: Variance of the inputs by that of the training.
        mean_shift: Distance of the means, in standard deviations of the training.
    """

    name: str
    variance_ratio: float
    mean_shift: float

    @property
    def is_large(self) -> bool:
        """Whether the inputs were probably preprocessed differently from those of the training."""
        return not 0.5 <= self.variance_ratio <= 2 or self.mean_shift > 1


class _Reached(Exception):
    """The first batch norm; nothing behind it needs to be computed."""

    def __init__(self, norm: nn.Module, values: Tensor) -> None:
        self.norm, self.values = norm, values


def first_norm_shift(model: nn.Module, inputs: Inputs) -> NormShift | None:
    """The shift at the batch norm that runs first; ``None`` where there is none, or none that has seen data."""
    names: dict[nn.Module, str] = {
        module: name for name, module in model.named_modules() if isinstance(module, NORMS) and module.running_var is not None
    }
    if not names:
        return None

    def stop(norm: nn.Module, x: Tensor) -> None:
        raise _Reached(norm, x)

    hooks = [on_input(norm, partial(stop, norm)) for norm in names]
    try:
        with evaluating(model):
            model(*inputs.args, **inputs.kwargs)
    except _Reached as reached:
        return _shift(names[reached.norm], reached.norm, reached.values)
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _shift(name: str, norm: nn.Module, inputs: Tensor) -> NormShift | None:
    known_mean, known_variance = (getattr(norm, key).double() for key in ("running_mean", "running_var"))
    values = inputs.detach().transpose(0, 1).flatten(1).double()  # channels, all else
    live = known_variance > LIVE * known_variance.max()
    is_new = bool((known_mean == 0).all() and (known_variance == 1).all())
    if is_new or not bool(live.any()) or len(values) != len(known_mean):
        return None
    ratio = (values.var(1, unbiased=False) / known_variance)[live].median()
    distance = ((values.mean(1) - known_mean).abs() / known_variance.sqrt())[live].median()
    return NormShift(name, float(ratio), float(distance))
