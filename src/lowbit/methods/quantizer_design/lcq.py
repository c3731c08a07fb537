"""LCQ: a uniform quantizer between a learned piecewise linear curve and its inverse.

Paper: Yamamoto 2021, "Learnable Companding Quantization for Accurate Low-bit Neural Networks", CVPR.
    Section 3.1 (Eq. 1-6, companding), section 3.2 (gradients), section 3.3 (limited weight normalization), section 3.4 (outer
    quantization of the levels).
Symbols: alpha -> clip, theta -> logits, gamma -> slopes, beta -> heights, Delta -> 1 / intervals, s -> steps, q_8 -> outer rounding.
Differs from the paper:
    - Clips of activations start at the least squared error of the first batch, which suits inputs of any scale;
      ``activation_clip`` sets another start.
    - Where a layer's input can be negative, activations are quantized on both sides, as weights are.
    - 2-bit weights are plain ternary: their levels are ``-clip, 0, clip`` whatever the curve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.options import Above, AtLeast, Interval
from lowbit.qat import OptimizerSpec, Recipe, Slot, TrainingMethod
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import count_below, mark_codebook
from lowbit.quantizers.qtensor import CodebookDecoder, QTensor
from lowbit.quantizers.ranges.observers import least_error_clip
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient, round_straight_through

SMALLEST_SLOPE = 1e-3
SMALLEST_CLIP = 1e-4
_ABOVE_HALF_ULP = 2.0**-22  # a factor of 1 plus this changes any float32, also behind a rounded product


def curve(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Slopes and heights of the compressing function: ``K softmax(logits)``, and its value where each of the K intervals starts.

    Slopes are kept above 0, for they divide in the inverse. Source: Eq. 3-4.
    """
    shares = torch.softmax(logits, 0).clamp(min=SMALLEST_SLOPE / len(logits))
    shares = shares / shares.sum()  # the curve has to end at 1, or the top level is not the clip
    return shares * len(logits), torch.cat([shares.new_zeros(1), torch.cumsum(shares, 0)[:-1]])


def compress(v: Tensor, slopes: Tensor, heights: Tensor) -> Tensor:
    """``f(v)`` for ``v`` in ``[0, 1]``: linear on K equal intervals, right-open but for the last. Source: Eq. 3."""
    count = len(slopes)
    index = (v.detach() * count).floor().long().clamp(0, count - 1)
    return slopes[index] * (v - index / count) + heights[index]


def expand(u: Tensor, slopes: Tensor, heights: Tensor) -> Tensor:
    """The inverse of ``compress``. Source: Eq. 4."""
    starts = heights.detach()[1:].contiguous()
    if torch.compiler.is_exporting():  # of a small table, in operators that every format has
        index = (u.detach().unsqueeze(-1) >= starts).sum(-1)
    else:
        index = torch.searchsorted(starts, u.detach().contiguous(), right=True)
    return (u - heights[index]) / slopes[index] + index / len(slopes)


