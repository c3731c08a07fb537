"""LSQ: the step size of a uniform grid is learned with the network; the baseline of later methods.

Paper: Esser, McKinstry, Bablani, Appuswamy, Modha 2020, "Learned Step Size Quantization", ICLR.
    Section 2.1 (gradient of the step size, Eq. 3), section 2.2 (its scale).
    Bhalgat et al. 2020, "LSQ+: Improving low-bit quantization through learnable offsets", for ``offset``.
Symbols: s -> scale, Q_N and Q_P -> qmin and qmax, beta -> offset.
Differs from the paper:
    - Weights have one scale per output channel by default, which is more accurate; the paper has one per tensor.
    - A learned offset is rounded to an integer zero point, so that 0 stays a level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lowbit.qat import Slot, TrainingMethod
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity


@register(
    MethodInfo(
        name="lsq",
        title="Learned Step Size Quantization",
        paper="Esser, McKinstry, Bablani, Appuswamy, Modha, ICLR 2020",
        url="https://arxiv.org/abs/1902.08153",
        section="quantizer_design",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="equations",
        summary="learns the step size of weights and activations, the baseline of later methods",
        evidence="no reference vectors",
        margin_points=65,
    )
)
@dataclass
class Lsq(TrainingMethod):
    """Learned step sizes.

    Attributes:
        weight_granularity: ``per_channel``, ``per_tensor`` or ``group:SIZE``.
        offset: Learn a zero point for activations: ``always``, ``signed`` (where the input can be negative) or ``never``.
        scale_gradient: Multiply the gradient of a step size by ``1 / sqrt(elements * qmax)``.
    """

    weight_granularity: str = "per_channel"
    offset: Literal["always", "signed", "never"] = "signed"
    scale_gradient: bool = True

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        return LearnedScaleQuantizer(slot.bit_width, signed=True, granularity=granularity, scale_gradient=self.scale_gradient)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        has_offset = self.offset == "always" or (self.offset == "signed" and slot.is_signed)
        return LearnedScaleQuantizer(
            slot.bit_width,
            signed=slot.is_signed and not has_offset,
            learn_offset=has_offset,
            scale_gradient=self.scale_gradient,
            is_batched=True,
        )
