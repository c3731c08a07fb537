"""``lowbit.training``: the hooks of a method for a custom training loop, in which the user owns the optimizer and its schedule."""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import FileFormatError, LoopError, SpecError, StateError
from lowbit.network import insert
from lowbit.qat.engine.constants import Constants
from lowbit.qat.engine.finite import gradient_is_finite
from lowbit.qat.engine.processes import average_buffers, average_gradients, mean_over_processes
from lowbit.qat.engine.snapshot import Restoration, Snapshot
from lowbit.qat.networks import GivenNetworks
from lowbit.qat.prepare import method_of, prepared_network
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Role, covering
from lowbit.qat.run import TrainRun, build_optimizers, named_roles, parameters_frozen_by_user
from lowbit.qat.task import Batch, Criterion, Task
from lowbit.qat.tasks import as_task


@dataclass
class ManualLoop(TrainRun):
    """A training run for a custom loop with the user's optimizer and learning-rate schedule; created by ``lowbit.training``.

    Three calls for each optimizer step, in this order::

        run = lowbit.training(model, steps_per_epoch=len(loader), epochs=10)
        optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=0.02), momentum=0.9)
        for epoch in range(10):
            for x, y in loader:
                run.before_step(optimizer)                         # also clears the network's gradients
                loss = criterion(model(x), y) + run.penalty()      # or run.loss((x, y)), for methods with a loss of their own
                loss.backward()
                run.after_backward()
                optimizer.step()
                run.after_step()

    A method may have several losses, each with a backward pass: ``for loss in run.losses((x, y)): loss.backward()`` (``run.loss`` is their
    sum, for a single pass that takes more memory). It may also have several turns in a step, which are trained on the same batch: then the
    body of the inner loop stands in ``for _ in run.phase.turns:``.

    Phases and epochs of the method start by themselves, counted in steps. At the start of a phase the parameters it does not train
    are frozen (``requires_grad``; those that were frozen when the run was made stay so), parameters that the method replaced are
    replaced in the optimizer, and its momentum is forgotten, as the new optimizers of ``lowbit.train`` would have none. Learning
    rates and kinds of optimizers are the user's, also where a method wants others (``kind`` and ``lr`` of ``parameter_groups``). Whoever
    wants to follow it in later phases makes a new optimizer when ``phase_index`` changes.

    Companion networks (``run.networks``) lie on the network's device. ``run.parameter_groups()`` has their roles as well; those that the optimizer
    does not hold are trained by optimizers of the run's own, with the method's rates, in ``after_step``. Those of several processes are
    kept alike by the run. With a gradient scaler, set ``run.gradient_scale = scaler.get_scale()``, or let your optimizer hold them.

    With gradient accumulation the three calls belong around each optimizer step, not around each backward pass. With a gradient
    scaler ``scaler.unscale_(optimizer)`` comes before ``after_backward``.

    Attributes:
        next_hook: The hook that has to be called next.
    """

    next_hook: Literal["before_step", "after_backward", "after_step"] = field(default="before_step", init=False)
    _has_entered: bool = field(default=False, init=False, repr=False)
    _has_called_loss: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._known = dict(self.model.named_parameters())
        self._rate: dict[str, object] | None = None  # the user's parameter group that holds the first weight
        self._checked: list[object] = []  # the holdings that were last checked
        self._companion_optimizers: list[torch.optim.Optimizer] = []
        self._constants = Constants()
        with contextlib.suppress(StateError):  # it is raised when the state is asked for
            self._take(Snapshot(self.not_saved(), self._constants))

    @property
    def learning_rate(self) -> float:
        """Current learning rate of the weights in the user's optimizer; before the first step the recipe's."""
        return super().learning_rate if self._rate is None else float(self._rate["lr"])  # type: ignore[arg-type]

    @property
    def total_steps(self) -> int:
        """Steps of all phases."""
        return self.epochs * self.steps_per_epoch

    def parameter_groups(self, learning_rate: float | None = None, weight_decay: float | None = None) -> list[dict[str, object]]:
        """Parameter groups for any ``torch.optim`` optimizer, one for each role, with the method's rates for quantizers.

        Args:
            learning_rate: Learning rate of the weights; default: the recipe's.
            weight_decay: Weight decay of the weights; default: the recipe's.

        Returns:
            Groups with ``params``, ``lr``, ``weight_decay``, ``role``, and ``kind``: the optimizer that the method wants for the role
            (the recipe's where it has no wish).
        """
        recipe = _with_rates(self.recipe, learning_rate, weight_decay)
        frozen = set(map(id, self._frozen_by_user))
        return _groups(self.method.phases(recipe), ((role, p) for role, p in self.roles() if id(p) not in frozen))

    def before_step(self, *optimizers: torch.optim.Optimizer) -> None:
        """Before the forward pass: phases and epochs that start here, schedules, the method's hook.

        Args:
            *optimizers: Those that the step will use; may be left out once they are known.

        Raises:
            LoopError: The step before was not ended, or the optimizers do not hold the network's parameters.
        """
        self._expect("before_step", "before_step")
        if optimizers:
            self.optimizers = [_unwrapped(optimizer) for optimizer in optimizers]
        if not self.optimizers:
            raise LoopError("before_step needs the optimizer of the loop: run.before_step(optimizer)")
        is_new = bool(optimizers) and not _are_same(self._holdings(), self._checked)
        if is_new:
            self._follow_parameters()
            self._drop_what_the_user_holds()
            self._find_learning_rate()
        if self._enter() or is_new:
            self._check_optimizers()
            self._checked = self._holdings()
        super().before_step()
        self.next_hook, self._has_called_loss = "after_backward", False

    def losses(self, batch: Batch) -> Iterator[Tensor]:
        """The method's losses of one batch, penalties included; each needs its backward pass before the next one is asked for."""
        self._has_called_loss = True
        return super().losses(batch)

    def after_backward(self) -> None:
        """After the last backward pass of the step and before the optimizer's step (and before clipping gradients).

        Raises:
            LoopError: Called out of order, there is no gradient, or the method has its own loss that was not used.
        """
        self._expect("after_backward", "after_backward")
        if not self._has_called_loss and self.method.has_own_loss:
            raise LoopError(
                f"{self.method.info.name!r} has its own loss: compute it with run.loss((inputs, targets)), then loss.backward()"
            )
        if all(parameter.grad is None for parameter in self.parameters()):
            raise LoopError(
                "no parameter has a gradient. Call after_backward() after loss.backward(), and zero_grad() before the forward pass."
            )
        self._ready_companions()
        super().after_backward()
        self.next_hook = "after_step"

    def after_step(self) -> None:
        """After the optimizer's step: the method's hook, projections, the count of steps.

        Raises:
            LoopError: Called out of order.
        """
        self._expect("after_step", "after_step")
        self._step_companions()
        super().after_step()
        self.next_hook = "before_step"
        if self.turn_index == 0 and self.step == self.total_steps:
            self._start_phases(len(self.phases) - 1)  # phases without an epoch that end the training

    def state_dict(self) -> dict[str, object]:
        """Where the run stands, with its networks and all that the method holds, but not the user's optimizer.

        Copies of tensors and plain values: ``torch.load(..., weights_only=True)`` takes it. A step under way is not counted.

        Raises:
            LoopError: Called between the turns of a step.
            StateError: Something cannot be saved.
        """
        if self.turn_index:
            raise LoopError(
                f"state_dict was called after {self.turn_index} of the {len(self.phase.turns)} turns of step {self.step}: end the step first"
            )
        snapshot = Snapshot(self.not_saved(), self._constants)
        objects = self._take(snapshot)
        position = {"phase_index": self.phase_index, "epoch": self.epoch, "step": self.step}
        return {"position": position, "has_entered": self._has_entered, "objects": objects, "tensors": snapshot.owned()}

    def _take(self, snapshot: Snapshot) -> dict[str, object]:
        objects = {name: snapshot.take(value, name) for name, value in self.objects().items()}
        optimizers = [snapshot.take(optimizer, f"optimizer.{index}") for index, optimizer in enumerate(self._companion_optimizers)]
        return {**objects, "companion_optimizers": optimizers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume where ``state_dict`` was taken by a run with the same settings.

        Comes before the optimizer is made and loaded; one that exists already follows the network at the next ``before_step``.

        Raises:
            FileFormatError: The state is of another network or method.
        """
        self._expect("before_step", "load_state_dict")
        try:
            if state["has_entered"]:
                # twice, as from the trainer's checkpoints: what a method does when a phase starts may depend on its state, and changes it
                self._put(state, strict=False)
                self.return_to(**state["position"])
            self._put(state, strict=True)
            self._has_entered = state["has_entered"]
        except (KeyError, TypeError, IndexError, AttributeError, RuntimeError) as error:
            raise FileFormatError(
                f"this is no state of {self.method.info.name!r} on this network ({type(error).__name__}: {error})"
            ) from error

    def resume(self, step: int) -> None:
        """Resume after ``step`` steps with nothing but the network's ``state_dict``, which has been loaded already.

        The method's generator starts from the recipe's seed, and what it keeps outside of the network's ``state_dict`` as well.
        """
        self._expect("before_step", "resume")
        if step > 0:
            loaded = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.return_to(*self._place(step - 1), step)
            self.model.load_state_dict(loaded)
            self._has_entered = True

    def return_to(self, phase_index: int, epoch: int, step: int) -> None:
        super().return_to(phase_index, epoch, step)
        self._has_returned = False  # epochs start by the count of steps

    def _put(self, state: Mapping[str, Any], *, strict: bool) -> None:
        restoration = Restoration(state["tensors"], strict=strict)
        for name, value in self.objects().items():
            restoration.put(state["objects"][name], value, name)
        if strict and state["has_entered"]:
            self.set_trainable()
            trees = state["objects"]["companion_optimizers"]
            for index, (tree, optimizer) in enumerate(zip(trees, self._companion_optimizers, strict=bool(trees))):
                restoration.put(tree, optimizer, f"optimizer.{index}")

    def _expect(self, hook: str, called: str) -> None:
        if self.next_hook != hook:
            raise LoopError(
                f"{called} was called where {self.next_hook} is next (step {self.step}). The order of a step is: run.before_step(optimizer), "
                "loss.backward(), run.after_backward(), optimizer.step(), run.after_step()."
            )

    def _place(self, step: int) -> tuple[int, int]:
        """Phase and epoch in it of a step; those of the last step for any later one."""
        epoch = min(step // self.steps_per_epoch, self.epochs - 1)
        for index, phase in enumerate(self.phases):
            if epoch < phase.epochs:
                return index, epoch
            epoch -= phase.epochs
        raise AssertionError("an epoch lies in a phase")

    def _enter(self) -> bool:
        """Start the phases and the epoch that begin with this step; says whether one does."""
        phase_index, epoch = self._place(self.step)
        is_new = not self._has_entered or (phase_index, epoch) > (self.phase_index, self.epoch)
        if is_new:
            self._start_phases(phase_index)
            self.epoch = epoch
            self.start_epoch()
        return is_new

    def _start_phases(self, last: int) -> None:
        for index in range(self.phase_index + 1 if self._has_entered else 0, last + 1):
            self.phase_index, self.epoch, self._has_entered = index, 0, True
            self.start_phase()

    def _ready_optimizers(self) -> None:
        """Gradients are cleared, also those of a method that looked at data; learning rates are the user's, but for companions."""
        for parameter in self.parameters():
            parameter.grad = None
        for optimizer in self._companion_optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["spec"].rate_at(self.phase.scheduled(self.phase_progress))

    def _build_optimizers(self) -> None:
        self.set_trainable()
        self._check_roles()
        self._follow_parameters()
        roles = [pair for name in self.companions for pair in self._companion_roles(name)]
        self._companion_optimizers = build_optimizers(self.phase, roles)
        self._drop_what_the_user_holds()
        for optimizer in self.optimizers:
            for parameter in (*self._known.values(), *self.parameters()):  # companions' too, where the user's optimizer holds them
                optimizer.state.pop(parameter, None)  # a new optimizer knows of no earlier gradients
        self._follow_weight_decay()

    def _holdings(self) -> list[object]:
        """What the user's optimizers hold of the network, and what of it is trained: looking through all of it takes long."""
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        held = [parameter for group in groups for parameter in group["params"]]
        own = list(self.model.parameters())
        return [*self.optimizers, *groups, *held, *own, *(parameter.requires_grad for parameter in own)]

    def _drop_what_the_user_holds(self) -> None:
        """Leave companions' parameters to the user's optimizers where these hold them."""
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        for optimizer in self._companion_optimizers:
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in held]
        self._companion_optimizers = [o for o in self._companion_optimizers if any(group["params"] for group in o.param_groups)]

    def _ready_companions(self) -> None:
        """Do for companions' gradients what wrappers and scalers of the user's do for the network's."""
        for network in self._trained_networks[1:]:
            average_gradients(network.parameters())
        for optimizer in self._companion_optimizers:
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad /= self.gradient_scale

    def _step_companions(self) -> None:
        for optimizer in self._companion_optimizers:
            parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            if self.gradient_scale == 1 or gradient_is_finite(parameters):  # a scaler skips such a step of the user's optimizer as well
                optimizer.step()
        for companion in self.companions.values():
            if companion.is_saved and companion.network.training:
                average_buffers(companion.network)

    def _follow_weight_decay(self) -> None:
        """The weight decay of the phase that starts, where it differs from that of the phase before; else it stays the user's."""
        before = self.phases[self.phase_index - 1].optimizers if self.phase_index else self.phase.optimizers
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            old, new = before.get(group.get("role", "")), self.phase.optimizers.get(group.get("role", ""))  # a user's own group has no role
            if old is not None and new is not None and new.weight_decay != old.weight_decay:
                group["weight_decay"] = new.weight_decay

    def _follow_parameters(self) -> None:
        """Take parameters that the method removed out of the user's optimizers, and put those it added where their role lies."""
        if not self.optimizers:
            return  # those of the network as it was may come yet
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        now = {id(p) for p in self.model.parameters()}
        gone = {id(p): p for p in self._known.values() if id(p) not in now}
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        for optimizer in self.optimizers:
            for parameter in gone.values():
                optimizer.state.pop(parameter, None)
        there = {id(p) for p in self._known.values()} | {id(p) for group in groups for p in group["params"]}
        network = named_roles(self.model, self.method.role)
        added = [(role, p) for role, _, p in network if id(p) not in there and self.phase.key(role) is not None]
        for new in _groups(self.phases, added):
            same = next((group for group in groups if group.get("role") == new["role"]), None)
            if same is None:
                self.optimizers[0].add_param_group(new)
            else:
                same["params"] = [*same["params"], *new["params"]]  # type: ignore[misc]
        self._known = dict(self.model.named_parameters())

    def _find_learning_rate(self) -> None:
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        weights = {id(site.original) for site in insert.quantized_weights(self.model).values()}
        others = set(map(id, self.model.parameters()))
        for wanted in (weights, others):
            for group in groups:
                if any(id(p) in wanted for p in group["params"]):
                    self._rate = group
                    return
        raise LoopError(
            "the optimizer holds no parameter of the prepared network. Make it after lowbit.prepare, from run.parameter_groups()."
        )

    def _check_optimizers(self) -> None:
        held = {id(p) for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]}
        missing = [
            n for n, p in self._known.items() if id(p) not in held and p.requires_grad and covering(self._role_of(n, p), ("quantizers",))
        ]
        if missing:
            raise LoopError(
                f"no optimizer holds {len(missing)} parameters of the quantizers, {missing[0]!r} among them: they would stay as they are. "
                "Make the optimizer from run.parameter_groups(), or freeze them with requires_grad_(False) before lowbit.training."
            )

    def _role_of(self, name: str, parameter: nn.Parameter) -> Role:
        return self.method.role(name, parameter, self.model.get_submodule(name.rpartition(".")[0]))


