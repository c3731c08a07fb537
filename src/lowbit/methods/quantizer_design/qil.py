"""QIL: the interval of magnitudes that is quantized, below which weights are pruned and above which they are clipped, is learned.

Paper: Jung, Son, Lee, Son, Han, Kwak, Hwang, Choi 2019, "Learning to Quantize Deep Networks by Optimizing Quantization Intervals With
    Task Loss", CVPR. Section 3.1 (Eq. 1-6, transformer and discretizer), section 3.2 (training).
Symbols: c -> center, d -> distance, gamma -> gamma, alpha and beta -> the affine map of the interval to [0, 1], q_D -> qmax.
Differs from the paper:
    - Intervals start at 0 and end at the least squared error, and ``gamma`` is 1 unless asked otherwise: the paper's initial values are
      not known.
    - Levels of weights are multiplied by a constant that keeps the size of the layer's output (``rescale``), which a following batch
      norm undoes.
    - Where a layer's input can be negative the interval lies on the values, around 0 at first, and activations become ``2 q - 1``.
    - Progressive training (5, 4, 3, 2 bits, each from the weights and intervals of the one before) is the option ``progressive``; left
      out, training starts at the bits asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.network import insert
from lowbit.network.bits import lower_bits
from lowbit.network.layers import WEIGHT
from lowbit.options import AtLeast, Interval
from lowbit.qat import OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.attach.output_ratio import output_ratio
from lowbit.qat.recipe import Role
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.ranges.observers import least_error_clip
from lowbit.registry import MethodInfo, register
from lowbit.spec import LayerBits
from lowbit.surrogates import pass_gradient, scale_gradient

SMALLEST_DISTANCE = 1e-4
_SMALLEST_BASE = 1e-12
Start = Literal["mse", "max", "histogram"]


def transform_magnitudes(magnitudes: Tensor, center: Tensor, distance: Tensor, gamma: Tensor | None = None) -> Tensor:
    """0 below ``center - distance``, 1 above ``center + distance``, ``((m - center + distance) / (2 distance))**gamma`` between.

    Differentiable in everything; the closed interval counts as inside. Source: Eq. 3.
    """
    inside = (magnitudes >= center - distance) & (magnitudes <= center + distance)
    base = (magnitudes - center) * (0.5 / distance) + 0.5
    if gamma is not None:
        base = torch.where(inside, base, torch.full_like(base, 0.5))
        # at the pruning point the slope of an exponent below 1 is infinite; it counts as 0 there
        has_slope = (base.detach() > _SMALLEST_BASE) | (gamma.detach() >= 1)
        base = pass_gradient(base * has_slope, base.detach().clamp(_SMALLEST_BASE, 1)) ** gamma
    return torch.where(inside, base.clamp(0, 1), (magnitudes > center).to(base.dtype))


def interval_of_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """Center and distance of ``[0, max|x|]``: nothing pruned, nothing clipped."""
    half = x.detach().float().abs().max() / 2
    half = torch.where(half > SMALLEST_DISTANCE, half, torch.ones_like(half))
    return half, half.clone()


def interval_of_least_error(x: Tensor, qmax: int) -> tuple[Tensor, Tensor]:
    """Center and distance of ``[0, clip]``, the clip where ``qmax`` steps give magnitudes the least squared error."""
    half = (least_error_clip(x, qmax) / 2).clamp(min=SMALLEST_DISTANCE)
    return half, half.clone()


def interval_of_histogram(x: Tensor, *, percentile: float = 90.0, bins: int = 10) -> tuple[Tensor, Tensor]:
    """Center and distance from the positive values below a percentile: pruned below the first bin's end, clipped above the last's."""
    values = x.detach().float().flatten()
    values = values[values > 0]
    if values.numel() < 2:
        return interval_of_maximum(x)
    values = values[values < _quantile(values, percentile / 100)]
    if values.numel() < 2 or float(values.max()) == float(values.min()):
        return interval_of_maximum(x)
    prune, clip = values.min() + (values.max() - values.min()) / bins, values.max()
    return (clip + prune) / 2, (clip - prune) / 2


def _quantile(values: Tensor, share: float) -> Tensor:
    """Linear between the two nearest values, of any number of values."""
    ordered = values.sort().values
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class IntervalQuantizer(GridQuantizer):
    """What both quantizers of QIL share: a learned interval ``[center - distance, center + distance]``.

    Args:
        bit_width: 1 to 8.
        qmin, qmax: Range of the codes.
        start: How the initial interval is found from the first data.
        scale_gradient: Multiply the gradients of center and distance by ``1 / sqrt(elements * qmax)``, elements of one sample where
            ``is_batched``.
        is_batched: Whether the first dimension counts samples (activations).

    All bit-widths share the interval, as in the paper's progressive training.
    """

    bit_widths: Sequence[int] = range(1, 9)

    def __init__(
        self, bit_width: int, qmin: int, qmax: int, *, start: Start = "mse", scale_gradient: bool = False, is_batched: bool = False
    ) -> None:
        super().__init__(bit_width, qmin, qmax)
        self.center, self.distance = (nn.Parameter(torch.tensor(float("nan"))) for _ in range(2))
        self.start, self.scales_gradient, self.is_batched = start, scale_gradient, is_batched

    def set_interval(self, center: Tensor, distance: Tensor) -> None:
        """Start at this interval."""
        self.center.data.copy_(center)
        self.distance.data.copy_(distance)

    def initialize(self, x: Tensor) -> None:
        if self.start == "mse":
            self.set_interval(*interval_of_least_error(x, self.qmax))
        else:
            self.set_interval(*(interval_of_maximum(x) if self.start == "max" else interval_of_histogram(x.abs())))

    def interval(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``(center, distance)`` for the values ``x``, differentiable."""
        if not self.scales_gradient:
            return self.center, self.distance
        elements = x.numel() / (x.shape[0] if self.is_batched and x.dim() else 1)
        factor = 1 / math.sqrt(max(elements, 1) * self.qmax)
        return scale_gradient(self.center, factor), scale_gradient(self.distance, factor)


