"""What a policy would do to a network, before anything is done."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lowbit.inputs import Inputs
from lowbit.network.layers import execution_order, layer_kind, quantizable_layers
from lowbit.spec import BitPolicy, LayerBits, Position


@dataclass(frozen=True)
class PlannedLayer:
    """A layer and the bits that it would get."""

    name: str
    kind: str
    bits: LayerBits


def plan_layers(model: nn.Module, sample: Inputs, policy: BitPolicy) -> list[PlannedLayer]:
    """The bits that ``policy`` gives each layer of ``model``, in the order in which they run on ``sample``.

    Raises:
        SpecError: A rule of the policy matches no layer.
    """
    layers = quantizable_layers(model)
    policy.check(layers)
    order = execution_order(model, sample)
    ends: dict[str, Position] = {order[0]: "first", order[-1]: "last"} if order else {}
    names = [*order, *(name for name in layers if name not in order)]
    return [
        PlannedLayer(name, layer_kind(layers[name]), policy.bits_for(name, layers[name], position=ends.get(name, "inner")))
        for name in names
    ]
