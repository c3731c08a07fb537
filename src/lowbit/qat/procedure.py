"""Procedures: in which phases, with which companions and losses a network is trained, whatever its quantizers are.

A procedure is a training method around another one, its ``base``, which makes the quantizers. A paper that brings both is a ``Procedure``
whose ``quantizers`` are a class of their own: ``method="qkd"`` is the paper, and ``method="lsq", procedure="qkd"`` sends the
quantizers of another one through the same class.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from types import MappingProxyType
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from lowbit.errors import SpecError, unknown_name
from lowbit.network import insert
from lowbit.network.layers import WEIGHT
from lowbit.network.slot import Slot
from lowbit.options import Setting, convert_option, make_method, settings_of
from lowbit.qat.attach.job import QatJob
from lowbit.qat.method import Measure, TrainingMethod
from lowbit.qat.networks import Companion, GivenNetworks
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Role
from lowbit.qat.run import TrainRun
from lowbit.qat.task import Batch, Scores
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, find_procedure
from lowbit.spec import BitPolicy, LayerBits

_BASE = "base"


@dataclass
class Procedure(TrainingMethod):
    """Trains with the quantizers of ``base``; every hook is that of ``base`` until a subclass says what its paper does around it.

    A subclass overrides the hooks that its paper is about, calls ``super()`` where what the quantizers need there comes as well, names
    the paper's own quantizers as ``quantizers``, and makes its phases from ``split``.

    Attributes:
        base: The method whose quantizers go through the procedure. Default: the paper's own.

    Class attributes:
        quantizers: Class of the paper's own quantizers. Its hyper-parameters count as the paper's, beside the procedure's.
        replaces_loss: Whether the procedure computes losses of its own from outputs, so that a base with one of its own cannot take part.

    Raises:
        SpecError: A base whose quantizers need phases or a loss of their own, or that trains several widths.

    Example:
        >>> import torch, lowbit
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> model = lowbit.prepare(network, method="lsq", procedure="qkd", sample=torch.rand(8, 4))
        >>> [phase.name for phase in lowbit.training(model, steps_per_epoch=2, epochs=10, float_network=network).phases]
        ['self-studying', 'co-studying', 'tutoring']
    """

    is_procedure = True
    quantizers: ClassVar[type[TrainingMethod]]
    replaces_loss: ClassVar[bool] = False
    quantizer_learning_rate: ClassVar[float]  # type: ignore[misc]  # the base's
    quantizer_weight_decay: ClassVar[float]  # type: ignore[misc]

    base: TrainingMethod = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if vars(self)[_BASE] is None:
            self.base = self.quantizers()
            return
        if self.has_own_quantizers:
            return
        base = self.base.info
        if isinstance(self.base, Procedure):
            base = base if self.base.has_own_quantizers else self.base.base.info
            self.base = self.base.base
        self._check_base(base)
        axes = (*dict.fromkeys((*base.axes, "procedure")),)
        needs = (*dict.fromkeys((*base.needs, *type(self).info.needs)),)
        self.info = replace(base, axes=axes, needs=needs, method=type(self))  # type: ignore[misc]

    @property
    def has_own_quantizers(self) -> bool:
        """Whether it trains the paper's own quantizers."""
        return type(self.base) is self.quantizers

    def _check_base(self, base: MethodInfo) -> None:
        own = type(self).info
        if not self.base.allows_procedure:
            raise SpecError(
                f"the quantizers of {base.name!r} need its own phases and cannot go through {own.name!r}. Leave procedure out, or choose "
                "another method."
            )
        if self.base.switching is not None:
            raise SpecError(
                f"{base.name!r} trains a network for several widths, in steps of its own that cannot go through {own.name!r}. Leave procedure out, "
                "or choose another method."
            )
        if self.replaces_loss and self.base.has_own_loss:
            raise SpecError(
                f"{base.name!r} trains on a loss of its own, which {own.name!r} would replace. Leave procedure out, or switch that loss off."
            )
        phases = self.base.phases(Recipe(epochs=100))
        has_own = type(self).phases is not Procedure.phases or type(self).optimizers is not Procedure.optimizers
        if len(phases) > 1 and has_own:
            raise SpecError(
                f"{base.name!r} has the phases {', '.join(phase.name for phase in phases)}, which cannot go through those of {own.name!r}. Switch "
                "them off by its options, or leave procedure out."
            )

    @classmethod
    def hyper_parameters(cls) -> dict[str, Setting]:
        """Those of the procedure and those of the paper's own quantizers."""
        return {**cls.procedure_parameters(), **cls.quantizers.hyper_parameters()}

    @classmethod
    def procedure_parameters(cls) -> dict[str, Setting]:
        """Those of the procedure alone."""
        return {name: setting for name, setting in settings_of(cls).items() if name != _BASE}

    @classmethod
    def with_hyper_parameters(cls, values: Mapping[str, Any]) -> Self:
        own = {name: value for name, value in values.items() if name in cls.procedure_parameters()}
        rest = {name: value for name, value in values.items() if name not in own}
        return cls(base=cls.quantizers.with_hyper_parameters(rest), **own)

    def hyper_parameter_values(self) -> dict[str, object]:
        """Those of the base, and the procedure's: beside them in the paper's own method, else as ``procedure.temperature``."""
        own = {name: getattr(self, name) for name in self.procedure_parameters()}
        base = self.base.hyper_parameter_values()
        if self.has_own_quantizers:
            return {**own, **base}
        return {**base, "procedure": type(self).info.name, **{f"procedure.{name}": value for name, value in own.items()}}

    def split(self, recipe: Recipe, shares: Mapping[str, float], *, restart: bool = False) -> list[Phase]:
        """The base's one phase in parts of these names, each with its share of the epochs; those without an epoch are left out.

        Each part has the optimizers of ``optimizers``.

        Args:
            recipe: The user's recipe.
            shares: Relative lengths by name. The last part with a share has one epoch or more.
            restart: Whether the learning rates' schedule starts again with each part; else it goes through all of them once.
        """
        (whole,) = Procedure.phases(self, recipe)
        counts = split_epochs(recipe.epochs, tuple(shares.values()))
        done, parts = 0, []
        for name, epochs in zip(shares, counts, strict=True):
            if epochs:
                span = (0.0, 1.0) if restart else (done / recipe.epochs, (done + epochs) / recipe.epochs)
                parts.append(replace(whole, name=name, epochs=epochs, span=span))
            done += epochs
        return parts

    def stages(self) -> Sequence[LayerBits]:
        """Bits that the network has before it comes down to those asked for, in their order; none unless a subclass lowers bits.

        A layer that was asked for more has its own. Quantizers are initialized at the first of their bits. The bits themselves are changed by
        ``network.bits.lower_bits`` in ``start_phase``.
        """
        return ()

    def attach(self, job: QatJob) -> None:
        stages = self.stages()
        if not stages:
            self.base.attach(job)
            return
        asked = {name: job.bits(name) for name in job.weights}
        start = LayerBits(_first(stage.weight for stage in stages), _first(stage.activation for stage in stages))
        with job.raised(start):
            self.base.attach(job)
            self._check_widths(job, stages, asked)

    def _check_widths(self, job: QatJob, stages: Sequence[LayerBits], asked: Mapping[str, LayerBits]) -> None:
        for name, quantizer in job.inserted:
            if job.is_excepted(name):
                continue
            part = "weight" if job.weights[name].quantizer is quantizer else "activation"
            own = getattr(asked[name], part)
            wanted = [max(own, width) for stage in stages if (width := getattr(stage, part)) is not None] + [own]
            missing = [width for width in wanted if width not in quantizer.bit_widths]
            if missing:
                raise SpecError(
                    f"layer {name!r}: {type(self).info.name!r} lowers {part} bits over {', '.join(map(str, dict.fromkeys(wanted)))}, and "
                    f"{type(quantizer).__name__} has {', '.join(map(str, quantizer.bit_widths))} alone. Choose a method with all of these "
                    "widths, or other stages."
                )

    def initialize_weights(self, model: nn.Module) -> None:
        """Set up the quantizers of all weights again, for weights that have learned in float since."""
        for site in insert.quantized_weights(model).values():
            self.initialize_layer(site.layer, None, site.parameter)

    # What the quantizers are is up to the base.

    def default_policy(self, bits: LayerBits) -> BitPolicy:
        return self.base.default_policy(bits)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return self.base.weight_quantizer(slot)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return self.base.activation_quantizer(slot)

    def output_quantizer(self, slot: Slot) -> Quantizer:
        return self.base.output_quantizer(slot)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        return self.base.merge_quantizer(slot)

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        return self.base.edge_quantizer(slot)

    def initialize_layer(self, layer: nn.Module, x: Tensor | None, parameter: str = WEIGHT) -> None:
        self.base.initialize_layer(layer, x, parameter)

    # What happens in training is the base's, and what a subclass does around it.

    @property
    def has_own_loss(self) -> bool:
        return type(self).losses is not Procedure.losses or self.base.has_own_loss

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        return self.base.role(name, parameter, owner)

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        return self.base.optimizers(recipe)

    def phases(self, recipe: Recipe) -> list[Phase]:
        """The base's; where it has one, with the procedure's optimizers."""
        found = self.base.phases(recipe)
        return found if len(found) > 1 else [replace(found[0], optimizers=self.optimizers(recipe))]

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        return self.base.companions(model, given)

    def start_phase(self, run: TrainRun) -> None:
        self.base.start_phase(run)

    def start_epoch(self, run: TrainRun) -> None:
        self.base.start_epoch(run)

    def before_step(self, run: TrainRun) -> None:
        self.base.before_step(run)

    def loss(self, run: TrainRun, batch: Batch) -> Tensor:
        return self.base.loss(run, batch)

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        return self.base.losses(run, batch)

    def after_backward(self, run: TrainRun) -> None:
        self.base.after_backward(run)

    def after_step(self, run: TrainRun) -> None:
        self.base.after_step(run)

    def evaluate(self, run: TrainRun, measure: Measure) -> Scores:
        return self.base.evaluate(run, measure)


