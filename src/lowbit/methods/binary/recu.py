"""ReCU: weights in the tails of their distribution are clamped before the sign, so that their gradients can move them again.

Paper: Xu, Lin, Liu, Chen, Shao, Gao, Tian, Ji 2021, "ReCU: Reviving the Dead Weights in Binary Neural Networks", ICCV.
    Section 3.2 (rectified clamp unit, Eq. 8-12), section 3.3 (entropy, Eq. 17-19), section 3.4 (tau), section 4.1 (schedule).
Symbols: w -> weight, tau -> tau, Q(tau) -> quantile, b -> spread, alpha -> scale.
Differs from the paper:
    - Zero counts as positive, because one bit has no third level.
    - ``alpha`` multiplies the binary weight instead of the layer's output, so that the scale is stored with the weight. The only
      difference is that a bias is not multiplied.
    - ``hardtanh`` replaces ``nn.ReLU`` modules, as the paper's networks have Hardtanh there; where inputs are never negative nonetheless, a
      batch norm is inserted before the sign.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.network.layers import replace_modules
from lowbit.options import Interval
from lowbit.qat import OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.attach.input_norm import insert_with_norms
from lowbit.qat.attach.shortcuts import Shortcuts, change_network
from lowbit.quantizers import Quantizer, SignQuantizer
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.qtensor import BinaryDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient
from lowbit.surrogates.approx_sign import approx_sign

EPSILON = 1e-5
E = 2.71828  # as in the authors' code


def tau_at(epoch: float, epochs: float, tau_min: float = 0.85, tau_max: float = 0.99) -> float:
    """``tau`` in an epoch: from ``tau_min`` to ``tau_max`` with ``exp(epoch / epochs)``. Source: section 4.1."""
    slope = (tau_max - tau_min) / (E - 1)
    return slope * math.exp(epoch / epochs) + tau_min - slope


def standardize(weight: Tensor, granularity: Granularity) -> Tensor:
    """``2 sqrt(2) (w - mean) / sqrt(var + 1e-5)`` for each filter, unbiased variance; differentiable through both. Source: Eq. 17.

    A filter of one weight is left unchanged.
    """
    rows = granularity.flatten(weight)
    if rows.shape[1] < 2:
        return weight
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (rows.shape[1] - 1)
    return granularity.unflatten(centred * (2 * math.sqrt(2) / torch.sqrt(variance + EPSILON)), weight.shape)


def laplace_quantile(standardized: Tensor, tau: float | Tensor) -> Tensor:
    """Quantile ``tau`` of a Laplace distribution around 0 with the spread ``mean |w|``: ``-spread ln(2 - 2 tau)``.

    Infinite for ``tau`` 1, 0 without spread; without gradient. Source: Eq. 9.
    """
    spread = standardized.detach().abs().mean()
    return -torch.xlogy(spread, 2 - 2 * torch.as_tensor(tau, dtype=spread.dtype, device=spread.device))


def clamp_tails(standardized: Tensor, tau: float | Tensor) -> Tensor:
    """``standardized`` clamped to the quantiles at ``1 - tau`` and ``tau``; gradient 1 within, else 0. Source: Eq. 8."""
    quantile = laplace_quantile(standardized, tau)
    return torch.clamp(standardized, -quantile, quantile)


class RecuWeight(TableQuantizer):
    """Two levels ``-scale`` and ``+scale`` for each filter, with a learned ``scale`` of any sign.

    Forward: ``scale`` where ``standardize(w) >= 0``, else ``-scale``. Backward: through ``clamp_tails(standardize(w))``, to the scale the
    signs. Source: Eq. 8-12 and 17.

    Args:
        granularity: Which elements form a filter.
        scale_init: ``uniform``: drawn from [0, 1), as the authors do; ``magnitude``: the filter's mean magnitude.
        generator: Draws the scales.
    """

    def __init__(
        self,
        *,
        granularity: Granularity,
        scale_init: Literal["uniform", "magnitude"] = "uniform",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(1, granularity)
        del self._buffers["scale"]
        self.scale = nn.Parameter(torch.tensor(float("nan")))
        self.register_buffer("tau", torch.ones(()))
        self.tau: Tensor
        self.scale_init, self.generator = scale_init, generator

    def initialize(self, x: Tensor) -> None:
        shape = self.granularity.scale_shape(x)
        if self.scale_init == "uniform":
            self._set_table("scale", torch.rand(shape, generator=self.generator).to(x.device))
        else:
            self._set_table("scale", self.granularity.flatten(x.detach().float().abs()).mean(1).reshape(shape))
        self.generator = None

    def forward(self, x: Tensor) -> Tensor:
        values = standardize(x.float(), self.granularity)
        signs = pass_gradient(clamp_tails(values, self.tau), torch.where(values.detach() >= 0, 1.0, -1.0))
        return (signs * self.scale).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        codes = (standardize(x.detach().float(), self.granularity) >= 0).to(torch.uint8)
        return QTensor(codes, BinaryDecoder(self.scale.detach(), self.granularity), 1)


class RecuActivation(SignQuantizer):
    """The sign, with the gradient of ApproxSign at the normalized input.

    Forward: 1 where ``x >= 0``, else -1. Backward: ``max(2 - 2|z|, 0)`` at ``z = x / sqrt(var + 1e-5)`` with the unbiased variance of each
    sample, and on through ``z``; in evaluation ``z = x``. Source: section 4.1 and the authors' code.
    """

    def proxy(self, x: Tensor) -> Tensor:
        if self.surrogate is not None:
            return super().proxy(x)
        if self.training and x.dim() > 1 and x[0].numel() > 1:
            dims = tuple(range(1, x.dim()))
            x = x / torch.sqrt(x.var(dims, keepdim=True) + EPSILON)
        return approx_sign(x)


@register(
    MethodInfo(
        name="recu",
        title="ReCU: Reviving the Dead Weights in Binary Neural Networks",
        paper="Xu, Lin, Liu, Chen, Shao, Gao, Tian, Ji, ICCV 2021",
        url="https://arxiv.org/abs/2103.12369",
        section="binary",
        axes=("weight_quantizer", "activation_quantizer", "surrogate"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=range(1, 2),
        needs=("labels",),
        fidelity="exact",
        summary="weights in the tails are clamped before the sign, ever less, so that their gradients revive",
        evidence="checked against the authors' code",
        margin_points=50,
    )
)
@dataclass
class Recu(TrainingMethod):
    """Binary weights whose tails are clamped.

    Attributes:
        tau_min, tau_max: Quantile at which weights are clamped in the first and (nearly) in the last epoch; above 0.5, at most 1.
        scale_init: Initial scales of filters: ``uniform`` from [0, 1), as the authors do, or ``magnitude``, the mean magnitude.
        hardtanh: Where inputs are binary, replace ``nn.ReLU`` modules by Hardtanh, as in the paper's networks.
        shortcuts: Where inputs are binary, give each convolution of a residual block its own shortcut, as the paper's ResNet-20 has:
            ``auto``: if the network has residual blocks; ``yes``: an error if it has none; ``no``.
    """

    ends = "float"

    tau_min: Annotated[float, Interval(0.5, 1, closed="right")] = 0.85
    tau_max: Annotated[float, Interval(0.5, 1, closed="right")] = 0.99
    scale_init: Literal["uniform", "magnitude"] = "uniform"
    hardtanh: bool = True
    shortcuts: Shortcuts = "auto"

    def default_recipe(self) -> Recipe:
        """CIFAR-10; the learning rate warms up per batch, not per epoch."""
        return Recipe(600, 256, OptimizerSpec(learning_rate=0.1, weight_decay=5e-4, warmup=5 / 600))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau_min > self.tau_max:
            raise SpecError(f"recu: tau_min must be at most tau_max, got {self.tau_min} and {self.tau_max}")

    def weight_quantizer(self, slot: Slot, generator: torch.Generator | None = None) -> Quantizer:
        return RecuWeight(granularity=Granularity.channel(slot.channel_axis), scale_init=self.scale_init, generator=generator)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return RecuActivation()

    def attach(self, job: QatJob) -> None:
        if job.activation_bits:
            relu = nn.Hardtanh if self.hardtanh else nn.ReLU
            change_network(job, self.shortcuts, lambda _: relu(), relu)
            if self.hardtanh and (count := replace_modules(job.model, nn.ReLU, nn.Hardtanh)):
                job.table.note(f"Hardtanh stands in the place of {count} ReLUs")
        weights = functools.partial(self.weight_quantizer, generator=job.generator())
        insert_with_norms(job, weights, self.activation_quantizer, self.initialize_layer)

    def start_epoch(self, run: TrainRun) -> None:
        """Set how much of the tails is clamped."""
        for quantizer in run.quantizers():
            if isinstance(quantizer, RecuWeight):
                quantizer.tau.fill_(tau_at(run.epochs_done, run.epochs, self.tau_min, self.tau_max))
