"""EWGS: each gradient element is scaled by whether its weight or activation moves towards the next decision point.

Paper: Lee, Kim, Ham 2021, "Network Quantization with Element-wise Gradient Scaling", CVPR.
    Section 3.1 (quantizer), Eq. 4 (gradient scaling), section 3.3 and Eq. 9-11 (the factor from the Hessian's trace).
Symbols: l and u -> lower and upper, delta -> delta, x_q -> discretized, alpha -> output_scale.
Deviations: as in the authors' program, the gradient's size in the factor is three standard deviations; the interval is kept from
    closing; where a layer's input can be negative, activations become ``2 q - 1``. ``delta`` starts at the authors' fixed value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.methods.gradients.normalized import NormalizedQuantizer, NormalizingMethod
from lowbit.network import insert
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.surrogates import ElementwiseGradientScaling
from lowbit.train import Slot, TrainRun

HALF_NORMAL = math.sqrt(1 - 2 / math.pi)  # standard deviation of |N(0, 1)|, as after a ReLU
Probes = Callable[[int, int, torch.Size], Iterable[Tensor]]


def discretize(x: Tensor, levels: int, delta: float) -> Tensor:
    """``round(x (levels - 1)) / (levels - 1)`` for ``x`` in ``[0, 1]``; backward ``g (1 + delta sign(g) (x - q))``. Source: Eq. 4."""
    code: Tensor = ElementwiseGradientScaling(delta)(x * (levels - 1), 0, levels - 1)
    return code / (levels - 1)


class EwgsWeight(NormalizedQuantizer):
    """Weights as ``(2 q - 1) |output_scale|``; the interval starts at three standard deviations."""

    def __init__(self, bit_width: int, *, delta: float = 0.0, has_output_scale: bool = True) -> None:
        surrogate = ElementwiseGradientScaling(delta)
        super().__init__(bit_width, is_centred=True, has_output_scale=has_output_scale, surrogate=surrogate)

    def initialize(self, x: Tensor) -> None:
        spread = 3 * (x.detach().float().std() if x.numel() > 1 else x.detach().float().abs().sum())
        self.set_interval(-spread, spread)


class EwgsActivation(NormalizedQuantizer):
    """Activations as ``q``; the interval starts at the least value and three standard deviations of the normal before the ReLU."""

    def __init__(self, bit_width: int, *, delta: float = 0.0, is_signed: bool = False) -> None:
        super().__init__(bit_width, is_centred=is_signed, surrogate=ElementwiseGradientScaling(delta))

    def initialize(self, x: Tensor) -> None:
        values = x.detach().float()
        spread = 3 * (values.std() if values.numel() > 1 else values.abs().sum())
        if self.is_centred:
            self.set_interval(-spread, spread)
        else:
            self.set_interval(values.min(), spread / HALF_NORMAL)


def hutchinson_trace(
    gradient: Tensor, tensor: Tensor, probes: Iterable[Tensor], *, max_iterations: int = 50, tolerance: float = 1e-3
) -> tuple[float, list[float]]:
    """The trace of the Hessian, estimated with random vectors of +-1.

    ``h_i = v . d(g . v) / dx`` for each probe ``v``, until the running mean changes by less than ``tolerance`` of its former
    (signed) value. Source: Eq. 10; Hutchinson 1990.

    Args:
        gradient: Of the loss with respect to ``tensor``, with its graph.
        tensor: Where the Hessian is taken.
        probes: Vectors shaped like ``tensor``.
        max_iterations: At most so many.
        tolerance: When to stop.

    Returns:
        The mean of the ``h_i``, and the ``h_i``.
    """
    found: list[float] = []
    previous = 0.0
    for probe in probes:
        if not gradient.requires_grad:  # the loss is linear in the tensor
            return 0.0, [0.0]
        product = torch.autograd.grad(gradient, tensor, grad_outputs=probe, retain_graph=True, allow_unused=True)[0]
        found.append(0.0 if product is None else float((probe * product).sum()))
        mean = sum(found) / len(found)
        if abs(mean - previous) / (previous + 1e-6) < tolerance or len(found) >= max_iterations:
            break
        previous = mean
    return sum(found) / max(len(found), 1), found


def estimate_deltas(
    quantizers: Sequence[NormalizedQuantizer], losses: Iterable[Callable[[], Tensor]], probes: Probes, *, max_iterations: int = 50
) -> list[float]:
    """The scaling factor of every quantizer: ``max(0, mean of trace / numel / (3 std(g)))`` over the batches. Source: Eq. 11.

    Args:
        quantizers: Activations first, then weights, as the authors do.
        losses: One for each batch; called in training mode, it runs the network and gives the loss.
        probes: ``probes(batch, quantizer, shape)`` gives random vectors of +-1.
        max_iterations: Probes for each tensor and batch at most.
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
                (gradient,) = torch.autograd.grad(loss, tensor, create_graph=True)
                vectors = probes(batch, index, tensor.shape)
                trace, _ = hutchinson_trace(gradient, tensor, vectors, max_iterations=max_iterations)
                size = 3 * float(gradient.detach().std())
                shares[index].append(trace / tensor.numel() / size if size > 0 else 0.0)
    finally:
        for quantizer in quantizers:
            quantizer.is_probed, quantizer.discretized = False, None
    return [max(0.0, sum(found) / len(found)) if found else 0.0 for found in shares]