class QilWeight(IntervalQuantizer):
    """Weights as ``round(sign(w) v q) / q`` times ``scale``, ``v = transform_magnitudes(|w|)`` and ``q = 2**(k - 1) - 1``.

    Backward: the surrogate's for the rounding, everything else by differentiation. Source: Eq. 3 and 5.

    Args:
        bit_width: 2 to 8.
        learns_gamma: Whether the exponent is learned; else it is 1.
        start: How the interval starts.
        scale_gradient: Multiply the gradients of center and distance by ``1 / sqrt(elements * qmax)``.
    """

    tables = ("scale",)
    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, learns_gamma: bool = False, start: Start = "mse", scale_gradient: bool = False) -> None:
        if bit_width < 2:
            raise SpecError(f"qil: weights need 2 bits or more (one of their levels is 0), got {bit_width}")
        super().__init__(bit_width, *self.code_range(bit_width), start=start, scale_gradient=scale_gradient)
        self.gamma = nn.Parameter(torch.ones(())) if learns_gamma else None
        self._set_table("scale", torch.ones(()))
        self.scale: Tensor

    def code_range(self, bit_width: int) -> tuple[int, int]:
        top = 2 ** (bit_width - 1) - 1
        return -top, top

    def set_scale(self, scale: Tensor) -> None:
        """Multiply the levels by ``scale``, a constant."""
        self._set_table("scale", scale.reshape(()))

    def transform(self, x: Tensor) -> Tensor:
        """The weights before rounding, in ``[-1, 1]``."""
        sign = torch.where(x.detach() < 0, -1.0, 1.0)
        v = transform_magnitudes(x * sign, *self.interval(x), self.gamma)
        return pass_gradient(sign * v, x.detach().sign() * v.detach())  # 0 has a gradient, or weights that start there would stay

    def prepare(self, x: Tensor) -> Tensor:
        return self.transform(x)

    def grid(self, x: Tensor) -> Grid:
        zero = torch.zeros_like(self.scale)
        return Grid(zero, torch.full_like(zero, 1 / self.qmax), self.scale / self.qmax, zero)

    @torch.no_grad()
    def project(self) -> None:
        """Keep ``0 < distance <= center`` and the exponent positive."""
        self.center.abs_().clamp_(min=SMALLEST_DISTANCE)
        self.distance.copy_(self.distance.abs().clamp(min=SMALLEST_DISTANCE).minimum(self.center))
        if self.gamma is not None:
            self.gamma.clamp_(min=0.1)


