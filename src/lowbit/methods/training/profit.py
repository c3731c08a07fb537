"""PROFIT: bits come down step by step, and the layers that unsettle the network most are frozen first; on quantizers that learn range and scale apart.

Paper: Park, Yoo 2020, "PROFIT: A Novel Training Method for sub-4-bit MobileNet Models", ECCV, arXiv 2008.04693.
    Section 3 (DuQ, negative padding), section 4 (activation instability, progressive freezing), section 5 (procedure); rates, lengths and
    the selection of layers as in the authors' code.
Symbols: A -> clip_range, C -> output_scale, n_lv -> 2**bit_width, D -> output_divergence, AIWQ -> InstabilityMeter.metric.
Differs from the paper:
    - The activation functions stay in the network, those that clip (ReLU6) too; the authors' quantizers contain them, with ReLU6 as ReLU.
    - Behind h-swish the range starts from its outputs; the authors' code measures its inputs. Networks that spell h-swish out in other
      functions are not recognized: there the quantizer is one for values of both signs.
    - ``policy="paper"`` quantizes what the first layer reads as well: a rule with ``activation="float"`` leaves it in float.
    - The learning rate follows its schedule step by step, in the authors' code epoch by epoch.
    - Weight averages are part of the recipe (``recipe="paper"``), one over the whole run; the authors keep the better of raw and averaged weights.
    - Half of the epochs are spent at the bits asked for (``last_share``), a third in the paper, because budgets here are short.
    - Without a phase for sampling, in runs of a few epochs, the instability is sampled while all layers still learn.
    - Phases without a whole epoch are left out, those of norms first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lowbit.errors import SpecError
from lowbit.inputs import map_tensors
from lowbit.measure.instability import InstabilityMeter
from lowbit.network.bits import lower_bits
from lowbit.network.calls import on_input
from lowbit.network.layers import evaluating
from lowbit.network.record import record_of
from lowbit.network.surgery.constant_padding import pad_with
from lowbit.options import AtLeast, Interval
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Phase, Procedure, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import LayerBits
from lowbit.surrogates import inner_straight_through

TEACHER = "teacher"
NORMS, BIASES = "others.norms", "others.biases"  # roles: of norms, and of what has one dimension outside of them
LOWEST_HSWISH = -3 / 8
SMALLEST_RANGE = 1e-3
METRIC = "AIWQ"
FLOAT, SAMPLING, SETTLING = "float", "sampling", "settling norms"
ROUNDS = ("all layers", "stable two thirds", "stable third")  # which layers learn in the runs of PROFIT itself
ActivationStart = Literal["positive", "magnitude"]


class DuqQuantizer(GridQuantizer):
    """Even steps over ``[-A, A]``, or ``[low, low + A]``, that stand for ``C / A`` times as much: range and scale are learned apart.

    Forward: ``C round(clip(x / A, -1, 1) n) / n`` with ``n = 2**(k - 1) - 1``, unsigned ``C round(clip((x - low) / A, 0, 1) n) / n + low``
    with ``n = 2**k - 1``, where ``A = softplus(raw_range)`` and ``C = softplus(raw_scale)``.
    Backward: by differentiation, 1 for the rounding, nothing at the ends of the clip and beyond. All bit-widths share A and C.
    Source: section 3.1.

    Args:
        bit_width: 2 to 8; 1 bit would leave a signed grid nothing but 0.
        signed: Whether the range has a negative half.
        low: Where an unsigned range starts, 0 or less.
    """

    tables = ("raw_range", "raw_scale")
    bit_widths: Sequence[int] = range(2, 9)

    def __init__(self, bit_width: int, *, signed: bool, low: float = 0.0) -> None:
        self.signed, self.low = signed, low
        if bit_width not in self.bit_widths:
            raise SpecError(f"profit: bit_width must be 2 to 8, got {bit_width}")
        super().__init__(bit_width, *self.code_range(bit_width), surrogate=inner_straight_through)
        for name in self.tables:
            del self._buffers[name]
            self.register_parameter(name, nn.Parameter(torch.tensor(float("nan"))))

    def code_range(self, bit_width: int) -> tuple[int, int]:
        top = 2 ** (bit_width - 1) - 1 if self.signed else 2**bit_width - 1
        return -top if self.signed else 0, top

    @property
    def clip_range(self) -> Tensor:
        """``A``, differentiable."""
        return functional.softplus(self.get_parameter("raw_range"))

    @property
    def output_scale(self) -> Tensor:
        """``C``, differentiable."""
        return functional.softplus(self.get_parameter("raw_scale"))

    def start_at(self, value: Tensor) -> None:
        """``A = C = value``, a positive number."""
        raw = value + torch.log(-torch.expm1(-value))
        for name in self.tables:
            self._set_table(name, raw)

    def initialize(self, x: Tensor) -> None:
        """``A = C = 0.9 max|x|``; those of zeros at ``SMALLEST_RANGE``."""
        self.start_at((0.9 * x.detach().float().abs().max()).clamp(min=SMALLEST_RANGE))

    def grid(self, x: Tensor) -> Grid:
        scale = self.output_scale / self.qmax
        return Grid(torch.full_like(scale, self.low), self.clip_range / self.qmax, scale, -self.low / scale)


class DuqActivation(DuqQuantizer):
    """Activations: as ``DuqQuantizer``, which starts where 95 % of the positive values of the first batch lie below.

    Args:
        bit_width, signed, low: As there.
        start: ``positive``: the values above 0, as in the authors' code; ``magnitude``: the magnitudes of signed values, and ``x - low``.
    """

    def __init__(self, bit_width: int, *, signed: bool, low: float = 0.0, start: ActivationStart = "positive") -> None:
        super().__init__(bit_width, signed=signed, low=low)
        self.start = start

    def initialize(self, x: Tensor) -> None:
        """``A = C = p[int(0.95 len(p))]`` for the sorted positive values ``p``, at least ``SMALLEST_RANGE``."""
        values = x.detach().float().flatten()
        if self.start == "magnitude":
            values = values.abs() if self.signed else values - self.low
        positive = values[values > 0]
        if not len(positive):
            self.start_at(values.new_tensor(SMALLEST_RANGE))
            return
        self.start_at(positive.sort().values[int(0.95 * len(positive))].clamp(min=SMALLEST_RANGE))


class _FromHardswish(TorchFunctionMode):
    """Within the context, ``outputs`` gathers what h-swish gave."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Tensor] = []

    def __torch_function__(
        self, function: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        if function is functional.hardswish:
            self.outputs.append(found)
        return found


def layers_behind_hardswish(job: QatJob) -> list[str]:
    """The layers that read nothing but what h-swish gave, in the job's sample."""
    reads: dict[str, list[bool]] = {}
    mode = _FromHardswish()

    def note(name: str, x: Tensor) -> None:
        reads.setdefault(name, []).append(any(x is output for output in mode.outputs))

    handles = [on_input(layer, partial(note, name)) for name, layer in job.layers.items()]
    try:
        with evaluating(job.model), mode:
            job.model(*job.sample.args, **job.sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [name for name, found in reads.items() if all(found)]


@dataclass
class DuqQuantizers(TrainingMethod):
    """Range and scale of each quantizer learned apart, and padding with the lowest value of h-swish behind it.

    Attributes:
        activation_start: Which values of the first batch an activation's range starts from: those above 0, as in the authors' code, or the
            magnitudes of signed ones and what lies above the lowest value of h-swish.
        negative_padding: Let convolutions behind h-swish pad with -3/8, its lowest value, in place of 0, which is no level there.
    """

    ends = "same"

    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 0.01
    activation_start: ActivationStart = "positive"
    negative_padding: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.behind_hardswish: list[str] = []

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return DuqQuantizer(slot.bit_width, signed=True)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        if slot.name in self.behind_hardswish:
            return DuqActivation(slot.bit_width, signed=False, low=LOWEST_HSWISH, start=self.activation_start)
        return DuqActivation(slot.bit_width, signed=slot.is_signed, start=self.activation_start)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        """The paper's quantizers stand behind every activation function, whatever reads what it gives; they have 2 bits or more."""
        if slot.bit_width not in DuqQuantizer.bit_widths:
            return super().merge_quantizer(slot)
        return DuqActivation(slot.bit_width, signed=slot.is_signed, start=self.activation_start)

    def attach(self, job: QatJob) -> None:
        self.behind_hardswish = layers_behind_hardswish(job)
        job.insert(self.weight_quantizer, self.activation_quantizer)
        for name in self.behind_hardswish if self.negative_padding else ():
            if name in job.activation_bits and pad_with(job.layers[name], LOWEST_HSWISH):
                job.remark(name, "pads with -3/8, the lowest value of h-swish")
        job.initialize(self.initialize_layer)


def freezing_groups(metric: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """The third of the layers with the largest metric, and the next third, each in descending order; thirds are rounded down.

    >>> freezing_groups({"a": 0.1, "b": 0.3, "c": 0.2}), freezing_groups({"a": 0.1, "b": 0.3})
    ((['b'], ['c']), ([], ['b']))
    """
    order = sorted(metric, key=lambda name: -metric[name])
    first, second = len(order) // 3, 2 * len(order) // 3
    return order[:first], order[first:second]


@dataclass(frozen=True)
class Step:
    """One phase: the bits in it, its length relative to those of the others, and whether nothing but norms, biases and quantizers learn."""

    bits: LayerBits
    length: float
    is_for_norms: bool = False


@register(
    MethodInfo(
        name="profit",
        title="PROFIT: A Novel Training Method for sub-4-bit MobileNet Models",
        paper="Park, Yoo, ECCV 2020",
        url="https://arxiv.org/abs/2008.04693",
        section="training",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(2, 9),
        needs=("labels", "teacher", "pretrained"),
        fidelity="partial",
        summary="ever fewer bits, then freezes the layers whose weights unsettle the network most; learns clip range and scale apart",
        evidence="quantizers, metric, selection, schedule and training steps checked against the authors' code; activation functions stay outside",
        margin_points=10,
    )
)
@dataclass
class Profit(Procedure):
    """Progressive bits, then progressive freezing of layers by their activation instability, with a teacher throughout.

    Lengths are relative to each other, on the way and at the last bits. Each phase has optimizers and a schedule of its own.

    Attributes:
        progressive: Come down over ``widths`` before the bits that are asked for, first of activations, then of weights.
        widths: Bits on the way, descending; those that no layer is below are left out.
        freezing: Train three times at the last bits of weights: all layers, then without the third whose metric is largest, then without two.
        kd_weight: Weight of the distance to the teacher, by default the network's own float twin; 0: none but what the recipe's ``distillation`` makes of a teacher.
        metric_decay: Decay of the running mean of the metric.
        float_length: Length of the training in float, with the teacher, that comes first.
        tune_length: Length of the training at each width, and of each of the three at the last one.
        norm_length: Length of the phases in which nothing but norms, biases and quantizers learn, before each width and behind those of activations.
        last_norm_length: Length of these behind the widths of weights.
        sample_length: Length of the training in which the metric is sampled, with a constant learning rate.
        last_share: Share of the epochs in all phases together in which weights and activations have the bits asked for.
    """

    quantizers = DuqQuantizers

    progressive: bool = True
    widths: Annotated[tuple[int, ...], Interval(2, 8)] = (8, 5)
    freezing: bool = True
    kd_weight: Annotated[float, AtLeast(0)] = 1.0
    metric_decay: Annotated[float, Interval(0, 1, closed="left")] = 0.999
    float_length: Annotated[float, AtLeast(0)] = 15.0
    tune_length: Annotated[float, AtLeast(0)] = 15.0
    norm_length: Annotated[float, AtLeast(0)] = 5.0
    last_norm_length: Annotated[float, AtLeast(0)] = 2.0
    sample_length: Annotated[float, AtLeast(0)] = 5.0
    last_share: Annotated[float, Interval(0, 1, closed="right")] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lowest = LayerBits(1, 1)  # the fewest bits that the policy asks for
        self.meter = InstabilityMeter(self.metric_decay)
        if any(after >= before for before, after in pairwise(self.widths)):
            raise SpecError(f"profit: widths must descend, got {', '.join(map(str, self.widths))}")
        if self.tune_length == 0:
            raise SpecError("profit: tune_length must be above 0: without it the network never learns at its bits.")

    @property
    def replaces_loss(self) -> bool:  # type: ignore[override]
        return self.kd_weight > 0

    @property
    def has_own_loss(self) -> bool:
        return self.kd_weight > 0 or self.base.has_own_loss

    def default_recipe(self) -> Recipe:
        """MobileNet-v2 on ImageNet: the epochs of all phases down to 4 bits."""
        spec = OptimizerSpec(
            learning_rate=0.005, nesterov=True, weight_decay=4e-5, warmup=0.2, start_factor=0.1, final_factor=0.001
        )  # of 15 epochs 3 are warm-up
        return Recipe(200, 256, spec, average_weights=0.9997)

    def steps(self) -> dict[str, Step]:
        """Every phase by its name, in order."""
        found = {FLOAT: Step(LayerBits(None, None), self.float_length)}
        for width in self._down_to(self.lowest.activation):
            bits, name = LayerBits(None, width or 1), _named("activations", width)
            found[f"{name}, norms"] = Step(bits, self.norm_length, is_for_norms=True)
            found[name] = Step(bits, self.tune_length)
            found[f"{name}, {SETTLING}"] = Step(bits, self.norm_length, is_for_norms=True)
        for width in self._down_to(self.lowest.weight):
            bits, name = LayerBits(width or 1, 1), _named("weights", width)
            found[f"{name}, norms"] = Step(bits, self.norm_length, is_for_norms=True)
            if width is None and self.freezing:
                found[SAMPLING] = Step(bits, self.sample_length)
                found |= dict.fromkeys(ROUNDS, Step(bits, self.tune_length))
            else:
                found[name] = Step(bits, self.tune_length)
            found[f"{name}, {SETTLING}"] = Step(bits, self.last_norm_length, is_for_norms=True)
        return {name: step for name, step in found.items() if step.length}

    def _down_to(self, lowest: int | None) -> list[int | None]:
        """The widths above ``lowest``, and ``None`` for what was asked; nothing where that is float."""
        return [] if lowest is None else [*(width for width in self.widths if self.progressive and width > lowest), None]

    def stages(self) -> Sequence[LayerBits]:
        return list(dict.fromkeys(step.bits for step in self.steps().values()))[:-1]

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        """The base's; what has one dimension does not decay."""
        found = super().optimizers(recipe)
        others = {role: replace(found["others"], weight_decay=0.0) for role in (NORMS, BIASES) if "others" in found}
        return {**found, **others}

    def phases(self, recipe: Recipe) -> list[Phase]:
        steps = self.steps()
        shares = self._shares(steps)
        norms = {name: round(recipe.epochs * shares.pop(name)) for name, step in steps.items() if step.is_for_norms}
        found = {
            phase.name: phase for phase in self.split(replace(recipe, epochs=recipe.epochs - sum(norms.values())), shares, restart=True)
        }
        one = next(iter(found.values()))
        found |= {name: replace(one, name=name, epochs=epochs) for name, epochs in norms.items() if epochs}
        return [self._adapted(found[name], step) for name, step in steps.items() if name in found]

    def _shares(self, steps: Mapping[str, Step]) -> dict[str, float]:
        """The share of the epochs of each phase: ``last_share`` for those at the bits asked for, by their lengths among themselves."""
        *_, last = steps.values()
        is_last = {name: step.bits == last.bits for name, step in steps.items()}
        lengths = {flag: sum(step.length for name, step in steps.items() if is_last[name] is flag) for flag in (False, True)}
        parts = {False: 1 - self.last_share, True: self.last_share} if lengths[False] else {True: 1.0}
        return {name: parts[is_last[name]] * step.length / lengths[is_last[name]] for name, step in steps.items()}

    def _adapted(self, phase: Phase, step: Step) -> Phase:
        optimizers = phase.optimizers
        if step.is_for_norms:
            learning = {role: spec for role, spec in optimizers.items() if role not in ("weights", "others")}
            optimizers = {role: replace(spec, warmup=0.0) for role, spec in learning.items()}
        if phase.name == SAMPLING:
            optimizers = {role: replace(spec, schedule="constant", warmup=0.0) for role, spec in optimizers.items()}
        return replace(phase, optimizers=optimizers)

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        found = super().role(name, parameter, owner)
        return BIASES if found == "others" and parameter.dim() <= 1 else found

    def attach(self, job: QatJob) -> None:
        weights = [job.bits(name).weight for name in job.weights]
        self.lowest = LayerBits(min((bits for bits in weights if bits), default=None), min(job.activation_bits.values(), default=None))
        super().attach(job)

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        found = super().companions(model, given)
        return {**found, TEACHER: Companion(given.teacher or given.float_twin(), mode="train")} if self.kd_weight else found

    def start_phase(self, run: TrainRun) -> None:
        super().start_phase(run)
        steps, before = self.steps(), run.phases[run.phase_index - 1].name if run.phase_index else ""
        bits = steps[run.phase.name].bits
        lower_bits(run.model, bits)
        if bits.weight is not None and before and steps[before].bits.weight is None:
            self.initialize_weights(run.model)
        if run.phase.name in ROUNDS:
            self._freeze(run, ROUNDS.index(run.phase.name))

    def _freeze(self, run: TrainRun, groups: int) -> None:
        """Keep the weights of the first of the ``freezing_groups``."""
        record = record_of(run.model)
        if record is not None:
            record.measured[METRIC] = dict(self.meter.metric)
        for names in freezing_groups(self.meter.metric)[:groups]:
            run.freeze(*names)

    def is_sampling(self, run: TrainRun) -> bool:
        """Whether the metric is sampled in the current phase."""
        sampling = SAMPLING if any(phase.name == SAMPLING for phase in run.phases) else ROUNDS[0]
        return run.phase.name == sampling

    def start_epoch(self, run: TrainRun) -> None:
        super().start_epoch(run)
        self.meter.forget()

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        with self.meter.watching(run.model, run.reduce_mean) if self.is_sampling(run) else nullcontext():
            if not self.kd_weight:
                yield from super().losses(run, batch)
                return
            output = run.predict(batch)
        with torch.no_grad():
            target = run.task.predict(run.networks[TEACHER], batch)
        distance = run.task.with_temperature(1.0).distillation_loss(output, map_tensors(target, Tensor.detach))
        yield run.task.loss(output, batch) + self.kd_weight * distance + run.penalty()

    def after_step(self, run: TrainRun) -> None:
        super().after_step(run)
        self.meter.step()


def _named(what: str, width: int | None) -> str:
    return what if width is None else f"{what} at {width} bits"
