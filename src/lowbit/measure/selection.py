"""Which layer takes how many bits in a network that mixes widths: the greedy path from the highest ones down to a budget.

Source: Bulat, Tzimiropoulos 2021, "Bit-Mixer", section 4 (no fine-tuning, no training again).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from lowbit.errors import SpecError
from lowbit.measure.macs import count_macs
from lowbit.network.bits import set_bits, switching_layers
from lowbit.network.record import record_of
from lowbit.progress import Progress

Widths = tuple[int, ...]


@dataclass(frozen=True)
class Path:
    """A way down to a budget.

    Attributes:
        trace: The widths of all layers after each move, first those before any.
        costs: The cost of each of these.
        accuracies: What was measured for each of these.
    """

    trace: tuple[Widths, ...]
    costs: tuple[float, ...]
    accuracies: tuple[float, ...]

    @property
    def bits(self) -> Widths:
        """The widths that fit into the budget."""
        return self.trace[-1]


def greedy_path(
    choices: Sequence[int],
    layers: int,
    measure: Callable[[Widths], float],
    cost: Callable[[Widths], float],
    budget: float,
    progress: Progress | None = None,
) -> Path:
    """Lower one layer at a time to the next width, that whose lowering leaves the most accuracy, until the cost is within the budget.

    Args:
        choices: The widths that each layer can have, in any order.
        layers: Number of layers.
        measure: Accuracy of a network whose layers have these widths.
        cost: What they cost.
        budget: The most that they may cost.
        progress: Progress display; default: silent.

    Raises:
        SpecError: All layers at the lowest width still cost more.

    Example:
        >>> path = greedy_path([2, 4], 2, lambda bits: bits[0] + 0.1 * bits[1], average_bits, budget=3)
        >>> path.trace, path.costs
        (((4, 4), (4, 2)), (4.0, 3.0))
    """
    ordered = sorted(choices, reverse=True)
    lowest = cost((ordered[-1],) * layers)
    if lowest > budget:
        raise SpecError(f"the budget is {budget:g}, and all layers at {ordered[-1]} bits cost {lowest:g}. Choose that or more.")
    current: Widths = (ordered[0],) * layers
    trace, costs, accuracies = [current], [cost(current)], [measure(current)]
    with (progress or Progress.silent()).stage("greedy selection", total=layers * (len(ordered) - 1)) as stage:
        while costs[-1] > budget:
            found = {}
            for layer, bits in enumerate(current):
                if bits != ordered[-1]:
                    lower = ordered[ordered.index(bits) + 1]
                    candidate = (*current[:layer], lower, *current[layer + 1 :])
                    found[candidate] = measure(candidate)
            current = max(found, key=found.__getitem__)
            trace, costs, accuracies = [*trace, current], [*costs, cost(current)], [*accuracies, found[current]]
            stage.advance()
    return Path(tuple(trace), tuple(costs), tuple(accuracies))


def average_bits(bits: Sequence[int]) -> float:
    """The plain mean over layers."""
    return sum(bits) / len(bits)


def bit_operations(weights: Sequence[int], activations: Sequence[int], macs: Sequence[float]) -> float:
    """Multiply-accumulates times the bits of weights and of inputs, over all layers."""
    return sum(count * width * other for width, other, count in zip(weights, activations, macs, strict=True))


def select_bits(
    model: nn.Module,
    measure: Callable[[nn.Module], float],
    *,
    budget_average_bits: float | None = None,
    budget_bit_operations: float | None = None,
    sample: object = None,
    progress: Progress | None = None,
) -> Path:
    """Give each layer of a network that mixes widths the bits that a budget allows, with the least loss of accuracy; changes ``model``.

    Layers of one width stay as they are and do not count. A layer whose bits follow those of another adds to the bit operations of that.

    Args:
        model: A network trained by a method that mixes widths, ``bit_mixer``.
        measure: Accuracy of the network as it is, on data kept for this choice; it is called for each layer at every move.
        budget_average_bits: The most bits of weights on average over the layers of ``lowbit.network.bits.switching_layers``.
        budget_bit_operations: The most bit operations of one sample in these layers; needs ``sample``.
        sample: One batch of inputs, to count multiply-accumulates.
        progress: Progress display; default: silent.

    Returns:
        The way down, with a width of weights for each of these layers.

    Raises:
        SpecError: Another network, no budget or two, or a budget that the lowest widths exceed.

    Example:
        >>> import torch, lowbit
        >>> layers = [torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU()]
        >>> network = torch.nn.Sequential(*layers, torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU(), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> model = lowbit.prepare(network, method="bit_mixer", bits=[4, 2], sample=torch.rand(8, 4))
        >>> _ = lowbit.select_bits(model, lambda network: 1.0, budget_average_bits=3)
        >>> sorted(lowbit.get_bits(model)[name].weight for name in ("3", "6"))
        [2, 4]
    """
    record, layers = record_of(model), switching_layers(model)
    if record is None or record.switching != "layer" or not layers:
        raise SpecError(
            f"{type(model).__name__} does not mix widths. Prepare it by a method that does, with several bits: method='bit_mixer', bits=[4, 3, 2]."
        )
    if (budget_average_bits is None) == (budget_bit_operations is None):
        raise SpecError("give either budget_average_bits or budget_bit_operations")
    if budget_bit_operations is not None and sample is None:
        raise SpecError("budget_bit_operations needs sample=, one batch of inputs, to count multiply-accumulates")
    switches = {switch.weight: switch for switch in record.switches}
    macs = {} if sample is None else count_macs(model, sample)
    own = [sum(macs.get(name, 0.0) for name in (layer, *(n for n, m in record.tied.items() if m == layer))) for layer in layers]

    def apply(bits: Widths) -> None:
        set_bits(model, {layer: switches[width] for layer, width in zip(layers, bits, strict=True)})

    def measured(bits: Widths) -> float:
        apply(bits)
        return measure(model)

    def operations(bits: Widths) -> float:
        return bit_operations(bits, [switches[width].activation or 32 for width in bits], own)

    choices = [width for width in switches if width is not None]
    cost, budget = (average_bits, budget_average_bits) if budget_bit_operations is None else (operations, budget_bit_operations)
    assert budget is not None
    path = greedy_path(choices, len(layers), measured, cost, budget, progress)
    apply(path.bits)
    return path