class QilActivation(IntervalQuantizer):
    """Activations as ``round(v q) / q``, ``v = clamp((x - center + distance) / (2 distance), 0, 1)`` and ``q = 2**k - 1``.

    With ``is_signed`` ``2 round(v q) / q - 1``. Backward: the surrogate's for the rounding, everything else by differentiation.
    Source: Eq. 4 and 6.
    """

    def __init__(self, bit_width: int, *, is_signed: bool = False, start: Start = "mse", scale_gradient: bool = False) -> None:
        super().__init__(bit_width, *self.code_range(bit_width), start=start, scale_gradient=scale_gradient, is_batched=True)
        self.is_signed = is_signed

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    def initialize(self, x: Tensor) -> None:
        if self.is_signed and self.start == "mse":
            self.set_interval(*interval_of_least_error(x, max(self.qmax // 2, 1)))
        else:
            super().initialize(x)
        if self.is_signed:  # from the end of the magnitudes to its mirror image
            self.set_interval(torch.zeros_like(self.center), self.center.detach() + self.distance.detach())

    def grid(self, x: Tensor) -> Grid:
        center, distance = self.interval(x)
        factor = 2 if self.is_signed else 1
        scale, zero_point = torch.full_like(center, factor / self.qmax), torch.full_like(center, self.qmax / 2 if self.is_signed else 0.0)
        return Grid(center - distance, 2 * distance / self.qmax, scale, zero_point)

    @torch.no_grad()
    def project(self) -> None:
        """Keep ``0 < distance``, and ``distance <= center`` where the input has no negative values."""
        self.distance.abs_().clamp_(min=SMALLEST_DISTANCE)
        if not self.is_signed:
            self.center.abs_().clamp_(min=SMALLEST_DISTANCE)
            self.distance.copy_(self.distance.minimum(self.center))


@register(
    MethodInfo(
        name="qil",
        title="Learning to Quantize Deep Networks by Optimizing Quantization Intervals With Task Loss",
        paper="Jung, Son, Lee, Son, Han, Kwak, Hwang, Choi, CVPR 2019",
        url="https://arxiv.org/abs/1808.05779",
        section="quantizer_design",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="equations",
        summary="learns which interval of magnitudes is quantized; below it is pruned, above it clipped",
        evidence="checked against two re-implementations",
        margin_points=60,
    )
)
@dataclass
class Qil(TrainingMethod):
    """Learned quantization intervals.

    Attributes:
        quantizer_learning_rate: Learning rate of centers and distances as a fraction of the weights': the paper's 0.01.
        gamma: ``fixed`` at 1, or ``learned``, the exponent of the weights' transform.
        start: How intervals start: ``mse`` (from 0 to where the squared error is least), ``max`` (from 0 to the largest magnitude) or
            ``histogram`` (the least and the largest tenth cut off).
        rescale: Multiply the weights' levels by a constant that keeps the size of the layer's output; needed without batch norms.
        scale_gradient: Multiply the gradients of centers and distances by ``1 / sqrt(elements * qmax)``, as MQBench does in place of
            the small learning rate; set ``quantizer_learning_rate`` to 1 with it.
        train_weights: Whether weights are trained with the intervals; else nothing but the intervals is.
        progressive: Bit-widths to train at first, one after another, each at least the layer's own, before the bits asked for; every stage
            has an equal share of the epochs and starts from the weights and intervals of the one before. The paper uses (5, 4, 3)
            for 2 bits.
    """

    ends = "float"

    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 0.01
    gamma: Literal["fixed", "learned"] = "fixed"
    start: Start = "mse"
    rescale: bool = True
    scale_gradient: bool = False
    train_weights: bool = True
    progressive: Annotated[tuple[int, ...], Interval(1, 8)] = ()

    def default_recipe(self) -> Recipe:
        """The low-bit stages on ImageNet."""
        return Recipe(90, 1024, OptimizerSpec(learning_rate=0.04, schedule="step", milestones=(2 / 9, 4 / 9, 2 / 3, 8 / 9)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return QilWeight(slot.bit_width, learns_gamma=self.gamma == "learned", start=self.start, scale_gradient=self.scale_gradient)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return QilActivation(slot.bit_width, is_signed=slot.is_signed, start=self.start, scale_gradient=self.scale_gradient)

    def attach(self, job: QatJob) -> None:
        job.insert(self.weight_quantizer, self.activation_quantizer)
        asked = [(quantizer, quantizer.bit_width) for _, quantizer in job.inserted if isinstance(quantizer, IntervalQuantizer)]
        for quantizer, bits in asked:  # intervals start where training starts
            quantizer.set_bit_width(max(bits, *self.progressive[:1], 1))
        job.initialize(self.initialize_layer)
        for quantizer, bits in asked:
            quantizer.set_bit_width(bits)

    def phases(self, recipe: Recipe) -> list[Phase]:
        (phase,) = super().phases(recipe)
        stages = [*(f"{bits} bits" for bits in self.progressive), phase.name]
        epochs, rest = divmod(recipe.epochs, len(stages))
        if self.progressive and not epochs:
            raise SpecError(f"qil: {len(stages)} stages need as many epochs, got {recipe.epochs}. Train longer, or shorten progressive.")
        return [replace(phase, name=name, epochs=epochs + rest * (name == phase.name)) for name in stages]

    def start_phase(self, run: TrainRun) -> None:
        if not self.progressive:
            return
        stage = (*self.progressive, 1)[run.phase_index]
        lower_bits(run.model, LayerBits(stage, stage))

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        found = super().optimizers(recipe)
        return found if self.train_weights else {"quantizers": found["quantizers"]}

    def initialize_layer(self, layer: nn.Module, x: Tensor | None, parameter: str = WEIGHT) -> None:
        super().initialize_layer(layer, x, parameter)
        weights = insert.weight_quantizer(layer, parameter)
        if self.rescale and isinstance(weights, QilWeight):
            weights.set_scale(output_ratio(layer, x, with_bias=False, parameter=parameter))
