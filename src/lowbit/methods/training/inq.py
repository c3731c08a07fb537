"""INQ: weights become powers of two share by share, and those that are still float repair the damage.

Paper: Zhou, Yao, Guo, Xu, Chen, ICLR 2017, "Incremental Network Quantization: Towards Lossless CNNs with Low-Precision Weights".
    Section 2.1 levels (Eq. 1-4), section 2.2 partition, section 2.3 masked updates (Eq. 8), Algorithm 1.
Authors' code: AojunZhou/Incremental-Network-Quantization.
Symbols: n1 and n2 -> largest and smallest exponent, sigma -> portions, T -> trainable.
Differs from the paper:
    - Magnitudes of 1.5 * 2**n1 and more become 2**n1, as in the authors' code; the paper's rule would make them 0.
    - A magnitude midway between two levels goes to the smaller one, as in the authors' code; in the paper to the larger one.
    - After each step the optimizer's running averages of frozen weights are set to 0, so that one that is free again starts without momentum.
    - Between portions the network is evaluated with all weights quantized.
Portions of 3 and 4 bits are from memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.network import insert
from lowbit.network.insert import WeightSite
from lowbit.options import Interval
from lowbit.qat import OptimizerSpec, Phase, Procedure, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.procedure import split_epochs
from lowbit.quantizers import Quantizer
from lowbit.quantizers.power_of_two import PowerOfTwoQuantizer
from lowbit.quantizers.qtensor import QTensor
from lowbit.registry import MethodInfo, register

Partition = Literal["quantile", "sorted_index", "random"]
PORTIONS = {
    2: (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.975, 1.0),
    3: (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0),
    4: (0.3, 0.5, 0.8, 0.9, 0.95, 1.0),
    5: (0.5, 0.75, 0.875, 1.0),
}
LAST_SHARE = 0.25  # epochs after everything is frozen, over those of another portion: only norms and biases still move


class InqQuantizer(PowerOfTwoQuantizer):
    """Zero and ``+-2**n2 ... +-2**n1``: ``2**(b - 2)`` magnitudes for ``b`` bits, the largest fitted to the weights.

    ``n1 = floor(log2(4/3 max|w|))``, ``n2 = n1 + 1 - 2**(b - 2)``. Forward: the nearest level, at most ``2**n1``. Backward: 1.

    Args:
        bit_width: 2 (ternary) to 8.

    Source: section 2.1, Eq. 1-4.
    """

    def resize(self) -> None:
        self.magnitudes = 2 ** (self.bit_width - 2)

    def initialize(self, x: Tensor) -> None:
        """``scale = 2**n1``, in float64, as ``log2`` may be off by a rounding beside whole numbers."""
        largest = self.granularity.flatten(x.detach().double().abs()).amax(1)
        exponents = torch.floor(torch.log2(torch.where(largest > 0, largest, 0.75) * 4 / 3))
        self.set_exponent(exponents.reshape(self.granularity.scale_shape(x)))

    def set_exponent(self, largest: Tensor) -> None:
        """Let ``2**largest`` be the largest magnitude."""
        self._set_table("scale", torch.exp2(largest))

    @property
    def exponents(self) -> tuple[Tensor, Tensor]:
        """``n1`` and ``n2``, each of the scale's shape, int64."""
        largest = torch.log2(self.scale.double()).round().long()
        return largest, largest + 1 - self.magnitudes


