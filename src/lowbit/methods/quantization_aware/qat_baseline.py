"""Fixed ranges and the straight-through estimator: the simplest form of quantization-aware training.

Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3.2; Nagel et al. 2021,
"A White Paper on Neural Network Quantization", section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.qat import Slot, TrainingMethod
from lowbit.quantizers import BinaryQuantizer, Quantizer, UniformQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity


@register(
    MethodInfo(
        name="qat_baseline",
        title="Fixed ranges, straight-through gradients",
        paper="Krishnamoorthi 2018; Nagel et al. 2021",
        url="https://arxiv.org/abs/1806.08342",
        section="quantization_aware",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="baseline",
        summary="the baseline: ranges fixed from one batch, straight-through gradients",
        margin_points=15,
    )
)
@dataclass
class QatBaseline(TrainingMethod):
    """Ranges from observers, fixed before training.

    Attributes:
        weight_granularity: ``per_channel``, ``per_tensor`` or ``group:SIZE``.
        weight_observer: How weight ranges are chosen.
        activation_observer: How activation ranges are chosen from the first batch.
    """

    weight_granularity: str = "per_channel"
    weight_observer: str = "mse"
    activation_observer: str = "mse"

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        if slot.bit_width == 1:
            return BinaryQuantizer(granularity=granularity)
        observer = make_observer(self.weight_observer, granularity)
        return UniformQuantizer(slot.bit_width, signed=True, symmetric=True, granularity=granularity, observer=observer)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        observer = make_observer(self.activation_observer, Granularity.tensor())
        return UniformQuantizer(slot.bit_width, signed=False, symmetric=False, observer=observer)
