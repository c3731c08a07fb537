"""BSQ: weights trained bit plane by bit plane; planes that a group lasso empties are dropped, so that each layer ends with bits of its own.

Paper: Yang, Duan, Chen, Li 2021, "BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network Quantization", ICLR, arXiv 2102.10462.
    Section 3.2 (group lasso, reweighed by memory), 3.3 (adjustments and finetuning); the planes themselves are ``quantizers.bit_planes``.
Authors' code: yanghr/BSQ.
Symbols: maxbit -> max_planes, Prun_Int -> interval.
Differs from the paper:
    - The forward pass clamps weights at the scale, as the authors' code does.
    - Bits count the sign: N planes are N + 1 bits, of which files hold at most 8. Layers of 8 bits start with eight planes as in the paper;
      evaluation, and finetuning where all eight are left, round to seven of them.
    - A layer grows by a plane up to those it started with, so that the bits asked for are the most that it ends with.
    - In evaluation activations have a running mean of the batches' ranges, so that an answer does not depend on the batch and runtimes can
      compute in integers; ``inference_range="batch"`` is the paper's.
    - Where a layer's input can be negative it is clipped at both ends. The clip replaces a ReLU in the paper; here the ReLU stays.
    - Convolutions of shortcuts and what the first layer reads are quantized too: a policy's rules can leave them in float.
    - Biases stay in float unless ``quantize_biases``; convolutions' biases are then treated as those of linear layers.
    - Finetuned weights are in their own units, and their gradients scaled so that SGD takes the authors' steps, who divide by the scale.
    - Planes and finetuned weights are clipped; the authors' code, by their names, clips further parameters as well.
    - Only empty planes are dropped. The authors' code can also drop nearly empty ones, which they do not use.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lowbit.methods.quantization_aware.dorefa import symmetric_codes
from lowbit.network import insert
from lowbit.network.bits import keep_bits
from lowbit.network.layers import WEIGHT
from lowbit.network.record import record_of
from lowbit.options import AtLeast, Interval
from lowbit.qat import OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.quantizers import Quantizer
from lowbit.quantizers.bit_planes import BitPlanes, size_of
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.registry import MethodInfo, register

PLANES, SCALES, RESTING = "weights.planes", "weights.scales", "resting"  # roles; weights behind planes rest
FINETUNING, MEASURE = "finetuning", "planes"
CLIP, FIRST_CLIP, SMALLEST_CLIP = 6.0, 10.0, 1e-4  # of ReLU6; where learned clips start, and where they end
LEARNED_BELOW = 4  # bits of activations
RANGE_DECAY = 0.9
PLANES_SHARE, INTERVAL_SHARE = 350 / 650, 100 / 350  # of the paper's epochs


class BitPlanesWithBias(BitPlanes):
    """``BitPlanes`` whose layer has a bias in planes of its own, with a scale of its own."""

    def __init__(self, bit_width: int, *, most: int | None = None) -> None:
        super().__init__(bit_width, most=most)
        self.bias = BitPlanes(bit_width, most=most)

    def scale_bias(self, bias: Tensor) -> Tensor:
        """The bias that its planes stand for."""
        return self.bias(bias)


class BsqActivation(GridQuantizer):
    """Activations clipped to ``[0, clip]``, or ``[-clip, clip]`` with ``is_signed``, on steps up to the largest of the batch.

    Forward: ``round(clip(x) n / S) S / n``, ``n = 2**k - 1`` (signed: ``2**(k - 1) - 1``), ``S = max|clip(x)|`` of the batch, and in
    evaluation, unless ``is_dynamic``, its running mean over the batches of training. Backward: 1 to ``x`` within the closed range, else 0, and
    to a learned clip the sum of the gradients where ``x >= clip``, less those where ``x <= -clip``; nothing through S.

    Args:
        bit_width: 1 to 8.
        learns_clip: Whether the clip is a parameter, which starts at 10; else it is 6, as ReLU6's.
        is_signed: Whether the range has a negative half.
        is_dynamic: Whether S is that of the batch in evaluation too.
    """

    tables = ("largest", "running")
    bit_widths = range(1, 9)

    def __init__(self, bit_width: int, *, learns_clip: bool, is_signed: bool = False, is_dynamic: bool = False) -> None:
        self.is_signed = is_signed
        super().__init__(bit_width, *self.code_range(bit_width))
        self.is_dynamic, self.learns_clip = is_dynamic, learns_clip
        self.largest: Tensor
        self.running: Tensor
        self.clip: Tensor
        if learns_clip:
            self.clip = nn.Parameter(torch.tensor(FIRST_CLIP))
        else:
            self.register_buffer("clip", torch.tensor(CLIP))

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return symmetric_codes(bit_width) if self.is_signed else (0, 2**bit_width - 1)

    def largest_of(self, x: Tensor) -> Tensor:
        """``max|clip(x)|``, shape ``()``."""
        clip = self.clip.detach()
        return x.detach().float().clamp(-clip if self.is_signed else torch.zeros_like(clip), clip).abs().amax()

    def initialize(self, x: Tensor) -> None:
        """The running mean starts with this batch."""
        for name in self.tables:
            self._set_table(name, self.largest_of(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._set_table("largest", self.largest_of(x))
            self._set_table("running", torch.lerp(self.largest, self.running, RANGE_DECAY))
        return super().forward(x)

    def grid(self, x: Tensor) -> Grid:
        largest = self.largest if self.training else self.largest_of(x) if self.is_dynamic else self.running
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        zero = torch.zeros_like(largest)
        ends = -self.clip if self.is_signed else zero, self.clip
        if self.is_signed and self.bit_width == 1:
            return Grid(-largest, 2 * largest, 2 * largest, torch.full_like(largest, 0.5), ends)
        return Grid(zero, largest / self.qmax, largest / self.qmax, zero, ends)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the clip positive."""
        self.clip.clamp_(min=SMALLEST_CLIP)


