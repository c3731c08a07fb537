"""QKD: the low-bit network learns alone, then together with a teacher that learns as well, then from the teacher at rest.

Paper: Kim, Bhalgat, Lee, Patel, Kwak 2019, "QKD: Quantization-aware Knowledge Distillation", arXiv 1911.12491.
    Self-studying, co-studying and tutoring; the quantizer is an interval that is learned, as in QIL with an exponent of 1.
Symbols: c -> center, d -> distance, tau -> temperature, p_S and p_T -> softened outputs of network and teacher.
Differs from the paper:
    - Levels are multiplied by the end of their interval (``rescale``), so that a quantizer starts near the identity; a batch norm behind
      the layer undoes it.
    - Intervals start where the squared error is least. The largest magnitudes, which are said to be the paper's start (``start="range"``),
      leave most weights of 2 bits at 0, and their learning rate is small.
    - With those an interval starts at 0 where the least and the largest magnitude are equal, because it would be empty.
    - Without a teacher the network learns from its own float twin.
    - The paper's temperature, lengths of its phases and learning rates are not known: they are options, at values that others use.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.inputs import map_tensors
from lowbit.methods.quantizer_design.qil import interval_of_least_error, transform_magnitudes
from lowbit.options import Above, AtLeast
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Phase, Procedure, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.surrogates import pass_gradient

SELF_STUDYING, CO_STUDYING, TUTORING = "self-studying", "co-studying", "tutoring"
TEACHER = "teacher"
WEIGHT_INTERVALS = "quantizers.weights"  # the role of weights' intervals
SMALLEST_DISTANCE = 1e-6
IntervalKind = Literal["prune_clip", "clip"]
Start = Literal["mse", "range"]


class QkdQuantizer(GridQuantizer):
    """Magnitudes between ``c - d`` and ``c + d`` in even steps, 0 below, ``c + d`` above, times the sign.

    ``v = transform_magnitudes(|x|, c, d)``; forward: ``round(sign(x) v q) / q`` times ``c + d`` where ``rescale``, ``q = 2**(k - 1) - 1``.
    Backward: the surrogate's for the rounding, everything else by differentiation, the factor ``c + d`` included.

    Source: the quantizer of QIL, Eq. 3 with an exponent of 1.

    Args:
        bit_width: 2 to 8; 1 bit would leave nothing but 0.
        interval: ``prune_clip``, or ``clip``: ``c = d``, so that nothing is pruned and ``c + d`` is the one parameter.
        rescale: Multiply the levels by ``c + d``.
        start: Where the interval starts: ``range``: from the least to the largest magnitude; ``mse``: from 0 to where the squared error is least.

    All bit-widths share the interval.
    """

    bit_widths: Sequence[int] = range(2, 9)

    def __init__(self, bit_width: int, *, interval: IntervalKind = "prune_clip", rescale: bool = True, start: Start = "mse") -> None:
        if bit_width not in self.bit_widths:
            raise SpecError(f"qkd: this grid has 0 among its levels and needs 2 bits or more, got {bit_width}")
        super().__init__(bit_width, *self.code_range(bit_width))
        self.distance = nn.Parameter(torch.tensor(float("nan")))
        self.center = nn.Parameter(torch.tensor(float("nan"))) if interval == "prune_clip" else None
        self.rescale, self.start = rescale, start

    def code_range(self, bit_width: int) -> tuple[int, int]:
        top = 2 ** (bit_width - 1) - 1
        return -top, top

    def interval(self) -> tuple[Tensor, Tensor]:
        """``(c, d)``, differentiable."""
        return self.distance if self.center is None else self.center, self.distance

    def set_interval(self, center: Tensor, distance: Tensor) -> None:
        """Start at this interval; with ``clip`` at the one from 0 to its end."""
        if self.center is None:
            distance = (center + distance) / 2
        else:
            self.center.data.copy_(center)
        self.distance.data.copy_(distance)

    def initialize(self, x: Tensor) -> None:
        """Set the interval as ``start`` says."""
        if self.start == "mse":
            self.set_interval(*interval_of_least_error(x, self.qmax))
            return
        magnitudes = x.detach().float().abs()
        low, high = magnitudes.min(), magnitudes.max()
        high = torch.where(high > SMALLEST_DISTANCE, high, torch.ones_like(high))
        low = torch.where(high - low > 2 * SMALLEST_DISTANCE, low, torch.zeros_like(low))
        self.set_interval((high + low) / 2, (high - low) / 2)

    def prepare(self, x: Tensor) -> Tensor:
        sign = torch.where(x.detach() < 0, -1.0, 1.0)
        v = transform_magnitudes(x * sign, *self.interval())
        return pass_gradient(sign * v, x.detach().sign() * v.detach())  # 0 has a gradient, or weights that start there would stay

    def size(self) -> Tensor:
        """What the largest level stands for, shape ``()``."""
        center, distance = self.interval()
        return center + distance if self.rescale else torch.ones_like(distance)

    def grid(self, x: Tensor) -> Grid:
        size = self.size()
        zero = torch.zeros_like(size)
        return Grid(zero, torch.full_like(size, 1 / self.qmax), size / self.qmax, zero)

    @torch.no_grad()
    def project(self) -> None:
        """Keep ``0 < d``, and ``d <= c`` where both are learned."""
        self.distance.abs_().clamp_(min=SMALLEST_DISTANCE)
        if self.center is not None:
            self.center.abs_().clamp_(min=SMALLEST_DISTANCE)
            self.distance.copy_(self.distance.minimum(self.center))


class QkdActivation(QkdQuantizer):
    """Activations that are never negative: ``round(v q) / q`` times ``c + d`` where ``rescale``, ``q = 2**k - 1``, 1 bit and more."""

    bit_widths = range(1, 9)

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    def prepare(self, x: Tensor) -> Tensor:
        return x

    def grid(self, x: Tensor) -> Grid:
        (center, distance), size = self.interval(), self.size()
        return Grid(center - distance, 2 * distance / self.qmax, size / self.qmax, torch.zeros_like(size))


@dataclass
class QkdQuantizers(TrainingMethod):
    """The paper's quantizers.

    Attributes:
        interval: ``prune_clip``: an interval of magnitudes, pruned below and clipped above; ``clip``: its end alone.
        rescale: Multiply the levels by the end of the interval; needed without batch norms.
        start: Where intervals start: ``mse``: from 0 to where the squared error is least; ``range``: from the least to the largest
            magnitude.
        weight_interval_rate: Learning rate of weights' intervals as a fraction of the weights'; those of activations have
            ``quantizer_learning_rate``.
    """

    interval: IntervalKind = "prune_clip"
    rescale: bool = True
    start: Start = "mse"
    weight_interval_rate: Annotated[float, AtLeast(0)] = 0.01

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return QkdQuantizer(slot.bit_width, interval=self.interval, rescale=self.rescale, start=self.start)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        kind = QkdQuantizer if slot.is_signed else QkdActivation
        return kind(slot.bit_width, interval=self.interval, rescale=self.rescale, start=self.start)

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        role = super().role(name, parameter, owner)
        return WEIGHT_INTERVALS if role == "quantizers" and "parametrizations." in name else role

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        found = super().optimizers(recipe)
        rate = recipe.optimizer.learning_rate * self.weight_interval_rate
        return {**found, WEIGHT_INTERVALS: replace(found["quantizers"], learning_rate=rate)}


@register(
    MethodInfo(
        name="qkd",
        title="QKD: Quantization-aware Knowledge Distillation",
        paper="Kim, Bhalgat, Lee, Patel, Kwak 2019",
        url="https://arxiv.org/abs/1911.12491",
        section="training",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(2, 9),
        needs=("labels", "teacher", "pretrained"),
        fidelity="partial",
        summary="learns alone, then together with a teacher that learns as well, then from the teacher at rest",
        evidence="losses and phases checked against another implementation; the quantizer against its equations; the paper's numbers are not known",
        margin_points=55,
    )
)
@dataclass
class Qkd(Procedure):
    """Three phases of learning with a teacher.

    Attributes:
        temperature: Temperature of the softened outputs of network and teacher.
        ce_weight: Weight of the task's loss for the network, once it learns from the teacher.
        kd_weight: Weight of its distance to the teacher.
        teacher_ce_weight: Weight of the task's loss for the teacher, while it learns.
        teacher_kd_weight: Weight of its distance to the network.
        teacher_learning_rate: Learning rate of the teacher as a fraction of the weights'.
        self_share: Share of the epochs in which the network learns alone.
        co_share: Share of the epochs in which network and teacher learn together; the rest is tutoring.
        restart_schedule: Start the learning rates' schedule again with each phase; else one goes through all of them.
    """

    quantizers = QkdQuantizers
    replaces_loss = True

    temperature: Annotated[float, Above(0)] = 2.0
    ce_weight: Annotated[float, AtLeast(0)] = 1.0
    kd_weight: Annotated[float, AtLeast(0)] = 1.0
    teacher_ce_weight: Annotated[float, AtLeast(0)] = 1.0
    teacher_kd_weight: Annotated[float, AtLeast(0)] = 1.0
    teacher_learning_rate: Annotated[float, AtLeast(0)] = 0.1
    self_share: Annotated[float, AtLeast(0)] = 0.3
    co_share: Annotated[float, AtLeast(0)] = 0.3
    restart_schedule: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.self_share + self.co_share > 1:
            raise SpecError(f"qkd: self_share and co_share are at most 1 together, got {self.self_share} and {self.co_share}")

    def default_recipe(self) -> Recipe:
        """SGD on ImageNet; epochs and learning rate are those of another implementation."""
        return Recipe(100, 256, OptimizerSpec(learning_rate=0.01))

    def phases(self, recipe: Recipe) -> list[Phase]:
        shares = {SELF_STUDYING: self.self_share, CO_STUDYING: self.co_share, TUTORING: max(1 - self.self_share - self.co_share, 0.0)}
        teacher = replace(recipe.optimizer, learning_rate=recipe.optimizer.learning_rate * self.teacher_learning_rate)
        return [
            replace(phase, optimizers={**phase.optimizers, TEACHER: teacher}) if phase.name == CO_STUDYING else phase
            for phase in self.split(recipe, shares, restart=self.restart_schedule)
        ]

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        return {**super().companions(model, given), TEACHER: Companion(given.teacher or given.float_twin())}

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """The network's loss, and while both learn the teacher's, each with the other's outputs as constants.

        Source: co-studying and tutoring; the loss of the network and the one of the teacher.
        """
        output = run.predict(batch)
        if run.phase.name == SELF_STUDYING:
            yield run.task.loss(output, batch) + run.penalty()
            return
        softened, is_together = run.task.with_temperature(self.temperature), run.phase.name == CO_STUDYING
        with torch.set_grad_enabled(is_together):
            target = run.task.predict(run.networks[TEACHER], batch)
        mine, theirs = (map_tensors(found, Tensor.detach) for found in (output, target))
        distance = softened.distillation_loss(output, theirs)
        yield self.ce_weight * run.task.loss(output, batch) + self.kd_weight * distance + run.penalty()
        if is_together:
            distance = softened.distillation_loss(target, mine)
            yield self.teacher_ce_weight * run.task.loss(target, batch) + self.teacher_kd_weight * distance
