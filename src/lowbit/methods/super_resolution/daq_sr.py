"""DAQ (super-resolution): activations standardized by channel and sample, and quantized in steps that are best for a normal distribution.

Paper: Hong, Kim, Baik, Oh, Lee 2022, "DAQ: Channel-Wise Distribution-Aware Quantization for Deep Image Super-Resolution Networks", WACV,
    arXiv 2012.11230. Training-free quantization, quantization of quantization parameters, fine-tuning.
    The steps: Max 1960, "Quantizing for Minimum Distortion".
Symbols: mu -> mean, sigma -> deviation, s -> STEPS, QQ -> quantize_deviations, n -> bit_width.
Differs from the paper:
    - Which of the two grids a tensor has is decided when quantizers are inserted, from whether the sample is negative anywhere at that place;
      the authors' program looks for a minimum of 0 in each batch.
    - Behind a ReLU values beyond the last level are clipped to it (``clip_top``); the authors' program leaves them on a grid without an end.
    - A deviation that its own quantization makes negative counts as 0, so that the channel is its mean, or 0 behind a ReLU.
    - Linear layers have one mean and deviation for each sample, since their channels have one value each.
    - Weights that are all equal have the step of their magnitude, for their deviation is 0.
    - All layers have the bits that the policy asks for; the paper has everything outside of residual blocks in float (``blocks_only``).
    - Bits by channel, which the abstract names, are left out: they are defined nowhere.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn

from lowbit.network.graph.blocks import residual_layers
from lowbit.network.placement import place_at_layers
from lowbit.options import Interval
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.qat import OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod
from lowbit.quantizers import Quantizer
from lowbit.quantizers.qtensor import AffineDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient

STEPS = (2.0, 1.596, 0.996, 0.586, 0.335, 0.188, 0.104, 0.057, 0.031)  # of least error for N(0, 1), by number of bits
BYTE = 255  # the largest code
NO_SPREAD = 1e-7  # a deviation below this share of the mean is rounding noise
SMALLEST = 1e-30
StepIndex = Literal["released", "width", "fine_tuning"]


def step_size(bits: int, index: StepIndex, *, of_deviations: bool = False) -> float:
    """The step in units of the deviation.

    ``released``: that of the table for one bit less, as in the authors' program; ``width``: that for ``bits``, of least error for a normal
    distribution; ``fine_tuning``: 1.596, and 0.057 for deviations, whatever the bits, as the program does in fine-tuning.

    Source: the table is Max 1960, "Quantizing for Minimum Distortion"; which of it is taken, the authors' code.

    >>> step_size(4, "released"), step_size(4, "width")
    (0.586, 0.335)
    """
    if index == "fine_tuning":
        return STEPS[7] if of_deviations else STEPS[1]
    return STEPS[bits if index == "width" else bits - 1]


def middle_codes(x: Tensor, step: Tensor, bits: int) -> Tensor:
    """``k`` of the nearest level ``(k - 1/2) step``, half to even, from ``1 - 2**(bits - 1)`` to ``2**(bits - 1)``; ``step`` broadcasts."""
    most = 2 ** (bits - 1)
    return (x / step + 0.5).round().clamp(1 - most, most)


def quantize_deviations(deviation: Tensor, bits: int, step: float) -> Tensor:
    """Deviations on ``2**bits`` levels around their mean over channels, in steps of ``step`` times their own deviation; not below 0.

    Source: quantization of quantization parameters.

    Args:
        deviation: ``[N, C, ...]``; samples do not influence each other.
        bits: 1 to 8.
        step: In units of the deviation of ``deviation`` over channels.
    """
    mean, spread = deviation.mean(1, keepdim=True), torch.zeros_like(deviation[:, :1])
    if deviation.shape[1] > 1:
        spread = step * deviation.std(1, keepdim=True)
    usable = spread > NO_SPREAD * mean
    spread = torch.where(usable, spread, torch.ones_like(spread))
    quantized = (middle_codes(deviation - mean, spread, bits) - 0.5) * spread + mean
    return torch.where(usable, quantized, mean).clamp(min=0)


class DaqQuantizer(Quantizer):
    """A grid whose step follows from the values of each pass. Backward: 1 everywhere; nothing through statistics."""

    bit_widths = range(1, 9)

    @abstractmethod
    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scale and zero point of ``x``, float32."""

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def forward(self, x: Tensor) -> Tensor:
        codes, scale, zero_point = self.quantize(x.detach().float())
        return pass_gradient(x, ((codes - zero_point) * scale).to(x.dtype))

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        codes, scale, zero_point = self.quantize(x.detach().float())
        return QTensor(codes.to(torch.uint8), AffineDecoder(scale, zero_point, self.granularity), self.bit_width)