@register(
    MethodInfo(
        name="ewgs",
        title="Network Quantization with Element-wise Gradient Scaling",
        paper="Lee, Kim, Ham, CVPR 2021",
        section="gradients",
        axes=("weight_quantizer", "activation_quantizer", "surrogate"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="exact; held against the authors' program",
        summary="scales every gradient element by how far it is from the next decision point, by the loss's curvature",
        margin_points=60,
    )
)
@dataclass
class Ewgs(NormalizingMethod):
    """Learned intervals and element-wise scaled gradients.

    Attributes:
        delta: Strength of the scaling before its first update: the authors' 0.001 of runs with a fixed strength; 0 is the
            straight-through estimator.
        delta_interval: Epochs between updates of the strength from the Hessian's trace (10 for CIFAR-10, 1 for ImageNet); 0: never.
        delta_batches: Batches that an update looks at.
        delta_probes: Random vectors for each tensor and batch at most.
    """

    delta: float = 1e-3
    delta_interval: int = 10
    delta_batches: int = 3
    delta_probes: int = 50

    def __post_init__(self) -> None:
        if self.delta < 0 or self.delta_interval < 0:
            raise SpecError(f"ewgs: delta and delta_interval must be 0 or more, got {self.delta} and {self.delta_interval}")

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return EwgsWeight(slot.bit_width, delta=self.delta, has_output_scale=getattr(slot.layer, "bias", None) is None)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return EwgsActivation(slot.bit_width, delta=self.delta, is_signed=slot.is_signed)

    def start_epoch(self, run: TrainRun) -> None:
        if run.batches is None or not self.delta_interval or run.epochs_done == 0 or run.epochs_done % self.delta_interval:
            return
        activations = [q for q in insert.activation_quantizers(run.model).values() if isinstance(q, NormalizedQuantizer)]
        weights = [insert.weight_quantizer(layer) for layer in insert.quantized_layers(run.model).values()]
        chosen = [*activations, *(q for q in weights if isinstance(q, NormalizedQuantizer))]

        def probes(_batch: int, _index: int, shape: torch.Size) -> Iterator[Tensor]:
            while True:
                yield (torch.randint(0, 2, shape, generator=run.generator) * 2 - 1).float().to(next(run.model.parameters()).device)

        losses = ((lambda batch=batch: run.task_loss(batch, run.model)) for batch in run.batches(self.delta_batches))
        for quantizer, delta in zip(chosen, estimate_deltas(chosen, losses, probes, max_iterations=self.delta_probes), strict=True):
            if isinstance(quantizer.surrogate, ElementwiseGradientScaling):
                strength = quantizer.surrogate.delta.new_tensor(delta)
                run.reduce_mean(strength)
                quantizer.surrogate.delta.copy_(strength)
