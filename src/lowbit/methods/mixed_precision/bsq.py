"""BSQ: weights trained bit plane by bit plane; planes that a group lasso empties are dropped, so that each layer ends with bits of its own.

Paper: Yang, Duan, Chen, Li 2021, "BSQ: Exploring Bit-Level Sparsity for Mixed-Precision Neural Network Quantization", ICLR, arXiv 2102.10462.
    Section 3.1 (bit planes and their gradients), 3.2 (group lasso, reweighed by memory), 3.3 (re-quantization, adjustment, finetuning).
Authors' code: yanghr/BSQ.
Symbols: p and n -> planes[0] and planes[1], s -> scale, N -> count, B_GL -> group_lasso, maxbit -> max_planes, Prun_Int -> interval.
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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lowbit.errors import SpecError
from lowbit.methods.quantization_aware.dorefa import symmetric_codes
from lowbit.network import insert
from lowbit.network.bits import keep_bits
from lowbit.network.layers import WEIGHT
from lowbit.network.record import record_of
from lowbit.options import Above, AtLeast, Interval
from lowbit.qat import OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.qtensor import AffineDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import straight_through
from lowbit.surrogates.base import scale_gradient

PLANES, SCALES, RESTING = "weights.planes", "weights.scales", "resting"  # roles; weights behind planes rest
FINETUNING, MEASURE = "finetuning", "planes"
CLIP, FIRST_CLIP, SMALLEST_CLIP = 6.0, 10.0, 1e-4  # of ReLU6; where learned clips start, and where they end
LEARNED_BELOW = 4  # bits of activations
RANGE_DECAY = 0.9
PLANES_SHARE, INTERVAL_SHARE = 350 / 650, 100 / 350  # of the paper's epochs
_EPSILON = 1e-8


def planes_of(codes: Tensor, count: int) -> Tensor:
    """The planes of integer codes: the magnitude's bits, the most significant first, in ``planes[0]`` where positive, else in ``planes[1]``.

    Args:
        codes: Whole numbers from ``-(2**count - 1)`` to ``2**count - 1``, any shape.
        count: Number of planes.

    Returns:
        Zeros and ones, float32 ``[2, *codes.shape, count]``. Source: section 3.1.

    >>> planes_of(torch.tensor([5.0, -2.0]), 3).tolist()
    [[[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]], [[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]
    """
    bits = (codes.abs().long().unsqueeze(-1) >> torch.arange(count - 1, -1, -1, device=codes.device)) & 1
    is_positive = codes.unsqueeze(-1) > 0
    return torch.stack([bits * is_positive, bits * ~is_positive]).float()


def value_of(planes: Tensor) -> Tensor:
    """``sum_b 2**b (p_b - n_b)``, ``planes`` without its first and last dimension."""
    powers = 2 ** torch.arange(planes.shape[-1] - 1, -1, -1, device=planes.device)
    return ((planes[0] - planes[1]) * powers).sum(-1)


def to_planes(weight: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The planes of ``round(w (2**count - 1) / scale)``, and ``scale = max|w|``; 1 for a weight of zeros. Source: section 3.1."""
    largest = weight.abs().max()
    scale = torch.where(largest > 0, largest, torch.ones_like(largest))
    return planes_of((weight * (2**count - 1) / scale).round(), count), scale


def requantize(planes: Tensor, scale: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Trained planes as zeros and ones again, and their scale.

    Where a code does not fit, there is one more plane, ``scale`` growing with the largest code, as long as there are fewer than ``most``;
    else it saturates. Source: section 3.3.
    """
    codes, count = value_of(planes).round(), planes.shape[-1]
    top = 2**count - 1
    if count < most and bool((codes.abs() > top).any()):
        count, scale = count + 1, scale * (2 ** (count + 1) - 1) / top
    return planes_of(codes.clamp(1 - 2**count, 2**count - 1), count), scale


def trim(planes: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """``planes`` of zeros and ones without the empty ones at either end, at least one, and the scale that leaves the weights as they are.

    Source: section 3.3.
    """
    count = planes.shape[-1]
    used = planes.flatten(0, -2).any(0).nonzero().flatten().tolist() or [0]
    kept = planes[..., used[0] : used[-1] + 1]
    return kept, scale * 2 ** (count - 1 - used[-1] if planes.any() else 0) * (2 ** kept.shape[-1] - 1) / (2**count - 1)


def group_lasso(planes: Tensor) -> Tensor:
    """``sum_b sqrt(1e-8 + sum (p_b**2 + n_b**2))``, shape ``()``. Source: section 3.2."""
    return (planes.flatten(0, -2).square().sum(0) + _EPSILON).sqrt().sum()


class BitPlanes(Quantizer):
    """Weights as trained bit planes; after ``finish`` ordinary weights on the grid that was found.

    Forward: ``scale r / n`` with ``r = round(clamp(v n, -n, n))``, ``n = 2**count - 1``, where ``v = value_of(planes) / n``, whatever the
    weight that is passed, and after ``finish`` ``v = x / unit``. Backward: 1 for rounding and clamping, so that with the gradient ``g`` plane
    b gets ``+-g scale 2**b / n``, the scale ``sum g r / n``, and the weight ``g scale unit``. A layer of zeros stays one.

    Args:
        bit_width: 2 to 8, the sign counted: that of one plane to seven, 8 at first that of eight.
        most: Planes up to which ``adjust`` lets it grow. Default: those at first.

    Attributes:
        planes: ``[2, *weight.shape, count]``, the most significant first; ``None`` after ``finish``.
        scale: What the largest code stands for, shape ``()``.
        count: Number of planes, also after ``finish``.
        is_zero: Whether the last adjustment left nothing but zeros.
        adjusted: The phase before which ``adjust`` has been called.
        unit: The scale when it was finished.
        is_frozen: Whether the weight is not to change.
        strength: Factor of ``regularizer`` in the loss.
        is_reweighed: Whether ``regularizer`` counts what the layer takes.
    """

    def __init__(self, bit_width: int, *, most: int | None = None) -> None:
        super().__init__(bit_width, Granularity.tensor())
        if bit_width < 2:
            raise SpecError(f"bsq: bit_width must be 2 to 8, got {bit_width}: 1 bit holds the sign and no plane.")
        self.scale = nn.Parameter(torch.tensor(float("nan")))  # before the planes, which change their shape: so parameters keep their order
        self.planes: nn.Parameter | None
        self.register_parameter("planes", None)
        self.count = 8 if bit_width == 8 else bit_width - 1
        self.most = self.count if most is None else most
        self.is_zero, self.adjusted, self.unit = False, 0, 1.0
        self.is_frozen, self.strength, self.is_reweighed = False, 0.0, True
        self.register_load_state_dict_pre_hook(_take_saved_planes)

    @property
    def top(self) -> int:
        """The largest code that is stored."""
        return 2 ** (self.bit_width - 1) - 1

    @property
    def found(self) -> int:
        """Planes that are in use: ``count``, or 0 for a layer of zeros."""
        return 0 if self.is_zero else self.count

    def set_planes(self, planes: Tensor, scale: Tensor) -> None:
        """Let these be the weights, as new parameters."""
        self.planes, self.scale = nn.Parameter(planes.detach().clone()), nn.Parameter(scale.detach().clone().reshape(()))
        self._set_count(planes.shape[-1])

    def _set_count(self, count: int) -> None:
        self.count, self.bit_width = count, min(count + 1, 8)

    def initialize(self, x: Tensor) -> None:
        """The planes of ``x``."""
        self.set_planes(*to_planes(x.detach().float(), self.count))

    def normalized(self, x: Tensor) -> Tensor:
        """``v``, differentiable: the weights before rounding in units of the scale."""
        if self.planes is not None:
            return value_of(self.planes) / (2**self.count - 1)
        return scale_gradient(x.float(), self.unit**2) / self.unit

    def _codes(self, x: Tensor, top: int) -> Tensor:
        codes = straight_through(self.normalized(x) * top, -top, top)
        return codes * 0 if self.is_zero else codes  # times 0, so that there is a gradient, which gradients of several processes need

    def forward(self, x: Tensor) -> Tensor:
        top = 2**self.count - 1 if self.training else self.top
        return (self._codes(x, top) * (self.scale / top)).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        codes, step = self._codes(x, self.top), self.scale.detach() / self.top
        codes = torch.where(step < 0, -codes, codes)
        return QTensor(codes.to(torch.int8), AffineDecoder(step.abs(), torch.zeros_like(step), self.granularity), self.bit_width)

    def regularizer(self) -> Tensor:
        """The group lasso of the planes, times weights and planes where ``is_reweighed``; 0 after ``finish``. Source: section 3.2."""
        if self.planes is None:
            return torch.zeros_like(self.scale.detach())
        return group_lasso(self.planes) * (self.planes[0].numel() if self.is_reweighed else 1)

    def penalty(self) -> Tensor:
        return self.strength * self.regularizer()

    @torch.no_grad()
    def project(self) -> None:
        """Planes stay from 0 to 2."""
        if self.planes is not None:
            self.planes.clamp_(0, 2)

    @torch.no_grad()
    def adjust(self) -> None:
        """``requantize`` and ``trim``, with new parameters."""
        assert self.planes is not None
        planes = self.planes if self.scale >= 0 else self.planes.flip(0)
        planes, scale = trim(*requantize(planes, self.scale.abs(), self.most))
        self.set_planes(planes, scale)
        self.is_zero = not bool(planes.any())

    @torch.no_grad()
    def finish(self) -> Tensor:
        """End with the planes; gives the weights that they stood for, from which ordinary training goes on."""
        weight = self.normalized(self.scale) * self.scale
        self.planes, self.unit = None, float(self.scale)
        self._set_count(min(self.count, 7))
        return weight

    @torch.no_grad()
    def clip(self, weight: Tensor) -> None:
        """Keep a weight that is finetuned where its codes are, in place."""
        weight.clamp_(-self.unit, self.unit)

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.count, self.is_zero, self.adjusted, self.unit], dtype=torch.float32, device=self.scale.device)

    def set_extra_state(self, state: Tensor) -> None:
        count, is_zero, adjusted, self.unit = state.tolist()
        self.is_zero, self.adjusted = bool(is_zero), int(adjusted)
        self._set_count(int(count))

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, planes={self.found}"


def _take_saved_planes(module: nn.Module, state_dict: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Planes of the saved shape, or none where none were saved."""
    assert isinstance(module, BitPlanes)
    saved, has_state = state_dict.get(f"{prefix}planes"), f"{prefix}_extra_state" in state_dict
    if saved is None:
        module.planes = None if has_state else module.planes
    elif module.planes is None or module.planes.shape != saved.shape:
        module.planes = nn.Parameter(torch.empty_like(saved, device=module.scale.device))


class BitPlanesWithBias(BitPlanes):
    """``BitPlanes`` whose layer has a bias in planes of its own, with a scale of its own."""

    def __init__(self, bit_width: int, *, most: int | None = None) -> None:
        super().__init__(bit_width, most=most)
        self.bias = BitPlanes(bit_width, most=most)

    def scale_bias(self, bias: Tensor) -> Tensor:
        """The bias that its planes stand for."""
        return self.bias(bias)


def size_of(quantizers: Iterable[BitPlanes]) -> tuple[int, int]:
    """Number of weights in planes, and the bits that these take, without signs."""
    held = [(quantizer.planes[0, ..., 0].numel(), quantizer.found) for quantizer in quantizers if quantizer.planes is not None]
    return sum(weights for weights, _ in held), sum(weights * count for weights, count in held)


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
        section="mixed_precision",
        axes=("weight_quantizer", "activation_quantizer", "assignment", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="trains bit planes of weights; a group lasso empties some, and each layer ends with its own bits, at most those asked for",
        evidence="planes, re-quantization, trimming, regularizer, activations, finetuning and training steps checked against the authors' code",
        margin_points=33,
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
        finetune_learning_rate: Learning rate in these epochs, as a fraction.
        finetune_milestones: Fractions of these epochs at which the rate falls where the recipe's schedule has steps.
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
    finetune_learning_rate: Annotated[float, Above(0)] = 0.1
    finetune_milestones: Annotated[tuple[float, ...], Interval(0, 1)] = (0.5, 5 / 6)
    quantize_biases: bool = False
    inference_range: Literal["running", "batch"] = "running"

    def default_recipe(self) -> Recipe:
        """ResNet-20 on CIFAR-10."""
        return Recipe(650, 128, OptimizerSpec(learning_rate=0.1, schedule="step", milestones=(250 / 350,), gamma=0.1))

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
        """One for the epochs between two adjustments each, the schedule going on through them, then that of finetuning."""
        optimizers = self.optimizers(recipe)
        tuned = min(round(recipe.epochs * self.finetune_share), recipe.epochs - 1)
        epochs = recipe.epochs - tuned
        interval = self.interval or max(round(epochs * INTERVAL_SHARE), 1)
        found = []
        for start in range(0, epochs, interval):
            end = min(start + interval, epochs)
            span = start / epochs, end / epochs
            found.append(Phase(f"planes {len(found) + 1}", end - start, optimizers, recipe.clip_norm, span=span))
        slower = {
            role: replace(spec, learning_rate=spec.learning_rate * self.finetune_learning_rate, milestones=self.finetune_milestones)
            for role, spec in optimizers.items()
        }
        return [*found, Phase(FINETUNING, tuned, slower, recipe.clip_norm)]

    def start_phase(self, run: TrainRun) -> None:
        """Adjust the planes, once for each phase; before finetuning end with them."""
        for quantizer, held in held_by_planes(run.model):
            if quantizer.planes is not None and quantizer.adjusted == 0 and not held.original.requires_grad:  # the user froze it
                quantizer.finish()
                quantizer.is_frozen = True
        trained = [q for q in run.quantizers() if isinstance(q, BitPlanes) and q.planes is not None]
        for quantizer in trained:
            if quantizer.adjusted <= run.phase_index:
                quantizer.adjust()
                quantizer.adjusted = run.phase_index + 1
        self.weigh(trained)
        if run.phase.name == FINETUNING and trained:
            self._finish(run.model, *size_of(trained))
        keep_bits(run.model)

    def weigh(self, quantizers: Sequence[BitPlanes]) -> None:
        """Set the factor of each layer's regularizer: ``alpha``, where ``reweigh`` over the number of all weights in planes."""
        weights, _ = size_of(quantizers)
        for quantizer in quantizers:
            quantizer.is_reweighed = self.reweigh
            quantizer.strength = self.alpha / weights if self.reweigh else self.alpha

    def _finish(self, model: nn.Module, weights: int, bits: int) -> None:
        """Put weights in the place of planes, and say in the record what was found."""
        found: dict[BitPlanes, nn.Parameter] = {}
        for quantizer, held in held_by_planes(model):
            if quantizer.planes is not None:
                found[quantizer] = nn.Parameter(quantizer.finish().to(held.original.dtype))
            if quantizer in found:
                held.original = found[quantizer]
        record = record_of(model)
        if record is None:
            return
        sites = {name: site.quantizer for name, site in insert.quantized_weights(model).items()}
        planes = {name: quantizer.found for name, quantizer in sites.items() if isinstance(quantizer, BitPlanes)}
        record.measured[MEASURE] = dict(planes)
        for name in (name for name, count in planes.items() if count == 0):
            row = record.table[name]
            said = f"all of its weights became 0: it lost every plane, and its codes of {sites[name].bits} bits say nothing"
            record.table.add(replace(row, reason="; ".join(filter(None, (row.reason, said)))))
        record.table.note(f"planes found: {bits / weights:.2f} for each weight, without its sign; a larger alpha leaves fewer")

    def after_step(self, run: TrainRun) -> None:
        for quantizer, held in held_by_planes(run.model):
            if quantizer.planes is None and not quantizer.is_frozen:
                quantizer.clip(held.original)


def held_by_planes(model: nn.Module) -> Iterator[tuple[BitPlanes, ParametrizationList]]:
    """Each weight, and bias, that has planes or had them: its quantizer, and what holds the float weight as ``original``."""
    for site in insert.quantized_weights(model).values():
        if isinstance(site.quantizer, BitPlanes):
            yield site.quantizer, site.layer.parametrizations[site.parameter]  # type: ignore[index]
        if isinstance(site.quantizer, BitPlanesWithBias):
            yield site.quantizer.bias, site.layer.parametrizations["bias"]  # type: ignore[index]
