"""How a network is trained: the user's recipe, and the phases and optimizers that a method derives from it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from lowbit.errors import SpecError
from lowbit.options import Above, AtLeast, CheckedSettings, Interval

Role = str  # "weights", "quantizers", "others", "others.norms", or one that a method adds
OptimizerKind = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "step", "linear", "constant"]
AugmentName = Literal["auto", "none", "crop", "crop_flip"]
PrecisionName = Literal["32", "bf16", "fp16"]
Selection = Literal["last", "best"]


@dataclass(frozen=True)
class OptimizerSpec(CheckedSettings):
    """An optimizer for the parameters of one role, and its learning rate over a phase.

    Attributes:
        kind: ``sgd`` (Nesterov where ``momentum`` is positive and ``nesterov``), ``adam`` or ``adamw``.
        learning_rate: Learning rate at the start, after warm-up.
        momentum: SGD momentum.
        nesterov: Whether SGD uses Nesterov momentum.
        weight_decay: L2 penalty; decoupled with ``adamw``.
        schedule: ``cosine`` and ``linear`` fall to 0, ``step`` multiplies by ``gamma`` at each of ``milestones``.
        milestones: Fractions of the phase at which ``step`` multiplies.
        gamma: Factor at each milestone of ``step``.
        warmup: Fraction of the phase over which the learning rate rises linearly.
        start_factor: Share of the learning rate at which the warm-up starts.
        final_factor: Share of the learning rate to which ``cosine`` and ``linear`` fall.
        betas: Decay rates of Adam's two moments.

    Example:
        >>> import lowbit
        >>> spec = lowbit.OptimizerSpec(learning_rate=0.1, schedule="step", milestones=(0.5,))
        >>> spec.rate_at(0.2), round(spec.rate_at(0.7), 6)
        (0.1, 0.01)
    """

    kind: OptimizerKind = "sgd"
    learning_rate: Annotated[float, AtLeast(0)] = 0.02
    momentum: Annotated[float, Interval(0, 1, closed="left")] = 0.9
    nesterov: bool = False
    weight_decay: Annotated[float, AtLeast(0)] = 1e-4
    schedule: Schedule = "cosine"
    milestones: Annotated[tuple[float, ...], Interval(0, 1)] = (0.5, 0.75)
    gamma: Annotated[float, AtLeast(0)] = 0.1
    warmup: Annotated[float, Interval(0, 1, closed="left")] = 0.0
    start_factor: Annotated[float, Interval(0, 1)] = 0.0
    final_factor: Annotated[float, Interval(0, 1)] = 0.0
    betas: Annotated[tuple[float, float], Interval(0, 1, closed="left")] = (0.9, 0.999)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise SpecError(f"{type(self).__name__}: betas must be two numbers, got {self.betas}")

    def rate_at(self, fraction: float) -> float:
        """The learning rate when ``fraction`` (0 to 1) of the phase is done."""
        if fraction < self.warmup:
            return self.learning_rate * (self.start_factor + (1 - self.start_factor) * (fraction / self.warmup))
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "step":
            return self.learning_rate * self.gamma ** sum(fraction >= milestone for milestone in self.milestones)
        done = min((fraction - self.warmup) / (1 - self.warmup), 1)
        left = 1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * (self.final_factor + (1 - self.final_factor) * left)


@dataclass(frozen=True)
class Recipe(CheckedSettings):
    """What the user decides about training, whatever the method.

    Attributes:
        epochs: Passes over the training data, over all phases together.
        batch_size: Samples of one step.
        optimizer: Optimizer of everything except quantizers; methods derive the quantizers' optimizer from it.
        clip_norm: Largest norm of all gradients together, or ``None``.
        distillation: Weight of the teacher's outputs in the loss; the rest is the targets'.
        accumulate: Batches whose gradients are added up before the optimizer steps.
        average_weights: Decay of an exponential moving average of the weights that is used in the end, or ``None``.
        seed: Makes the run reproducible.

    Example:
        >>> import lowbit
        >>> recipe = lowbit.Recipe(epochs=20, optimizer=lowbit.OptimizerSpec(kind="adam", learning_rate=1e-3))
        >>> recipe.batch_size, recipe.optimizer.rate_at(1.0)
        (128, 0.0)
    """

    epochs: Annotated[int, AtLeast(1)] = 10
    batch_size: Annotated[int, AtLeast(1)] = 128
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    clip_norm: Annotated[float | None, Above(0)] = None
    distillation: Annotated[float, Interval(0, 1)] = 0.5
    accumulate: Annotated[int, AtLeast(1)] = 1
    average_weights: Annotated[float | None, Interval(0, 1, closed="left")] = None
    seed: int = 0


UPSCALING_RECIPE = Recipe(batch_size=16, optimizer=OptimizerSpec(kind="adam", learning_rate=2e-4, weight_decay=0.0))


@dataclass(frozen=True)
class Turn:
    """One backward-and-step within a training step: a generator and a network may be trained in turn.

    Attributes:
        name: What a method's ``losses`` asks for: ``run.turn.name``.
        roles: The roles that this turn trains, among those of the phase; the others rest meanwhile. ``None``: all of them.
    """

    name: str = "step"
    roles: Sequence[Role] | None = None


@dataclass(frozen=True)
class Phase:
    """A part of the training with its own optimizers.

    Roles are dotted names, and a specification for one counts for all below it that have none of their own: ``{"others": spec}`` trains
    norms as well, ``{"others.norms": spec}`` trains nothing but norms.

    Attributes:
        name: Shown in the progress bar and the logs.
        epochs: Passes over the data.
        optimizers: An optimizer for each role of parameters; a role without one is frozen.
        clip_norm: Largest norm of all gradients of one network together, or ``None``.
        renew_each_epoch: Build new optimizers at the start of every epoch.
        turns: Turns of a step; each sees the batches of the step and has its own backward passes and optimizer step.
        span: The part of the optimizers' schedules that the phase goes through, as fractions: (0.5, 1.0) is the second half of a schedule
            that two phases share.

    Example:
        >>> import lowbit
        >>> phase = lowbit.Phase("norms", epochs=1, optimizers={"others.norms": lowbit.OptimizerSpec()})
        >>> phase.key("others.norms"), phase.key("weights")
        ('others.norms', None)
    """

    name: str
    epochs: int
    optimizers: Mapping[Role, OptimizerSpec]
    clip_norm: float | None = None
    renew_each_epoch: bool = False
    turns: Sequence[Turn] = (Turn(),)
    span: tuple[float, float] = (0.0, 1.0)

    def scheduled(self, progress: float) -> float:
        """The fraction of the schedules that is done when ``progress`` (0 to 1) of the phase is."""
        start, end = self.span
        return start + (end - start) * progress

    def key(self, role: Role, turn: Turn | None = None) -> Role | None:
        """The key of ``optimizers`` that counts for ``role``; ``None`` where the phase, or the turn, does not train it."""
        key = covering(role, self.optimizers)
        return key if turn is None or turn.roles is None or covering(role, turn.roles) is not None else None


def covering(role: Role, keys: Collection[Role]) -> Role | None:
    """The one of ``keys`` that is ``role`` or the nearest above it: ``others`` for ``others.norms``.

    >>> covering("others.norms", ["weights", "others"]), covering("others", ["others.norms"])
    ('others', None)
    """
    while role not in keys:
        role, dot, _ = role.rpartition(".")
        if not dot:
            return None
    return role