class DaqWeight(DaqQuantizer):
    """Weights on ``2**k`` levels ``+- step / 2, +- 3 step / 2, ...`` around 0, ``step`` being ``step_size`` times their unbiased deviation.

    Source: the step of the weights, whose mean counts as 0, in the authors' code.

    Args:
        bit_width: 1 to 8.
        step_index: See ``step_size``.
        granularity: Which elements share a step.

    >>> DaqWeight(1)(torch.tensor([-1.0, 0.0, 1.0]))
    tensor([-1., -1.,  1.])
    """

    def __init__(self, bit_width: int, *, step_index: StepIndex = "released", granularity: Granularity | None = None) -> None:
        super().__init__(bit_width, granularity or Granularity.tensor())
        self.step_index: StepIndex = step_index

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, shape = self.granularity.flatten(x), self.granularity.scale_shape(x)
        deviation = rows.std(1) if rows.shape[1] > 1 else torch.zeros_like(rows[:, 0])
        size = rows.square().mean(1).sqrt()
        deviation = torch.where(deviation > 1e-6 * size, deviation, size).reshape(shape)
        step = step_size(self.bit_width, self.step_index) * deviation
        step = torch.where(step > SMALLEST, step, torch.full_like(step, SMALLEST))
        offset = 2 ** (self.bit_width - 1) - 1
        view = self.granularity.broadcast(x)
        codes = middle_codes(view, step, self.bit_width) + offset
        return self.granularity.restore(codes, x.shape), step, torch.full_like(step, offset + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return pass_gradient(x, self.encode(x).decode().to(x.dtype))


class DaqActivation(DaqQuantizer):
    """Activations around the mean of their channel in their sample, in steps of ``step_size`` times its deviation.

    Signed: ``mean + (r((x - mean) / step + 1/2) - 1/2) step`` on ``2**k`` levels, the mean itself not among them. Behind a ReLU:
    ``r(x / step) step`` on the levels 0 to ``2**k - 1`` steps, the deviation being that of the ``K - 1`` positive values as far as ``sum(x) / K`` and
    ``sum(x**2) / K`` give it. A channel without a deviation is its mean, behind a ReLU 0.

    Source: channel-wise distribution-aware quantization; the authors' code behind a ReLU.

    Args:
        bit_width: 1 to 8.
        is_signed: Whether values can be negative.
        deviation_bits: Bits of the deviations, which are quantized over the channels of a sample; ``None``: float.
        step_index: See ``step_size``.
        clip_top: Behind a ReLU, whether there are ``2**k`` levels; else 256, which no value exceeds.
        granularity: Which elements share a mean: those of a channel of a sample, or of a sample.

    >>> quantizer = DaqActivation(1, is_signed=True, deviation_bits=None)
    >>> quantizer(torch.tensor([[[-1.0, 0.0, 1.0], [10.0, 10.0, 13.0]]]))
    tensor([[[-1.0000, -1.0000,  1.0000],
             [ 9.2679,  9.2679, 12.7321]]])
    """

    is_dynamic = True

    def __init__(
        self,
        bit_width: int,
        *,
        is_signed: bool,
        deviation_bits: int | None = 4,
        step_index: StepIndex = "released",
        clip_top: bool = True,
        granularity: Granularity | None = None,
    ) -> None:
        super().__init__(bit_width, granularity or Granularity.over(0, 1))
        self.is_signed, self.deviation_bits, self.clip_top = is_signed, deviation_bits, clip_top
        self.step_index: StepIndex = step_index

    def step(self, deviation: Tensor) -> Tensor:
        """The step for these deviations ``[N, C, ...]``."""
        if self.deviation_bits is not None:
            of_deviations = step_size(self.deviation_bits, self.step_index, of_deviations=True)
            deviation = quantize_deviations(deviation, self.deviation_bits, of_deviations)
        return step_size(self.bit_width, self.step_index) * deviation

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        axes = self.granularity.shared_axes(x)
        if not axes:  # each value is a channel of its own
            return torch.zeros_like(x), torch.ones_like(x), -(x if self.is_signed else x.clamp(min=0))
        return self._around_mean(x, axes) if self.is_signed else self._from_zero(x, axes)

    def _around_mean(self, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        mean, count = x.mean(axes, keepdim=True), _count(x, axes)
        step = self.step(((x - mean).square().sum(axes, keepdim=True) / max(count - 1, 1)).sqrt())
        has_spread = step > NO_SPREAD * mean.abs() + SMALLEST
        step = torch.where(has_spread, step, torch.ones_like(step))
        offset = 2 ** (self.bit_width - 1) - 1
        codes = middle_codes(x - mean, step, self.bit_width) + offset
        return codes * has_spread, step, torch.where(has_spread, offset + 0.5 - mean / step, -mean)

    def _from_zero(self, x: Tensor, axes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        count = (x > 0).float().sum(axes, keepdim=True) + 1
        values = x.clamp(min=0)
        mean = values.sum(axes, keepdim=True) / count
        step = self.step((values.square().sum(axes, keepdim=True) / count - mean.square()).clamp(min=0).sqrt())
        has_spread = step > SMALLEST
        step = torch.where(has_spread, step, torch.ones_like(step))
        codes = (x / step).round().clamp(0, 2**self.bit_width - 1 if self.clip_top else BYTE)
        return codes * has_spread, step, torch.zeros_like(step)


def _count(x: Tensor, axes: tuple[int, ...]) -> int:
    count = 1
    for axis in axes:
        count *= x.shape[axis]
    return count


@dataclass
class DaqOptions:
    """What both kinds of the method can be asked for.

    Attributes:
        deviation_bits: Bits of the channels' deviations: 4 in the paper's EDSR-baseline, 8 in its EDSR; ``None``: float.
        step_index: Which step of the table ``k`` bits have: ``released``: that for one bit less, with which the paper's numbers were made;
            ``width``: that for ``k`` bits, better for values that are distributed normally; ``fine_tuning``: 1.596 whatever the bits.
        clip_top: Clip values behind a ReLU at ``2**k`` levels; else they have up to 256, more than there are bits.
        blocks_only: Leave everything outside of residual blocks in float, as the paper does, whatever the policy asks for.
    """

    deviation_bits: Annotated[int | None, Interval(1, 8)] = 4
    step_index: StepIndex = "released"
    clip_top: bool = True
    blocks_only: bool = False

    def make_weight(self, slot: Slot, granularity: Granularity | None = None) -> Quantizer:
        """The quantizer of a weight."""
        return DaqWeight(slot.bit_width, step_index=self.step_index, granularity=granularity)

    def make_activation(self, slot: Slot) -> Quantizer:
        """The quantizer of an activation: a grid for each channel of a sample, at linear layers for each sample."""
        return DaqActivation(
            slot.bit_width,
            is_signed=slot.is_signed,
            deviation_bits=self.deviation_bits,
            step_index=self.step_index,
            clip_top=self.clip_top,
            granularity=Granularity.over(0) if isinstance(slot.layer, nn.Linear) else Granularity.over(0, 1),
        )


@register(
    MethodInfo(
        name="daq_sr",
        title="DAQ: Channel-Wise Distribution-Aware Quantization for Deep Image Super-Resolution Networks",
        paper="Hong, Kim, Baik, Oh, Lee, WACV 2022",
        url="https://arxiv.org/abs/2012.11230",
        section="super_resolution",
        axes=("weight_quantizer", "activation_quantizer"),
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        fidelity="exact",
        kind="post_training",
        needs=(),
        summary="activations standardized by channel and sample as they come; nothing is calibrated or trained",
        evidence="quantizers, blocks and a network checked against the authors' code",
        margin_db=-8.5,
    )
)
@dataclass
class DaqSr(DaqOptions, PostTrainingMethod):
    """Without training: statistics come from each input.

    Attributes:
        weight_granularity: ``per_tensor`` is the paper's.
        weight_observer, activation_observer: Without effect, for nothing is calibrated.
    """

    ends: ClassVar[Literal["wide", "float", "same"]] = "float"

    weight_granularity: str = "per_tensor"

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return self.make_weight(slot, Granularity.parse(self.weight_granularity, slot.channel_axis))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return self.make_activation(slot)

    def quantize(self, job: PtqJob) -> None:
        if self.blocks_only:
            job.keep_outside_float(residual_layers(job.model, job.need_graph("finding residual blocks")), "residual blocks")
        job.insert_weights(self.weight_quantizer)
        placements = place_at_layers(job.activation_bits, job.output_bits)
        signs = job.signs(placements)
        for placement in placements:
            job.place(placement, self.make_activation(job.slot(placement, is_signed=signs[placement.name])))
        job.table.note(
            "sums and concatenations stay in float" if job.policy.merges is None else "daq_sr quantizes no sums and concatenations"
        )


@register(
    MethodInfo(
        name="daq_sr",
        title="DAQ: Channel-Wise Distribution-Aware Quantization for Deep Image Super-Resolution Networks",
        paper="Hong, Kim, Baik, Oh, Lee, WACV 2022",
        url="https://arxiv.org/abs/2012.11230",
        section="super_resolution",
        axes=("weight_quantizer", "activation_quantizer"),
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        fidelity="exact",
        kind="training",
        needs=("labels", "pretrained"),
        summary="fine-tuning with activations standardized by channel and sample; gradients pass straight through",
        evidence="quantizers, blocks and a network checked against the authors' code",
        margin_points=60,
    )
)
@dataclass
class DaqSrTraining(DaqOptions, TrainingMethod):
    """Fine-tuning of the network that is quantized without training."""

    ends = "float"

    def default_recipe(self) -> Recipe:
        """EDSR-baseline on DIV2K, with 1,000 steps in an epoch."""
        return Recipe(300, 16, OptimizerSpec("adam", 1e-4, weight_decay=0.0, schedule="step", milestones=(0.5,), gamma=0.5))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return self.make_weight(slot)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return self.make_activation(slot)

    def attach(self, job: QatJob) -> None:
        if self.blocks_only:
            job.keep_outside_float(residual_layers(job.model, job.dataflow()), "residual blocks")
        super().attach(job)
