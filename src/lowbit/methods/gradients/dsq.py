"""DSQ: the derivative of a staircase of tanh curves, whose sharpness is learned with the clipping range.

Paper: Gong, Liu, Jiang, Li, Hu, Lin, Yu, Yan 2019, "Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural
    Networks", ICCV. Section 3.2 (Eq. 3-8, the soft curve), section 3.3 (learned sharpness), section 3.4 (learned range).
Symbols: l and u -> lower and upper, alpha -> alpha, Delta -> step, Q_S -> the soft curve, Q_H -> the forward pass.
Differs from the paper:
    - The forward pass is the hard one, as in the paper's algorithm 1, so that training sees the values that are exported.
    - ``alpha_decay`` has a default of this library, as the paper gives none.
    - Ranges of weights start at 2.6 standard deviations around the mean, as in the authors' later toolkit, and ranges of activations at the
      least squared error, which suits inputs of any distribution.
    - ``bounds="observed"`` selects that toolkit's variant: an affine grid that follows the data, and a fixed alpha.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.options import AtLeast, Interval
from lowbit.qat import Slot, TrainingMethod
from lowbit.quantizers import Quantizer
from lowbit.quantizers.affine import affine_parameters
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import SoftTanh
from lowbit.surrogates.dsq import SHARPEST, SOFTEST

SMALLEST_WIDTH = 1e-4
WEIGHT_SPREAD = 2.6  # standard deviations
OBSERVER_MOMENTUM = 0.9  # of activation ranges that follow the data
LEARNED_ALPHA, FIXED_ALPHA = 0.2, 0.4


def spread_range(rows: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """``mean -+ spread * std`` of each row; a single value has no spread."""
    mean = rows.mean(1)
    half = spread * rows.std(1) if rows.shape[1] > 1 else torch.zeros_like(mean)
    return mean - half, mean + half


class DsqQuantizer(GridQuantizer):
    """Uniform levels between a learned ``lower`` and ``upper``, ends included.

    Forward: ``lower + step * round((clamp(x, lower, upper) - lower) / step)`` with ``step = (upper - lower) / (2**k - 1)``.
    Backward: that of ``SoftTanh`` for the rounding (its ``alpha`` is learned too), everything else by differentiation.
    All bit-widths share the bounds and alpha.

    Args:
        bit_width: 1 to 8.
        spread: Initial range in standard deviations around the mean (weights); ``None``: the range of least squared error.
        alpha: Initial sharpness.
        alpha_decay: ``penalty`` is ``alpha_decay * alpha**2``.
        granularity: Which elements share bounds; not with ``spans_data``.
        momentum: Use ``(1 - momentum) * running + momentum * learned`` bounds in training, the running ones in evaluation; ``None``:
            the learned bounds. The running bounds are where the learned ones started.
        spans_data: Whether the levels span the clipped values from the smallest to the largest instead of the bounds.
    """

    tables = ("running_lower", "running_upper", "lower", "upper")
    bit_widths = range(1, 9)

    def __init__(
        self,
        bit_width: int,
        *,
        spread: float | None = None,
        alpha: float = LEARNED_ALPHA,
        granularity: Granularity | None = None,
        alpha_decay: float = 0.0,
        momentum: float | None = None,
        spans_data: bool = False,
    ) -> None:
        super().__init__(bit_width, *self.code_range(bit_width), granularity=granularity, surrogate=SoftTanh(alpha))
        self.spread, self.alpha_decay, self.momentum, self.spans_data = spread, alpha_decay, momentum, spans_data
        for name in ("lower", "upper"):
            del self._buffers[name]
            self.register_parameter(name, nn.Parameter(torch.tensor(float("nan"))))
        self.lower: Tensor
        self.upper: Tensor
        self.running_lower: Tensor
        self.running_upper: Tensor

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    def initialize(self, x: Tensor) -> None:
        values = x.detach().float()
        if self.spread is not None:
            lower, upper = spread_range(self.granularity.flatten(values), self.spread)
        else:
            observer = make_observer("mse", self.granularity)
            observer.observe(values, is_all=True)
            scale, zero_point = observer.parameters(self.qmin, self.qmax, symmetric=False)
            lower, upper = -zero_point * scale, (self.qmax - zero_point) * scale
        shape = self.granularity.scale_shape(x)
        self.set_bounds(lower.reshape(shape), torch.where(upper - lower > SMALLEST_WIDTH, upper, lower + 1).reshape(shape))

    def set_bounds(self, lower: Tensor, upper: Tensor) -> None:
        """Start at these bounds, learned and running."""
        for name, value in (("lower", lower), ("upper", upper)):
            self._set_table(name, value)
            self._set_table(f"running_{name}", value)

    def bounds(self) -> tuple[Tensor, Tensor]:
        """Where values are clipped; differentiable in the learned bounds."""
        if self.momentum is None:
            return self.lower, self.upper
        if not self.training:
            return self.running_lower, self.running_upper
        rest = 1 - self.momentum
        return rest * self.running_lower + self.momentum * self.lower, rest * self.running_upper + self.momentum * self.upper

    def prepare(self, x: Tensor) -> Tensor:
        return torch.clamp(x, *self.bounds()) if self.spans_data else x

    def grid(self, x: Tensor) -> Grid:
        lower, upper = self.bounds()
        if self.spans_data:
            clipped = self.prepare(x)
            lower, upper = clipped.amin(), clipped.amax()
            upper = torch.where(upper > lower, upper, lower + 1)
        step = (upper - lower) / self.qmax
        return Grid(lower, step, step, -lower / step)

    def penalty(self) -> Tensor:
        if not (self.alpha_decay and isinstance(self.surrogate, SoftTanh)):
            return super().penalty()
        return self.alpha_decay * self.surrogate.alpha.square().reshape(())

    @torch.no_grad()
    def project(self) -> None:
        """Keep the range from closing and the sharpness in ``0.001 .. 0.5``."""
        self.upper.copy_(torch.maximum(self.upper, self.lower + SMALLEST_WIDTH))
        if isinstance(self.surrogate, SoftTanh):
            self.surrogate.alpha.clamp_(SHARPEST, SOFTEST)


class ObservedDsqQuantizer(GridQuantizer):
    """An affine grid with integer zero points that follows the data, and the soft gradient of fixed sharpness.

    Forward: ``(clamp(round(x / scale + zero_point), 0, 2**k - 1) - zero_point) * scale``. Backward: that of ``SoftTanh`` to ``x``; scale
    and zero point get none. Every training pass sets them: for weights from ``mean -+ 2.6 std``, for activations from moving averages
    (0.9) of the mean over samples of each sample's least and largest value. Evaluation leaves them. All bit-widths share the range.

    Args:
        bit_width: 2 to 8.
        is_weight: Whether it quantizes weights; else activations.
        granularity: Which elements share a scale.
        alpha: Sharpness.
    """

    tables = ("scale", "zero_point", "running_lower", "running_upper")
    tables_by_width = ("scale", "zero_point")
    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, is_weight: bool, granularity: Granularity | None = None, alpha: float = FIXED_ALPHA) -> None:
        super().__init__(bit_width, *self.code_range(bit_width), granularity=granularity, surrogate=SoftTanh(alpha, is_learned=False))
        if bit_width == 1:
            raise SpecError("dsq: bounds=observed needs at least 2 bits, as one of its levels is always 0. Use bounds=learned for 1 bit.")
        self.is_weight = is_weight
        self.scale: Tensor
        self.zero_point: Tensor
        self.running_lower: Tensor
        self.running_upper: Tensor

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    def carry_over(self, old_bits: int) -> None:
        self._set_range(self.running_lower, self.running_upper)

    def initialize(self, x: Tensor) -> None:
        self._follow(x.detach().float(), keep=0.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not torch.compiler.is_exporting():
            self._follow(x.detach().float(), keep=0.0 if self.is_weight else OBSERVER_MOMENTUM)
        return super().forward(x)

    def grid(self, x: Tensor) -> Grid:
        # copies, as the next pass changes the tables in place while this one's graph may still be alive
        scale, zero_point = self.scale.clone(), self.zero_point.clone()
        return Grid(-zero_point * scale, scale, scale, zero_point)

    @torch.no_grad()
    def _follow(self, values: Tensor, keep: float) -> None:
        if not values.numel():
            return
        if self.is_weight:
            lower, upper = spread_range(self.granularity.flatten(values), WEIGHT_SPREAD)
        else:
            samples = values.reshape(len(values) if values.dim() else 1, -1)
            lower, upper = samples.amin(1).mean(), samples.amax(1).mean()
        if keep:
            lower, upper = keep * self.running_lower + (1 - keep) * lower, keep * self.running_upper + (1 - keep) * upper
        shape = self.granularity.scale_shape(values)
        self._set_range(lower.reshape(shape), upper.reshape(shape))

    def _set_range(self, lower: Tensor, upper: Tensor) -> None:
        scale, zero_point = affine_parameters(lower, upper, self.qmin, self.qmax, symmetric=False)
        self._put(running_lower=lower, running_upper=upper)
        self.set_parameters(scale, zero_point)

    @torch.no_grad()
    def set_parameters(self, scale: Tensor, zero_point: Tensor) -> None:
        """Take this grid; both must broadcast with ``granularity.broadcast(x)``."""
        self._put(scale=scale, zero_point=zero_point)

    def _put(self, **tables: Tensor) -> None:
        for name, value in tables.items():
            current = self.get_buffer(name)
            if current.shape == value.shape:
                current.copy_(value)
            else:
                self._set_table(name, value)


@register(
    MethodInfo(
        name="dsq",
        title="Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural Networks",
        paper="Gong, Liu, Jiang, Li, Hu, Lin, Yu, Yan, ICCV 2019",
        url="https://arxiv.org/abs/1908.05033",
        section="gradients",
        axes=("weight_quantizer", "activation_quantizer", "surrogate"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="equations",
        summary="a tanh staircase as derivative, its sharpness and range learned",
        evidence="checked against two re-implementations, one by the same group",
        margin_points=60,
    )
)
@dataclass
class Dsq(TrainingMethod):
    """Learned sharpness and ranges.

    Attributes:
        alpha: Sharpness at the start, 0.001 (close to the step) to 0.5. ``none``: 0.2, or 0.4 where it is fixed.
        alpha_decay: Weight of ``alpha**2`` in the loss; the paper constrains the norm of alpha without saying how strongly.
        bounds: ``learned``: by gradients; ``blended``: a tenth of the learned bound plus nine tenths of its start; ``observed``: an
            affine grid that follows the data, with a fixed alpha, for 2 bits or more.
        weight_granularity: ``per_tensor``, ``per_channel`` or ``group:SIZE``.
    """

    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 0.1
    alpha: Annotated[float | None, Interval(SHARPEST, SOFTEST)] = None
    alpha_decay: Annotated[float, AtLeast(0)] = 0.0
    bounds: Literal["learned", "blended", "observed"] = "learned"
    weight_granularity: str = "per_tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        Granularity.parse(self.weight_granularity)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        return self._quantizer(slot.bit_width, granularity, WEIGHT_SPREAD if slot.bit_width > 1 else 1.0)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return self._quantizer(slot.bit_width, Granularity.tensor(), None)

    def _quantizer(self, bit_width: int, granularity: Granularity, spread: float | None) -> Quantizer:
        if self.bounds == "observed":
            alpha = FIXED_ALPHA if self.alpha is None else self.alpha
            return ObservedDsqQuantizer(bit_width, is_weight=spread is not None, granularity=granularity, alpha=alpha)
        return DsqQuantizer(
            bit_width,
            spread=spread,
            granularity=granularity,
            alpha=LEARNED_ALPHA if self.alpha is None else self.alpha,
            alpha_decay=self.alpha_decay,
            momentum=0.1 if self.bounds == "blended" else None,
        )
