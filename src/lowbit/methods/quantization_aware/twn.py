"""TWN: weights become ``-scale``, 0 or ``+scale``, by a threshold from their mean magnitude.

Paper: Li, Liu, Wang, Zhang, Yan 2016, "Ternary Weight Networks", NIPS workshop on efficient methods for deep neural networks.
    Section 2.1 (the problem, Eq. 2 and 3), section 2.2 (threshold, Eq. 5 and 6; scale, Eq. 4), section 2.3 (training).
Symbols: W -> weight, W^t -> codes, Delta -> threshold, alpha -> scale, 0.7 -> delta_factor.
Differs from the paper:
    - The first and the last layer have 8 bits unless the policy says otherwise, as in all methods of lowbit; the authors make every layer
      ternary (a policy with ``first_last=None``).
    - The sum of the scale is divided by its count, without the 1e-6 of the authors' GPU code, which only avoids a division by zero.
    - ``search`` and scales for each channel are additions.
    - Activations stay in float as in the paper; a policy that asks for activation bits gets learned-scale quantizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.options import Above
from lowbit.qat import OptimizerSpec, Recipe, Slot, TrainingMethod
from lowbit.quantizers import Grid, GridQuantizer, LearnedScaleQuantizer, Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient, straight_through

LARGEST_THRESHOLD = 100.0  # cap in the authors' code


def threshold_by_rule(rows: Tensor, delta_factor: float = 0.7) -> Tensor:
    """``delta_factor * mean |w|`` of each row, at most 100.

    Args:
        rows: ``[scales, elements]``.
        delta_factor: 0.7 in the paper, between the optima for uniform (2/3) and Gaussian weights (0.75).

    Returns:
        ``[scales]``, in weight units.

    Source: section 2.2, Eq. 6.
    """
    return (delta_factor * rows.abs().mean(1)).clamp(max=LARGEST_THRESHOLD)


def best_threshold(rows: Tensor) -> Tensor:
    """The threshold of least squared error for each row, found among all.

    With the ``k`` largest magnitudes kept, the error falls by ``(their sum)**2 / k``; the threshold lies midway between the
    magnitudes number ``k`` and ``k + 1`` of the best ``k``.

    Args:
        rows: ``[scales, elements]``.

    Returns:
        ``[scales]``, in weight units.

    Source: section 2.2, Eq. 5.
    """
    ordered = rows.abs().sort(dim=1, descending=True).values
    counts = torch.arange(1, rows.shape[1] + 1, device=rows.device, dtype=torch.float64)
    best = (ordered.double().cumsum(1).square() / counts).argmax(1, keepdim=True)
    following = torch.cat([ordered[:, 1:], torch.zeros_like(ordered[:, :1])], 1)
    return ((ordered.gather(1, best) + following.gather(1, best)) / 2).squeeze(1)


def ternary_scale(rows: Tensor, threshold: Tensor) -> Tensor:
    """The mean magnitude of the elements of each row above its threshold; 0 where there are none.

    Args:
        rows: ``[scales, elements]``.
        threshold: ``[scales]``.

    Returns:
        ``[scales]``, in weight units.

    Source: section 2.2, Eq. 4.
    """
    sizes = rows.abs()
    kept = sizes > threshold[:, None]
    return (sizes * kept).sum(1) / kept.sum(1).clamp(min=1)


class TernaryQuantizer(GridQuantizer):
    """Three levels ``-scale``, 0, ``scale``, computed from the weights in every pass.

    Forward: ``scale`` where ``w > threshold``, ``-scale`` where ``w < -threshold``, else 0.
    Backward: 1, nothing through threshold and scale; with another surrogate that of rounding ``w / (2 threshold)``.

    Args:
        delta_factor: Threshold over mean magnitude.
        threshold: ``rule`` (``delta_factor``) or ``search`` (least squared error).
        granularity: Which weights share threshold and scale.
    """

    def __init__(
        self, *, delta_factor: float = 0.7, threshold: Literal["rule", "search"] = "rule", granularity: Granularity | None = None
    ) -> None:
        super().__init__(2, -1, 1, granularity=granularity, surrogate=straight_through)
        self.delta_factor, self.threshold_kind = delta_factor, threshold

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    @torch.no_grad()
    def threshold_and_scale(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both for ``x`` (already ``granularity.broadcast``), shaped to broadcast with it."""
        is_grouped = self.granularity.kind == "per_group"
        rows = x.flatten(0, 1) if is_grouped else self.granularity.flatten(x)
        shape = (*x.shape[:2], 1) if is_grouped else self.granularity.scale_shape(x)
        threshold = threshold_by_rule(rows, self.delta_factor) if self.threshold_kind == "rule" else best_threshold(rows)
        return threshold.reshape(shape), ternary_scale(rows, threshold).reshape(shape)

    def grid(self, x: Tensor) -> Grid:
        threshold, scale = self.threshold_and_scale(x)
        # rounding half to even sends exactly +-threshold to 0; a step of 0 would divide by it
        step = torch.where(threshold > 0, 2 * threshold, torch.ones_like(threshold))
        return Grid(torch.zeros_like(step), step, scale, torch.zeros_like(step))

    def forward(self, x: Tensor) -> Tensor:
        if self.surrogate is not straight_through:
            return super().forward(x)
        with torch.no_grad():
            y = super().forward(x)
        return pass_gradient(x, y)


@register(
    MethodInfo(
        name="twn",
        title="Ternary Weight Networks",
        paper="Li, Liu, Wang, Zhang, Yan, NIPS workshop 2016",
        url="https://arxiv.org/abs/1605.04711",
        section="quantization_aware",
        axes=("weight_quantizer",),
        kind="training",
        weight_bits=range(2, 3),
        activation_bits=None,
        needs=("labels",),
        fidelity="exact",
        summary="ternary weights, threshold 0.7 times the mean magnitude",
        evidence="checked against the authors' code",
        margin_points=60,
    )
)
@dataclass
class Twn(TrainingMethod):
    """Ternary weights.

    Attributes:
        delta_factor: Threshold relative to the mean magnitude; positive.
        threshold: ``rule`` (the paper's, with ``delta_factor``) or ``search`` (the threshold of least squared error).
        weight_granularity: ``per_tensor`` (the paper's), ``per_channel`` or ``group:SIZE``.
    """

    ends = "same"

    delta_factor: Annotated[float, Above(0)] = 0.7
    threshold: Literal["rule", "search"] = "rule"
    weight_granularity: str = "per_tensor"

    def default_recipe(self) -> Recipe:
        """LeNet on MNIST as in the authors' code: 30000 iterations."""
        return Recipe(25, 50, OptimizerSpec(learning_rate=0.01, schedule="step", milestones=(0.5, 5 / 6)))

    def __post_init__(self) -> None:
        super().__post_init__()
        Granularity.parse(self.weight_granularity)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        return TernaryQuantizer(delta_factor=self.delta_factor, threshold=self.threshold, granularity=granularity)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return LearnedScaleQuantizer(slot.bit_width, signed=False, learn_offset=slot.is_signed, is_batched=True)
