"""A training run as a method sees it, and the hooks that a loop calls: the trainer's, or a plain PyTorch one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lowbit.errors import LoopError, SpecError
from lowbit.network import insert
from lowbit.network.bits import current_switch, get_bits, set_bits, switches_of
from lowbit.network.layers import evaluating, frozen_norms
from lowbit.qat.networks import Companion, GivenNetworks, RoleOf
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Role, Turn, covering
from lowbit.qat.task import Batch, Output, Scores, Task
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo
from lowbit.spec import LayerBits

USUAL_ROLES = {"weights", "quantizers", "others", "others.norms"}  # a phase may name them where a network has none
_FROZEN = "lowbit_frozen"  # attribute of the network: names of the parameters that a phase does not train


@runtime_checkable
class Scheduled(Protocol):
    """A module that changes with training: temperatures, thresholds."""

    def set_progress(self, progress: float) -> None:
        """``progress`` is the fraction of all training that is done, 0 to 1."""


class Hooks(Protocol):
    """What a run calls of its method, in any class that has them; ``TrainingMethod`` has a default for each and says what they are for."""

    info: ClassVar[MethodInfo]

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role: ...
    def phases(self, recipe: Recipe) -> list[Phase]: ...
    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]: ...
    def start_phase(self, run: TrainRun) -> None: ...
    def start_epoch(self, run: TrainRun) -> None: ...
    def before_step(self, run: TrainRun) -> None: ...
    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]: ...
    def after_backward(self, run: TrainRun) -> None: ...
    def after_step(self, run: TrainRun) -> None: ...
    def evaluate(self, run: TrainRun, measure: Callable[[], Scores]) -> Scores: ...
    @property
    def has_own_loss(self) -> bool: ...


@dataclass
class TrainRun:
    """One training run: its position, and everything that a method needs to know about it.

    A loop calls the hooks in this order::

        for _ in run.each_epoch():
            for batch in loader:
                for _ in run.phase.turns:
                    run.before_step()
                    for loss in run.losses(batch):
                        loss.backward()
                    run.after_backward()
                    run.optimizer_step()
                    run.after_step()

    Most methods have one turn in a step and one loss in a turn; then ``run.loss(batch).backward()`` is the same.

    Parameters of ``model`` that are frozen (``requires_grad``) when the run is made stay frozen. Whether a companion's parameters are
    trained is up to the phases alone.

    Attributes:
        model: The prepared network.
        method: Its method.
        task: Loss and metric.
        recipe: The user's recipe.
        steps_per_epoch: Training steps of an epoch.
        given: Networks that the user gave for the method to make companions from.
        batches: ``batches(n)`` returns the first ``n`` training batches, for methods that look at data between epochs.
        reduce_mean: Averages a tensor over all processes in place; does nothing in a single one.
        phase_index, epoch, step: Position of the run: the phase, the epoch in it, and the steps so far over all phases.
        turn_index: The turn of the step.
        optimizers: Optimizers of the current phase, each with the roles and specifications of its parameter groups.
        gradient_scale: What the loss was multiplied by before the backward pass of this step, for methods that look at gradients inside
            the network; gradients of parameters are free of it when ``after_backward`` is called.
        wrapped: ``model`` inside a wrapper that has to be called in its place (``DistributedDataParallel``, ``torch.compile``).
        generator: For everything random in a method; its state is saved with the run.
        companions: What the method declared beside ``model``, by name.
        networks: The networks of the companions by name: ``run.networks["teacher"]``.
        frozen: Names of the parameters of ``model`` that ``freeze`` has frozen.

    Example:
        >>> import torch, lowbit
        >>> model = lowbit.prepare(torch.nn.Linear(4, 2), method="lsq", sample=torch.rand(8, 4))
        >>> run = lowbit.TrainRun(model, model.lowbit_method, lowbit.Classification(), lowbit.Recipe(epochs=3), steps_per_epoch=10)
        >>> run.epochs, run.phase.name, len(run.parameters_of("quantizers"))
        (3, 'train', 2)
    """

    model: nn.Module
    method: Hooks
    task: Task
    recipe: Recipe
    steps_per_epoch: int
    given: GivenNetworks = field(default_factory=GivenNetworks)
    batches: Callable[[int], Iterable[Batch]] | None = None
    reduce_mean: Callable[[Tensor], None] = lambda _: None
    phase_index: int = 0
    epoch: int = 0
    step: int = 0
    turn_index: int = 0
    optimizers: list[torch.optim.Optimizer] = field(default_factory=list)
    wrapped: nn.Module | None = None
    gradient_scale: float = 1.0

    def __post_init__(self) -> None:
        self.phases = self.method.phases(self.recipe)
        self.generator = torch.Generator().manual_seed(self.recipe.seed)
        self.companions = self._make_companions()
        self.networks = {name: companion.network for name, companion in self.companions.items()}
        trained = [name for name in self.companions if any(self._trains(name, phase) for phase in self.phases)]
        self._trained_networks = [self.model, *(self.networks[name] for name in trained)]
        self._check_companions(trained)
        networks = (self.model, *self.networks.values())
        self._scheduled = [module for network in networks for module in network.modules() if isinstance(module, Scheduled)]
        self._resting: LayerBits | Mapping[str, LayerBits] | None = None  # widths to go back to behind the backward pass
        self._has_returned = False  # it stands inside an epoch that an earlier run has entered
        self.frozen: list[str] = []
        self._frozen_by_user = parameters_frozen_by_user(self.model)
        self._frozen_norms = frozen_norms(self.model, self._frozen_by_user)
        for name, companion in self.companions.items():
            if name not in trained:
                companion.network.requires_grad_(False)
        self._set_modes()

    @property
    def phase(self) -> Phase:
        """The current phase."""
        return self.phases[self.phase_index]

    @property
    def turn(self) -> Turn:
        """The current turn of the step."""
        return self.phase.turns[self.turn_index]

    @property
    def epochs(self) -> int:
        """Epochs of all phases."""
        return sum(phase.epochs for phase in self.phases)

    @property
    def epochs_done(self) -> int:
        """Epochs before the current one, over all phases."""
        return sum(phase.epochs for phase in self.phases[: self.phase_index]) + self.epoch

    @property
    def progress(self) -> float:
        """The fraction of all steps that is done, at most 1."""
        return min(self.step / max(self.epochs * self.steps_per_epoch, 1), 1.0)

    @property
    def phase_progress(self) -> float:
        """Fraction of the current phase's steps that are done, 0 or more."""
        before = sum(phase.epochs for phase in self.phases[: self.phase_index]) * self.steps_per_epoch
        return max(self.step - before, 0) / max(self.phase.epochs * self.steps_per_epoch, 1)

    @property
    def learning_rate(self) -> float:
        """Current learning rate of the weights."""
        spec = self.phase.optimizers.get("weights") or next(iter(self.phase.optimizers.values()), None)
        return 0.0 if spec is None else spec.rate_at(self.phase.scheduled(self.phase_progress))

    def trained_weights(self) -> list[insert.WeightSite]:
        """The quantized weights that hooks may change: all but those that the user froze."""
        frozen = set(map(id, self._frozen_by_user))
        return [site for site in insert.quantized_weights(self.model).values() if id(site.original) not in frozen]

    def quantizers(self) -> Iterator[Quantizer]:
        """Every quantizer of the network, each once."""
        return (module for module in self.model.modules() if isinstance(module, Quantizer))

    def parameters_of(self, role: Role) -> list[nn.Parameter]:
        """The parameters with this role or one below it, each once."""
        return [parameter for found, parameter in self.roles() if covering(found, (role,)) is not None]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The parameters of the network, and of the companions that some phase trains."""
        return itertools.chain.from_iterable(network.parameters() for network in self._trained_networks)

    def objects(self) -> dict[str, object]:
        """What a run that is resumed needs back, beside its position and the optimizers."""
        saved = {f"networks.{name}": companion.network for name, companion in self.companions.items() if companion.is_saved}
        return {"generator": self.generator, "model": self.model, "method": vars(self.method), "frozen": self.frozen, **saved}

    def not_saved(self) -> tuple[object, ...]:
        """Objects that the creator of the run provides again, so that they are not saved."""
        networks = [companion.network for companion in self.companions.values() if not companion.is_saved]
        return (self, self.recipe, self.task, self.given, *networks)

    def to(self, device: torch.device) -> None:
        """Move all networks."""
        for network in (self.model, *self.networks.values()):
            network.to(device)

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """The network, and the companions that follow it, in evaluation mode and without gradients."""
        following = [companion.network for companion in self.companions.values() if companion.mode == "follow"]
        with evaluating(nn.ModuleList([self.model, *following]) if following else self.model):
            yield

    def set_training_mode(self) -> None:
        """The network in training mode, but for the batch norms that the user froze (see ``network.layers.frozen_norms``)."""
        self.model.train()
        for norm in self._frozen_norms:
            norm.eval()

    def freeze(self, *layers: str, roles: Collection[Role] = ("weights",)) -> None:
        """Keep the parameters with these roles in the layers of these names as they are, from now on and over all phases.

        Raises:
            SpecError: A layer without such a parameter.
        """
        names = self._names_in(layers, roles)
        self.frozen.extend(name for name in names if name not in self.frozen)
        self.set_trainable()

    def release(self, *layers: str, roles: Collection[Role] = ("weights",)) -> None:
        """Undo ``freeze``."""
        names = set(self._names_in(layers, roles))
        self.frozen[:] = [name for name in self.frozen if name not in names]
        self.set_trainable()

    def _names_in(self, layers: Iterable[str], roles: Collection[Role]) -> list[str]:
        named = [(role, name) for role, name, _ in named_roles(self.model, self.method.role)]
        found = []
        for layer in layers:
            inside = [name for role, name in named if name.startswith(f"{layer}.") and covering(role, roles) is not None]
            if not inside:
                raise SpecError(f"layer {layer!r} of {type(self.model).__name__} has no parameter with the role {' or '.join(roles)}")
            found += inside
        return found

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
            self.epoch, self.turn_index = 0, 0
            self.step = self.steps_per_epoch * sum(phase.epochs for phase in self.phases[: self.phase_index])
            self.start_phase()
        self.epoch, self.step = epoch, step
        self._has_returned = True

    def start_phase(self) -> None:
        """Enter the phase ``phase_index``: the method's hook, trainable parameters, optimizers."""
        self._set_modes()
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
        if len(self.phase.turns) > 1:
            self.set_trainable()
        self._ready_optimizers()
        self.method.before_step(self)

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """The method's losses of one batch in the current turn. Each needs its backward pass before the next one is asked for."""
        return iter(self.method.losses(self, batch))

    def loss(self, batch: Batch) -> Tensor:
        """The sum of ``losses``, for a single backward pass: the same gradients, but with the graphs of all passes held at once.

        Where they were computed at different widths of the network, the backward pass puts it back to those of each loss in turn, as
        activation checkpointing computes parts of the network again there. That relies on one device, where autograd begins with the loss that
        was computed last and is done with it before it takes the one before; ``losses`` does not.
        """
        found, widths = [], []
        for loss in self.losses(batch):
            found.append(loss)
            widths.append(self._current_widths())
        if not found:
            raise LoopError(f"{self.method.info.name!r} gave no loss in the turn {self.turn.name!r}")
        resting = self._current_widths()
        if any(own != resting for own in widths):
            self._resting = resting
            for loss, own in zip(found, widths, strict=True):
                loss.register_hook(lambda _, own=own: set_bits(self.model, own))
        return found[0] if len(found) == 1 else torch.stack(found).sum()

    def _current_widths(self) -> LayerBits | Mapping[str, LayerBits] | None:
        """The switch of a network with several widths, or the bits of its layers where each has its own; ``None`` for one of one width."""
        return (current_switch(self.model) or get_bits(self.model)) if len(switches_of(self.model)) > 1 else None

    def predict(self, batch: Batch) -> Output:
        """The network's output for a batch, through the wrapper where there is one."""
        return self.task.predict(self.model if self.wrapped is None else self.wrapped, batch)

    def task_loss(self, batch: Batch, model: nn.Module | None = None) -> Tensor:
        """The task's loss, mixed with the teacher's where there is one."""
        return self.loss_of(self.predict(batch) if model is None or model is self.model else self.task.predict(model, batch), batch)

    def loss_of(self, output: Output, batch: Batch) -> Tensor:
        """The task's loss of an output for the batch, mixed with the teacher's where there is one."""
        loss = self.task.loss(output, batch)
        teacher = self.networks.get("teacher")
        if teacher is None:
            return loss
        with torch.no_grad():
            target = self.task.predict(teacher, batch)
        weight = self.recipe.distillation
        return (1 - weight) * loss + weight * self.task.distillation_loss(output, target)

    def penalty(self) -> Tensor:
        """The sum of all quantizers' penalties."""
        return penalty(self.model)

    def after_backward(self) -> None:
        """The method's hook, then clipping, of each network by itself."""
        if self._resting is not None:
            set_bits(self.model, self._resting)
            self._resting = None
        self.method.after_backward(self)
        if self.phase.clip_norm is not None:
            for network in self._trained_networks:
                nn.utils.clip_grad_norm_(network.parameters(), self.phase.clip_norm)

    def optimizer_step(self, step: Callable[[torch.optim.Optimizer], object] | None = None) -> None:
        """Step every optimizer; ``step`` does it in place of ``optimizer.step()``, as a gradient scaler's."""
        for optimizer in self.optimizers:
            if step is None:
                optimizer.step()
            else:
                step(optimizer)

    def after_step(self) -> None:
        """The method's hook; quantizers bring their parameters back to where they are allowed. The last turn ends the step."""
        self.method.after_step(self)
        for network in self._trained_networks:
            for module in network.modules():
                if isinstance(module, Quantizer):
                    module.project()
        self.turn_index += 1
        if self.turn_index == len(self.phase.turns):
            self.turn_index = 0
            self.step += 1

    def _ready_optimizers(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
            for group in optimizer.param_groups:
                group["lr"] = group["spec"].rate_at(self.phase.scheduled(self.phase_progress))

    def roles(self) -> Iterator[tuple[Role, nn.Parameter]]:
        """Every parameter of the network and its companions with its role."""
        yield from ((role, parameter) for role, _, parameter in named_roles(self.model, self.method.role))
        for name in self.companions:
            yield from self._companion_roles(name)

    def set_trainable(self) -> None:
        """Let those parameters ask for gradients that the current phase and turn train, but for what is frozen."""
        by_user, frozen_by_run = set(map(id, self._frozen_by_user)), set()
        frozen, phase, turn = set(self.frozen), self.phase, self.turn
        for role, name, parameter in named_roles(self.model, self.method.role):
            is_trained = name not in frozen and id(parameter) not in by_user and phase.key(role, turn) is not None
            _set_trainable(parameter, is_trained)
            if not is_trained and id(parameter) not in by_user:
                frozen_by_run.add(name)
        vars(self.model)[_FROZEN] = frozen_by_run  # a later run shall not take them for frozen by the user
        for companion in self.companions:
            for role, parameter in self._companion_roles(companion):
                _set_trainable(parameter, phase.key(role, turn) is not None)

    def _make_companions(self) -> dict[str, Companion]:
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.recipe.seed)  # the same in every process, and in a run that is resumed
            found = dict(self.method.companions(self.model, self.given))
        for companion in found.values():
            companion.network.to(device)
        return found

    def _check_companions(self, trained: Collection[str]) -> None:
        own = set(map(id, self.model.parameters()))
        for name, companion in self.companions.items():
            if name in trained and not companion.is_saved:
                raise SpecError(f"companion {name!r}: a phase trains it, so checkpoints must hold it. Leave is_saved=False out.")
            if any(id(parameter) in own for parameter in companion.network.parameters()):
                raise SpecError(f"companion {name!r}: it holds parameters of the network itself. Use a copy, or a network of its own.")

    def _companion_roles(self, name: str) -> Iterator[tuple[Role, nn.Parameter]]:
        companion = self.companions[name]
        if companion.role is None:
            return ((name, parameter) for parameter in companion.network.parameters())
        return ((f"{name}.{role}", parameter) for role, _, parameter in named_roles(companion.network, companion.role))

    def _trains(self, name: str, phase: Phase) -> bool:
        return any(phase.key(role) is not None for role, _ in self._companion_roles(name))

    def _set_modes(self) -> None:
        for name, companion in self.companions.items():
            companion.network.train(companion.mode == "train" or (companion.mode == "follow" and self._trains(name, self.phase)))

    def _build_optimizers(self) -> None:
        self.set_trainable()
        self._check_roles()
        frozen = set(map(id, self._frozen_by_user))
        self.optimizers = build_optimizers(self.phase, ((role, p) for role, p in self.roles() if id(p) not in frozen))

    def _check_roles(self) -> None:
        """SpecError where the phase names a role that no parameter has."""
        roles = {role for role, _ in self.roles()}
        asked = {key for turn in self.phase.turns for key in turn.roles or ()} | set(self.phase.optimizers)
        unknown = {key for key in asked if all(covering(role, (key,)) is None for role in roles) and not covering(key, USUAL_ROLES)}
        if unknown:
            raise SpecError(f"phase {self.phase.name!r}: no parameter has the role {', '.join(sorted(unknown))}")


