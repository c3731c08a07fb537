"""A walk over the layers of a network: at each decision an agent chooses the bits of one weight or one input; a budget is met at the end.

Source: Wang, Liu, Lin, Lin, Han, CVPR 2019, "HAQ", sections 3.1 (observation), 3.2 (action, budget), 3.5 (reward).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.assignment.costs import Assignment, Choices, Cost
from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.measure.cost import FLOAT_BITS
from lowbit.network.insert import WeightSite
from lowbit.network.layers import CONVOLUTIONS, TRANSPOSED, evaluating
from lowbit.spec import LayerBits

Part = Literal["weight", "activation"]
PARTS: tuple[Part, ...] = ("weight", "activation")
_FACTS = 8  # numbers of an observation before the last action


@dataclass(frozen=True)
class LayerFacts:
    """What an agent sees of a layer.

    Attributes:
        is_depthwise: Whether it is a convolution with as many groups as input channels.
        in_channels, out_channels: Channels, or features.
        stride, kernel: Of a convolution, along the first dimension of space; 0 and 1 elsewhere.
        weights: Number of weights.
        input_size: Positions of a convolution's input, the number of features elsewhere.
    """

    is_depthwise: bool
    in_channels: int
    out_channels: int
    stride: int
    kernel: int
    weights: int
    input_size: int


def facts_of(model: nn.Module, sample: Inputs, layers: Mapping[str, WeightSite]) -> dict[str, LayerFacts]:
    """The facts of each of ``layers``, by name, input sizes being those of a call with ``sample``."""
    positions: dict[nn.Module, int] = {}
    handles = [site.layer.register_forward_pre_hook(_noting(positions), with_kwargs=True) for site in layers.values()]
    try:
        with evaluating(model):
            model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return {name: _facts(site, positions.get(site.layer, 0)) for name, site in layers.items()}


def _noting(positions: dict[nn.Module, int]) -> Callable[[nn.Module, tuple[object, ...], dict[str, object]], None]:
    def note(layer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        x = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        positions[layer] = 0 if x is None else x.shape[2:].numel()

    return note


def _facts(site: WeightSite, positions: int) -> LayerFacts:
    layer, weight = site.layer, site.original
    if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)):
        is_depthwise = layer.groups == layer.in_channels
        kernel, stride = layer.kernel_size[0], layer.stride[0]
        return LayerFacts(is_depthwise, layer.in_channels, layer.out_channels, stride, kernel, weight.numel(), positions)
    outputs, features = weight.shape[0], weight[0].numel()
    return LayerFacts(False, features, outputs, 0, 1, weight.numel(), features)


def embedding(layers: Sequence[LayerFacts], *rest: float) -> Tensor:
    """What is known of each layer before any decision, each column scaled to [0, 1] over the layers.

    Columns: depthwise, channels in and out, stride, kernel, weights, input size, index, and ``rest``, the same for all layers. A column in
    which all layers are equal stays as it is.

    Returns:
        float32 ``[layers, 8 + len(rest)]``. Source: section 3.1.
    """
    rows = [
        (
            layer.is_depthwise,
            layer.in_channels,
            layer.out_channels,
            layer.stride,
            layer.kernel,
            layer.weights,
            layer.input_size,
            index,
            *rest,
        )
        for index, layer in enumerate(layers)
    ]
    columns = torch.tensor(rows, dtype=torch.float64)
    low, span = columns.amin(0), columns.amax(0) - columns.amin(0)
    return torch.where(span > 0, (columns - low) / torch.where(span > 0, span, 1.0), columns).float()


def action_to_bits(action: float, lowest: int, highest: int) -> int:
    """The bits that an action in [0, 1] stands for: ``round((highest - lowest + 1) * action + lowest - 1/2)``, within the range.

    Every width has an interval of equal length; rounding is half to even. Source: section 3.2.

    >>> [action_to_bits(action, 2, 8) for action in (0.0, 0.5, 0.6, 1.0)], action_to_bits(0.0, 1, 8)
    ([2, 5, 6, 8], 1)
    """
    return min(max(round((highest - lowest + 1) * action + (lowest - 0.5)), lowest), highest)


def reward(accuracy: float, original: float) -> float:
    """``(accuracy - original) / 10``, accuracies in percent. Source: section 3.5."""
    return 0.1 * (accuracy - original)


def code_cost(weights: Mapping[str, int], choices: Choices) -> Cost:
    """Bits of all codes, as the paper counts the size: no tables, no biases; reference: 32 bits for each weight."""
    table = {name: {bits: float((bits.weight or FLOAT_BITS) * weights[name]) for bits in widths} for name, widths in choices.items()}
    return Cost("size", "bits", table, reference=float(FLOAT_BITS * sum(weights[name] for name in choices)))


def share(cost: Cost, bits: Assignment) -> float:
    """What a network with these bits costs, as a share of the reference."""
    return cost.of(bits) / cost.reference


class Environment:
    """A network as an agent meets it.

    Each layer that has a choice of weight bits is a decision, and each that has one of input bits is another one behind it. The bits of
    a whole walk are lowered until they are within every budget; then ``measure`` says what they are worth.

    Args:
        facts: Facts of each layer, by name, in the order of the walk.
        choices: The widths that each layer may have.
        budgets: Costs, each with the most that it may be.
        measure: The accuracy, in percent, of a network with these bits.
        original: That of the float network.
        pinned: Bits of layers that keep theirs, whatever the agent says.
        pins: When pinned layers get these bits: ``always``, or where a walk is ``over budget``, as in the authors' code.
        first_action: What counts as the action before the first decision.
        actions: How a decision enters the observation of the next: as a ``share`` of the most bits, or as a number of ``bits``.
        flag: Which decision the last number of an observation is about, 1 for a weight: the one that comes (``next``), or, as in the
            authors' code, the one that was taken (``previous``). It starts at 1, and there is none where only weights have a choice.
        forgets: Whether a walk starts without the last action of the walk before; in the authors' code it does not.

    Attributes:
        chosen: Bits that the agent chose in this walk.
        bits: Bits after the budgets were met, once a walk is done.
        accuracy: What ``measure`` said of them.

    Raises:
        SpecError: Even the lowest bits cost too much; the message names the least possible cost.
    """

    def __init__(
        self,
        facts: Mapping[str, LayerFacts],
        choices: Choices,
        budgets: Sequence[tuple[Cost, float]],
        *,
        measure: Callable[[Assignment], float],
        original: float,
        pinned: Assignment | None = None,
        pins: Literal["always", "over budget"] = "always",
        first_action: float = 1.0,
        actions: Literal["share", "bits"] = "share",
        flag: Literal["next", "previous"] = "next",
        forgets: bool = True,
    ) -> None:
        self.choices, self.budgets, self.measure, self.original = choices, budgets, measure, original
        self.pinned, self.pins, self.actions, self.flag, self.forgets = pinned or {}, pins, actions, flag, forgets
        self._widths = {name: {part: _widths(widths, part) for part in PARTS} for name, widths in choices.items()}
        self.decisions = [(name, part) for name in facts for part in PARTS if len(self._widths[name][part]) > 1]
        if not self.decisions:
            raise SpecError("there is nothing to decide: no layer has a choice of bits. Give several candidates.")
        self.has_flag = any(part == "activation" for _, part in self.decisions)
        self.embedding = embedding(list(facts.values()), first_action, *([1.0] if self.has_flag else []))
        self._rows = {name: row for row, name in enumerate(facts)}
        self._start = self.embedding.clone()
        self._check_budgets()
        self.reset()

    @property
    def state_size(self) -> int:
        """Length of an observation."""
        return self.embedding.shape[1]

    def reset(self) -> Tensor:
        """Start a walk; its first observation."""
        if self.forgets:
            self.embedding = self._start.clone()
        self._place = 0
        self.chosen = {name: LayerBits(widths["weight"][-1], widths["activation"][-1]) for name, widths in self._widths.items()}
        self.bits: Assignment = {}
        self.accuracy = float("nan")
        return self._observation()

    def step(self, action: float) -> tuple[Tensor, float, bool]:
        """Take one decision.

        Args:
            action: A number in [0, 1].

        Returns:
            The next observation (behind the last decision the one before it again), the reward, which is 0 but for the last
            decision, and whether the walk is done.
        """
        name, part = self.decisions[self._place]
        widths = self._widths[name][part]
        lowest = widths[0] or FLOAT_BITS
        bits = widths[action_to_bits(action, lowest, lowest + len(widths) - 1) - lowest]
        self.chosen[name] = replace(self.chosen[name], **{part: bits})
        if self._place == len(self.decisions) - 1:
            self.bits = self.within_budgets(self.chosen)
            self.accuracy = self.measure(self.bits)
            return self._observation(), reward(self.accuracy, self.original), True
        self._place += 1
        value = float(bits or FLOAT_BITS)
        self._remember(value / (widths[-1] or FLOAT_BITS) if self.actions == "share" else value, part)
        return self._observation(), 0.0, False

    def _remember(self, action: float, part: Part) -> None:
        name, coming = self.decisions[self._place]
        row = self.embedding[self._rows[name]]
        row[_FACTS] = action
        if self.has_flag:
            row[_FACTS + 1] = float((part if self.flag == "previous" else coming) == "weight")

    def _observation(self) -> Tensor:
        return self.embedding[self._rows[self.decisions[self._place][0]]].clone()

    def within_budgets(self, chosen: Assignment) -> Assignment:
        """The bits of a walk, lowered until no budget is exceeded.

        From the last layer to the first, over and over, the input and then the weight of a layer go to their next lower width, as long
        as a budget is exceeded. Pinned layers keep their bits.

        Raises:
            SpecError: All bits are at their lowest, and a budget is still exceeded. Source: section 3.2.
        """
        bits = {**chosen, **self.pinned} if self.pins == "always" else dict(chosen)
        while not self._fits(bits):
            before = dict(bits)
            for name in reversed(bits):
                for part in ("activation", "weight"):
                    bits[name] = self._lowered(name, bits[name], part)
                    bits |= self.pinned
                    if self._fits(bits):
                        return bits
            if bits == before:
                raise self._unreachable(bits)
        return bits

    def _lowered(self, name: str, bits: LayerBits, part: Part) -> LayerBits:
        lower = [width for width in self._widths[name][part] if (width or FLOAT_BITS) < (getattr(bits, part) or FLOAT_BITS)]
        return replace(bits, **{part: lower[-1]}) if lower else bits

    def _fits(self, bits: Assignment) -> bool:
        return all(cost.of(bits) <= limit * (1 + 1e-12) for cost, limit in self.budgets)

    def _check_budgets(self) -> None:
        lowest = {name: LayerBits(widths["weight"][0], widths["activation"][0]) for name, widths in self._widths.items()}
        if self.pins == "always":
            lowest |= self.pinned
        if not self._fits(lowest):
            raise self._unreachable(lowest)

    def _unreachable(self, bits: Assignment) -> SpecError:
        cost, limit = next((cost, limit) for cost, limit in self.budgets if not cost.of(bits) <= limit * (1 + 1e-12))
        pinned = f", {', '.join(self.pinned)} keeping their bits" if self.pinned else ""
        return SpecError(
            f"budget {cost.kind}: {limit:.6g} {cost.unit} cannot be met; at the lowest bits of all layers{pinned}, the network costs "
            f"{cost.of(bits):.6g} {cost.unit}. Allow more, or widths of fewer bits."
        )


def _widths(choices: Sequence[LayerBits], part: Part) -> tuple[int | None, ...]:
    """The widths of one part, from the lowest to the highest, float being the highest."""
    found = dict.fromkeys(getattr(bits, part) for bits in choices)
    return tuple(sorted(found, key=lambda width: width or FLOAT_BITS))
