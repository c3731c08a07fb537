"""EWGS: each gradient element is scaled by whether its weight or activation moves towards the next decision point.

Paper: Lee, Kim, Ham 2021, "Network Quantization with Element-wise Gradient Scaling", CVPR.
    Section 3.1 (quantizer), Eq. 4 (gradient scaling), section 3.3 and Eq. 9-11 (the factor from the Hessian's trace).
Symbols: l and u -> lower and upper, delta -> delta, x_q -> discretized, alpha -> output_scale.
Differs from the paper:
    - The size of the gradient in the factor is three standard deviations, as in the authors' code.
    - The interval is kept from closing, because an empty one divides by zero.
    - Where a layer's input can be negative, activations become ``2 q - 1``, so that both signs have levels.
    - Where a layer's weight stays in float, the levels of its input include the output scale, as there is no weight quantizer to hold it.
    - ``delta`` is updated at least once, even in runs shorter than the update interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from lowbit.inputs import map_tensors
from lowbit.measure.hessian import inner_product, product_with
from lowbit.network import insert
from lowbit.options import AtLeast
from lowbit.qat import OptimizerSpec, Recipe, Slot, TrainRun
from lowbit.qat.attach.normalized import NormalizedQuantizer, NormalizingMethod, needs_output_scale, spread_of
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.surrogates import ElementwiseGradientScaling

HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |N(0, 1)|, as after a ReLU
Probes = Callable[[int, int, torch.Size], Iterable[Tensor]]


class EwgsWeight(NormalizedQuantizer):
    """Weights as ``(2 q - 1) |output_scale|``; the interval starts at three standard deviations."""

    def __init__(self, bit_width: int, *, delta: float = 0.0) -> None:
        super().__init__(bit_width, is_centred=True, has_output_scale=True, surrogate=ElementwiseGradientScaling(delta))

    def initialize(self, x: Tensor) -> None:
        spread = spread_of(x.detach().float())
        self.set_interval(-spread, spread)


class EwgsActivation(NormalizedQuantizer):
    """Activations as ``q``; the interval starts at the least value and three standard deviations of the normal before the ReLU."""

    def __init__(self, bit_width: int, *, delta: float = 0.0, is_signed: bool = False, has_output_scale: bool = False) -> None:
        surrogate = ElementwiseGradientScaling(delta)
        super().__init__(bit_width, is_centred=is_signed, has_output_scale=has_output_scale, surrogate=surrogate)

    def initialize(self, x: Tensor) -> None:
        values = x.detach().float()
        spread, lower = spread_of(values), values.min()
        if self.is_centred:
            self.set_interval(-spread, spread)
        else:
            self.set_interval(torch.where(lower < values.max(), lower, torch.zeros_like(lower)), spread / HALF_NORMAL)


def hutchinson_trace(
    gradient: Tensor, tensor: Tensor, probes: Iterable[Tensor], *, max_iterations: int = 50, tolerance: float = 1e-3
) -> tuple[float, list[float]]:
    """The trace of the Hessian, estimated with random vectors of +-1.

    ``h_i = v . d(g . v) / dx`` for each probe ``v``, until the running mean changes by less than ``tolerance`` of its former
    (signed) value. Source: Eq. 10; Hutchinson 1990.

    Args:
        gradient: Gradient of the loss with respect to ``tensor``, with its graph.
        tensor: Tensor at which the Hessian is taken.
        probes: Vectors shaped like ``tensor``.
        max_iterations: Maximum number of probes.
        tolerance: Relative change below which to stop.

    Returns:
        The mean of the ``h_i``, and the ``h_i``.
    """
    found: list[float] = []
    previous = 0.0
    for probe in probes:
        found.append(inner_product([probe], product_with([gradient], [tensor], [probe])))
        mean = sum(found) / len(found)
        if abs(mean - previous) / (previous + 1e-6) < tolerance or len(found) >= max_iterations:
            break
        previous = mean
    return sum(found) / max(len(found), 1), found


def estimate_deltas(
    quantizers: Sequence[NormalizedQuantizer], losses: Iterable[Callable[[], Tensor]], probes: Probes, *, max_iterations: int = 50
) -> list[float | None]:
    """Scaling factor of every quantizer: ``max(0, mean of trace / numel / (3 std(g)))`` over the batches. Source: Eq. 11.

    ``None`` for a quantizer that does not contribute to the losses.

    Args:
        quantizers: Activations first, then weights, as the authors do.
        losses: One function per batch; called in training mode, it runs the network and returns the loss.
        probes: ``probes(batch, quantizer, shape)`` yields random vectors of +-1.
        max_iterations: Maximum number of probes per tensor and batch.
    """
    shares: list[list[float]] = [[] for _ in quantizers]
    for quantizer in quantizers:
        quantizer.is_probed = True
    try:
        for batch, loss_of in enumerate(losses):
            loss = loss_of()
            for index, quantizer in enumerate(quantizers):
                tensor = quantizer.discretized
                if tensor is None or not tensor.requires_grad:
                    continue
                gradient = torch.autograd.grad(loss, tensor, create_graph=True, allow_unused=True)[0]
                if gradient is not None:  # None for a tensor that did not contribute to the loss
                    vectors = probes(batch, index, tensor.shape)
                    trace, _ = hutchinson_trace(gradient, tensor, vectors, max_iterations=max_iterations)
                    size = 3 * float(gradient.detach().std()) if gradient.numel() > 1 else 0.0
                    shares[index].append(trace / tensor.numel() / size if size > 0 else 0.0)
            for quantizer in quantizers:
                quantizer.discretized = None  # frees the autograd graph
    finally:
        for quantizer in quantizers:
            quantizer.is_probed, quantizer.discretized = False, None
    return [max(0.0, sum(found) / len(found)) if found else None for found in shares]


@register(
    MethodInfo(
        name="ewgs",
        title="Network Quantization with Element-wise Gradient Scaling",
        paper="Lee, Kim, Ham, CVPR 2021",
        url="https://arxiv.org/abs/2104.00903",
        section="gradients",
        axes=("weight_quantizer", "activation_quantizer", "surrogate"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="scales every gradient element by how far it is from the next decision point, by the loss's curvature",
        evidence="checked against the authors' code",
        margin_points=55,
    )
)
@dataclass
class Ewgs(NormalizingMethod):
    """Learned intervals and element-wise scaled gradients.

    Attributes:
        delta: Strength of the scaling before its first update; 0 is the straight-through estimator. The authors' runs with a fixed
            strength (``delta_interval=0``) use 0.001.
        delta_interval: Epochs between updates of the strength from the Hessian's trace (10 for CIFAR-10, 1 for ImageNet), at most half of
            the run; 0: never. An update costs some twenty backward passes per quantizer and batch.
        delta_batches: Batches used by an update (3 for CIFAR-10, 10 of 16 images for ImageNet).
        delta_probes: Maximum number of random vectors per tensor and batch.
    """

    ends = "float"

    delta: Annotated[float, AtLeast(0)] = 0.0
    delta_interval: Annotated[int, AtLeast(0)] = 10
    delta_batches: Annotated[int, AtLeast(1)] = 3
    delta_probes: Annotated[int, AtLeast(1)] = 50

    def default_recipe(self) -> Recipe:
        """ResNet-20 on CIFAR-10."""
        return Recipe(400, 256, OptimizerSpec("adam", 1e-3))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return EwgsWeight(slot.bit_width, delta=self.delta)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return EwgsActivation(slot.bit_width, delta=self.delta, is_signed=slot.is_signed, has_output_scale=needs_output_scale(slot))

    def start_epoch(self, run: TrainRun) -> None:
        interval = min(self.delta_interval, max(run.epochs // 2, 1))
        if interval and run.epochs_done > 0 and run.epochs_done % interval == 0:
            self.update_deltas(run)

    def update_deltas(self, run: TrainRun) -> None:
        """Estimate the strength of every quantizer again, if the run provides batches; norms update their running statistics as in training."""
        chosen = scaled_quantizers(run.model)
        if run.batches is None or not chosen:
            return
        device = next(run.model.parameters()).device

        def probes(_batch: int, _index: int, shape: torch.Size) -> Iterator[Tensor]:
            while True:
                yield (torch.randint(0, 2, shape, generator=run.generator) * 2.0 - 1).to(device)

        def losses() -> Iterator[Callable[[], Tensor]]:
            assert run.batches is not None
            for batch in run.batches(self.delta_batches):
                batch = map_tensors(batch, lambda tensor: tensor.to(device))
                yield lambda batch=batch: run.task_loss(batch)  # type: ignore[misc]

        # compiled graphs and wrappers that gather gradients cannot be differentiated twice
        wrapped, run.wrapped = run.wrapped, None
        try:
            deltas = estimate_deltas(chosen, losses(), probes, max_iterations=self.delta_probes)
        finally:
            run.wrapped = wrapped
        for quantizer, delta in zip(chosen, deltas, strict=True):
            strength = quantizer.surrogate.delta  # type: ignore[attr-defined]
            estimate = strength.new_tensor(float(strength) if delta is None else delta)
            run.reduce_mean(estimate)
            strength.copy_(estimate)


def scaled_quantizers(model: nn.Module) -> list[NormalizedQuantizer]:
    """The quantizers whose gradients are scaled: those of activations first, then those of weights, as the authors treat them."""
    weights = [site.quantizer for site in insert.quantized_weights(model).values()]
    found = [*insert.activation_quantizers(model).values(), *weights]
    return [q for q in found if isinstance(q, NormalizedQuantizer) and isinstance(q.surrogate, ElementwiseGradientScaling)]
