"""The quantizers of HAWQ: weights scaled by their largest magnitude, activations by a running range.

Paper: Dong, Yao, Gholami, Mahoney, Keutzer 2019, "HAWQ: Hessian AWare Quantization of Neural Networks With Mixed-Precision", ICCV, which says
    of them only that they are uniform and straight-through; as in the code that the authors published with Yao et al. 2021, "HAWQ-V3".
Symbols: k -> bit_width, n -> qmax, x_min and x_max -> lower and upper, m -> momentum, p -> percentile.
Differs from the paper: nothing that is known.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers.affine import qrange
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.spec import Granularity
from lowbit.surrogates import straight_through

SMALLEST_RANGE = 1e-8
MINMAX = -1.0  # momentum of a range that only grows


def symmetric_scale(lower: Tensor, upper: Tensor, qmax: int) -> Tensor:
    """``max(|lower|, |upper|, 1e-8) / qmax``, shaped like the bounds."""
    return torch.maximum(lower.abs(), upper.abs()).clamp(min=SMALLEST_RANGE) / qmax


def weight_range(rows: Tensor, percentile: float = 0.0) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value of each row, or its percentiles.

    With a percentile ``p > 0`` of ``n`` values: the ``ceil(n (100 - p) / 100)``-th and the ``ceil(n p / 100)``-th smallest.

    Args:
        rows: ``[scales, elements]``.
        percentile: ``p``, 0 to 100; 0: none.

    Returns:
        Two tensors ``[scales]``.
    """
    if percentile == 0:
        return rows.amin(1), rows.amax(1)
    count = rows.shape[1]
    low, high = (max(math.ceil(count * share * 0.01), 1) for share in (100 - percentile, percentile))
    return rows.kthvalue(low, dim=1).values, rows.kthvalue(high, dim=1).values


def activation_range(x: Tensor, *, is_signed: bool, percentile: float = 0.0) -> tuple[Tensor, Tensor]:
    """The smallest and the largest value, or percentiles.

    With a percentile ``p > 0`` of ``n`` values, ``k = round(n p / 100)``: the upper end is the ``k``-th smallest; the lower one 0, or where
    values are signed the ``k``-th largest.

    Args:
        x: Values of any shape.
        is_signed: Whether values can be negative.
        percentile: ``p``, 0 to 100; 0: none.

    Returns:
        Two tensors of shape ``()``.
    """
    values = x.flatten()
    if percentile == 0:
        return values.amin(), values.amax()
    count = len(values)
    upper = values.kthvalue(max(round(count * percentile * 0.01), 1)).values
    if not is_signed:
        return torch.zeros_like(upper), upper
    return -(-values).kthvalue(max(round(count * (1 - (100 - percentile) * 0.01)), 1)).values, upper


class HawqWeight(GridQuantizer):
    """Weights on a symmetric grid that follows them: nothing is stored.

    Forward: ``clamp(round(w / scale), -n - 1, n) * scale`` with ``n = 2**(k - 1) - 1`` and ``scale = max(max|w|, 1e-8) / n`` for each channel.
    Backward: 1 everywhere, also where a percentile clips; nothing through the scale.

    Args:
        bit_width: 2 to 8.
        granularity: Which elements share a scale; default: an output channel.
        percentile: See ``weight_range``.
    """

    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, granularity: Granularity | None = None, percentile: float = 0.0) -> None:
        if bit_width < 2:
            raise SpecError(f"hawq: weights need 2 to 8 bits, got {bit_width}: one bit has no level beside 0.")
        super().__init__(
            bit_width, *self.code_range(bit_width), granularity=granularity or Granularity.channel(), surrogate=straight_through
        )
        self.percentile = percentile

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return qrange(bit_width, signed=True)

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def grid(self, x: Tensor) -> Grid:
        sharing = Granularity.over(0, 1) if self.granularity.group_size else self.granularity  # groups are rows of the view
        lower, upper = weight_range(sharing.flatten(x.detach()), self.percentile)
        scale = symmetric_scale(lower, upper, self.qmax).reshape(sharing.scale_shape(x))
        zero = torch.zeros_like(scale)
        return Grid(zero, scale, scale, zero)


class HawqActivation(GridQuantizer):
    """Activations on a grid of zero point 0 whose range follows the batches of training, and stays in evaluation.

    Forward: ``clamp(round(x / scale), 0, 2**k - 1) * scale`` with ``scale = max(upper - lower, 1e-8) / (2**k - 1)``; where values can be
    negative ``clamp(round(x / scale), -n - 1, n) * scale`` with ``n = 2**(k - 1) - 1`` and ``scale = max(|lower|, |upper|, 1e-8) / n``.
    Backward: 1 everywhere, also beyond the range; nothing through the scale.

    In training each batch first moves the range: ``lower <- m lower + (1 - m) min``, ``upper`` alike. Where both are equal, as in the
    beginning, that of the batch is added to them. All bit-widths have one range. A step moves it once: several passes before ``project``
    count as one batch, so that a pass that is computed again changes nothing.

    Args:
        bit_width: 1 to 8, signed 2 to 8.
        is_signed: Whether values can be negative.
        momentum: ``m``, or -1 for the smallest and largest value so far.
        percentile: See ``activation_range``.
    """

    tables = ("lower", "upper")

    def __init__(self, bit_width: int, *, is_signed: bool = False, momentum: float = 0.95, percentile: float = 0.0) -> None:
        self.is_signed = is_signed
        if bit_width not in self.bit_widths:
            raise SpecError(f"hawq: activations that can be negative need 2 to 8 bits, got {bit_width}")
        super().__init__(bit_width, *self.code_range(bit_width), surrogate=straight_through)
        self.lower: Tensor
        self.upper: Tensor
        self.momentum, self.percentile = momentum, percentile
        self.step: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None  # the range before it, and what it has seen

    @property
    def bit_widths(self) -> range:
        return range(1 + self.is_signed, 9)

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return qrange(bit_width, signed=self.is_signed)

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Take the range of ``x`` alone."""
        self.step = None
        for name, value in zip(self.tables, self._range_of(x), strict=True):
            self._set_table(name, value)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Move the range, as it was before the step, towards that of all that the step has seen."""
        extremes, found = (torch.minimum, torch.maximum), self._range_of(x)
        (lower, upper), seen = self.step or ((self.lower.clone(), self.upper.clone()), found)
        joined = tuple(extreme(one, other) for extreme, one, other in zip(extremes, seen, found, strict=True))
        self.step = (lower, upper), (joined[0], joined[1])
        is_empty = ~(lower < upper)
        for table, start, value, extreme in zip((self.lower, self.upper), (lower, upper), joined, extremes, strict=True):
            before = start.nan_to_num()
            moved = extreme(before, value) if self.momentum == MINMAX else self.momentum * before + (1 - self.momentum) * value
            table.copy_(torch.where(is_empty, before + value, moved))

    def project(self) -> None:
        """End the step: what the next one sees moves the range as it is now."""
        self.step = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.observe(x)
        return super().forward(x)

    def grid(self, x: Tensor) -> Grid:
        if self.is_signed:
            scale = symmetric_scale(self.lower, self.upper, self.qmax)
        else:
            scale = (self.upper - self.lower).clamp(min=SMALLEST_RANGE) / self.qmax
        zero = torch.zeros_like(scale)
        return Grid(zero, scale, scale, zero)

    def _range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return activation_range(x.detach().float(), is_signed=self.is_signed, percentile=self.percentile)
