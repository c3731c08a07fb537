"""Bi-Real Net: a shortcut around every binary convolution, a parabola for the derivative of the sign, weights with magnitude.

Paper: Liu, Wu, Luo, Yang, Liu, Cheng 2018, "Bi-Real Net: Enhancing the Performance of 1-bit CNNs With Improved Representational
    Capability and Advanced Training Algorithm", ECCV. Section 3.2 (shortcuts), section 3.3 (ApproxSign, magnitude-aware gradient,
    initialization).
Symbols: alpha -> scale, W -> weight, F -> ``approx_sign``.
Differs from the paper:
    - Zero counts as positive, because one bit has no third level.
    - By default the network trains as in the authors' PyTorch release: no gradient through the scale, weights pass gradients within
      [-1, 1], all in one step. ``weight_gradient``, ``pretraining`` and ``retrain_norms`` select what the paper describes.
    - Weights start from the given network; ``weight_init="uniform"`` draws them from [0, 0.001) as the release does.
    - ReLU modules become the identity where inputs are binary, because the signs behind a ReLU would all be equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.network import insert
from lowbit.options import AtLeast, Interval
from lowbit.qat import OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.attach.input_norm import insert_with_norms
from lowbit.qat.attach.shortcuts import Shortcuts, change_network
from lowbit.quantizers import Quantizer, ScaledSignQuantizer, SignQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import ApproxSign

WeightGradient = Literal["release", "magnitude_aware", "caffe"]
LEAK = 0.1


def leaky_clip(x: Tensor, slope: float = LEAK) -> Tensor:
    """``x`` in [-1, 1], beyond it a line of this slope: the activation of the pre-trained network. Source: section 3.3."""
    clipped = x.clamp(-1, 1)
    return clipped + slope * (x - clipped)


class BiRealWeight(ScaledSignQuantizer):
    """Two levels ``-scale`` and ``+scale`` for each filter, with ``scale = mean |w|`` of the current weights.

    Forward: ``scale`` where ``w >= 0``, else ``-scale``; ``w`` itself while ``is_real`` in training. Backward: ``release``: 1 where
    ``|w| <= 1``, else 0; ``magnitude_aware``: ``scale`` where ``-1 < w <= 1``, else 0; ``caffe``: 1. Source: section 3.3.
    """

    def __init__(self, *, granularity: Granularity, gradient: WeightGradient = "release") -> None:
        super().__init__(granularity=granularity)
        self.gradient, self.is_real = gradient, False

    def proxy(self, x: Tensor) -> Tensor:
        if self.gradient == "caffe":
            return x
        if self.gradient == "release":
            return x.clamp(-1, 1)
        inside = (x.detach() > -1) & (x.detach() <= 1)
        return x * (self.scale(x.detach()) * inside)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.is_real and self.training else super().forward(x)


class BiRealActivation(SignQuantizer):
    """The sign with the gradient ``max(2 - 2|x|, 0)``; a clip at -1 and 1 in its place while a network is pre-trained.

    Attributes:
        form: ``sign``, or in training ``leaky_clip`` or ``clip``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.surrogate = ApproxSign()
        self.form: Literal["sign", "leaky_clip", "clip"] = "sign"

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "sign" or not self.training:
            return super().forward(x)
        return leaky_clip(x, LEAK if self.form == "leaky_clip" else 0.0)


@register(
    MethodInfo(
        name="bi_real_net",
        title="Bi-Real Net: Enhancing the Performance of 1-bit CNNs",
        paper="Liu, Wu, Luo, Yang, Liu, Cheng, ECCV 2018",
        url="https://arxiv.org/abs/1808.00278",
        section="binary",
        axes=("weight_quantizer", "activation_quantizer", "surrogate", "surgery", "procedure"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=range(1, 2),
        needs=("labels",),
        fidelity="exact",
        summary="a shortcut around every binary convolution, a better derivative of the sign",
        evidence="checked against the authors' PyTorch release and their Caffe source",
        margin_points=50,
    )
)
@dataclass
class BiRealNet(TrainingMethod):
    """Shortcuts, ApproxSign, scaled binary weights.

    Attributes:
        weight_gradient: Gradient of the weights: ``release``: as in the authors' PyTorch code; ``magnitude_aware``: as in the paper;
            ``caffe``: as in their Caffe layer.
        shortcuts: Give each convolution of a residual block its own shortcut where inputs are binary: ``auto``: if the network has
            residual blocks; ``yes``: an error if it has none; ``no``.
        weight_init: ``keep`` the weights, or draw them ``uniform`` from [0, 0.001), as the release does for training from scratch.
        pretraining: Share of the epochs in which weights are real and activations are clipped, with a leak in the first half.
        retrain_norms: Epochs at the end in which binary weights are fixed without their scale and everything else is trained.
    """

    ends = "float"

    weight_gradient: WeightGradient = "release"
    shortcuts: Shortcuts = "auto"
    weight_init: Literal["keep", "uniform"] = "keep"
    pretraining: Annotated[float, Interval(0, 1, closed="left")] = 0.0
    retrain_norms: Annotated[int, AtLeast(0)] = 0

    def default_recipe(self) -> Recipe:
        """ImageNet from scratch, in the authors' PyTorch program; it smooths labels by 0.1."""
        return Recipe(256, 512, OptimizerSpec("adam", 1e-3, weight_decay=0.0, schedule="linear"))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return BiRealWeight(granularity=Granularity.channel(slot.channel_axis), gradient=self.weight_gradient)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return BiRealActivation()

    def attach(self, job: QatJob) -> None:
        if job.activation_bits:
            change_network(job, self.shortcuts)

        def weight_quantizer(slot: Slot) -> Quantizer:
            weight = insert.float_weight(slot.layer, slot.parameter)
            if self.weight_init == "uniform" and weight.requires_grad:
                weight.data.copy_(torch.rand(weight.shape, generator=generator) * 1e-3)
            return self.weight_quantizer(slot)

        generator = job.generator()
        insert_with_norms(job, weight_quantizer, self.activation_quantizer, self.initialize_layer)

    def phases(self, recipe: Recipe) -> list[Phase]:
        optimizers = self.optimizers(recipe)
        real = round(recipe.epochs * self.pretraining)
        last = min(self.retrain_norms, max(recipe.epochs - real - 1, 0))
        rest = {role: spec for role, spec in optimizers.items() if role != "weights"}
        epochs = {"leaky clip": (real + 1) // 2, "clip": real // 2, "binary": recipe.epochs - real - last, "norms": last}
        return [Phase(name, count, rest if name == "norms" else optimizers, recipe.clip_norm) for name, count in epochs.items() if count]

    def start_phase(self, run: TrainRun) -> None:
        """Real or binary weights and activations, with or without their scale."""
        name = run.phase.name
        for quantizer in run.quantizers():
            if isinstance(quantizer, BiRealWeight):
                quantizer.is_real, quantizer.has_scale = name in ("leaky clip", "clip"), name != "norms"
            elif isinstance(quantizer, BiRealActivation):
                quantizer.form = "leaky_clip" if name == "leaky clip" else "clip" if name == "clip" else "sign"