class FrozenShare(Quantizer):
    """Another quantizer for weights of which some are frozen at their levels while the others are still float.

    Forward in training: the weights themselves, as those that are frozen lie on their levels; in evaluation: ``quantizer``. Backward in
    training: 1.

    Args:
        quantizer: What quantizes. It must not change what it has quantized.
        shape: Shape of the weights.

    Attributes:
        trainable: Which weights are still float, a bool buffer; all at first.
    """

    def __init__(self, quantizer: Quantizer, shape: Sequence[int]) -> None:
        super().__init__(quantizer.bit_width, quantizer.granularity)
        self.quantizer = quantizer
        self.register_buffer("trainable", torch.ones(tuple(shape), dtype=torch.bool))
        self.trainable: Tensor

    @property
    def bit_widths(self) -> Sequence[int]:
        return self.quantizer.bit_widths

    def has_grid_for(self, bits: int) -> bool:
        return self.quantizer.has_grid_for(bits)

    def _change_bit_width(self, bits: int, values: Tensor | None) -> None:
        self.quantizer.set_bit_width(bits, values)
        super()._change_bit_width(bits, values)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else self.quantizer(x)

    def encode(self, x: Tensor) -> QTensor:
        return self.quantizer.encode(x)

    def initialize(self, x: Tensor) -> None:
        self.quantizer.initialize(x)

    def check_stable(self, weight: Tensor) -> None:
        """SpecError where quantizing ``weight`` twice gives other values than once, so that they cannot stay as they are."""
        levels = self._levels(weight)
        if not torch.equal(levels, self._levels(levels)):
            raise SpecError(
                f"{type(self.quantizer).__name__} changes values that it has quantized itself, so weights cannot be frozen share by share at its "
                "levels. Choose a method whose levels stay where they are, or leave procedure 'inq' out."
            )

    @torch.no_grad()
    def freeze(self, weight: Tensor, trainable: Tensor) -> None:
        """Put the entries of ``weight`` that are not ``trainable`` on their levels, in place."""
        self.trainable.copy_(trainable)
        weight.copy_(torch.where(self.trainable, weight, self._levels(weight)))

    def _levels(self, x: Tensor) -> Tensor:
        return self.quantizer.encode(x.detach()).decode().to(x.dtype)


