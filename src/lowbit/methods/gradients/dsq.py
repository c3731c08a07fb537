"""DSQ: the derivative of a staircase of tanh curves, whose sharpness is learned with the clipping range.

Paper: Gong, Liu, Jiang, Li, Hu, Lin, Yu, Yan 2019, "Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural
    Networks", ICCV. Section 3.2 (Eq. 3-8, the soft curve), section 3.3 (learned sharpness), section 3.4 (learned range).
Symbols: l and u -> lower and upper, alpha -> alpha, Delta -> step, Q_S -> the soft curve, Q_H -> the forward pass.
Deviations: the forward pass is the hard one, as in the paper's algorithm 1; ``alpha_decay`` is not given in the paper; ranges start at
    2.6 standard deviations around the mean for weights, as in the authors' later toolkit, and at the least squared error for activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.observers import make_observer
from lowbit.quantizers.uniform import fake_quantize
from lowbit.registry import MethodInfo, register
from lowbit.surrogates import SoftTanh
from lowbit.train import Slot, TrainingMethod

SMALLEST_WIDTH = 1e-4
WEIGHT_SPREAD = 2.6  # standard deviations


def soft_fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, alpha: float) -> Tensor:
    """A fixed affine grid with the soft gradient of fixed sharpness ``alpha``; the form of the authors' later toolkit.

    Forward: ``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``. Backward: that of ``SoftTanh``.
    """
    return fake_quantize(x, scale, zero_point, qmin, qmax, SoftTanh(alpha).to(x.device))


class DsqQuantizer(GridQuantizer):
    """Uniform levels between a learned ``lower`` and ``upper``, ends included.

    Forward: ``lower + step * round((clamp(x, lower, upper) - lower) / step)`` with ``step = (upper - lower) / (2**k - 1)``.
    Backward: that of ``SoftTanh`` for the rounding (its ``alpha`` is learned too), everything else by differentiation.

    Args:
        bit_width: 1 to 8.
        spread: Start at so many standard deviations around the mean (weights); ``None``: at the range of least squared error.
        alpha: Sharpness at the start.
        alpha_decay: ``penalty`` is ``alpha_decay * alpha**2``.
        momentum: Use ``(1 - momentum) * running + momentum * learned`` bounds in training, the running ones in evaluation; ``None``:
            the learned bounds. The running bounds are where the learned ones started.
        spans_data: The levels span the clipped values from the least to the largest instead of the bounds.
    """

    tables = ("running_lower", "running_upper")

    def __init__(
        self,
        bit_width: int,
        *,
        spread: float | None = None,
        alpha: float = 0.2,
        alpha_decay: float = 0.0,
        momentum: float | None = None,
        spans_data: bool = False,
    ) -> None:
        super().__init__(bit_width, 0, 2**bit_width - 1, surrogate=SoftTanh(alpha))
        self.spread, self.alpha_decay, self.momentum, self.spans_data = spread, alpha_decay, momentum, spans_data
        self.lower, self.upper = (nn.Parameter(torch.tensor(float("nan"))) for _ in range(2))
        self.running_lower: Tensor
        self.running_upper: Tensor

    def initialize(self, x: Tensor) -> None:
        values = x.detach().float()
        if self.spread is not None:
            half = self.spread * (values.std() if values.numel() > 1 else values.abs().sum())
            lower, upper = values.mean() - half, values.mean() + half
        else:
            observer = make_observer("mse")
            observer.observe(values, is_all=True)
            scale, zero_point = observer.parameters(self.qmin, self.qmax, symmetric=False)
            lower, upper = (-zero_point * scale).reshape(()), ((self.qmax - zero_point) * scale).reshape(())
        self.set_bounds(lower, torch.where(upper - lower > SMALLEST_WIDTH, upper, lower + 1))

    def set_bounds(self, lower: Tensor, upper: Tensor) -> None:
        """Start at these bounds, learned and running."""
        for name, value in (("lower", lower), ("upper", upper)):
            getattr(self, name).data.copy_(value)
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
        return self.alpha_decay * self.surrogate.alpha.square()

    @torch.no_grad()
    def project(self) -> None:
        """Keep the range from closing and the sharpness in ``0.001 .. 0.5``."""
        self.upper.clamp_(min=float(self.lower) + SMALLEST_WIDTH)
        if isinstance(self.surrogate, SoftTanh):
            self.surrogate.alpha.clamp_(1e-3, 0.5)


@register(
    MethodInfo(
        name="dsq",
        title="Differentiable Soft Quantization: Bridging Full-Precision and Low-Bit Neural Networks",
        paper="Gong, Liu, Jiang, Li, Hu, Lin, Yu, Yan, ICCV 2019",
        section="gradients",
        axes=("weight_quantizer", "activation_quantizer", "surrogate"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="the paper's equations; held against two re-implementations, one by the same group",
        summary="a tanh staircase as derivative, its sharpness and range learned",
        margin_points=60,
    )
)
@dataclass
class Dsq(TrainingMethod):
    """Learned sharpness and ranges.

    Attributes:
        alpha: Sharpness at the start, 0.001 (close to the step) to 0.5.
        alpha_decay: Weight of ``alpha**2`` in the loss; the paper constrains the norm of alpha and does not say how strongly.
        bounds: ``learned`` by gradients, or ``blended``: a tenth of the learned bound and the rest where it started.
    """

    quantizer_learning_rate: float = 0.1
    alpha: float = 0.2
    alpha_decay: float = 0.0
    bounds: Literal["learned", "blended"] = "learned"

    def __post_init__(self) -> None:
        if not 1e-3 <= self.alpha <= 0.5:
            raise SpecError(f"dsq: alpha must be 0.001 to 0.5, got {self.alpha}")

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return self._quantizer(slot.bit_width, WEIGHT_SPREAD if slot.bit_width > 1 else 1.0)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return self._quantizer(slot.bit_width, None)

    def _quantizer(self, bit_width: int, spread: float | None) -> DsqQuantizer:
        momentum = 0.1 if self.bounds == "blended" else None
        return DsqQuantizer(bit_width, spread=spread, alpha=self.alpha, alpha_decay=self.alpha_decay, momentum=momentum)
