"""BinaryConnect: real weights accumulate the updates, binary copies of them compute.

Paper: Courbariaux, Bengio, David 2015, "BinaryConnect: Training Deep Neural Networks with binary weights during propagations", NIPS.
    Section 2.2 (deterministic and stochastic binarization, Eq. 1-3), section 2.4 (clipping), Algorithm 1, section 2.5 (learning rates).
Symbols: w -> weight, w_b -> binary weight, H -> limit, sigma -> hard_sigmoid, W_LR_scale -> learning_rate_scale.
Differs from the paper:
    - The deterministic form is the default, as exported networks have binary weights. The authors' scripts train stochastically and test
      with the real weights: ``binarization="stochastic"`` with ``evaluation="real"``.
    - Zero counts as positive, because one bit has no third level.
    - Fan-in and fan-out count the channels of a group, which the paper does not treat.
    - The first and the last layer have more bits, as in all methods of lowbit; the paper makes them binary too (``first_last=1`` in the
      policy). Inputs stay in float as in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.measure.outputs import output_tensor
from lowbit.network import insert
from lowbit.network.layers import TRANSPOSED, WEIGHT
from lowbit.options import Above
from lowbit.qat import Classification, OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.quantizers.qtensor import BinaryDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient

Binarization = Literal["deterministic", "stochastic"]
Evaluation = Literal["binary", "real"]


def hard_sigmoid(x: Tensor) -> Tensor:
    """``clip((x + 1) / 2, 0, 1)``. Source: Eq. 3."""
    return ((x + 1) / 2).clamp(0, 1)


def glorot_scales(fan_in: float, fan_out: float) -> tuple[float, float]:
    """The learning-rate scale ``1 / sqrt(1.5 / (fan_in + fan_out))`` and the limit ``H``, its inverse, of a layer. Source: authors' code."""
    limit = math.sqrt(1.5 / (fan_in + fan_out))
    return 1 / limit, limit


def fans(shape: tuple[int, ...], *, is_transposed: bool = False) -> tuple[int, int]:
    """``fan_in`` and ``fan_out`` of a weight ``[out, in, ...]``, transposed ``[in, out, ...]``: channels times kernel positions."""
    positions = math.prod(shape[2:])
    outputs, inputs = (shape[1], shape[0]) if is_transposed else (shape[0], shape[1])
    return inputs * positions, outputs * positions


def take_step(weight: Tensor, before: Tensor, scale: float, limit: float) -> Tensor:
    """``clip(before + scale (weight - before), -limit, limit)``, ``weight`` being what the optimizer made of ``before``. Source: Algorithm 1, 3."""
    return (before + scale * (weight - before)).clamp(-limit, limit)


def squared_hinge(scores: Tensor, targets: Tensor) -> Tensor:
    """``mean(max(0, 1 - t y)^2)`` over samples and classes; ``targets`` are +1 for the right class and -1 for the others. Source: section 3.1."""
    return (1 - targets * scores).clamp(min=0).square().mean()


class BinaryConnectWeight(Quantizer):
    """Two levels ``-limit`` and ``+limit``.

    Forward: ``limit`` where ``w >= 0``, else ``-limit``; stochastic training: ``limit`` with the probability ``hard_sigmoid(w / limit)``,
    drawn again in every forward pass. Backward: 1 everywhere. Source: Eq. 1-3.

    Args:
        limit: ``H``, positive.
        binarization: How weights become binary in training.
        evaluation: ``real``: the real weights are used in evaluation, and there are no codes.
        seed: Seed of the random draws.
    """

    def __init__(
        self, limit: float = 1.0, *, binarization: Binarization = "deterministic", evaluation: Evaluation = "binary", seed: int = 0
    ) -> None:
        super().__init__(1, Granularity.tensor())
        if not 0 < limit < math.inf:
            raise SpecError(f"binary_connect: the limit H must be positive, got {limit}")
        self.limit, self.binarization, self.evaluation, self.seed = limit, binarization, evaluation, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.draws: Tensor

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def probability(self, x: Tensor) -> Tensor:
        """Probability that a weight is drawn as ``+limit``."""
        return hard_sigmoid(x / self.limit)

    def forward(self, x: Tensor) -> Tensor:
        values = x.detach().float()
        if self.training and self.binarization == "stochastic":
            generator = torch.Generator(device="cpu").manual_seed(self.seed + int(self.draws))
            self.draws += 1
            drawn = torch.rand(values.shape, generator=generator).to(values.device)
            return pass_gradient(x, torch.where(drawn < self.probability(values), self.limit, -self.limit).to(x.dtype))
        if self.evaluation == "real" and not self.training:
            return x
        return pass_gradient(x, torch.where(values >= 0, self.limit, -self.limit).to(x.dtype))

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        if self.evaluation == "real":
            raise SpecError(
                "binary_connect: evaluation=real uses the real weights, which have no codes. Use evaluation=binary to write a file."
            )
        return QTensor((x.detach() >= 0).to(torch.uint8), BinaryDecoder(torch.tensor(self.limit, device=x.device), self.granularity), 1)