def still_trainable(
    weight: Tensor, portion: float, partition: Partition = "quantile", *, before: float = 0.0, free: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:  # fmt: skip
    """Which weights stay float when ``portion`` of them is frozen, the largest magnitudes first.

    ``|w| < threshold``, the threshold being the quantile of ``|w|`` at ``1 - portion``.

    Args:
        weight: The weights of a layer.
        portion: Share of the weights to freeze, those that are frozen already included; 1 freezes all.
        partition: ``quantile``: linearly interpolated; ``sorted_index``: the element ``int(count (1 - portion)) - 1`` of the sorted magnitudes,
            as in the authors' code; ``random``: each weight that is free is frozen with the probability ``(portion - before) / (1 - before)``.
        before, free: The portion that is frozen already, and which weights are not; for ``random``.
        generator: For ``random``.

    Returns:
        Bool tensor shaped like ``weight``. Source: section 2.2.
    """
    if portion >= 1:
        return torch.zeros_like(weight, dtype=torch.bool)
    if partition == "random":
        drawn = torch.rand(weight.shape, generator=generator).to(weight.device) >= (portion - before) / (1 - before)
        return drawn if free is None else drawn & free
    magnitudes = weight.detach().abs()
    if partition == "sorted_index":
        threshold = magnitudes.flatten().sort().values[int(weight.numel() * (1 - portion)) - 1]
    else:
        threshold = torch.as_tensor(np.quantile(magnitudes.cpu().numpy(), 1 - portion), dtype=weight.dtype, device=weight.device)
    return magnitudes < threshold


@dataclass
class InqQuantizers(TrainingMethod):
    """Powers of two for weights, a layer sharing its largest magnitude."""

    ends = "same"

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return InqQuantizer(slot.bit_width)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        raise SpecError("inq leaves inputs in float. Pass activation_bits=None.")


@register(
    MethodInfo(
        name="inq",
        title="Incremental Network Quantization: Towards Lossless CNNs with Low-Precision Weights",
        paper="Zhou, Yao, Guo, Xu, Chen, ICLR 2017",
        url="https://arxiv.org/abs/1702.03044",
        section="training",
        axes=("weight_quantizer", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=None,
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="powers of two, frozen share by share from the largest weights on, while the others repair the damage",
        evidence="levels, partitions, masked steps and whole schedules checked against another implementation, levels against the authors' code",
        margin_points=5,
    )
)
@dataclass
class Inq(Procedure):
    """Freezes weights at their levels share by share and trains the rest in between.

    Attributes:
        portions: Shares of each layer's weights that are frozen, one after the other, the last one 1. Default: the paper's for the
            number of bits.
        partition: Which weights are frozen first: ``quantile``: the largest; ``sorted_index``: the same as the authors count them; ``random``.
        never_release: Keep frozen what is frozen. Else each portion is counted anew, and a weight can become free where others have grown.
        restart_schedule: Start optimizer and learning rates' schedule again with each portion; else one goes through all of them.
    """

    quantizers = InqQuantizers

    portions: Annotated[tuple[float, ...] | None, Interval(0, 1)] = None
    partition: Partition = "quantile"
    never_release: bool = False
    restart_schedule: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.portions
        if given is not None and (not given or given[-1] != 1 or any(b <= a for a, b in zip((0.0, *given), given, strict=False))):
            raise SpecError(f"inq: portions must rise from above 0 to 1, for example 0.5,0.75,0.875,1; got {', '.join(map(str, given))}")
        self._bits = max(PORTIONS)
        self._before: dict[int, Tensor] = {}

    def default_recipe(self) -> Recipe:
        """Four epochs for each of four portions on ImageNet, as another implementation has it."""
        return Recipe(16, 256, OptimizerSpec(learning_rate=1e-3, weight_decay=5e-4, schedule="step", milestones=(0.5,), gamma=0.1))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return FrozenShare(super().weight_quantizer(slot), insert.float_weight(slot.layer, slot.parameter).shape)

    def attach(self, job: QatJob) -> None:
        asked = {name: job.bits(name) for name in job.weights}
        if both := [name for name, bits in asked.items() if bits.activation is not None]:
            raise SpecError(
                f"layer {both[0]!r}: 'inq' freezes weights, and inputs are new with each sample, so that none of them can be frozen. Pass "
                "activation_bits=None."
            )
        job.insert(self.weight_quantizer, self.activation_quantizer)
        job.initialize(self.initialize_layer)
        exponents = []
        for site in job.weights.values():
            if isinstance(site.quantizer, FrozenShare):
                site.quantizer.check_stable(site.original)
                if isinstance(site.quantizer.quantizer, InqQuantizer):
                    exponents.append(site.quantizer.quantizer.exponents)
        if exponents:
            low, high = min(int(n2.min()) for _, n2 in exponents), max(int(n1.max()) for n1, _ in exponents)
            job.table.note(f"weights become 0 and powers of two from 2**{low} to 2**{high}")
        self._bits = min((bits.weight for bits in asked.values() if bits.weight is not None), default=self._bits)

    @property
    def shares(self) -> dict[str, float]:
        """Relative lengths of the portions by their names."""
        found = self.portions or PORTIONS[min(max(self._bits, min(PORTIONS)), max(PORTIONS))]
        return {f"{100 * portion:g} % frozen": LAST_SHARE if portion == 1 and len(found) > 1 else 1.0 for portion in found}

    def phases(self, recipe: Recipe) -> list[Phase]:
        if self.restart_schedule:
            return self.split(recipe, self.shares, restart=True)
        return super().phases(recipe)

    def start_epoch(self, run: TrainRun) -> None:
        """Freeze the next portion where its time has come."""
        super().start_epoch(run)
        counts = split_epochs(run.epochs, tuple(self.shares.values()))
        starts = [sum(counts[:index]) for index in range(len(counts))]
        portions = [float(name.split()[0]) / 100 for name in self.shares]
        begun = [index for index, (start, count) in enumerate(zip(starts, counts, strict=True)) if count and start == run.epochs_done]
        if begun:
            earlier = [portions[index] for index in range(begun[0]) if counts[index]]
            self.freeze(run, portions[begun[0]], before=earlier[-1] if earlier else 0.0)

    def freeze(self, run: TrainRun, portion: float, *, before: float = 0.0) -> None:
        """Freeze ``portion`` of each layer's weights, of which ``before`` is frozen already."""
        for site, quantizer in _shares(run):
            weight = site.original
            trainable = still_trainable(
                weight, portion, self.partition, before=before, free=quantizer.trainable, generator=run.generator
            )  # fmt: skip
            quantizer.freeze(weight, trainable & quantizer.trainable if self.never_release else trainable)

    def after_backward(self, run: TrainRun) -> None:
        """Keep the weights that the optimizer starts from."""
        super().after_backward(run)
        self._before = {id(site.original): site.original.detach().clone() for site, _ in _shares(run)}

    @torch.no_grad()
    def after_step(self, run: TrainRun) -> None:
        """Undo whatever the optimizer did to frozen weights, decay and momentum included."""
        states = {id(parameter): state for optimizer in run.optimizers for parameter, state in optimizer.state.items()}
        for site, quantizer in _shares(run):
            weight, trainable = site.original, quantizer.trainable
            weight.copy_(torch.where(trainable, weight, self._before.pop(id(weight), weight)))
            for value in states.get(id(weight), {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:
                    value.mul_(trainable)
        super().after_step(run)


def _shares(run: TrainRun) -> Iterator[tuple[WeightSite, FrozenShare]]:
    return ((site, site.quantizer) for site in run.trained_weights() if isinstance(site.quantizer, FrozenShare))
