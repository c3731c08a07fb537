"""Quantization Networks: a staircase of sigmoids that grows steeper during training and becomes a staircase of steps at inference.

Paper: Yang, Shen, Xing, Tian, Li, Deng, Huang, Hua 2019, "Quantization Networks", CVPR.
    Section 3.2 (Eq. 3-6, the soft and the hard function), section 3.3 (gradients, Eq. 8-10), section 3.4 (training).
Symbols: Y -> values, s_i -> gaps, b_i -> biases, o -> offset, alpha -> output_scale, beta -> input_scale, T -> temperature.
Differs from the paper:
    - Gradients are the true derivative, as in the authors' code (Eq. 8 and 10 print a different one). The derivative at temperature 1 for
      binary steps is the option ``unit_backward``; binary activations learn poorly with it in short runs.
    - The temperature rises geometrically over the run, so that it becomes as steep in a short one; ``temperature`` selects the paper's
      schedule.
    - Scales learn at a hundredth of the weights' rate; the paper uses one small rate for both.
    - Weights and activations are trained together, which takes one run instead of three; ``staged`` selects the paper's three phases.
    - Where a layer's input can be negative, activations have centred values, so that both signs have levels.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lowbit.network import insert
from lowbit.options import Above, AtLeast
from lowbit.qat import OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.quantizers import Quantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import count_below, mark_codebook
from lowbit.quantizers.qtensor import CodebookDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity

LARGEST_WEIGHT_TEMPERATURE = 2000.0
WEIGHT_SCALES, ACTIVATION_SCALES = "weight_scales", "activation_scales"  # separate roles where phases treat them differently
NEAR_ZERO = 0.05  # where ternary weights and binary activations step, in scaled units
SMALLEST_SCALE = 1e-6
_CLUSTER_STEPS, _CLUSTER_SAMPLES = 100, 20_000


class _Stairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, output_scale: Tensor, input_scale: Tensor, owner: StairsQuantizer) -> Tensor:
        y = _soft(x, input_scale, owner, owner.soft_temperature) - owner.offset
        ctx.save_for_backward(x, output_scale, input_scale, y)
        ctx.owner = owner
        return output_scale * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, output_scale, input_scale, y = ctx.saved_tensors
        owner: StairsQuantizer = ctx.owner
        if owner.is_weight:
            owner.soft_gradient = grad if owner.soft_gradient is None else owner.soft_gradient + grad
        inner, outer = owner.backward_temperatures()
        slope = outer * _slope(x, input_scale, owner, inner)
        return grad * output_scale * input_scale * slope, (grad * y).sum(), (grad * output_scale * x * slope).sum(), None


def _sigmoids(x: Tensor, input_scale: Tensor, owner: StairsQuantizer, temperature: float) -> list[Tensor]:
    scaled = input_scale * x
    return [torch.sigmoid((temperature * (scaled - bias)).clamp(-10, 10)) for bias in owner.biases]


def _soft(x: Tensor, input_scale: Tensor, owner: StairsQuantizer, temperature: float) -> Tensor:
    total = torch.zeros_like(x)
    for gap, sigmoid in zip(owner.gaps, _sigmoids(x, input_scale, owner, temperature), strict=True):
        total += gap * sigmoid
    return total


def _slope(x: Tensor, input_scale: Tensor, owner: StairsQuantizer, temperature: float) -> Tensor:
    total = torch.zeros_like(x)
    for gap, sigmoid in zip(owner.gaps, _sigmoids(x, input_scale, owner, temperature), strict=True):
        total += gap * sigmoid * (1 - sigmoid)
    return total


ValueSet = Literal["powers", "uniform", "positive"]


class StairsQuantizer(TableQuantizer):
    """Soft steps in training, hard steps in evaluation, between any values.

    Forward, in training: ``alpha (sum_i s_i sigmoid(clamp(T (beta x - b_i), -10, 10)) - o)``; in evaluation
    ``alpha (sum_i s_i [x > b_i / beta] - o)``. Backward, with ``D = T sum_i s_i sig_i (1 - sig_i)``: ``alpha beta D`` to ``x``,
    ``sum g alpha x D`` to beta, ``sum g y / alpha`` to alpha; the biases get none. Source: Eq. 3-10.

    Args:
        bit_width: 1 to 8.
        values: The target values, ascending; at most ``2**bit_width`` distinct levels.
        is_centred: Whether the output is centred (weights); else it starts at 0.
        unit_backward: Evaluate the derivative's sigmoids at temperature 1 (as the authors do for binary steps).
        is_weight: Whether the outer temperature stays in the backward pass where ``unit_backward``, and temperatures are capped.
        is_tight: The two steps beside the value 0 lie 0.05 from it in scaled units, as in the paper, instead of where clusters meet.
        value_set: Set from which ``target_values`` takes the values of other bit-widths; ``None``: this width is the only one. If
            given, ``unit_backward`` only applies at 1 bit.

    Each bit-width has its own values, steps and scales. At a new width the steps lie midway between the values, and the scales keep
    the output of the largest value.
    """

    tables = ("biases",)
    tables_by_width = ("biases", "output_scale", "input_scale")

    def __init__(
        self,
        bit_width: int,
        values: Sequence[float],
        *,
        is_centred: bool,
        unit_backward: bool = False,
        is_weight: bool = True,
        is_tight: bool = False,
        value_set: ValueSet | None = None,
    ) -> None:
        super().__init__(bit_width, Granularity.tensor())
        self.value_set: ValueSet | None = value_set
        self.is_centred, self.unit_backward, self.is_weight, self.is_tight = is_centred, unit_backward, is_weight, is_tight
        self._set_values(values)
        self.output_scale, self.input_scale = (nn.Parameter(torch.tensor(float("nan"))) for _ in range(2))
        self.register_buffer("temperature", torch.ones(()))
        self.temperature: Tensor
        self.biases: Tensor
        self.mode: Literal["soft", "hard", "float"] = "soft"  # what training computes; hard steps get no gradient
        self.is_scheduled = False  # whether a run has set the temperature
        self.soft_gradient: Tensor | None = None  # of weights: the loss's at the soft values, all backward passes of a step together

    @property
    def bit_widths(self) -> Sequence[int]:
        return (self.bit_width,) if self.value_set is None else range(1, 9)

    def resize(self) -> None:
        if self.value_set is not None:
            self._set_values(target_values(self.bit_width, self.value_set))

    def carry_over(self, old_bits: int) -> None:
        assert self.value_set is not None
        ratio = max(self.values) / max(target_values(old_bits, self.value_set))
        self.set_scales(self.output_scale.detach() / ratio, self.input_scale.detach() * ratio)
        self.set_biases(torch.tensor([(low + high) / 2 for low, high in itertools.pairwise(self.values)]))

    def _set_values(self, values: Sequence[float]) -> None:
        self.values: tuple[float, ...] = tuple(values)
        self.gaps = [high - low for low, high in itertools.pairwise(values)]
        self.offset = sum(self.gaps) / 2 if self.is_centred else 0.0

    @property
    def soft_temperature(self) -> float:
        """The effective temperature, which is capped for weights."""
        return min(float(self.temperature), LARGEST_WEIGHT_TEMPERATURE) if self.is_weight else float(self.temperature)

    def backward_temperatures(self) -> tuple[float, float]:
        """Temperatures inside and outside the sigmoids of the derivative."""
        if not self.unit_backward or (self.value_set is not None and self.bit_width > 1):
            return self.soft_temperature, self.soft_temperature
        return 1.0, self.soft_temperature if self.is_weight else 1.0

    def set_scales(self, output_scale: Tensor, input_scale: Tensor) -> None:
        """Fix alpha and beta."""
        self.output_scale.data.copy_(output_scale.reshape(()))
        self.input_scale.data.copy_(input_scale.reshape(()))

    def set_biases(self, biases: Tensor) -> None:
        """Fix where the steps lie, in scaled units, ascending."""
        self._set_table("biases", biases)

    def initialize(self, x: Tensor) -> None:
        """``beta = 5/4 max(Y) / max|x|``, ``alpha = 1 / beta``, and biases from the data where they are not given."""
        self.initialize_scales(x)
        binary = [0.0] * len(self.gaps)
        if self.bit_width == 1:
            biases = torch.tensor(binary if self.is_centred else [NEAR_ZERO])
        elif len(self.values) == 3:
            biases = torch.tensor([-NEAR_ZERO, NEAR_ZERO])
        else:
            biases = self.clustered(x)
            if self.is_tight and 0 in self.values[1:-1]:
                zero = self.values.index(0)
                biases[zero - 1], biases[zero] = -NEAR_ZERO, NEAR_ZERO
                biases = torch.cat([biases[:zero].clamp(max=-NEAR_ZERO), biases[zero:].clamp(min=NEAR_ZERO)])
        self.set_biases(biases.to(x.device))

    def clustered(self, x: Tensor) -> Tensor:
        """Biases in scaled units from clusters of ``x``."""
        self.initialize_scales(x)
        return cluster_biases(x.detach().float() * self.input_scale.detach(), len(self.values))

    def initialize_scales(self, x: Tensor) -> None:
        """``beta = 5/4 max(Y) / max|x|`` and ``alpha = 1 / beta``."""
        largest = x.detach().float().abs().max()
        input_scale = 1.25 * max(self.values) / torch.where(largest > 0, largest, torch.ones_like(largest))
        self.set_scales(1 / input_scale, input_scale)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and not self.is_weight:
            marked: Tensor = mark_codebook(x.float(), *self._table())
            return marked.to(x.dtype)
        # without gradients training is soft as well, as in checkpointing's first pass, but what looks at a new network sees hard steps
        if self.mode == "hard" or not self.training or not (self.is_scheduled or torch.is_grad_enabled()):
            return self.encode(x).decode().to(x.dtype)
        if self.mode == "float":
            return x
        y: Tensor = _Stairs.apply(x.float(), self.output_scale, self.input_scale, self)
        return y.to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        boundaries, levels = self._table()
        codes = count_below(x.detach().float(), boundaries)
        return QTensor(codes.to(torch.uint8), CodebookDecoder(levels.reshape(1, -1), self.granularity), self.bit_width)

    @torch.no_grad()
    def project(self) -> None:
        """Keep both scales positive."""
        self.output_scale.clamp_(min=SMALLEST_SCALE)
        self.input_scale.clamp_(min=SMALLEST_SCALE)

    def _table(self) -> tuple[Tensor, Tensor]:
        """Boundaries and levels; the top level is repeated up to ``2**bit_width``."""
        heights = [sum(self.gaps[:count]) - self.offset for count in range(len(self.gaps) + 1)]
        missing = 2**self.bit_width - len(heights)
        levels = self.biases.new_tensor(heights + heights[-1:] * missing) * self.output_scale.detach()
        biases = torch.cat([self.biases, self.biases.new_full((missing,), float("inf"))])
        return biases / self.input_scale.detach(), levels


def cluster_biases(scaled: Tensor, count: int) -> Tensor:
    """Where ``count`` clusters of the values meet, ``[count - 1]``: halfway between the largest of one and the least of the next.

    k-means in one dimension, from quantiles and from the values farthest apart, the better of both. Large tensors are thinned evenly.
    """
    ordered = scaled.detach().float().flatten().sort().values
    if len(ordered) > _CLUSTER_SAMPLES:
        ordered = ordered[torch.linspace(0, len(ordered) - 1, _CLUSTER_SAMPLES, device=ordered.device).long()]
    quantiles = ordered[((torch.arange(count, device=ordered.device) + 0.5) / count * len(ordered)).long()]
    farthest = ordered[:1]
    distance = torch.full_like(ordered, float("inf"))
    while len(farthest) < count:
        distance = torch.minimum(distance, (ordered - farthest[-1]).abs())
        farthest = torch.cat([farthest, ordered[distance.argmax()].reshape(1)])
    found = [_lloyd(ordered, start.sort().values) for start in (quantiles, farthest)]
    boundaries = min(found, key=lambda pair: pair[1])[0]
    return _gap_middles(ordered, boundaries)


def _lloyd(ordered: Tensor, centers: Tensor) -> tuple[Tensor, float]:
    """Boundaries between the centers after Lloyd's iteration, and the squared error."""
    for _ in range(_CLUSTER_STEPS):
        boundaries = (centers[1:] + centers[:-1]) / 2
        index = torch.bucketize(ordered, boundaries)
        counts = torch.bincount(index, minlength=len(centers))
        sums = torch.bincount(index, weights=ordered.double(), minlength=len(centers)).float()
        moved = torch.where(counts > 0, sums / counts.clamp(min=1), centers)
        if torch.equal(moved, centers):
            break
        centers = moved
    boundaries = (centers[1:] + centers[:-1]) / 2
    return boundaries, float((ordered - centers[torch.bucketize(ordered, boundaries)]).square().sum())


