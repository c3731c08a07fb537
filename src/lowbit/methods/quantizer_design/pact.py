"""PACT: activations clipped at a learned level, with SAWB weights, whose clip follows from two moments.

Paper: Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan 2018, "PACT: Parameterized Clipping Activation for Quantized
    Neural Networks". Section 3, Eq. 1 (clip), Eq. 2 (quantize), Eq. 3 (gradient of the clip level).
    Choi et al. 2019, "Accurate and Efficient 2-bit Quantized Neural Networks", MLSys, section 3 (SAWB).
Symbols: alpha -> clip, lambda_alpha -> clip_decay, k -> bit_width, c1 and c2 -> SAWB_COEFFICIENTS.
Differs from the paper:
    - Where a layer's input can be negative it is clipped at both ends.
    - The clip replaces a ReLU in the paper; here the ReLU stays in the network, where it changes nothing.
    - ``clip_init="least_error"`` is an addition: the paper trains for many epochs from a large clip, and short runs at 2 bits gain some
      twenty points by a better start.
    - Weights are DoReFa's as in the PACT paper; ``weights="sawb"`` selects those of the follow-up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.methods.quantization_aware.dorefa import DorefaWeight, symmetric_codes
from lowbit.options import Above, AtLeast
from lowbit.qat import OptimizerSpec, Recipe, Slot, TrainingMethod
from lowbit.quantizers import Quantizer
from lowbit.quantizers.binary import ScaledSignQuantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.ranges.observers import least_error_clip
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import bounded_straight_through, straight_through

SMALLEST_CLIP = 1e-4
ClipInit = float | Literal["max", "least_error"]

# (c1, c2) of clip = c1 sqrt(E w^2) + c2 E|w|, by bit-width: 2**k levels without zero, and 2**k - 1 levels with it
SAWB_COEFFICIENTS = {2: (3.12, -2.064), 3: (7.509, -6.892), 4: (12.68, -12.80), 5: (17.74, -18.64)}
# with zero at 3, 5 and 6 bits: fitted in the same way (clip of least squared error of six distributions), for the paper has none
SAWB_COEFFICIENTS_WITH_ZERO = {
    2: (2.6, -1.71),
    3: (6.95, -6.31),
    4: (12.035, -12.03),
    5: (16.87, -17.74),
    6: (21.81, -23.56),
    7: (28.24, -30.81),
    8: (31.76, -35.04),
}


class PactActivation(GridQuantizer):
    """Activations on ``[0, clip]``, or ``[-clip, clip]`` with ``is_signed``, with a learned ``clip``.

    Forward: ``round(clip(x) / scale) * scale`` with ``scale = clip / n``, ``n = 2**k - 1`` (signed: ``2**(k - 1) - 1``).
    Backward: the surrogate's for the rounding; then 1 to ``x`` within the closed range, else 0, and to ``clip`` the sum of the gradients
    where ``x >= clip``, less those where ``x <= -clip``: elements at the clip belong to both. Nothing through the scale.
    All bit-widths share the clip. Source: PACT, Eq. 1-3.

    Args:
        bit_width: 1 to 8.
        clip: Initial clip level: a number, ``max`` (the largest magnitude of the first batch) or ``least_error`` (the least squared error
            on the first batch).
        clip_decay: ``penalty`` is ``clip_decay * clip**2``.
        is_signed: Whether the range has a negative half.
    """

    tables = ("clip",)
    bit_widths = range(1, 9)

    def __init__(self, bit_width: int, *, clip: ClipInit = "least_error", clip_decay: float = 0.0, is_signed: bool = False) -> None:
        self.is_signed = is_signed
        super().__init__(bit_width, *self.code_range(bit_width))
        del self._buffers["clip"]
        self.clip = nn.Parameter(torch.tensor(float("nan") if isinstance(clip, str) else float(clip)))
        self.initial_clip, self.clip_decay = clip, clip_decay

    @property
    def is_binary(self) -> bool:
        """Whether the levels are ``-clip`` and ``clip``."""
        return self.is_signed and self.bit_width == 1

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return symmetric_codes(bit_width) if self.is_signed else (0, 2**bit_width - 1)

    def initialize(self, x: Tensor) -> None:
        """Set the clip level as ``clip`` asks."""
        if self.initial_clip == "max":
            clip = x.detach().float().abs().amax()
        elif self.initial_clip == "least_error":
            clip = least_error_clip(x, self.qmax)
        else:
            clip = torch.tensor(float(self.initial_clip))
        self._set_table("clip", clip.clamp(min=SMALLEST_CLIP))

    def grid(self, x: Tensor) -> Grid:
        clip = self.clip.detach()  # Eq. 3 gives it no gradient through the grid
        ends = (-self.clip if self.is_signed else torch.zeros_like(clip)), self.clip
        if self.is_binary:
            return Grid(-clip, 2 * clip, 2 * clip, torch.full_like(clip, 0.5), ends)
        zero = torch.zeros_like(clip)
        return Grid(zero, clip / self.qmax, clip / self.qmax, zero, ends)

    def penalty(self) -> Tensor:
        return self.clip_decay * self.clip.square()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the clip positive."""
        self.clip.clamp_(min=SMALLEST_CLIP)