def _first(widths: Iterable[int | None]) -> int:
    """The first width at which a quantizer is in use; 1, below which nothing is asked for, where it first is at the bits asked for."""
    return next((width for width in widths if width is not None), 1)


def training_method(
    method: object,
    options: Mapping[str, object],
    procedure: object = None,
    procedure_options: Mapping[str, object] = MappingProxyType({}),
    elsewhere: Mapping[str, str] | None = None,
) -> TrainingMethod:
    """The training method that a user asks for, its quantizers sent through another procedure where one is named.

    Args:
        method, options, elsewhere: As ``make_method`` takes them.
        procedure: Name of a procedure, ``path/to/file.py:Class``, or a class or an object derived from ``Procedure``.
        procedure_options: The procedure's hyper-parameters.

    Raises:
        UnknownNameError: No such method, procedure or option.
        SpecError: What cannot work together, or a value that is not allowed.
    """
    chosen = make_method(method, "training", options, elsewhere)
    assert isinstance(chosen, TrainingMethod)
    if procedure is None:
        if procedure_options:
            raise SpecError(f"procedure_options {', '.join(procedure_options)} without a procedure. Name one with procedure=.")
        return chosen
    info, given = find_procedure(procedure), dict(procedure_options)
    if isinstance(procedure, Procedure):
        if given:
            raise SpecError(f"procedure is an object of {info.name} with hyper-parameters of its own: set {', '.join(given)} there.")
        return replace(procedure, base=chosen)
    cls = info.method
    assert cls is not None and issubclass(cls, Procedure)
    known = cls.procedure_parameters()
    for name in given:
        if name not in known:
            if name in cls.hyper_parameters():
                raise SpecError(
                    f"{name} belongs to the quantizers of {info.name}, and those are {chosen.info.name}'s here. Leave it out, or train with "
                    f"method={info.name!r}."
                )
            raise unknown_name(f"option of the procedure {info.name}", name, known, f"See 'lowbit methods show {info.name}'.")
    values: dict[str, Any] = {name: convert_option(info.name, name, value, known[name].type) for name, value in given.items()}
    return cls(base=chosen, **values)


def split_epochs(epochs: int, shares: Sequence[float]) -> list[int]:
    """``epochs`` in parts of these relative lengths, rounded so that they add up; the last that has a share has one or more.

    >>> split_epochs(10, (3, 3, 4)), split_epochs(1, (1, 1, 1)), split_epochs(4, (1, 0, 0))
    ([3, 3, 4], [0, 0, 1], [4, 0, 0])
    """
    total = sum(shares)
    if not total > 0:
        raise SpecError(f"shares of the epochs must be positive together, got {', '.join(map(str, shares))}")
    ends = [0, *(epochs if end == total else min(round(epochs * end / total), epochs - 1) for end in accumulate(shares))]
    return [end - start for start, end in pairwise(ends)]
