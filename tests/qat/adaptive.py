"""A method that trains several widths of the network, and one that mixes them in its layers, with learned step sizes of their own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.network.surgery.switchable_norm import SwitchableNorm, pair_key, switch_norms
from lowbit.qat import AdaptiveMethod, QatJob, Slot
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.quantizers.switchable import SwitchableQuantizer
from lowbit.spec import Granularity


@dataclass
class Joint(AdaptiveMethod, Lsq):
    """All widths in every step."""

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        granularity = Granularity.channel(slot.channel_axis)
        return SwitchableQuantizer(slot.widths, lambda bits: LearnedScaleQuantizer(bits, signed=True, granularity=granularity))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return SwitchableQuantizer(
            slot.widths, lambda bits: LearnedScaleQuantizer(bits, signed=False, learn_offset=slot.is_signed, is_batched=True)
        )


@dataclass
class Mixed(Joint):
    """Norms for the widths of the layers around them, in the network of ``chain``."""

    switching = "layer"

    def insert_norms(self, job: QatJob) -> None:
        neighbours = {"norm1": (None, "conv2"), "norm2": ("conv2", "conv3"), "norm3": ("conv3", None)}
        widths = [switch.weight for switch in job.switches]

        def make(name: str, norm: nn.Module) -> SwitchableNorm:
            before, behind = ([None] if layer is None else widths for layer in neighbours[name])
            return SwitchableNorm(norm, [pair_key(a, b) for a in before for b in behind], neighbours[name])

        switch_norms(job.model, make)


def chain() -> nn.Module:
    """Three convolutions with norms and a classifier for ``[N, 2, 6, 6]`` and 3 classes."""
    model = nn.Sequential()
    for index, (inputs, outputs) in enumerate(((2, 6), (6, 6), (6, 6)), 1):
        model.add_module(f"conv{index}", nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
        model.add_module(f"norm{index}", nn.BatchNorm2d(outputs))
        model.add_module(f"relu{index}", nn.ReLU())
    model.add_module("pool", nn.AdaptiveAvgPool2d(1))
    model.add_module("flatten", nn.Flatten())
    model.add_module("fc", nn.Linear(6, 3))
    return model
