"""DAQ: rounding as a soft assignment to two levels, equally sharp everywhere and corrected to equal hard rounding.

Paper: Kim, Lee, Ham 2021, "Distance-aware Quantization", ICCV.
    Section 3.1 (quantizer), section 3.2 and Eq. 5-10 (distance-aware soft rounding and its temperature controller).
Symbols: gamma -> gamma, sigma -> sigma, l and u -> lower and upper, beta -> output_scale, r -> the rounded code.
Differs from the paper:
    - The forward pass rounds, which the soft rounding equals by construction, and the backward pass is its closed form,
      ``gamma / (2 sinh gamma) coth(|z - 1/2| + 1 / (2 sigma**2))``: the same values at less cost.
    - Where a layer's input can be negative, activations become ``2 q - 1`` on ``[-upper, upper]``, so that both signs have levels.
    - Where a layer's weight stays in float, the levels of its input include the output scale, as there is no weight quantizer to hold it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from lowbit.options import Above, Interval
from lowbit.qat import OptimizerSpec, Recipe, Slot
from lowbit.qat.attach.normalized import NormalizedQuantizer, NormalizingMethod, needs_output_scale, spread_of
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.surrogates import DistanceAwareRounding
from lowbit.surrogates.daq import LARGEST_GAMMA


class DaqWeight(NormalizedQuantizer):
    """Standardized weights, ``(w - mean) / std`` with constant statistics, as ``(2 q - 1) |output_scale|``."""

    def __init__(self, bit_width: int, *, gamma: float = 2.0, sigma: float = 1.0) -> None:
        super().__init__(bit_width, is_centred=True, has_output_scale=True, surrogate=DistanceAwareRounding(gamma, sigma))

    def initialize(self, x: Tensor) -> None:
        """Start at an interval of three standard deviations on either side."""
        self.set_interval(x.new_tensor(-3.0), x.new_tensor(3.0))

    def prepare(self, x: Tensor) -> Tensor:
        """The standardized weights; weights that are all equal lie at the end of the interval with their sign."""
        values = x.detach()
        mean, std = values.mean(), values.std() if values.numel() > 1 else values.new_zeros(())
        is_constant = std <= 1e-6 * mean.abs()
        size = torch.where(is_constant, mean.abs() / 3, std)
        return (x - torch.where(is_constant, torch.zeros_like(mean), mean)) / torch.where(size > 0, size, torch.ones_like(size))


class DaqActivation(NormalizedQuantizer):
    """Activations as ``q`` on ``[0, upper]``, which starts at three standard deviations."""

    def __init__(
        self, bit_width: int, *, gamma: float = 2.0, sigma: float = 2.0, is_signed: bool = False, has_output_scale: bool = False
    ) -> None:
        surrogate = DistanceAwareRounding(gamma, sigma)
        super().__init__(bit_width, is_centred=is_signed, has_output_scale=has_output_scale, learns_lower=False, surrogate=surrogate)

    def initialize(self, x: Tensor) -> None:
        values = x.detach().float()
        self.set_interval(values.new_zeros(()), spread_of(values))


@register(
    MethodInfo(
        name="daq",
        title="Distance-aware Quantization",
        paper="Kim, Lee, Ham, ICCV 2021",
        url="https://arxiv.org/abs/2108.06983",
        section="gradients",
        axes=("weight_quantizer", "activation_quantizer", "surrogate"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="the gradient of a soft rounding that equals the hard one in the forward pass",
        evidence="checked against the authors' code",
        margin_points=60,
    )
)
@dataclass
class Daq(NormalizingMethod):
    """Learned intervals and distance-aware rounding.

    Attributes:
        gamma: Sharpness of the soft assignment.
        weight_sigma: Width of the kernel for weights, in steps.
        activation_sigma: Width of the kernel for activations, in steps.
    """

    ends = "float"

    gamma: Annotated[float, Interval(0, LARGEST_GAMMA, closed="right")] = 2.0
    weight_sigma: Annotated[float, Above(0)] = 1.0
    activation_sigma: Annotated[float, Above(0)] = 2.0

    def default_recipe(self) -> Recipe:
        """ResNet-20 on CIFAR-10."""
        return Recipe(400, 256, OptimizerSpec(learning_rate=0.1))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return DaqWeight(slot.bit_width, gamma=self.gamma, sigma=self.weight_sigma)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return DaqActivation(
            slot.bit_width,
            gamma=self.gamma,
            sigma=self.activation_sigma,
            is_signed=slot.is_signed,
            has_output_scale=needs_output_scale(slot),
        )