class SawbWeight(GridQuantizer):
    """Weights on evenly spaced levels in ``[-clip, clip]``, with a clip from the moments of the current weights.

    Forward: ``(2 round(u N) / N - 1) clip`` with ``u = clamp(w / clip, -1, 1) / 2 + 1/2`` and
    ``clip = c1 sqrt(E w^2) + c2 E|w|``, or ``max|w|`` where there are no coefficients or the clip is not positive;
    ``N = 2**k - 1``, with ``has_zero`` ``2**k - 2``. In evaluation the clip is the last one of training.
    Backward: 1 everywhere, with ``clips_gradient`` 0 outside ``[-clip, clip]``; nothing through the clip.
    Each bit-width has its own clip. That of a new width starts at the current one unless weights are given, and training replaces it.
    Source: Choi et al. 2019, section 3.

    Args:
        bit_width: 2 to 8.
        has_zero: Whether 0 is a level.
        clips_gradient: Whether weights beyond the clip get no gradient.
        granularity: Which elements share a clip.
    """

    tables = tables_by_width = ("clip",)
    bit_widths = range(2, 9)

    def __init__(
        self, bit_width: int, *, has_zero: bool = False, clips_gradient: bool = False, granularity: Granularity | None = None
    ) -> None:
        if bit_width < 2:
            raise SpecError(f"sawb: bit_width must be 2 to 8, got {bit_width}")
        self.has_zero = has_zero
        surrogate = bounded_straight_through if clips_gradient else straight_through
        super().__init__(bit_width, *self.code_range(bit_width), granularity=granularity, surrogate=surrogate)
        self.clip: Tensor

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return symmetric_codes(bit_width) if self.has_zero else (0, 2**bit_width - 1)

    def clip_of(self, x: Tensor) -> Tensor:
        """The clip for the weights ``x``, shaped to broadcast with ``granularity.broadcast(x)``."""
        rows = self.granularity.flatten(x.detach().float())
        magnitudes, largest = rows.abs(), rows.abs().amax(1)
        coefficients = (SAWB_COEFFICIENTS_WITH_ZERO if self.has_zero else SAWB_COEFFICIENTS).get(self.bit_width)
        clip = largest
        if coefficients is not None:
            clip = coefficients[0] * rows.square().mean(1).sqrt() + coefficients[1] * magnitudes.mean(1)
            clip = torch.where(clip > 0, clip, largest)
        return torch.where(clip > 0, clip, torch.ones_like(clip)).reshape(self.granularity.scale_shape(x))

    def initialize(self, x: Tensor) -> None:
        self._set_table("clip", self.clip_of(x))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._set_table("clip", self.clip_of(x))
        return super().forward(x)

    def grid(self, x: Tensor) -> Grid:
        if self.has_zero:
            zero = torch.zeros_like(self.clip)
            return Grid(zero, self.clip / self.qmax, self.clip / self.qmax, zero)
        step = 2 * self.clip / self.qmax
        return Grid(-self.clip, step, step, torch.full_like(self.clip, self.qmax / 2))


@register(
    MethodInfo(
        name="pact",
        title="PACT: Parameterized Clipping Activation for Quantized Neural Networks",
        paper="Choi, Wang, Venkataramani, Chuang, Srinivasan, Gopalakrishnan 2018; SAWB: Choi et al., MLSys 2019",
        url="https://arxiv.org/abs/1805.06085",
        section="quantizer_design",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="exact",
        summary="learns where to clip activations; weights as in dorefa, or by SAWB",
        evidence="checked against the authors' company's toolkit (fms-model-optimizer)",
        margin_points=55,
    )
)
@dataclass
class Pact(TrainingMethod):
    """Learned clip levels of activations.

    Attributes:
        weights: Weight quantizer: ``dorefa`` (the PACT paper) or ``sawb`` (the follow-up).
        sawb_zero: Give SAWB weights a level at 0, at the cost of one level.
        sawb_clip_gradient: Give weights beyond the SAWB clip no gradient.
        clip_init: Initial clip level: a number in units of the activation (the paper starts with a large one), ``max`` (the largest
            magnitude of the first batch) or ``least_error`` (the least squared error on the first batch, best for short runs).
        clip_decay: ``clip_decay * clip**2`` is added to the loss for every layer; the paper uses the weight decay.
    """

    ends = "float"

    weights: Literal["dorefa", "sawb"] = "dorefa"
    sawb_zero: bool = False
    sawb_clip_gradient: bool = False
    clip_init: Annotated[ClipInit, Above(0)] = 10.0
    clip_decay: Annotated[float, AtLeast(0)] = 1e-4

    def default_recipe(self) -> Recipe:
        """ResNet-20 on CIFAR-10; the paper's batch size is not known."""
        return Recipe(200, optimizer=OptimizerSpec(learning_rate=0.1, weight_decay=2e-4, schedule="step", milestones=(0.3, 0.6)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        if slot.bit_width == 1:
            return ScaledSignQuantizer()
        if self.weights == "dorefa":
            return DorefaWeight(slot.bit_width)
        return SawbWeight(slot.bit_width, has_zero=self.sawb_zero, clips_gradient=self.sawb_clip_gradient)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return PactActivation(slot.bit_width, clip=self.clip_init, clip_decay=self.clip_decay, is_signed=slot.is_signed)
