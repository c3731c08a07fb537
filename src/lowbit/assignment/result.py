"""What a search found, as callers, ``search.json`` and the report get it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lowbit.assignment.budget import CostKind
from lowbit.assignment.costs import Assignment
from lowbit.spec import BitPolicy, LayerBits, switch_name


@dataclass(frozen=True)
class Candidate:
    """One way to give bits to a network.

    Attributes:
        name: What people call it: ``found``, ``uniform 4``.
        policy: Bits of each layer, as every command takes them.
        bits: The same by the names of weights, those that are not searched included.
        cost: What the network costs, by kind.
        loss: The loss that the method predicts; ``None`` where it predicts none.
        metric: The task's metric where the network was measured.
    """

    name: str
    policy: BitPolicy
    bits: Assignment
    cost: Mapping[CostKind, float]
    loss: float | None = None
    metric: float | None = None

    def to_dict(self) -> dict[str, object]:
        """As JSON holds it."""
        bits = {layer: switch_name(width) for layer, width in self.bits.items()}
        return {"name": self.name, "cost": dict(self.cost), "loss": self.loss, "metric": self.metric, "bits": bits}


@dataclass(frozen=True)
class SearchResult:
    """The result of ``lowbit.search``.

    Attributes:
        method: The search method.
        options: Its hyper-parameters.
        found: The network that it chose.
        uniform: Networks with the same bits in each searched layer, from the most bits on.
        frontier: Networks of which none costs less and loses less than another, from the cheapest on; empty where the method finds one.
        sensitivity: Predicted loss of each layer at each width, the others in float; empty where the method has none.
        searched: The weights that were searched, in the order in which they run.
        limits: The most that a network may cost, by kind, in the units of ``units``.
        reference: What shares of a budget are shares of, by kind.
        units: Unit of each kind of cost.
        main: The kind of cost along which the frontier is ordered.
        order: Layers in the order in which the paper retrains them; empty where it says none.
        facts: What else the method knows of its search.
        metric_name, metric_unit: The task's metric.
        float_metric: That of the float network, where it was measured.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> result = lowbit.search(model, method="random_bits", budget="average=4", sample=torch.rand(2, 8))
        >>> result.searched, result.cost["average"] <= 4, [one.name for one in result.uniform][:2]
        (('1', '2'), True, ['uniform 8/8', 'uniform 7/8'])
    """

    method: str
    options: Mapping[str, object]
    found: Candidate
    uniform: tuple[Candidate, ...]
    frontier: tuple[Candidate, ...]
    sensitivity: Mapping[str, Mapping[LayerBits, float]]
    searched: tuple[str, ...]
    limits: Mapping[CostKind, float]
    reference: Mapping[CostKind, float]
    units: Mapping[CostKind, str]
    main: CostKind
    order: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)
    metric_name: str = ""
    metric_unit: str = ""
    float_metric: float | None = None

    @property
    def policy(self) -> BitPolicy:
        """Bits of each layer, as ``lowbit.quantize`` and ``lowbit.train`` take them."""
        return self.found.policy

    @property
    def cost(self) -> Mapping[CostKind, float]:
        """What the network that was found costs, by kind."""
        return self.found.cost

    def to_dict(self) -> dict[str, object]:
        """As ``search.json`` holds it."""
        return {
            "method": self.method,
            "options": dict(self.options),
            "limits": dict(self.limits),
            "reference": dict(self.reference),
            "units": dict(self.units),
            "main": self.main,
            "metric": {"name": self.metric_name, "unit": self.metric_unit, "float": self.float_metric},
            "found": self.found.to_dict(),
            "policy": self.policy.to_dict(),
            "uniform": [one.to_dict() for one in self.uniform],
            "frontier": [one.to_dict() for one in self.frontier],
            "sensitivity": {n: {switch_name(bits): loss for bits, loss in losses.items()} for n, losses in self.sensitivity.items()},
            "order": list(self.order),
            "facts": dict(self.facts),
        }
