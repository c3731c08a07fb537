"""A small prepared network, and a method that writes down which of its hooks is called when."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

import lowbit
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.qat import OptimizerSpec, Phase, Recipe, TrainRun

_generator = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(8, 6, generator=_generator), torch.randint(0, 3, (8,), generator=_generator)) for _ in range(4)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))


def prepared(**options: object) -> nn.Module:
    return lowbit.prepare(network(), method="lsq", weight_bits=2, activation_bits=3, sample=BATCHES[0][0], **options).train()


@dataclass
class Recorder(Lsq):
    """Learned step sizes that write down which hook is called when."""

    schedule: tuple[Phase, ...] = ()
    calls: list[str] = field(default_factory=list)

    def phases(self, recipe: Recipe) -> list[Phase]:
        return list(self.schedule) or super().phases(recipe)

    def start_phase(self, run: TrainRun) -> None:
        self.calls.append(f"phase {run.phase.name}")

    def start_epoch(self, run: TrainRun) -> None:
        self.calls.append(f"epoch {run.epoch}")

    def before_step(self, run: TrainRun) -> None:
        self.calls.append(f"before {run.step}")

    def after_backward(self, run: TrainRun) -> None:
        self.calls.append("backward")

    def after_step(self, run: TrainRun) -> None:
        self.calls.append("after")


def recorded(*phases: tuple[str, int, tuple[str, ...]], base: type[Recorder] = Recorder) -> tuple[nn.Module, Recorder]:
    """A prepared network whose method has these phases: name, epochs, roles that are trained."""
    model, spec = prepared(), OptimizerSpec(learning_rate=0.1)
    method = base(schedule=tuple(Phase(name, epochs, dict.fromkeys(roles, spec)) for name, epochs, roles in phases))
    model.lowbit_method = method  # type: ignore[assignment]
    return model, method
