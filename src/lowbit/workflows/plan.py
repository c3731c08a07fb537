"""The effect of a policy on a network, before anything is changed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lowbit.inputs import Inputs
from lowbit.network.bits import check_policy, policy_bits
from lowbit.network.insert import weight_sites
from lowbit.network.job import in_order, positions_of
from lowbit.network.layers import execution_order, layer_kind, shuffled_layers
from lowbit.spec import BitPolicy, LayerBits


@dataclass(frozen=True)
class PlannedLayer:
    """A layer and the bits that it would get."""

    name: str
    kind: str
    bits: LayerBits


def plan_layers(model: nn.Module, sample: Inputs, policy: BitPolicy) -> list[PlannedLayer]:
    """The bits that ``policy`` assigns to each layer of ``model``, in the order in which they run on ``sample``.

    Raises:
        SpecError: A rule of the policy matches no layer, or no layer that it could be honoured in.
    """
    sites = weight_sites(model)
    check_policy(policy, {name: site.layer for name, site in sites.items()})
    order = in_order(execution_order(model, sample), sites)
    ends = positions_of(order, sites, shuffled_layers(model, sample))
    return [
        PlannedLayer(name, layer_kind(sites[name].layer), policy_bits(policy, name, sites[name].layer, ends.get(name, "inner")))
        for name in dict.fromkeys([*order, *sites])
    ]
