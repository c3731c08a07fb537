"""IR-Net: binary weights from balanced, standardized filters with power-of-two scales, and a gradient that steepens.

Paper: Qin, Gong, Liu, Shen, Wei, Yu, Song 2020, "Forward and Backward Information Retention for Accurate Binary Neural Networks",
    CVPR. Section 3.2 (Libra parameter binarization, Eq. 7-10), section 3.3 (error-decay estimator, Eq. 12-15).
Symbols: w_std -> standardized, s -> exponent, t -> steepness, k -> height.
Differs from the paper:
    - Zero counts as positive, because one bit has no third level.
    - A filter of equal weights, or of a single weight, is not divided by its standard deviation, which is 0.
    - ``hardtanh`` replaces ``nn.ReLU`` modules where inputs are binary, as the paper's networks have Hardtanh there; where inputs are never
      negative nonetheless, a batch norm is inserted before the sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.network.layers import replace_modules
from lowbit.options import Above
from lowbit.qat import OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.attach.input_norm import insert_with_norms
from lowbit.qat.attach.shortcuts import Shortcuts, change_network
from lowbit.quantizers import Quantizer, ScaledSignQuantizer, SignQuantizer
from lowbit.quantizers.qtensor import BinaryDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import ErrorDecay, Surrogate


def standardize(weight: Tensor, granularity: Granularity) -> Tensor:
    """``(w - mean) / std`` for each filter, unbiased; differentiable through both. Source: Eq. 8.

    A filter of one weight is left unchanged. One whose weights are equal up to rounding becomes 0 without division.
    """
    rows = granularity.flatten(weight)
    if rows.shape[1] < 2:
        return weight
    centred = rows - rows.mean(1, keepdim=True)
    variance = centred.square().sum(1, keepdim=True) / (rows.shape[1] - 1)
    numbers = torch.finfo(rows.dtype)
    rounding = 8 * numbers.eps * rows.detach().abs().amax(1, keepdim=True)  # of the mean: its signs would be noise, its inverse immense
    is_flat = variance <= rounding.square().clamp(min=numbers.tiny)
    deviation = torch.where(is_flat, torch.ones_like(variance), variance).sqrt()
    centred = torch.where(is_flat, centred - centred.detach(), centred)
    return granularity.unflatten(centred / deviation, weight.shape)


class LibraWeight(ScaledSignQuantizer):
    """Two levels ``-2**s`` and ``+2**s`` for each filter.

    Forward: ``2**s`` where ``standardize(w) >= 0``, else ``-2**s``, with ``s = round(log2(mean |standardize(w)|))``.
    Backward: the surrogate's at the standardized weight times ``2**s``, then through the standardization; nothing through ``s``.
    Source: Eq. 7-10.
    """

    def __init__(self, *, granularity: Granularity, t_min: float = 0.1, t_max: float = 10.0) -> None:
        super().__init__(granularity=granularity)
        self.surrogate: Surrogate = ErrorDecay(t_min, t_max)

    def scale(self, x: Tensor) -> Tensor:
        mean = super().scale(standardize(x, self.granularity)).detach()
        return torch.where(mean > 0, torch.exp2(mean.log2().round()), torch.ones_like(mean))

    def proxy(self, x: Tensor) -> Tensor:
        standardized = standardize(x, self.granularity)
        return (2 * self.surrogate((standardized + 1) / 2, 0, 1) - 1) * self.scale(x)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        values = x.detach().float()
        codes = (standardize(values, self.granularity) >= 0).to(torch.uint8)
        return QTensor(codes, BinaryDecoder(self.scale(values), self.granularity), 1)


@register(
    MethodInfo(
        name="ir_net",
        title="Forward and Backward Information Retention for Accurate Binary Neural Networks",
        paper="Qin, Gong, Liu, Shen, Wei, Yu, Song, CVPR 2020",
        url="https://arxiv.org/abs/1909.10788",
        section="binary",
        axes=("weight_quantizer", "activation_quantizer", "surrogate"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=range(1, 2),
        needs=("labels",),
        fidelity="exact",
        summary="standardized binary weights with powers of two as scales, a gradient that turns from a line into the sign",
        evidence="checked against the authors' code",
        margin_points=45,
    )
)
@dataclass
class IrNet(TrainingMethod):
    """Balanced binary weights and the error-decay estimator.

    Attributes:
        t_min, t_max: Steepness of the estimator in the first and (nearly) in the last epoch; one of the authors' scripts starts at 0.001.
        hardtanh: Where inputs are binary, replace ``nn.ReLU`` modules by Hardtanh, as in the paper's networks.
        shortcuts: Where inputs are binary, give each convolution of a residual block its own shortcut, as the paper's ResNet-20 has:
            ``auto``: if the network has residual blocks; ``yes``: an error if it has none; ``no``.
    """

    ends = "float"

    t_min: Annotated[float, Above(0)] = 0.1
    t_max: Annotated[float, Above(0)] = 10.0
    hardtanh: bool = True
    shortcuts: Shortcuts = "auto"

    def default_recipe(self) -> Recipe:
        """ResNet-20 on CIFAR-10."""
        return Recipe(400, 128, OptimizerSpec(learning_rate=0.1))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t_min > self.t_max:
            raise SpecError(f"ir_net: t_min must be at most t_max, got {self.t_min} and {self.t_max}")

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return LibraWeight(granularity=Granularity.channel(slot.channel_axis), t_min=self.t_min, t_max=self.t_max)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        quantizer = SignQuantizer()
        quantizer.surrogate = ErrorDecay(self.t_min, self.t_max)
        return quantizer

    def attach(self, job: QatJob) -> None:
        if job.activation_bits:
            relu = nn.Hardtanh if self.hardtanh else nn.ReLU
            change_network(job, self.shortcuts, lambda _: relu(), relu)
            if self.hardtanh and (count := replace_modules(job.model, nn.ReLU, nn.Hardtanh)):
                job.table.note(f"Hardtanh stands in the place of {count} ReLUs")
        insert_with_norms(job, self.weight_quantizer, self.activation_quantizer, self.initialize_layer)

    def before_step(self, run: TrainRun) -> None:
        """The estimator is the same for a whole epoch."""
        for module in run.model.modules():
            if isinstance(module, ErrorDecay):
                module.set_progress(run.epochs_done / run.epochs)
