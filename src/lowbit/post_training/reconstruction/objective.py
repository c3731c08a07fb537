"""The objective of a unit of a network: the error at its output, weighted or not, and the regularizer of its roundings."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from lowbit.errors import CalibrationError
from lowbit.inputs import Inputs
from lowbit.measure.outputs import output_tensor
from lowbit.network.insert import quantization_enabled, quantized_weights, weight_quantizer
from lowbit.network.layers import evaluating
from lowbit.options import Above, AtLeast, CheckedSettings, Interval
from lowbit.post_training.reconstruction.rounding import AdaptiveRounding, BetaSchedule, LossKind, reconstruction_loss
from lowbit.post_training.reconstruction.unit_data import UnitData, batches
from lowbit.post_training.reconstruction.units import PlannedUnit
from lowbit.quantizers.base import disabled

FisherKind = Literal["released", "paper"]

PAPER_LEARNING_RATE, LARGEST_LEARNING_RATE = 1e-3, 3e-2


@dataclass(frozen=True)
class Objective(CheckedSettings):
    """What a unit minimises and how (see ``reconstruction_loss`` and ``ResumableAdam``).

    Attributes:
        fisher: How saved gradients ``g`` weigh errors: ``released`` by ``|g| + 1``, ``paper`` by ``g`` scaled to mean square 1.
        schedule: The regularizer's exponent, ``None`` where nothing is rounded; ``regularization`` multiplies it.
        settled: Learning stops once at most this share of the roundings is undecided, ``None`` for never (see ``AdaptiveRounding.undecided``).
        precision: ``bf16`` computes the unit under autocast; parameters, rounding and loss stay float32.
    """

    iterations: Annotated[int, AtLeast(0)]
    learning_rate: Annotated[float, Above(0)]
    batch_size: Annotated[int, AtLeast(1)] = 32
    loss: LossKind = "mse"
    power: Annotated[float, AtLeast(1)] = 2.0
    fisher: FisherKind = "released"
    schedule: BetaSchedule | None = None
    regularization: Annotated[float, AtLeast(0)] = 0.01
    is_annealed: bool = False
    settled: Annotated[float | None, Interval(0, 1)] = None
    precision: Literal["fp32", "bf16"] = "fp32"


def rounding_learning_rate(given: float | None, iterations: int, paper_iterations: int) -> float:
    """The given rate, or else the papers' 0.001, raised for fewer iterations than in the paper.

    ``min(0.001 paper_iterations / iterations, 0.03)``: Adam moves the logits by about the rate in each step, so they can still travel
    far enough to flip a rounding.
    """
    if given is not None:
        return given
    return (
        PAPER_LEARNING_RATE
        if iterations >= paper_iterations
        else min(PAPER_LEARNING_RATE * paper_iterations / max(iterations, 1), LARGEST_LEARNING_RATE)
    )


@dataclass(frozen=True)
class UnitReport:
    """Result of one unit: its loss over all calibration samples before and after, and the share of roundings undecided at the end.

    ``is_kept``: learning did not improve the loss on the calibration data, so the unit stayed unchanged.
    """

    unit: str
    before: float
    after: float
    undecided: float
    is_kept: bool

    def __str__(self) -> str:
        ending = ", kept as it was" if self.is_kept else f", {self.undecided:.1%} undecided" if self.undecided else ""
        return f"{self.unit}: loss {self.before:.4g} -> {self.after:.4g}{ending}"


def unit_loss(unit: PlannedUnit, module: nn.Module, data: UnitData, index: Tensor, objective: Objective) -> Tensor:
    """The reconstruction loss of the samples ``index``."""
    args, kwargs = data.inputs.read(index)
    with parametrize.cached(), torch.autocast(data.target.device.type, torch.bfloat16, enabled=objective.precision == "bf16"):
        output = unit.call(module, args, kwargs)
    gradient = None if data.gradient is None else data.gradient.read(index)
    return reconstruction_loss(
        output.float(),
        data.target.read(index),
        kind=objective.loss,
        power=objective.power,
        gradient=gradient,
        channel_axis=unit.channel_axis,
    )


@torch.no_grad()
def mean_loss(unit: PlannedUnit, module: nn.Module, data: UnitData, objective: Objective) -> float:
    """The reconstruction loss over all samples; CalibrationError when it is not finite."""
    samples = data.target.samples
    parts = [float(unit_loss(unit, module, data, index, objective)) * len(index) for index in batches(samples, objective.batch_size)]
    loss = sum(parts) / samples
    if not math.isfinite(loss):
        raise CalibrationError(
            f"unit {unit.name!r}: its error on the calibration data is {loss}: the network overflows on these samples. "
            "Check their preprocessing, or keep the layers of this unit in float."
        )
    return loss


def rounding_loss(
    unit: PlannedUnit,
    module: nn.Module,
    data: UnitData,
    index: Tensor,
    objective: Objective,
    roundings: Collection[AdaptiveRounding],
    iteration: int,
) -> Tensor:
    """Reconstruction loss plus the weighted regularizer of all the unit's roundings."""
    set_beta(objective, roundings, iteration)
    return unit_loss(unit, module, data, index, objective) + weighted_penalty(objective, roundings)