_KINDS: Mapping[str, Callable[[list[dict[str, object]]], torch.optim.Optimizer]] = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.0),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.0),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.0),
}


def build_optimizers(phase: Phase, roles: Iterable[tuple[Role, nn.Parameter]]) -> list[torch.optim.Optimizer]:
    """The optimizers of a phase for these parameters: one for each kind, with a group for each role that has a specification."""
    found: dict[Role, list[nn.Parameter]] = {}
    for role, parameter in roles:
        key = phase.key(role)
        if key is not None:
            found.setdefault(key, []).append(parameter)
    by_kind: dict[str, list[dict[str, object]]] = {}
    for key, spec in phase.optimizers.items():
        if key in found:
            by_kind.setdefault(spec.kind, []).append({"params": found[key], "role": key, **_options(spec)})
    return [_KINDS[kind](groups) for kind, groups in by_kind.items()]


def _options(spec: OptimizerSpec) -> dict[str, object]:
    common: dict[str, object] = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay, "spec": spec}
    if spec.kind == "sgd":
        return {**common, "momentum": spec.momentum, "nesterov": spec.nesterov and spec.momentum > 0}
    return {**common, "betas": spec.betas}


def named_roles(network: nn.Module, role_of: RoleOf) -> Iterator[tuple[Role, str, nn.Parameter]]:
    """Role, name and parameter for every parameter of ``network``."""
    owners = dict(network.named_modules())
    for name, parameter in network.named_parameters():
        yield role_of(name, parameter, owners[name.rpartition(".")[0]]), name, parameter