def training(
    model: nn.Module,
    *,
    steps_per_epoch: int,
    epochs: int,
    task: Task | Criterion | str | None = None,
    recipe: Recipe | None = None,
    teacher: nn.Module | None = None,
    float_network: nn.Module | None = None,
    batches: Callable[[int], Iterable[Batch]] | Iterable[Batch] | None = None,
    reduce_mean: Callable[[Tensor], None] | None = None,
) -> ManualLoop:
    """The hooks of the method that ``model`` was prepared with, for a custom training loop.

    Args:
        model: What ``lowbit.prepare`` returned, or a wrapper around it (``DistributedDataParallel``, ``torch.compile``, a module that
            has it as a submodule).
        steps_per_epoch: Optimizer steps of an epoch.
        epochs: Epochs of the whole training, over which methods spread their schedules.
        task: For ``run.loss``: a ``Task`` or a function ``criterion(output, target)``. Default: classification.
        recipe: Recipe with the weight of distillation, the seed, and the learning rate of ``run.parameter_groups``.
        teacher: Network that gives soft targets in ``run.loss``. It becomes part of the run: it is moved to the network's device, frozen
            and put in evaluation mode, unless the method trains it.
        float_network: The network given to ``lowbit.prepare``, for methods that train a float twin too.
        batches: Training batches for methods that look at data between epochs: a loader, or a function that returns the first ``n``.
        reduce_mean: Function that averages a tensor over all processes in place. Default: by ``torch.distributed`` if it runs.

    Raises:
        SpecError: ``model`` was not prepared, a number is out of range, or the method needs more epochs.

    Example:
        >>> import torch, lowbit
        >>> inputs, labels = torch.rand(8, 4), torch.arange(8) % 2
        >>> model = lowbit.prepare(torch.nn.Linear(4, 2), method="lsq", sample=inputs)
        >>> run = lowbit.training(model, steps_per_epoch=1, epochs=3)
        >>> optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=0.1), lr=0.1)
        >>> for _ in range(run.total_steps):
        ...     run.before_step(optimizer)
        ...     optimizer.zero_grad()
        ...     run.loss((inputs, labels)).backward()
        ...     run.after_backward()
        ...     optimizer.step()
        ...     run.after_step()
        >>> run.step, run.progress
        (3, 1.0)
    """
    for name, value in (("steps_per_epoch", steps_per_epoch), ("epochs", epochs)):
        if value < 1:
            raise SpecError(f"{name} must be 1 or more, got {value}")
    network = prepared_network(model)
    recipe = replace(recipe or Recipe(), epochs=epochs)
    run = ManualLoop(
        network,
        method_of(network),
        as_task(task),
        recipe,
        steps_per_epoch,
        given=GivenNetworks(teacher, float_network),
        batches=batches if batches is None or callable(batches) else _first_of(batches),
        reduce_mean=reduce_mean or mean_over_processes,
        wrapped=model if model is not network and _calls_alike(model, network) else None,
    )
    if run.epochs > epochs:
        raise SpecError(
            f"{run.method.info.name!r} has {len(run.phases)} phases, which take {run.epochs} epochs or more; got epochs={epochs}"
        )
    return run


