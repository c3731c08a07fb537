"""ReActNet: signs and activations with learned shifts, trained in two steps on nothing but the teacher's distribution.

Paper: Liu, Shen, Savvides, Cheng 2020, "ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions", ECCV.
    Section 4.2 (RSign, RPReLU, Eq. 2-4), section 4.3 (distributional loss, Eq. 5), section 5.1 (two steps).
Symbols: alpha -> minus shift (of RSign), beta -> slope, gamma and zeta -> shifts of RPReLU, f -> ``ShiftedPReLU``.
Differs from the paper:
    - Zero counts as positive, because one bit has no third level.
    - Without a teacher the loss is the task's, as there is no distribution to match.
    - Outside of residual blocks ReLUs stay, with a batch norm in front of a sign whose inputs are never negative, because those
      signs would all be equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.measure.outputs import output_tensor
from lowbit.methods.binary.bi_real_net import BiRealActivation, BiRealWeight
from lowbit.network import insert
from lowbit.network.layers import TRANSPOSED
from lowbit.network.surgery.shortcuts import ShiftedPReLU
from lowbit.options import AtLeast, Interval
from lowbit.qat import OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.attach.input_norm import insert_with_norms
from lowbit.qat.attach.shortcuts import Shortcuts, change_network
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity


def distribution_loss(output: Tensor, target: Tensor) -> Tensor:
    """``-mean over samples of sum_c softmax(target)_c log_softmax(output)_c``; both are logits ``[N, classes]``. Source: Eq. 5."""
    return -(functional.softmax(target, 1) * functional.log_softmax(output, 1)).sum(1).mean()


class ChannelShift(nn.Module):
    """``x + shift`` with a learned shift for each channel, 0 at the start; before a sign it is RSign with ``alpha = -shift``. Source: Eq. 2.

    Args:
        layer: The layer that follows: a convolution (channels come second) or a linear layer (features come last).
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = insert.float_weight(layer)
        channels = weight.shape[0] if isinstance(layer, TRANSPOSED) else weight.shape[1] * int(getattr(layer, "groups", 1))
        dims = len(getattr(layer, "kernel_size", ()))
        self.shift = nn.Parameter(torch.zeros(channels, *(1,) * dims, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


@register(
    MethodInfo(
        name="react_net",
        title="ReActNet: Towards Precise Binary Neural Network with Generalized Activation Functions",
        paper="Liu, Shen, Savvides, Cheng, ECCV 2020",
        url="https://arxiv.org/abs/2003.03488",
        section="binary",
        axes=("weight_quantizer", "activation_quantizer", "surrogate", "surgery", "procedure"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=range(1, 2),
        needs=("labels", "teacher"),
        fidelity="exact",
        summary="Bi-Real Net with learned shifts before signs and around PReLUs, trained on a teacher's distribution in two steps",
        evidence="checked against the authors' code",
        margin_points=20,
    )
)
@dataclass
class ReactNetMethod(TrainingMethod):
    """Learned shifts, distributional loss, two steps.

    Attributes:
        shortcuts: Give each convolution of a residual block its own shortcut and a PReLU with shifts where inputs are binary:
            ``auto``: if the network has residual blocks; ``yes``: an error if it has none; ``no``.
        real_weights: Share of the epochs in which weights are real and inputs binary.
        real_weight_decay: Weight decay of that step; the second step uses the recipe's (none in the paper).
    """

    ends = "float"

    shortcuts: Shortcuts = "auto"
    real_weights: Annotated[float, Interval(0, 1, closed="left")] = 0.5
    real_weight_decay: Annotated[float, AtLeast(0)] = 1e-5

    def default_recipe(self) -> Recipe:
        """ResNets on ImageNet, two steps of 128 epochs each; the loss uses the teacher's outputs only."""
        return Recipe(256, 512, OptimizerSpec("adam", 2.5e-3, weight_decay=0.0, schedule="linear"), distillation=1.0)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return BiRealWeight(granularity=Granularity.channel(slot.channel_axis))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return BiRealActivation()

    def attach(self, job: QatJob) -> None:
        if job.activation_bits:
            change_network(job, self.shortcuts, ShiftedPReLU)

        def activation_quantizer(slot: Slot) -> Quantizer:
            if slot.is_signed:  # elsewhere a norm precedes the sign, which shifts as well
                insert.set_input_transform(slot.layer, ChannelShift(slot.layer))
            return self.activation_quantizer(slot)

        insert_with_norms(job, self.weight_quantizer, activation_quantizer, self.initialize_layer)

    def phases(self, recipe: Recipe) -> list[Phase]:
        optimizers = self.optimizers(recipe)
        real = min(round(recipe.epochs * self.real_weights), recipe.epochs - 1)
        decayed = {**optimizers, "weights": replace(optimizers["weights"], weight_decay=self.real_weight_decay)}
        binary = Phase("binary", recipe.epochs - real, optimizers, recipe.clip_norm)
        return [Phase("real weights", real, decayed, recipe.clip_norm), binary] if real else [binary]

    def start_phase(self, run: TrainRun) -> None:
        """Real or binary weights."""
        for quantizer in run.quantizers():
            if isinstance(quantizer, BiRealWeight):
                quantizer.is_real = run.phase.name == "real weights"

    def loss(self, run: TrainRun, batch: Batch) -> Tensor:
        """The teacher's distribution alone, where there is a teacher."""
        teacher = run.networks.get("teacher")
        if teacher is None:
            return super().loss(run, batch)
        with torch.no_grad():
            target = run.task.predict(teacher, batch)
        output = run.predict(batch)
        return distribution_loss(output_tensor(output), output_tensor(target)) + run.penalty()