def _gap_middles(ordered: Tensor, boundaries: Tensor) -> Tensor:
    """Halfway between the neighbours of each boundary among the values."""
    above = torch.searchsorted(ordered, boundaries)
    inside = (above > 0) & (above < len(ordered))
    above = above.clamp(1, max(len(ordered) - 1, 1))
    return torch.where(inside, (ordered[above - 1] + ordered[above.clamp(max=len(ordered) - 1)]) / 2, boundaries)


def target_values(bit_width: int, value_set: ValueSet) -> tuple[float, ...]:
    """The paper's sets: +-1, ternary, +-1 +-2 +-4 at 3 bits where ``powers`` are asked for, else all whole numbers; ``positive``: from 0."""
    if value_set == "positive":
        return tuple(range(2**bit_width))
    if bit_width == 1:
        return (-1, 1)
    if bit_width == 3 and value_set == "powers":
        return (-4, -2, -1, 0, 1, 2, 4)
    top = 2 ** (bit_width - 1) - 1
    return tuple(range(-top, top + 1))


@register(
    MethodInfo(
        name="quantization_networks",
        title="Quantization Networks",
        paper="Yang, Shen, Xing, Tian, Li, Deng, Huang, Hua, CVPR 2019",
        url="https://arxiv.org/abs/1911.09464",
        section="gradients",
        axes=("weight_quantizer", "activation_quantizer", "surrogate", "procedure"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="a staircase of sigmoids that grows steeper with the epochs",
        evidence="checked against the authors' code",
        margin_points=25,
    )
)
@dataclass
class QuantizationNetworks(TrainingMethod):
    """Soft staircases.

    Attributes:
        temperature: The paper's schedule: ``temperature (e + 1)`` in epoch ``e``, counted from 0; the paper uses 5 or 10 and 55 epochs.
            ``none``: a geometric rise over the steps, which suits short runs.
        first_temperature: Temperature at the first step, if ``temperature`` is none.
        final_temperature: Temperature at the last step, if ``temperature`` is none.
        soft_clip_norm: Largest norm of all gradients together, those of weights taken at the soft values. The paper uses 5 for weights
            and 20 with activations at a learning rate of 0.001; 1 limits a step at 0.02 as 20 does there. ``none``: no limit.
        three_bits: Values of 3-bit weights: ``powers`` (+-1, +-2, +-4) or ``uniform`` (up to +-3).
        tight_zero: Whether only scaled weights within 0.05 of 0 become 0, as in the paper, instead of those in the cluster around it.
        staged: If weights and activations are both quantized, train weights with float activations, then activations with hard
            weights, then both, as in the paper; each phase takes a third of the epochs and restarts the temperatures.
        joint_learning_rate: With ``staged``, learning rate of all but the activations' scales in the last phase, as a fraction.
        unit_backward: Evaluate the derivative of binary steps at temperature 1, as the authors do.
    """

    ends = "float"

    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 0.01
    temperature: Annotated[float | None, Above(0)] = None
    first_temperature: Annotated[float, Above(0)] = 10.0
    final_temperature: Annotated[float, Above(0)] = 200.0
    soft_clip_norm: Annotated[float | None, Above(0)] = 1.0
    three_bits: Literal["powers", "uniform"] = "powers"
    tight_zero: bool = False
    staged: bool = False
    joint_learning_rate: Annotated[float, AtLeast(0)] = 0.1
    unit_backward: bool = False

    _in_stages = False  # whether ``staged`` applies to the network

    def default_recipe(self) -> Recipe:
        """ResNets on ImageNet."""
        return Recipe(55, 256, OptimizerSpec(learning_rate=1e-3, schedule="step", milestones=(30 / 55, 45 / 55)))

    def attach(self, job: QatJob) -> None:
        super().attach(job)
        kinds = {module.is_weight for module in job.model.modules() if isinstance(module, StairsQuantizer)}
        self._in_stages = self.staged and len(kinds) == 2

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        values = target_values(slot.bit_width, self.three_bits)
        return StairsQuantizer(
            slot.bit_width, values, is_centred=True, unit_backward=self.unit_backward, is_tight=self.tight_zero, value_set=self.three_bits
        )

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        value_set: ValueSet = "uniform" if slot.is_signed else "positive"
        return StairsQuantizer(
            slot.bit_width,
            target_values(slot.bit_width, value_set),
            is_centred=slot.is_signed,
            unit_backward=self.unit_backward,
            is_weight=False,
            value_set=value_set,
        )

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        if self._in_stages and isinstance(owner, StairsQuantizer):
            return WEIGHT_SCALES if owner.is_weight else ACTIVATION_SCALES
        return super().role(name, parameter, owner)

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        found = super().optimizers(recipe)
        return {**found, **dict.fromkeys((WEIGHT_SCALES, ACTIVATION_SCALES), found["quantizers"])} if self._in_stages else found

    def phases(self, recipe: Recipe) -> list[Phase]:
        phase = super().phases(recipe)[0]
        third = recipe.epochs // 3
        if not self._in_stages or not third:
            return [phase]
        every = phase.optimizers

        def without(*frozen: Role) -> dict[Role, OptimizerSpec]:
            return {role: spec for role, spec in every.items() if role not in frozen}

        slower = {role: replace(spec, learning_rate=spec.learning_rate * self.joint_learning_rate) for role, spec in every.items()}
        return [
            replace(phase, name="weights", epochs=third, optimizers=without(ACTIVATION_SCALES)),
            replace(phase, name="activations", epochs=third, optimizers=without("weights", WEIGHT_SCALES)),
            replace(
                phase,
                name="both",
                epochs=recipe.epochs - 2 * third,
                optimizers={**slower, ACTIVATION_SCALES: every[ACTIVATION_SCALES]},
            ),
        ]

    def start_phase(self, run: TrainRun) -> None:
        for quantizer in self._stairs(run):
            quantizer.mode = "soft"
            if run.phase.name == "weights" and not quantizer.is_weight:
                quantizer.mode = "float"
            if run.phase.name == "activations" and quantizer.is_weight:
                quantizer.mode = "hard"

    def before_step(self, run: TrainRun) -> None:
        if self.temperature is not None:
            temperature = self.temperature * (run.epoch + 1)
        else:
            temperature = self.first_temperature * (self.final_temperature / self.first_temperature) ** run.phase_progress
        for quantizer in self._stairs(run):
            quantizer.temperature.fill_(temperature)
            quantizer.is_scheduled = True
            quantizer.soft_gradient = None

    @torch.no_grad()
    def after_backward(self, run: TrainRun) -> None:
        """Clip before the chain rule: as it is linear, gradients behind it can be multiplied by the same factor afterwards."""
        weights = [quantizer for quantizer in self._stairs(run) if quantizer.is_weight]
        gradients = [quantizer.soft_gradient for quantizer in weights]
        for quantizer in weights:
            quantizer.soft_gradient = None
        if self.soft_clip_norm is None:
            return
        behind = {id(parameter) for quantizer in weights for parameter in quantizer.parameters()}
        for site in insert.quantized_weights(run.model).values():
            if isinstance(site.quantizer, StairsQuantizer):
                behind.add(id(site.original))
        parameters = list(run.model.parameters())
        gradients += [parameter.grad for parameter in parameters if id(parameter) not in behind]
        squares = [gradient.square().sum() for gradient in gradients if gradient is not None]
        if not squares:
            return
        total = torch.stack(squares).sum()
        run.reduce_mean(total)  # soft gradients belong to this process's samples; all processes must clip alike
        norm = float(total.sqrt())
        if norm > self.soft_clip_norm:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(self.soft_clip_norm / (norm + 1e-6))

    @staticmethod
    def _stairs(run: TrainRun) -> list[StairsQuantizer]:
        return [quantizer for quantizer in run.quantizers() if isinstance(quantizer, StairsQuantizer)]