@register(
    MethodInfo(
        name="binary_connect",
        title="BinaryConnect: Training Deep Neural Networks with binary weights during propagations",
        paper="Courbariaux, Bengio, David, NIPS 2015",
        url="https://arxiv.org/abs/1511.00363",
        section="binary",
        axes=("weight_quantizer", "procedure"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=None,
        needs=("labels",),
        fidelity="exact",
        summary="signs of real weights that are clipped to -1 .. 1 and take steps of a size that suits their layer",
        evidence="checked against the authors' code",
        margin_points=50,
    )
)
@dataclass
class BinaryConnect(TrainingMethod):
    """Binary weights in both passes, real ones for the updates.

    Attributes:
        binarization: ``deterministic``: the sign; ``stochastic``: drawn with a probability that is linear in the weight.
        evaluation: ``binary``, or ``real`` weights, which the authors use after stochastic training; such a network has no codes to write.
        limit: ``H``, the size of binary weights and the bound of real ones; ``glorot``: ``sqrt(1.5 / (fan_in + fan_out))`` of the layer.
        learning_rate_scale: Factor of each step of the weights; ``glorot``: the inverse of that.
        squared_hinge: Train on the paper's squared hinge of labels in place of the task's loss.
    """

    ends = "same"

    binarization: Binarization = "deterministic"
    evaluation: Evaluation = "binary"
    limit: Annotated[float | Literal["glorot"], Above(0)] = 1.0
    learning_rate_scale: Annotated[float | Literal["glorot"], Above(0)] = "glorot"
    squared_hinge: bool = False

    def default_recipe(self) -> Recipe:
        """CIFAR-10: from 3e-3 down to 2e-6, by the same factor after each epoch."""
        return Recipe(
            500, 50, OptimizerSpec(
                "adam", 3e-3, weight_decay=0.0, schedule="step", milestones=tuple(epoch / 500 for epoch in range(1, 500)),
                gamma=(2e-6 / 3e-3) ** (1 / 499),
            ),
        )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        self._before: dict[int, Tensor] = {}

    def weight_quantizer(self, slot: Slot, seed: int = 0) -> Quantizer:
        limit = self.glorot(slot.layer, slot.parameter)[1] if isinstance(self.limit, str) else self.limit
        return BinaryConnectWeight(limit, binarization=self.binarization, evaluation=self.evaluation, seed=seed)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        raise SpecError("binary_connect leaves inputs in float. Pass activation_bits=None.")

    def attach(self, job: QatJob) -> None:
        generator = job.generator()

        def weight_quantizer(slot: Slot) -> Quantizer:  # each has its own seed; generators use its lower 32 bits
            return self.weight_quantizer(slot, int(torch.randint(2**32, (), generator=generator)))

        job.insert(weight_quantizer, self.activation_quantizer)
        job.initialize(self.initialize_layer)

    @staticmethod
    def glorot(layer: nn.Module, parameter: str = WEIGHT) -> tuple[float, float]:
        """Learning-rate scale and limit of a layer's weight."""
        shape = tuple(insert.float_weight(layer, parameter).shape)
        return glorot_scales(*fans(shape, is_transposed=isinstance(layer, TRANSPOSED)))

    def step_scale(self, layer: nn.Module, parameter: str = WEIGHT) -> float:
        """Factor of the steps of a layer's weight."""
        return self.glorot(layer, parameter)[0] if isinstance(self.learning_rate_scale, str) else self.learning_rate_scale

    @property
    def has_own_loss(self) -> bool:
        return self.squared_hinge

    def loss(self, run: TrainRun, batch: Batch) -> Tensor:
        """The squared hinge of labels where that is asked for."""
        if not self.squared_hinge:
            return super().loss(run, batch)
        if not isinstance(run.task, Classification):
            raise SpecError(f"binary_connect: squared_hinge needs class labels, which {type(run.task).__name__} has none of; leave it out")
        scores = output_tensor(run.predict(batch))
        targets = torch.full_like(scores, -1).scatter(1, run.task.tensor_target(batch).unsqueeze(1), 1)
        return squared_hinge(scores, targets) + run.penalty()

    def after_backward(self, run: TrainRun) -> None:
        """Keep the weights that the optimizer starts from."""
        self._before = {id(weight): weight.detach().clone() for weight in (site.original for site, _ in _binary_weights(run))}

    @torch.no_grad()
    def after_step(self, run: TrainRun) -> None:
        """Scale the step and clip the weights."""
        for site, quantizer in _binary_weights(run):
            weight, scale = site.original, self.step_scale(site.layer, site.parameter)
            weight.copy_(take_step(weight, self._before.pop(id(weight), weight), scale, quantizer.limit))


def _binary_weights(run: TrainRun) -> list[tuple[insert.WeightSite, BinaryConnectWeight]]:
    found = ((site, site.quantizer) for site in run.trained_weights())
    return [(site, quantizer) for site, quantizer in found if isinstance(quantizer, BinaryConnectWeight)]