@register(
    MethodInfo(
        name="bsq",
        title="BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network Quantization",
        paper="Yang, Duan, Chen, Li, ICLR 2021",
        url="https://arxiv.org/abs/2102.10462",
        section="mixed_precision",
        axes=("weight_quantizer", "activation_quantizer", "assignment", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="trains bit planes of weights; a group lasso empties some, and each layer ends with its own bits, at most those asked for",
        evidence="planes, re-quantization, trimming, regularizer, activations, finetuning and training steps checked against the authors' code",
        margin_points=25,
    )
)
@dataclass
class Bsq(TrainingMethod):
    """Finds the bits of each layer by training its bit planes, then trains the network with these bits.

    Bits asked for are those that layers start with and the most that they end with; the policy that was found is in the network's record.

    Attributes:
        quantizer_weight_decay: L2 penalty on the activations' clips.
        alpha: Weight of the regularizer. The paper's are 3e-3 to 2e-2 for 350 epochs on CIFAR-10 at a rate of 0.1; how much it empties is
            proportional to the sum of the rates over all steps, so that short runs need far more.
        reweigh: Whether large layers, and those of many planes, are regularized more, by their share of all bits.
        interval: Epochs between adjustments. Default: 100 in 350, as in the paper.
        max_planes: Planes up to which a layer may grow where a code does not fit. Default: those that it starts with.
        finetune_share: Share of the epochs with the bits fixed.
        quantize_biases: Whether biases are in planes too. Files hold the values as float.
        inference_range: Range of activations in evaluation: ``running``: the mean over the batches of training; ``batch``: the batch's own.
    """

    ends = "same"
    allows_procedure = False  # planes are in the place of weights

    quantizer_weight_decay: Annotated[float, AtLeast(0)] = 1e-4
    alpha: Annotated[float, AtLeast(0)] = 5e-3
    reweigh: bool = True
    interval: Annotated[int | None, AtLeast(1)] = None
    max_planes: Annotated[int | None, Interval(1, 8)] = None
    finetune_share: Annotated[float, Interval(0, 1, closed="left")] = 1 - PLANES_SHARE
    quantize_biases: bool = False
    inference_range: Literal["running", "batch"] = "running"

    def default_recipe(self) -> Recipe:
        """ResNet-20 on CIFAR-10: 350 epochs of planes, 300 of finetuning at the rate that the first part ended with."""
        return Recipe(650, 128, OptimizerSpec(learning_rate=0.1, schedule="step", milestones=(250 / 650, 500 / 650, 600 / 650)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        has_bias = self.quantize_biases and slot.parameter == WEIGHT and isinstance(getattr(slot.layer, "bias", None), Tensor)
        return (BitPlanesWithBias if has_bias else BitPlanes)(slot.bit_width, most=self.max_planes)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return BsqActivation(
            slot.bit_width,
            learns_clip=slot.bit_width < LEARNED_BELOW,
            is_signed=slot.is_signed,
            is_dynamic=self.inference_range == "batch",
        )

    def attach(self, job: QatJob) -> None:
        shared: dict[tuple[int, int], Quantizer] = {}

        def planes(slot: Slot) -> Quantizer:
            """Layers that share a weight share its planes."""
            key = id(insert.float_weight(slot.layer, slot.parameter)), slot.bit_width
            if key not in shared or isinstance(shared[key], BitPlanesWithBias):
                shared[key] = self.weight_quantizer(slot)
            return shared[key]

        job.insert(planes, self.activation_quantizer)
        job.initialize(self.initialize_layer)

    def initialize_layer(self, layer: nn.Module, x: Tensor | None, parameter: str = WEIGHT) -> None:
        super().initialize_layer(layer, x, parameter)
        quantizer, bias = insert.weight_quantizer(layer, parameter), insert.float_bias(layer)
        if isinstance(quantizer, BitPlanesWithBias) and bias is not None:
            quantizer.bias.initialize(bias)

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        """Planes and scales learn as weights do, and weights once there are no planes in their place."""
        if isinstance(owner, BitPlanes):
            return RESTING if owner.is_frozen else SCALES if parameter is owner.scale else PLANES
        if isinstance(owner, ParametrizationList):
            parts = (part.quantizer for part in owner if isinstance(part, insert.WeightParametrization | insert.BiasParametrization))
            if any(isinstance(quantizer, BitPlanes) and quantizer.planes is not None for quantizer in parts):
                return RESTING
        return super().role(name, parameter, owner)

    def phases(self, recipe: Recipe) -> list[Phase]:
        """Those of the planes, an adjustment before each, and that of finetuning; the schedule goes on through all of them."""
        (whole,) = super().phases(recipe)
        tuned = min(round(recipe.epochs * self.finetune_share), recipe.epochs - 1)
        epochs = recipe.epochs - tuned
        interval = self.interval or max(round(epochs * INTERVAL_SHARE), 1)
        starts = [*range(0, epochs, interval), epochs, recipe.epochs]
        return [
            replace(
                whole,
                name=FINETUNING if start == epochs else f"planes {index}",
                epochs=end - start,
                span=(start / recipe.epochs, end / recipe.epochs),
            )
            for index, (start, end) in enumerate(pairwise(starts), start=1)
        ]

    def start_phase(self, run: TrainRun) -> None:
        """Begin with planes, or adjust them, once for each phase; before finetuning end with them."""
        for quantizer, held in held_by_planes(run.model):
            if quantizer.adjusted == 0 and quantizer.planes is None:
                quantizer.is_frozen = not held.original.requires_grad  # by the user
                if not quantizer.is_frozen:
                    quantizer.begin(held.original)
        trained = [q for q in run.quantizers() if isinstance(q, BitPlanes) and q.planes is not None]
        for quantizer in trained:
            if quantizer.adjusted <= run.phase_index:
                quantizer.adjust()
                quantizer.adjusted = run.phase_index + 1
        self.weigh(trained)
        if run.phase.name == FINETUNING and trained:
            self._finish(run.model)
        keep_bits(run.model)

    def weigh(self, quantizers: Sequence[BitPlanes]) -> None:
        """Set the factor of each layer's group lasso: ``alpha``, where ``reweigh`` times the layer's weights and planes over all weights."""
        weights, _ = size_of(quantizers)
        for quantizer in quantizers:
            quantizer.strength = self.alpha * (quantizer.weights * quantizer.count / weights if self.reweigh else 1)

    def _finish(self, model: nn.Module) -> None:
        """Put weights in the place of planes, and say in the record what was found."""
        found: dict[BitPlanes, nn.Parameter] = {}
        for quantizer, held in held_by_planes(model):
            if quantizer.planes is not None:
                found[quantizer] = nn.Parameter(quantizer.finish().to(held.original.dtype))
            if quantizer in found:
                held.original = found[quantizer]
        record = record_of(model)
        if record is not None:
            counts = {name: q.found for name, site in insert.quantized_weights(model).items() if isinstance(q := site.quantizer, BitPlanes)}
            record.measured[MEASURE] = dict(counts)
            bits = sum(weight.numel() * quantizer.found for quantizer, weight in found.items())
            mean = bits / sum(weight.numel() for weight in found.values())
            record.table.note(
                f"planes found: {mean:.2f} for each weight, without its sign; a larger alpha leaves fewer, a smaller one more"
            )
            for row in [record.table[name] for name, count in counts.items() if count == 0]:
                said = "every weight became 0: it has lost all of its planes, and is stored as zeros"
                record.table.add(replace(row, reason="; ".join(filter(None, (row.reason, said)))))

    def after_step(self, run: TrainRun) -> None:
        for quantizer, held in held_by_planes(run.model):
            if quantizer.planes is None and not quantizer.is_frozen:
                quantizer.keep_inside(held.original)


def held_by_planes(model: nn.Module) -> Iterator[tuple[BitPlanes, ParametrizationList]]:
    """Each weight, and bias, that has planes or had them: its quantizer, and what holds the float weight as ``original``."""
    for site in insert.quantized_weights(model).values():
        held: nn.ModuleDict = site.layer.parametrizations  # type: ignore[assignment]
        if isinstance(site.quantizer, BitPlanes):
            yield site.quantizer, cast(ParametrizationList, held[site.parameter])
        if isinstance(site.quantizer, BitPlanesWithBias):
            yield site.quantizer.bias, cast(ParametrizationList, held["bias"])
