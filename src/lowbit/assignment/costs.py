"""What each layer of a network costs at each width: average bits, stored bytes, bit operations, time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lowbit.assignment.budget import CostKind, Limit
from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.measure.cost import FLOAT_BITS, ModelSize, float_size, model_size
from lowbit.measure.latency_table import LatencyTable
from lowbit.network.insert import weight_sites
from lowbit.network.unwrap import plain_copy
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.spec import BitPolicy, LayerBits, switch_name

Assignment = Mapping[str, LayerBits]
Choices = Mapping[str, Sequence[LayerBits]]  # the widths that each searched layer may have
UNITS: dict[CostKind, str] = {"average": "bits", "size": "bytes", "bops": "bit operations", "latency": ""}


@dataclass(frozen=True)
class Cost:
    """A cost that adds up over layers.

    Attributes:
        kind: What it counts.
        unit: Its unit.
        table: Cost of each searched layer at each width.
        fixed: Cost of all else.
        reference: What a share of it is a share of.

    Example:
        >>> low, high = LayerBits(2, 8), LayerBits(4, 8)
        >>> cost = Cost("size", "bytes", {"a": {low: 10, high: 20}, "b": {low: 1, high: 2}}, fixed=5, reference=100)
        >>> cost.of({"a": low, "b": high}), cost.least, cost.limit(Limit("size", 0.2, is_share=True))
        (17, 16, 20.0)
    """

    kind: CostKind
    unit: str
    table: Mapping[str, Mapping[LayerBits, float]]
    fixed: float = 0.0
    reference: float = math.nan

    def of(self, bits: Assignment) -> float:
        """Cost of the network whose searched layers have these bits."""
        return self.fixed + sum(widths[bits[name]] for name, widths in self.table.items())

    @property
    def least(self) -> float:
        """Cost of the network with each layer at the width that costs least."""
        return self.fixed + sum(min(widths.values()) for widths in self.table.values())

    def limit(self, limit: Limit) -> float:
        """The limit in the unit of this cost.

        Raises:
            SpecError: Even the cheapest widths cost more.
        """
        most = limit.value * self.reference if limit.is_share else limit.value
        if most < self.least * (1 - 1e-12):
            share = f" ({100 * self.least / self.reference:.3g}%)" if limit.is_share else ""
            raise SpecError(
                f"budget {limit}: {most:.6g} {self.unit} cannot be met; the least that these widths cost is {self.least:.6g} {self.unit}{share}. "
                "Allow more, or widths of fewer bits."
            )
        return most


def average_cost(weights: Mapping[str, int], choices: Choices) -> Cost:
    """Bits of weights on average: each layer's bits times its share of the weights of all searched layers."""
    total = sum(weights[name] for name in choices)
    table = {name: {bits: (bits.weight or FLOAT_BITS) * weights[name] / total for bits in widths} for name, widths in choices.items()}
    return Cost("average", UNITS["average"], table)


def bops_cost(macs: Mapping[str, float], choices: Choices, fixed: Assignment) -> Cost:
    """Multiply-accumulates x weight bits x activation bits for one sample, a float operand counting 32 bits; reference: all in float."""

    def operations(name: str, bits: LayerBits) -> float:
        return macs.get(name, 0.0) * (bits.weight or FLOAT_BITS) * (bits.activation or FLOAT_BITS)

    return Cost(
        "bops",
        UNITS["bops"],
        {name: {bits: operations(name, bits) for bits in widths} for name, widths in choices.items()},
        sum(operations(name, bits) for name, bits in fixed.items()),
        sum(macs.values()) * FLOAT_BITS**2,
    )


def size_cost(model: nn.Module, sample: Inputs, choices: Choices, fixed: Assignment) -> Cost:
    """Stored bytes: codes at exactly their bits, a scale for each output channel, biases and what norms leave; reference: the float network.

    They are those of ``lowbit.measure.model_size`` after rounding to nearest, batch norms folded, with a scale and a zero point for each tensor
    that is quantized between layers.
    """
    policy = policy_of({**fixed, **{name: LayerBits(8, widths[0].activation) for name, widths in choices.items()}})
    job = PtqJob(plain_copy(model).eval(), policy, sample)
    _Rounding(weight_observer="min_max", activation_observer="min_max").quantize(job)
    size, counts = model_size(job.model), {name: site.original.numel() for name, site in weight_sites(job.model).items()}
    table = {name: {bits: _layer_bytes(size, name, counts[name], bits) for bits in widths} for name, widths in choices.items()}
    rest = size.total_bytes - sum(size.layers[name].total_bytes for name in choices)
    return Cost("size", UNITS["size"], table, float(rest), float(float_size(model).total_bytes))


class _Rounding(PostTrainingMethod):
    """Rounding to nearest without ranges of activations, which take the same bytes whatever they are."""

    def quantize(self, job: PtqJob) -> None:
        job.fold()
        job.insert_weights(self.weight_quantizer)
        job.insert_activations(self)


def _layer_bytes(size: ModelSize, name: str, count: int, bits: LayerBits) -> float:
    layer = size.layers[name]
    if layer.weight_bytes == 0:  # stored with another layer that has the same tensor
        return float(layer.total_bytes)
    if bits.weight is None:
        return float(4 * count + layer.bias_bytes)
    return float(math.ceil(count * bits.weight / 8) + layer.table_bytes + layer.bias_bytes)


def latency_cost(table: LatencyTable, choices: Choices, fixed: Assignment) -> Cost:
    """Time of all layers by ``table``; reference: 8-bit weights and activations everywhere.

    Raises:
        SpecError: The table lacks a layer, or one of the widths.
    """
    table.check(
        {
            **{name: (*widths, LayerBits(8, 8)) for name, widths in choices.items()},
            **{n: (bits, LayerBits(8, 8)) for n, bits in fixed.items()},
        }
    )
    return Cost(
        "latency",
        table.unit,
        {name: {bits: table.time(name, bits) for bits in widths} for name, widths in choices.items()},
        sum(table.time(name, bits) for name, bits in fixed.items()),
        sum(table.time(name, LayerBits(8, 8)) for name in (*choices, *fixed)),
    )


def policy_of(bits: Assignment, *, default: LayerBits | None = None) -> BitPolicy:
    """The policy with a rule for each layer that differs from ``default``, by default the bits that most layers have.

    >>> print(policy_of({"a": LayerBits(4, 8), "b": LayerBits(2, 8), "c": LayerBits(4, 8)}).rules)
    (Rule(match='b', type=None, weight=2, activation=8, output=None),)
    """
    counts: dict[LayerBits, int] = {}
    for width in bits.values():
        counts[width] = counts.get(width, 0) + 1
    usual = default or max(counts, key=lambda width: (counts[width], switch_name(width)))
    policy = BitPolicy(usual, None)
    for name, width in bits.items():
        if width != usual:
            policy = policy.with_rule(match=name, weight=width.weight or "float", activation=width.activation or "float")
    return policy
