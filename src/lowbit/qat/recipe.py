"""How a network is trained: what the user asks for, and the phases and optimizers that a method makes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from lowbit.errors import SpecError

Role = str  # "weights", "quantizers", "others", or one that a method adds
OptimizerKind = Literal["sgd", "adam", "adamw"]
Schedule = Literal["cosine", "step", "linear", "constant"]


@dataclass(frozen=True)
class OptimizerSpec:
    """An optimizer for the parameters of one role, and its learning rate over a phase.

    Attributes:
        kind: ``sgd`` (Nesterov where ``momentum`` is positive and ``nesterov``), ``adam`` or ``adamw``.
        learning_rate: At the start, after warm-up.
        momentum: Of SGD.
        nesterov: Of SGD.
        weight_decay: L2 penalty; decoupled with ``adamw``.
        schedule: ``cosine`` and ``linear`` fall to 0, ``step`` multiplies by ``gamma`` at each of ``milestones``.
        milestones: Fractions of the phase.
        gamma: Factor of ``step``.
        warmup: Fraction of the phase over which the learning rate rises linearly from 0.
    """

    kind: OptimizerKind = "sgd"
    learning_rate: float = 0.02
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    schedule: Schedule = "cosine"
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("kind", get_args(OptimizerKind)), ("schedule", get_args(Schedule))):
            if getattr(self, name) not in known:
                raise SpecError(f"{name} of an optimizer must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        for name in ("learning_rate", "weight_decay", "gamma"):
            value = getattr(self, name)
            if not value >= 0 or not math.isfinite(value):
                raise SpecError(f"{name} must be 0 or more and finite, got {value}")
        if not 0 <= self.momentum < 1:
            raise SpecError(f"momentum must be from 0 to below 1, got {self.momentum}")
        if not 0 <= self.warmup < 1:
            raise SpecError(f"warmup is a fraction of the phase from 0 to below 1, got {self.warmup}")

    def rate_at(self, fraction: float) -> float:
        """The learning rate when ``fraction`` (0 to 1) of the phase is done."""
        if fraction < self.warmup:
            return self.learning_rate * fraction / self.warmup
        if self.schedule == "constant":
            return self.learning_rate
        if self.schedule == "step":
            return self.learning_rate * self.gamma ** sum(fraction >= milestone for milestone in self.milestones)
        done = min((fraction - self.warmup) / (1 - self.warmup), 1)
        return self.learning_rate * (1 - done if self.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2)


@dataclass(frozen=True)
class Recipe:
    """What the user decides about training, whatever the method.

    Attributes:
        epochs: Passes over the training data, over all phases together.
        batch_size: Samples of one step.
        optimizer: For weights and everything else that is not a quantizer's; methods derive the quantizers' from it.
        clip_norm: Largest norm of all gradients together, or ``None``.
        distillation: Weight of the teacher's outputs in the loss, 0 to 1; the rest is the targets'.
        accumulate: Steps whose gradients are added up before the optimizer steps.
        average_weights: Decay of an exponential moving average of the weights that is used in the end, or ``None``.
        seed: Makes the run reproducible.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: OptimizerSpec = field(default_factory=OptimizerSpec)
    clip_norm: float | None = None
    distillation: float = 0.5
    accumulate: int = 1
    average_weights: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Phase:
    """A stretch of training with its own optimizers.

    Attributes:
        name: Shown in the progress bar and the logs.
        epochs: Passes over the data.
        optimizers: For each role of parameters; a role that is missing is frozen.
        clip_norm: Largest norm of all gradients together, or ``None``.
        renew_each_epoch: Build the optimizers anew at the start of every epoch.
    """

    name: str
    epochs: int
    optimizers: Mapping[Role, OptimizerSpec]
    clip_norm: float | None = None
    renew_each_epoch: bool = False
