"""Learned rounding: up or down as a rectified sigmoid, driven to 0 or 1 by a regularizer.

Paper: Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML,
    section 3.2 (rectified sigmoid, regularizer). The affine grid and the linear schedule follow Li et al. 2021 (BRECQ).
Symbols: V -> logits, h(V) -> share, s -> scale, n, p -> qmin, qmax, beta -> beta.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import LayerError, SpecError
from lowbit.options import Above, AtLeast, CheckedSettings, Interval
from lowbit.quantizers import QTensor, Quantizer, UniformQuantizer
from lowbit.quantizers.qtensor import AffineDecoder, code_dtype

ZETA, GAMMA = 1.1, -0.1  # how far the sigmoid is stretched beyond 1 and 0
CACHED_ELEMENTS = 2**16  # largest tensor that stays in a processor's cache while a dozen passes run over it
DECIDED = 0.01  # a share this close to 0 or 1 counts as decided

LossKind = Literal["mse", "fisher_diag", "fisher_full"]


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """``clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``: reaches 0 and 1 exactly, with a gradient that does not vanish near them.

    Source: Nagel et al. 2020, section 3.2.
    """
    return (torch.sigmoid(logits) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def initial_logits(weight: Tensor, scale: Tensor) -> Tensor:
    """``V`` with ``h(V) = weight / scale - floor(weight / scale)``, so that soft rounding starts at the float weight."""
    position = weight / scale
    return -torch.log((ZETA - GAMMA) / (position - position.floor() - GAMMA) - 1)


def _parts(x: Tensor) -> list[slice]:
    """Runs of the first dimension short enough for a processor's cache, where a dozen passes over them cost little; one run elsewhere."""
    rows = x.shape[0] if x.device.type != "cpu" else max(1, CACHED_ELEMENTS * x.shape[0] // max(x.numel(), 1))
    return [slice(start, start + rows) for start in range(0, x.shape[0], max(rows, 1))]


class _SoftRound(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, floor: Tensor, scale: Tensor, low: Tensor, high: Tensor, beta: float | None
    ) -> tuple[Tensor, Tensor]:
        weight, gain = torch.empty_like(logits), torch.empty_like(logits)
        pull = None if beta is None else torch.empty_like(logits)
        scale, low, high = (t.expand(logits.shape) for t in (scale, low, high))
        penalty = logits.new_zeros(())
        for part in _parts(logits):
            sigmoid = torch.sigmoid(logits[part])
            stretched = sigmoid * (ZETA - GAMMA) + GAMMA
            share = stretched.clamp(0, 1)
            slope = (sigmoid - sigmoid.square()).mul_(ZETA - GAMMA).mul_(share == stretched)
            wanted = floor[part] + share
            code = wanted.clamp(low[part], high[part])
            inside = code == wanted
            torch.mul(code, scale[part], out=weight[part])
            if beta is not None and pull is not None:
                signed = share.mul_(2).sub_(1)
                magnitude = signed.abs()
                power = magnitude.pow(beta - 1)
                penalty += magnitude.numel() - magnitude.mul_(power).sum()
                torch.mul(power.mul_(signed.sign_()).mul_(slope), -2 * beta, out=pull[part])
            torch.mul(slope.mul_(inside), scale[part], out=gain[part])
        ctx.save_for_backward(gain, pull)
        return weight, penalty

    @staticmethod
    def backward(ctx: Any, grad_weight: Tensor, grad_penalty: Tensor) -> tuple[Tensor | None, ...]:
        gain, pull = ctx.saved_tensors
        grad = grad_weight * gain
        return grad if pull is None else torch.addcmul(grad, pull, grad_penalty), None, None, None, None, None


def soft_round(
    logits: Tensor, floor: Tensor, scale: Tensor, low: Tensor, high: Tensor, *, beta: float | None = None
) -> tuple[Tensor, Tensor]:
    """Softly rounded weights and the regularizer of their logits, in one pass forward and one backward.

    ``weight = scale * clip(floor + h(V), low, high)``, ``penalty = sum 1 - |2 h(V) - 1|**beta``.
    Backward: ``d weight / dV = scale * (1.2 sigmoid(V) (1 - sigmoid(V)))`` where neither the code nor ``h`` is clipped, else 0;
    ``d penalty / dV = -2 beta |2h - 1|**(beta - 1) sign(2h - 1) dh/dV``. Only ``logits`` gets a gradient.

    Args:
        logits: ``V``, any shape.
        floor: ``floor(W / scale)``, shaped like ``logits``.
        scale: Positive, broadcasts with ``logits``.
        low, high: Least and largest code minus the zero point; tensors that broadcast with ``logits``.
        beta: Exponent of the regularizer; ``None`` for a penalty of 0 (the warm start).

    Returns:
        ``(weight, penalty)``; ``penalty`` is 0 when every ``h`` is 0 or 1 and the number of weights when every ``h`` is 1/2.

    Source: Nagel et al. 2020, section 3.2.
    """
    return _SoftRound.apply(logits, floor, scale, low, high, beta)  # type: ignore[no-any-return]


def hard_round(logits: Tensor, floor: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Codes minus the zero point after the decision: ``clip(floor + [V >= 0], low, high)``."""
    return torch.clamp(floor + (logits >= 0), low, high)


@dataclass(frozen=True)
class BetaSchedule(CheckedSettings):
    """The exponent of the regularizer over the iterations, which count from 0.

    Nothing in the first ``warm_start`` share of the iterations; then from ``start`` down to ``end``:
    cosine: ``end + (start - end) / 2 * (1 + cos(pi (t - t0) / (T - t0)))`` with ``t`` the iteration (Nagel et al. 2020, as the
    authors' AIMET computes it); linear: ``end + (start - end) max(0, 1 - (t - t0) / (T - t0))`` with ``t`` the iteration plus 1
    (BRECQ). ``t0 = warm_start * T``.
    """

    shape: Literal["cosine", "linear"]
    iterations: Annotated[int, AtLeast(0)]
    warm_start: Annotated[float, Interval(0, 1)] = 0.2
    start: Annotated[float, Above(0)] = 20.0
    end: Annotated[float, Above(0)] = 2.0

    def is_active(self, iteration: int) -> bool:
        """Whether the regularizer counts in this iteration."""
        return self._time(iteration) >= self.warm_start * self.iterations

    def beta(self, iteration: int) -> float:
        """The exponent; ``start`` during the warm start."""
        first = self.warm_start * self.iterations
        passed = max(0.0, (self._time(iteration) - first) / max(self.iterations - first, 1e-12))
        if self.shape == "cosine":
            return self.end + (self.start - self.end) / 2 * (1 + math.cos(math.pi * passed))
        return self.end + (self.start - self.end) * max(0.0, 1 - passed)

    def _time(self, iteration: int) -> int:
        return iteration if self.shape == "cosine" else iteration + 1


class _SquaredError(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, prediction: Tensor, target: Tensor) -> Tensor:
        difference = prediction - target
        ctx.save_for_backward(difference)
        norm: Tensor = torch.linalg.vector_norm(difference)
        return norm.square()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        return difference.mul_(2 * gradient), None


def squared_error(prediction: Tensor, target: Tensor) -> Tensor:
    """``sum (prediction - target)**2``, with a gradient in the memory layout of ``prediction``, which only it gets, and only once.

    PyTorch's own loss gives a contiguous gradient: behind channels-last layers that and what follows run several times slower.
    """
    return _SquaredError.apply(prediction, target)  # type: ignore[no-any-return]


def reconstruction_loss(
    prediction: Tensor, target: Tensor, *, kind: LossKind = "mse", power: float = 2.0, gradient: Tensor | None = None, channel_axis: int = 1
) -> Tensor:
    """Distance of a unit's output from the float network's, with ``D = prediction - target``.

    ``mse``: ``|D|**power`` summed over channels, averaged over everything else.
    ``fisher_diag``: ``D**2 G**2`` summed over channels, averaged over everything else.
    ``fisher_full``: ``mean(a g sum(a g)) / 100`` with ``a = |D|``, ``g = |G|``, the sum over all but the batch.

    Args:
        prediction, target: Equal shapes, ``[batch, channels, ...]``; float32.
        power: Exponent of ``mse``.
        gradient: ``G``, the task loss's gradient at the output, one per sample; shaped like ``target``.
        channel_axis: Which axis counts channels.

    Source: Nagel et al. 2020, section 3.3 (mse); Li et al. 2021, section 3.3 (Fisher); the normalisation is that of both released programs.
    """
    places = target.numel() / (target.shape[channel_axis] if target.dim() > 1 else 1)
    if kind == "mse":
        if power == 2:
            return squared_error(prediction, target) / places
        return (prediction - target).abs().pow(power).sum() / places
    if gradient is None:
        raise SpecError(f"loss {kind!r} needs the gradient at the unit's output")
    weighted = (prediction - target) * gradient
    if kind == "fisher_diag":
        return weighted.square().sum() / places
    weighted = weighted.abs().flatten(1)
    return (weighted * weighted.sum(1, keepdim=True)).mean() / 100


class AdaptiveRounding(Quantizer):
    """A weight quantizer whose rounding is being learned on the fixed grid of a ``UniformQuantizer``.

    It replaces that quantizer while its unit is reconstructed. Forward: soft weights, or the decided ones when ``is_soft`` is
    off. ``penalty()`` is the regularizer of the last soft forward pass, 0 while ``beta`` is ``None``.
    """

    def __init__(self, grid: UniformQuantizer) -> None:
        super().__init__(grid.bit_width, grid.granularity)
        self.qmin = grid.qmin
        self.scale, self.zero_point = grid.scale.detach(), grid.zero_point.detach()
        self.low, self.high = grid.qmin - self.zero_point, grid.qmax - self.zero_point
        self.beta: float | None = None
        self.is_soft = True
        self._penalty = torch.zeros(())

    def initialize(self, x: Tensor) -> None:
        """Start at the float weight ``x``."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        view = self.granularity.broadcast(x.detach().float())
        self.floor = (view / self.scale).floor()
        self.logits = nn.Parameter(initial_logits(view, self.scale))
        if not bool(torch.isfinite(self.logits).all()):
            raise LayerError("its weight holds NaN or infinite values")

    def forward(self, x: Tensor) -> Tensor:
        if self.is_soft:
            view, self._penalty = soft_round(self.logits, self.floor, self.scale, self.low, self.high, beta=self.beta)
        else:
            view = hard_round(self.logits.detach(), self.floor, self.low, self.high) * self.scale
        return self.granularity.restore(view, x.shape).to(x.dtype)

    def penalty(self) -> Tensor:
        return self._penalty

    def encode(self, x: Tensor) -> QTensor:
        codes = hard_round(self.logits.detach(), self.floor, self.low, self.high) + self.zero_point
        decoder = AffineDecoder(self.scale, self.zero_point, self.granularity)
        return QTensor(self.granularity.restore(codes, x.shape).contiguous().to(code_dtype(self.qmin)), decoder, self.bit_width)

    @property
    def undecided(self) -> int:
        """How many weights are still between down and up: ``h`` more than 0.01 away from both."""
        share = rectified_sigmoid(self.logits.detach())
        return int(((share > DECIDED) & (share < 1 - DECIDED)).sum())