class CompandingQuantizer(TableQuantizer):
    """Levels ``clip * f^-1(j / s)`` with a learned clip and curve ``f``, on both sides of zero where ``signed``.

    Forward: ``sign(x) clip g(|x| / clip)`` with ``g = f^-1 . round to s steps . f``, the clip beyond it; ``s = 2**(k - 1) - 1`` signed,
    else ``2**k - 1``; with ``outer_bits`` the levels are rounded to that many bits of the clip.
    Backward: 1 to ``x`` inside the clip, else 0; to the clip ``sign(x) (g - |x| / clip)`` inside, ``sign(x)`` outside; to the curve by
    differentiation with the rounding straight-through.
    All bit-widths share the clip and the curve, which three signed levels make no use of. Source: Eq. 1-8.

    Args:
        bit_width: 1 to 8, signed 2 to 8.
        signed: Whether values can be negative.
        clip: Initial clip; ``None``: the clip of least squared error on the first data.
        intervals: Pieces of the curve; ``None``: no curve, a uniform quantizer.
        outer_bits: Bits of the levels, or ``None`` for levels in float.
        normalizes: Quantize ``(x - mean) / std`` and multiply by ``std`` (limited weight normalization).
        detaches_statistics: Whether mean and standard deviation are constants in the backward pass.
    """

    tables = ("clip",)

    def __init__(
        self,
        bit_width: int,
        *,
        signed: bool,
        clip: float | None = None,
        intervals: int | None = 16,
        outer_bits: int | None = 8,
        normalizes: bool = False,
        detaches_statistics: bool = False,
    ) -> None:
        super().__init__(bit_width, Granularity.tensor())
        self.signed, self.intervals = signed, intervals
        self.logits: nn.Parameter | None = None
        self.resize()
        if self.steps < 1:
            raise SpecError("lcq: signed values need 2 bits or more")
        del self._buffers["clip"]
        self.clip = nn.Parameter(torch.tensor(float("nan") if clip is None else float(clip)))
        self.initial_clip, self.normalizes, self.detaches_statistics = clip, normalizes, detaches_statistics
        self.outer_steps = None if outer_bits is None else 2 ** (outer_bits - int(signed)) - 1

    @property
    def bit_widths(self) -> Sequence[int]:
        return range(2 if self.signed else 1, 9)

    @property
    def has_curve(self) -> bool:
        """Whether levels lie on a curve at this width."""
        return self.intervals is not None and not (self.steps == 1 and self.signed)

    def resize(self) -> None:
        self.steps = 2 ** (self.bit_width - 1) - 1 if self.signed else 2**self.bit_width - 1
        if self.has_curve and self.logits is None:
            assert self.intervals is not None
            self.logits = nn.Parameter(torch.zeros(self.intervals, device=self.clip.device))

    def initialize(self, x: Tensor) -> None:
        if self.initial_clip is not None:
            self._set_table("clip", torch.tensor(self.initial_clip))
        else:
            self._set_table("clip", least_error_clip(self._normalized(x.detach().float())[0], self.steps).clamp(min=SMALLEST_CLIP))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and not self.normalizes:
            marked: Tensor = mark_codebook(x.float(), *self._table())
            return marked.to(x.dtype)
        if not (self.training and torch.is_grad_enabled()):
            return self.encode(x).decode().to(x.dtype)
        values, std = self._normalized(x.float())
        sign = torch.where(values.detach() < 0, -1.0, 1.0)  # 0 has a gradient, or weights that start there would stay
        share = values * sign / self.clip
        inside = share.detach() < 1
        inner = share.detach().clamp(max=1)
        # the derivative of g counts as 1 in the input and the clip, and is the curve's in the logits
        companded = share + (self._compand(inner) - inner)
        y = sign * self.clip * torch.where(inside, companded, torch.ones_like(companded))
        return pass_gradient(y if std is None else y * std, self.encode(x).decode()).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        values, std = self._normalized(x.detach().float())
        boundaries, levels = self._table()
        codes = count_below(values, boundaries)
        levels = levels if std is None else levels * std
        return QTensor(codes.to(torch.uint8), CodebookDecoder(levels.reshape(1, -1), self.granularity), self.bit_width)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the clip positive."""
        self.clip.clamp_(min=SMALLEST_CLIP)

    def _normalized(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not self.normalizes:
            return x, None
        std = x.std() if x.numel() > 1 else torch.ones_like(x.sum())
        std = torch.where(std > 0, std, torch.ones_like(std))
        mean = x.mean()
        if self.detaches_statistics:
            std, mean = std.detach(), mean.detach()
        return (x - mean) / std, std

    def _compand(self, v: Tensor) -> Tensor:
        """``g(v)`` with its gradient to the logits."""
        g: Tensor
        if self.logits is None or not self.has_curve:
            g = round_straight_through(v * self.steps) / self.steps
        else:
            slopes, heights = curve(self.logits)
            g = expand(round_straight_through(compress(v, slopes, heights) * self.steps) / self.steps, slopes, heights)
        if self.outer_steps is not None:
            g = round_straight_through(g * self.outer_steps) / self.outer_steps
        return g

    def _table(self) -> tuple[Tensor, Tensor]:
        """Boundaries and levels of the whole grid, ascending; the top level is repeated up to ``2**bit_width``."""
        places = torch.arange(2 * self.steps + 1, device=self.clip.device) / (2 * self.steps)
        if self.logits is not None and self.has_curve:
            slopes, heights = curve(self.logits.detach())
            places = torch.cat([expand(places[:-1], slopes, heights).clamp(max=1), places[-1:]])
        levels, between = places[::2], places[1::2]
        if self.outer_steps is not None:
            levels = (levels * self.outer_steps).round() / self.outer_steps
        # values at a boundary take the level below it; a boundary a little lower lets them round half to even on both sides
        is_odd = torch.arange(self.steps, device=self.clip.device) % 2
        above = between * (1 - is_odd * _ABOVE_HALF_ULP)
        if self.signed:
            below = -(between * (1 + (1 - is_odd) * _ABOVE_HALF_ULP)).flip(0)
            levels, above = torch.cat([-levels[1:].flip(0), levels]), torch.cat([below, above])
        missing = 2**self.bit_width - len(levels)
        levels = torch.cat([levels, levels[-1:].expand(missing)])
        boundaries = torch.cat([above, above.new_full((missing,), float("inf"))])
        clip = self.clip.detach()
        return boundaries * clip, levels * clip


@register(
    MethodInfo(
        name="lcq",
        title="Learnable Companding Quantization for Accurate Low-bit Neural Networks",
        paper="Yamamoto, CVPR 2021",
        url="https://arxiv.org/abs/2103.07156",
        section="quantizer_design",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="equations",
        summary="learns where levels lie through a piecewise linear curve; 8-bit look-up table at inference",
        evidence="checked against a re-implementation",
        margin_points=50,
    )
)
@dataclass
class Lcq(TrainingMethod):
    """Learned companding.

    Attributes:
        quantizer_learning_rate: Learning rate of clips and curves, as a fraction of the weights'.
        intervals: Pieces of the curve.
        weight_clip: Initial clip of the normalized weights, usually 3; ``none``: the clip of least squared error.
        activation_clip: Initial clip of activations, in their units, usually 8; ``none``: the clip of least squared error.
        outer_bits: Bits of the levels, as in the look-up table; ``none``: levels in float.
        normalize_weights: Use limited weight normalization.
        detach_statistics: Treat the mean and standard deviation of the weights as constants in the backward pass.
    """

    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 0.1
    intervals: Annotated[int, AtLeast(1)] = 16
    weight_clip: Annotated[float | None, Above(0)] = None
    activation_clip: Annotated[float | None, Above(0)] = None
    outer_bits: Annotated[int | None, Interval(2, 8)] = 8
    normalize_weights: bool = True
    detach_statistics: bool = False

    def default_recipe(self) -> Recipe:
        """CIFAR-10, in the re-implementation."""
        return Recipe(300, 128, OptimizerSpec(learning_rate=0.04, nesterov=True))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return CompandingQuantizer(
            slot.bit_width,
            signed=True,
            clip=self.weight_clip,
            intervals=self.intervals,
            outer_bits=self.outer_bits,
            normalizes=self.normalize_weights,
            detaches_statistics=self.detach_statistics,
        )

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        if slot.is_signed and slot.bit_width == 1:
            return LearnedScaleQuantizer(1, signed=True, is_batched=True)
        return CompandingQuantizer(
            slot.bit_width, signed=slot.is_signed, clip=self.activation_clip, intervals=self.intervals, outer_bits=self.outer_bits
        )