def parameter_groups(model: nn.Module, *, learning_rate: float = 0.02, weight_decay: float = 1e-4) -> list[dict[str, object]]:
    """Parameter groups of a prepared network for any ``torch.optim`` optimizer, for use before a run exists; see ``ManualLoop``.

    Args:
        model: What ``lowbit.prepare`` returned, or a wrapper around it; parameters outside the prepared network are left out.
        learning_rate: Learning rate of the weights.
        weight_decay: Weight decay of the weights.

    Example:
        >>> import torch, lowbit
        >>> model = lowbit.prepare(torch.nn.Linear(4, 2), method="lsq", sample=torch.rand(8, 4))
        >>> [(group["role"], group["lr"]) for group in lowbit.parameter_groups(model, learning_rate=0.1)]
        [('weights', 0.1), ('others', 0.1), ('quantizers', 0.1)]
    """
    network = prepared_network(model)
    method, frozen = method_of(network), set(map(id, parameters_frozen_by_user(network)))
    roles = [(role, p) for role, _, p in named_roles(network, method.role) if id(p) not in frozen]
    return _groups(method.phases(_with_rates(Recipe(), learning_rate, weight_decay)), roles)


def _with_rates(recipe: Recipe, learning_rate: float | None, weight_decay: float | None) -> Recipe:
    optimizer = recipe.optimizer
    rate = optimizer.learning_rate if learning_rate is None else learning_rate
    decay = optimizer.weight_decay if weight_decay is None else weight_decay
    return replace(recipe, optimizer=replace(optimizer, learning_rate=rate, weight_decay=decay))