def parameters_frozen_by_user(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that ask for no gradient, and for another reason than the phases of an earlier run."""
    by_a_run = vars(model).get(_FROZEN, ())
    return [parameter for name, parameter in model.named_parameters() if not parameter.requires_grad and name not in by_a_run]


def _set_trainable(parameter: nn.Parameter, is_trained: bool) -> None:
    parameter.requires_grad_(is_trained)
    if not is_trained:
        parameter.grad = None  # or an optimizer would keep stepping it


def penalty(model: nn.Module) -> Tensor:
    """The sum of the penalties of every quantizer of ``model``, to add to a training loss; 0 where there is none.

    Example:
        >>> import torch, lowbit
        >>> policy = lowbit.BitPolicy.uniform(4, 4, first_last=None)
        >>> model = lowbit.prepare(torch.nn.Linear(4, 2), method="pact", policy=policy, clip_init=2.0, clip_decay=0.1, sample=torch.rand(8, 4))
        >>> f"{lowbit.penalty(model).item():.3f}"
        '0.400'
    """
    terms = [module.penalty() for module in model.modules() if isinstance(module, Quantizer)]
    terms = [term for term in terms if term.requires_grad]
    return torch.stack(terms).sum() if terms else torch.zeros((), device=next(model.parameters()).device)
