"""HWGQ: binary weights, and activations on levels that are optimal for the positive half of a Gaussian.

Paper: Cai, He, Sun, Vasconcelos 2017, "Deep Learning with Low Precision by Half-wave Gaussian Quantization", CVPR.
    Section 3.1 (binary weights), section 4.1 (half-wave Gaussian quantizer, Eq. 11 to 14), section 4.2 (gradients: vanilla ReLU,
    clipped ReLU Eq. 17, log-tailed ReLU Eq. 19).
Symbols: q_i -> levels, t_i -> boundaries, m -> positive levels, q_m -> the largest level, tau -> largest level - 1, alpha -> scale.
Differs from the paper:
    - ``input_scale="measured"`` multiplies the levels by the standard deviation of the first batch: the paper's inputs come from a batch
      norm without scale and shift and have variance 1, those of other networks do not. ``unit`` does not multiply.
    - Inputs that can be negative keep their sign (``signed_inputs="symmetric"``): the levels are then optimal for a whole Gaussian, on both
      sides of 0. ``rectify`` is the paper's quantizer, itself a ReLU, for networks built as in the paper: batch norm without scale and
      shift, no ReLU, this quantizer, convolution.
    - Levels are computed; ``authors`` takes the rounded constants of the authors' code.
    - The authors' ``negative_slope`` is left out, as it is 0 in every published network.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.qat import OptimizerSpec, Recipe, Slot, TrainingMethod
from lowbit.quantizers import CodebookDecoder, QTensor, Quantizer, ScaledSignQuantizer, SignQuantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import count_below, mark_codebook
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient

Backward = Literal["clipped", "vanilla", "log_tailed"]
Levels = Literal["uniform", "non_uniform", "authors", "authors_non_uniform"]

AUTHORS_UNIFORM = (0.538, 1.076, 1.614)
AUTHORS_NON_UNIFORM = (0.453, 1.51)
_BELOW_ZERO = -(2.0**-149)  # the largest number below zero: what is above it is 0 or more
_NEGLIGIBLE = 1e-12


def _density(x: Tensor) -> Tensor:
    return torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi)


def _mass(low: Tensor, high: Tensor) -> Tensor:
    """The probability of N(0, 1) between ``low`` and ``high``, accurate in the upper tail."""
    return (torch.erfc(low / math.sqrt(2)) - torch.erfc(high / math.sqrt(2))) / 2


def _intervals(levels: Tensor) -> tuple[Tensor, Tensor]:
    """Ends of the interval of each positive level (last dimension): 0, the midpoints, infinity."""
    midpoints = (levels[..., 1:] + levels[..., :-1]) / 2
    zero = torch.zeros_like(levels[..., :1])
    return torch.cat([zero, midpoints], -1), torch.cat([midpoints, zero + math.inf], -1)


def gaussian_error(levels: Tensor) -> Tensor:
    """``E[(Q(x) - x)**2 | x > 0]`` for x ~ N(0, 1) and the quantizer with these positive levels.

    Args:
        levels: Ascending, float64, ``[..., m]``.

    Returns:
        ``[...]``.

    Source: section 4.1, Eq. 13.
    """
    low, high = _intervals(levels)
    mass, first = _mass(low, high), _density(low) - _density(high)
    second = mass + low * _density(low) - torch.where(high.isinf(), 0.0, high) * _density(high)
    return 2 * (levels.square() * mass - 2 * levels * first + second).sum(-1)


@functools.cache
def uniform_levels(count: int, *, is_symmetric: bool = False) -> tuple[float, ...]:
    """The evenly spaced positive levels of least ``gaussian_error``.

    Args:
        count: Positive levels, 1 or more.
        is_symmetric: Levels ``step / 2, 3 step / 2, ...`` whose mirror images are levels too, instead of ``step, 2 step, ...`` with 0
            below them.

    Returns:
        The levels, ascending.

    Source: section 4.1, Eq. 13 and 14.
    """
    multiples = torch.arange(1, count + 1, dtype=torch.float64) - (0.5 if is_symmetric else 0.0)
    low, high = 0.1 / count, 8.0 / count
    while high - low > 1e-10:  # the error has one minimum; look around the best of 33 steps
        steps = torch.linspace(low, high, 33, dtype=torch.float64)
        best = int(gaussian_error(steps[:, None] * multiples).argmin())
        low, high = float(steps[max(best - 1, 0)]), float(steps[min(best + 1, 32)])
    return tuple((multiples * (low + high) / 2).tolist())


@functools.cache
def lloyd_levels(count: int) -> tuple[float, ...]:
    """The positive levels of least ``gaussian_error``: each is the mean of N(0, 1) over its interval.

    Found by Newton's method on that condition, which needs a few steps where Lloyd's iteration needs thousands.

    Args:
        count: Positive levels, 1 or more.

    Returns:
        The levels, ascending.

    Source: section 4.1, Eq. 13.
    """
    # dense quantizers have levels at the quantiles of the density's cube root, a Gaussian with variance 3
    quantiles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = math.sqrt(3) * torch.special.ndtri((1 + quantiles) / 2)
    for _ in range(100):
        low, high = _intervals(levels)
        mass = _mass(low, high)
        means = (_density(low) - _density(high)) / mass
        residual = levels - means
        if float(residual.abs().max()) < _NEGLIGIBLE:
            break
        by_low = _density(low) * (means - low) / mass / 2  # each midpoint moves half as far as either of its levels
        by_high = torch.where(high.isinf(), 0.0, _density(high) * (high - means) / mass / 2)
        by_low[0] = 0  # the first interval starts at 0 whatever the levels
        jacobian = torch.diag(1 - by_low - by_high) - torch.diag(by_low[1:], -1) - torch.diag(by_high[:-1], 1)
        levels = levels - torch.linalg.solve(jacobian, residual)
    return tuple(levels.tolist())


def positive_levels(bit_width: int, levels: Levels, *, is_symmetric: bool) -> tuple[float, ...]:
    """The positive levels for inputs with standard deviation 1: ``2**bit_width - 1`` beside 0, symmetric ``2**(bit_width - 1)``.

    SpecError where the authors have no constants for this bit-width.
    """
    if levels in ("authors", "authors_non_uniform"):
        if bit_width != 2 or is_symmetric:
            kind = "signed inputs" if is_symmetric else f"{bit_width} bits"
            raise SpecError(
                f"levels={levels!r}: the authors have constants for 2 bits and inputs that are not negative, not for {kind}. "
                "Use 'uniform' or 'non_uniform', which are computed."
                + (" Or set signed_inputs='rectify', where the quantizer is to be the activation function." if is_symmetric else "")
            )
        return AUTHORS_UNIFORM if levels == "authors" else AUTHORS_NON_UNIFORM
    count = 2 ** (bit_width - 1) if is_symmetric else 2**bit_width - 1
    return uniform_levels(count, is_symmetric=is_symmetric) if levels == "uniform" else lloyd_levels(count)


def half_wave_table(positive: Tensor) -> tuple[Tensor, Tensor]:
    """Boundaries and levels of the half-wave quantizer: 0 up to 0, then the positive levels with midpoints between them.

    Args:
        positive: Ascending, ``[m]``.

    Returns:
        Boundaries ``[m]`` and levels ``[m + 1]``. A value takes the level whose number is that of the boundaries below it.

    Source: section 4.1, Eq. 11 and 12.
    """
    zero = torch.zeros_like(positive[:1])
    return torch.cat([zero, (positive[1:] + positive[:-1]) / 2]), torch.cat([zero, positive])


def symmetric_table(positive: Tensor) -> tuple[Tensor, Tensor]:
    """Boundaries and levels of a quantizer with ``positive`` and their mirror images as levels; 0 takes the smallest positive one.

    Args:
        positive: Ascending, ``[m]``.

    Returns:
        Boundaries ``[2 m - 1]`` and levels ``[2 m]``.
    """
    midpoints = (positive[1:] + positive[:-1]) / 2
    below_zero = torch.full_like(positive[:1], _BELOW_ZERO)
    return torch.cat([-midpoints.flip(0), below_zero, midpoints]), torch.cat([-positive.flip(0), positive])


def gradient_factor(x: Tensor, largest: Tensor, scale: Tensor, backward: Backward, *, is_symmetric: bool = False) -> Tensor:
    """What the gradient of a level is multiplied by on its way to ``x``.

    With ``x`` for its magnitude where levels are symmetric: 0 for ``x <= 0`` (not where they are symmetric), 1 up to the largest
    level, beyond it 1 (``vanilla``), 0 (``clipped``) or ``1 / (x / scale - tau)`` with ``tau = largest / scale - 1`` (``log_tailed``).

    Args:
        x: Values.
        largest: The largest level.
        scale: Standard deviation that the levels were made for.
        backward: The rule.
        is_symmetric: Whether negative values have levels.

    Source: section 4.2, Eq. 16, 17 and 19.
    """
    size = x.abs() if is_symmetric else x
    passes = torch.ones_like(x) if is_symmetric else (x > 0).to(x.dtype)
    if backward == "vanilla":
        return passes
    if backward == "clipped":
        return passes * (size <= largest)
    return passes / (1 + (size - largest).clamp(min=0) / scale)


class GaussianQuantizer(TableQuantizer):
    """Fixed levels, optimal for a Gaussian or its positive half, times ``scale``.

    Forward: the level whose number is that of the boundaries below ``x``; boundaries lie midway between levels, but half-wave the
    first is 0, so that every positive value is at least the first level. Backward: ``gradient_factor``.

    Args:
        bit_width: 1 to 8.
        is_symmetric: Whether negative values have levels.
        levels: ``uniform``, ``non_uniform``, ``authors`` or ``authors_non_uniform`` (two positive levels).
        backward: ``clipped``, ``vanilla`` or ``log_tailed``.
        has_unit_scale: Whether inputs have the standard deviation 1; else it is measured when initialized.

    All bit-widths share the scale; the authors' constants are for 2 bits alone.
    """

    tables = ("scale",)

    def __init__(
        self,
        bit_width: int,
        *,
        is_symmetric: bool = False,
        levels: Levels = "uniform",
        backward: Backward = "clipped",
        has_unit_scale: bool = False,
    ) -> None:
        super().__init__(bit_width, Granularity.tensor())
        self.scale: Tensor
        self.unit_levels: Tensor
        self.is_symmetric, self.backward, self.has_unit_scale = is_symmetric, backward, has_unit_scale
        self.levels: Levels = levels
        self.register_buffer("unit_levels", self._unit_levels(), persistent=False)

    @property
    def bit_widths(self) -> Sequence[int]:
        return (2,) if self.levels in ("authors", "authors_non_uniform") else range(1, 9)

    def resize(self) -> None:
        self.unit_levels = self._unit_levels().to(self.unit_levels.device)

    def _unit_levels(self) -> Tensor:
        return torch.tensor(positive_levels(self.bit_width, self.levels, is_symmetric=self.is_symmetric))

    def initialize(self, x: Tensor) -> None:
        """``scale = sqrt(mean x**2)`` over the values that are not rectified away; 1 where there are none."""
        values = x.detach().float().flatten()
        used = values if self.is_symmetric else values[values > 0]
        deviation = used.square().mean().sqrt() if len(used) else values.new_zeros(())
        is_used = not self.has_unit_scale and bool(deviation > 0) and bool(torch.isfinite(deviation))
        self._set_table("scale", deviation if is_used else torch.ones_like(deviation))

    def table(self) -> tuple[Tensor, Tensor]:
        """Boundaries ``[2**bit_width - 1]`` and levels ``[2**bit_width]``; levels that the table lacks repeat the last one."""
        make = symmetric_table if self.is_symmetric else half_wave_table
        boundaries, levels = make(self.unit_levels.float() * self.scale.float())
        missing = 2**self.bit_width - len(levels)
        return torch.cat([boundaries, boundaries.new_full((missing,), math.inf)]), torch.cat([levels, levels[-1:].expand(missing)])

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        boundaries, levels = self.table()
        if torch.compiler.is_exporting():
            marked: Tensor = mark_codebook(values, boundaries, levels)
            return marked.to(x.dtype)
        y = levels[count_below(values.detach(), boundaries)]
        if not (torch.is_grad_enabled() and x.requires_grad):
            return y.to(x.dtype)
        factor = gradient_factor(values.detach(), levels[-1], self.scale, self.backward, is_symmetric=self.is_symmetric)
        return pass_gradient(values * factor, y).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        boundaries, levels = self.table()
        codes = count_below(x.detach().float(), boundaries).to(torch.uint8)
        return QTensor(codes, CodebookDecoder(levels[None], self.granularity), self.bit_width)


@register(
    MethodInfo(
        name="hwgq",
        title="Deep Learning with Low Precision by Half-wave Gaussian Quantization",
        paper="Cai, He, Sun, Vasconcelos, CVPR 2017",
        url="https://arxiv.org/abs/1702.00953",
        section="quantization_aware",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="exact",
        summary="binary weights, activations on levels that suit half a Gaussian",
        evidence="checked against the authors' code (the log-tailed gradient is in the paper only)",
        margin_points=50,
    )
)
@dataclass
class Hwgq(TrainingMethod):
    """Binary weights, half-wave Gaussian activations.

    Attributes:
        backward: ``clipped`` (gradients stop at the largest level), ``vanilla`` (those of a ReLU) or ``log_tailed`` (they fade).
        levels: ``uniform``, ``non_uniform``, or for 2 bits ``authors`` (0.538, 1.076, 1.614) or ``authors_non_uniform`` (0.453, 1.51).
        input_scale: ``measured`` (levels times the standard deviation in the first batch) or ``unit`` (as in the paper, for inputs
            from a batch norm without scale and shift).
        signed_inputs: Where inputs can be negative, ``symmetric`` (levels on both sides of 0), ``rectify`` (negative values become 0,
            as in the paper, whose quantizer is also the activation function), or ``sign`` (1 bit is -1 and 1 with the gradient of a hard
            tanh, which the paper compares with; more bits are symmetric).
        weight_scale: Multiply the signs of a filter by its mean magnitude.
    """

    ends = "float"

    backward: Backward = "clipped"
    levels: Levels = "uniform"
    input_scale: Literal["measured", "unit"] = "measured"
    signed_inputs: Literal["symmetric", "rectify", "sign"] = "symmetric"
    weight_scale: bool = True

    def default_recipe(self) -> Recipe:
        """VGG-small on CIFAR-10: 100000 iterations."""
        return Recipe(200, 100, OptimizerSpec(learning_rate=0.01, weight_decay=5e-4, schedule="linear"))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return ScaledSignQuantizer(granularity=Granularity.channel(slot.channel_axis), has_scale=self.weight_scale)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        if slot.is_signed and slot.bit_width == 1 and self.signed_inputs == "sign":
            return SignQuantizer(is_closed=True)
        return GaussianQuantizer(
            slot.bit_width,
            is_symmetric=slot.is_signed and self.signed_inputs != "rectify",
            levels=self.levels,
            backward=self.backward,
            has_unit_scale=self.input_scale == "unit",
        )