def _groups(phases: Iterable[Phase], roles: Iterable[tuple[Role, nn.Parameter]]) -> list[dict[str, object]]:
    """A group for each role that some phase trains, with the rates of the first such phase."""
    specs: dict[Role, OptimizerSpec] = {}
    for phase in phases:
        specs = {**phase.optimizers, **specs}
    found: dict[Role, list[nn.Parameter]] = {}
    for role, parameter in roles:
        key = covering(role, specs)
        if key is not None:
            found.setdefault(key, []).append(parameter)
    return [
        {"params": found[role], "lr": spec.learning_rate, "weight_decay": spec.weight_decay, "role": role, "kind": spec.kind}
        for role, spec in specs.items()
        if role in found
    ]


def _first_of(batches: Iterable[Batch]) -> Callable[[int], Iterator[Batch]]:
    return lambda count: itertools.islice(iter(batches), count)


def _are_same(first: list[object], second: list[object]) -> bool:
    return len(first) == len(second) and all(map(operator.is_, first, second))


def _unwrapped(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's: methods look at what kind it is."""
    inner = getattr(optimizer, "optimizer", None)
    return inner if isinstance(inner, torch.optim.Optimizer) else optimizer


def _calls_alike(wrapper: nn.Module, network: nn.Module) -> bool:
    """Whether ``wrapper`` is called in the network's place, as those of torch are, and does not merely contain it."""
    inner: object = wrapper
    while isinstance(inner, nn.Module) and inner is not network:
        is_parallel = isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel))
        inner = inner._modules.get("module" if is_parallel else "_orig_mod")
    return inner is network