def set_beta(objective: Objective, roundings: Collection[AdaptiveRounding], iteration: int) -> None:
    """Give the roundings the exponent that the schedule has for ``iteration``: none during the warm start."""
    schedule = objective.schedule
    beta = schedule.beta(iteration) if schedule is not None and schedule.is_active(iteration) else None
    for rounding in roundings:
        rounding.beta = beta


def undecided_share(roundings: Collection[AdaptiveRounding]) -> float:
    """The share of all weights that are still between down and up."""
    return sum(rounding.undecided for rounding in roundings) / sum(rounding.logits.numel() for rounding in roundings)


def is_decided(objective: Objective, roundings: Collection[AdaptiveRounding], iteration: int) -> bool:
    """Whether the regularizer has decided so many roundings that the loss has settled; depends on the logits and ``iteration`` alone."""
    schedule = objective.schedule
    if objective.settled is None or schedule is None or not schedule.is_active(iteration):
        return False
    return undecided_share(roundings) <= objective.settled


def weighted_penalty(objective: Objective, roundings: Collection[AdaptiveRounding]) -> Tensor:
    """``regularization`` times the regularizers of the last soft forward pass; 0 during the warm start."""
    return objective.regularization * torch.stack([rounding.penalty() for rounding in roundings]).sum()


def released_weight(gradient: Tensor) -> Tensor:
    """``|g| + 1``, by which the released program weighs errors; gradients are small, so it is almost the plain squared error."""
    return gradient.abs() + 1


def fisher_gradient(model: nn.Module, reference: nn.Module, unit: str, layers: Sequence[nn.Module], inputs: Inputs) -> Tensor:
    """The gradient ``G`` of the task loss at the output of ``unit``, for each sample.

    The task loss is ``KL(softmax(float logits) || softmax(logits))``, summed over the batch and divided by its size, of the network
    in which only the weights of ``layers`` (all up to this unit) are quantized.

    Source: Li et al. 2021, section 3.3; the released program's choice of loss.
    """
    caught: list[Tensor] = []

    def catch(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[0].clone()  # the network may change it in place

    with evaluating(reference):
        expected = output_tensor(reference(*inputs.args, **inputs.kwargs))
    handle = model.get_submodule(unit).register_forward_hook(catch)
    try:
        kept = [weight_quantizer(layer) for layer in layers]
        others = [q for q in (site.quantizer for site in quantized_weights(model).values()) if q is not None and q not in kept]
        with quantization_enabled(model, weights=True, activations=False), disabled(others), torch.enable_grad():
            logits = output_tensor(model(*inputs.args, **inputs.kwargs))
            axis = -1 if logits.dim() == 3 else min(1, logits.dim() - 1)
            loss = F.kl_div(F.log_softmax(logits, axis), F.softmax(expected, axis), reduction="batchmean")
            return torch.autograd.grad(loss, caught[0])[0]
    finally:
        handle.remove()
