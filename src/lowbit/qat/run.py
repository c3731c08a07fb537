"""A training run as a method sees it, and the hooks that a loop calls: the trainer's, or a plain PyTorch one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.qat.method import TrainingMethod
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Role
from lowbit.qat.task import Batch, Task
from lowbit.quantizers import Quantizer

_FROZEN = "lowbit_frozen"  # attribute of the network: names of the parameters that a phase does not train


@runtime_checkable
class Scheduled(Protocol):
    """A module that changes with training: temperatures, thresholds."""

    def set_progress(self, progress: float) -> None:
        """``progress`` is the fraction of all training that is done, 0 to 1."""


@dataclass
class TrainRun:
    """One training run: where it stands, and what a method needs to know of it.

    A loop calls the hooks in this order::

        for _ in run.each_epoch():
            for batch in loader:
                run.before_step()
                loss = run.loss(batch)
                loss.backward()
                run.after_backward()
                run.optimizer_step()
                run.after_step()

    Parameters that are frozen (``requires_grad``) when the run is made stay frozen.

    Attributes:
        model: The prepared network.
        method: Its method.
        task: Loss and metric.
        recipe: What the user decided.
        steps_per_epoch: Optimizer steps of an epoch.
        teacher: A network whose outputs are soft targets, in evaluation mode, or ``None``.
        batches: Gives the first so many training batches, for methods that look at data between epochs.
        reduce_mean: Averages a tensor over all processes in place; does nothing in a single one.
        phase_index, epoch, step: Where the run stands: the phase, the epoch in it, and the optimizer steps so far over all phases.
        optimizers: Those of the present phase, each with the roles and specifications of its parameter groups.
        gradient_scale: What the loss was multiplied by before the backward pass of this step, for methods that look at gradients inside
            the network; gradients of parameters are free of it when ``after_backward`` is called.
        wrapped: ``model`` inside a wrapper that has to be called in its place (``DistributedDataParallel``, ``torch.compile``).
        generator: For everything random in a method; its state is saved with the run.
    """

    model: nn.Module
    method: TrainingMethod
    task: Task
    recipe: Recipe
    steps_per_epoch: int
    teacher: nn.Module | None = None
    batches: Callable[[int], Iterable[Batch]] | None = None
    reduce_mean: Callable[[Tensor], None] = lambda _: None
    phase_index: int = 0
    epoch: int = 0
    step: int = 0
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    wrapped: nn.Module | None = None
    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        self.phases = self.method.phases(self.recipe)
        self.generator = torch.Generator().manual_seed(self.recipe.seed)
        self._scheduled = [module for module in self.model.modules() if isinstance(module, Scheduled)]
        self._has_returned = False  # it stands inside an epoch that an earlier run has entered
        by_a_run = vars(self.model).get(_FROZEN, set())
        named = self.model.named_parameters()
        self._frozen = [parameter for name, parameter in named if not parameter.requires_grad and name not in by_a_run]

    @property
    def phase(self) -> Phase:
        """The present phase."""
        return self.phases[self.phase_index]

    @property
    def epochs(self) -> int:
        """Epochs of all phases."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def epochs_done(self) -> int:
        """Epochs before the present one, over all phases."""
        return sum(phase.epochs for phase in self.phases[: self.phase_index]) + self.epoch

    @property
    def progress(self) -> float:
        """The fraction of all steps that is done, at most 1."""
        return min(self.step / max(self.epochs * self.steps_per_epoch, 1), 1.0)

    @property
    def phase_progress(self) -> float:
        """The fraction of the present phase's steps that is done, 0 or more."""
        before = sum(phase.epochs for phase in self.phases[: self.phase_index]) * self.steps_per_epoch
        return max(self.step - before, 0) / max(self.phase.epochs * self.steps_per_epoch, 1)

    @property
    def learning_rate(self) -> float:
        """The present learning rate of the weights."""
        spec = self.phase.optimizers.get("weights") or next(iter(self.phase.optimizers.values()), None)
        return 0.0 if spec is None else spec.rate_at(self.phase_progress)

    def quantizers(self) -> Iterator[Quantizer]:
        """Every quantizer of the network, each once."""
        return (module for module in self.model.modules() if isinstance(module, Quantizer))

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """The network's parameters with this role, each once."""
        return [parameter for found, parameter in self.roles() if found == role]

    def each_epoch(self) -> Iterator[int]:
        """Enter every phase and every epoch in turn; gives the number of epochs before it, over all phases.

        After ``return_to`` it begins with the epoch where the run stands.
        """
        first_phase, first_epoch = (self.phase_index, self.epoch) if self._has_returned else (0, 0)
        for self.phase_index in range(first_phase, len(self.phases)):  # noqa: B020 - where the run stands
            if not self._has_returned:
                self.epoch = 0
                self.start_phase()
            for self.epoch in range(first_epoch, self.phase.epochs):  # noqa: B020
                if not self._has_returned:
                    self.start_epoch()
                self._has_returned = False
                yield self.epochs_done
            self._has_returned, first_epoch = False, 0

    def return_to(self, phase_index: int, epoch: int, step: int) -> None:
        """Stand where a run stood that was stopped, and build the optimizers of that phase.

        The network, the method and the optimizers are still those of a new run: their state has to be loaded as well. What the
        method does to their structure at the start of a phase is done again for the phases that have started.
        """
        for self.phase_index in range(phase_index + 1):
            self.epoch, self.step = 0, self.steps_per_epoch * sum(phase.epochs for phase in self.phases[: self.phase_index])
            self.start_phase()
        self.epoch, self.step = epoch, step
        self._has_returned = True

    def start_phase(self) -> None:
        """Enter the phase ``phase_index``: the method's hook, trainable parameters, optimizers."""
        self.method.start_phase(self)
        self._build_optimizers()

    def start_epoch(self) -> None:
        """Enter the epoch ``epoch``."""
        if self.phase.renew_each_epoch and self.epoch > 0:
            self._build_optimizers()
        self.method.start_epoch(self)

    def before_step(self) -> None:
        """Schedules and the method's hook; also clears gradients."""
        for module in self._scheduled:
            module.set_progress(self.progress)
        self._ready_optimizers()
        self.method.before_step(self)

    def loss(self, batch: Batch) -> Tensor:
        """The method's loss of one batch."""
        return self.method.loss(self, batch)

    def task_loss(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """The task's loss, mixed with the teacher's where there is one."""
        if self.wrapped is not None and (model is None or model is self.model):
            model = self.wrapped
        output = self.task.predict(self.model if model is None else model, batch)
        loss = self.task.loss(output, batch)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            target = self.task.predict(self.teacher, batch)
        weight = self.recipe.distillation
        return (1 - weight) * loss + weight * self.task.distillation_loss(output, target)

    def penalty(self) -> Tensor:
        """The sum of all quantizers' penalties."""
        return penalty(self.model)

    def after_backward(self) -> None:
        """The method's hook, then clipping."""
        self.method.after_backward(self)
        if self.phase.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.phase.clip_norm)

    def optimizer_step(self, step: Callable[[torch.optim.Optimizer], object] | None = None) -> None:
        """Step every optimizer; ``step`` does it in place of ``optimizer.step()``, as a gradient scaler's."""
        for optimizer in self.optimizers:
            if step is None:
                optimizer.step()
            else:
                step(optimizer)

    def after_step(self) -> None:
        """The method's hook; quantizers bring their parameters back to where they are allowed."""
        self.method.after_step(self)
        for quantizer in self.quantizers():
            quantizer.project()
        self.step += 1

    def _ready_optimizers(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["spec"].rate_at(self.phase_progress)

    def roles(self) -> Iterator[tuple[Role, nn.Parameter]]:
        owners = dict(self.model.named_modules())
        for name, parameter in self.model.named_parameters():
            yield self.method.role(name, parameter, owners[name.rpartition(".")[0]]), parameter

    def _build_optimizers(self) -> None:
        self._freeze()
        frozen = set(map(id, self._frozen))
        groups: dict[Role, list[nn.Parameter]] = {}
        for role, parameter in self.roles():
            found = groups.setdefault(role, [])
            if id(parameter) not in frozen:
                found.append(parameter)
        unknown = set(self.phase.optimizers) - set(groups) - {"weights", "quantizers", "others"}
        if unknown:
            raise SpecError(f"phase {self.phase.name!r}: no parameter has the role {', '.join(sorted(unknown))}")
        by_kind: dict[str, list[dict[str, object]]] = {}
        for role, spec in self.phase.optimizers.items():
            if groups.get(role):
                by_kind.setdefault(spec.kind, []).append({"params": groups[role], "role": role, **_options(spec)})
        self.optimizers = [_KINDS[kind](found) for kind, found in by_kind.items()]

    def _freeze(self) -> None:
        """Let those parameters ask for gradients that the phase trains, but for what was frozen when the run was made."""
        frozen, mine = set(map(id, self._frozen)), set()
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for role, parameter in self.roles():
            is_trained = role in self.phase.optimizers and id(parameter) not in frozen
            parameter.requires_grad_(is_trained)
            if not is_trained:
                parameter.grad = None  # or an optimizer would go on stepping it
            if not is_trained and id(parameter) not in frozen:
                mine.add(names[id(parameter)])
        vars(self.model)[_FROZEN] = mine  # a later run shall not take them for frozen by the user


_KINDS: Mapping[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.0),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.0),
}


def _options(spec: OptimizerSpec) -> dict[str, object]:
    common: dict[str, object] = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay, "spec": spec}
    return {**common, "momentum": spec.momentum, "nesterov": spec.nesterov and spec.momentum > 0} if spec.kind == "sgd" else common


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties of every quantizer of ``model``, to add to a training loss; 0 where there is none."""
    terms = [module.penalty() for module in model.modules() if isinstance(module, Quantizer)]
    terms = [term for term in terms if term.requires_grad]
    return torch.stack(terms).sum() if terms else torch.zeros((), device=next(model.parameters()).device)
