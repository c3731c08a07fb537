"""Pictures of training methods: staircases and surrogate gradients of their quantizers, and how these change in a short training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest

import torch
from torch import Tensor, nn

from lowbit.network import insert
from lowbit.network.bits import get_bits, set_bits, switches_of
from lowbit.options import make_method
from lowbit.pages.specimen import Place, Specimen, place_of, specimen_for
from lowbit.pages.widths import named_bits, shown_bits, unsupported
from lowbit.plotting import Curve, Panel, Picture
from lowbit.qat import GivenNetworks, OptimizerSpec, Recipe, TrainingMethod, TrainRun
from lowbit.qat.prepare import method_of, prepare
from lowbit.quantizers.staircase import Staircase, remarks_on, staircase, staircase_panels
from lowbit.registry import MethodInfo
from lowbit.spec import LayerBits, switch_name

EPOCHS, STEPS = 6, 6
TRAINED_BITS = 3
COURSE_POINTS = 81
SPAN = 1.2
MOMENTS = ("start", "middle", "end")


def trained_picture(info: MethodInfo) -> Picture:
    """Quantizers of a training method as ``lowbit.prepare`` inserts them, and the same at the start, in the middle and at the end of training."""
    specimen = specimen_for(info)
    weights, activations, layer = _staircases(info, specimen)
    panels: list[Panel] = []
    panels += _columns(weights, activations)
    course = _short_training(info, specimen)
    in_training = course.staircases()
    panels += course.panels(*in_training)
    notes = [
        f"Layer {layer} of {specimen.name}, trained in float before. One value moves, all others stay; gradients are autograd's.",
        *remarks_on(one for _, one in (*weights, *activations, *in_training[0], *in_training[1])),
        *unsupported(info),
        course.note,
    ]
    return Picture(f"{info.name}: staircases and surrogate gradients", tuple(panels), tuple(notes))


def _columns(weights: Sequence[tuple[str, Staircase]], activations: Sequence[tuple[str, Staircase]], when: str = "") -> list[Panel]:
    """Weights on the left, activations on the right; gradients below."""
    left = staircase_panels(weights, f"weights{when}")
    if not activations:
        return list(left)
    right = staircase_panels(activations, f"activations{when}")
    return [left[0], right[0], left[1], right[1]]


def _staircases(info: MethodInfo, specimen: Specimen) -> tuple[list[tuple[str, Staircase]], list[tuple[str, Staircase]], str]:
    weight_bits = shown_bits(info.weight_bits)
    activation_bits: list[int | None] = list(shown_bits(info.activation_bits)) if info.activation_bits is not None else [None]
    weights: dict[int, Staircase] = {}
    activations: dict[int, Staircase] = {}
    layer = ""
    for weight, activation, model in _prepared_at(info, specimen, weight_bits, activation_bits):
        place = place_of(model, specimen.sample, weight, activation)
        layer = layer or place.layer
        if weight not in weights:
            weights[weight] = staircase(place.weight_quantizer, place.weight, span=SPAN)
        if activation is not None and activation not in activations and place.activations is not None:
            assert place.activation_quantizer is not None
            activations[activation] = staircase(place.activation_quantizer, place.activations, span=SPAN)
    return _named(weights), _named(activations), layer


def _differ(found: Sequence[tuple[str, Staircase]]) -> bool:
    return any(not one.is_like(found[0][1]) for _, one in found)


def _named(found: dict[int, Staircase]) -> list[tuple[str, Staircase]]:
    return [(named_bits(bits), found[bits]) for bits in sorted(found)]


def _prepared_at(
    info: MethodInfo, specimen: Specimen, weight_bits: Sequence[int], activation_bits: Sequence[int | None]
) -> Iterator[tuple[int, int | None, nn.Module]]:
    """The network at each pair of widths; one network for all of them where the method trains several."""
    pairs = list(zip_longest(reversed(weight_bits), reversed(activation_bits)))
    filled = [(weight or weight_bits[0], activation or activation_bits[0]) for weight, activation in pairs]
    method = _method(info)
    if method.switching is not None:
        filled = list({weight: (weight, activation) for weight, activation in reversed(filled)}.values())[::-1]  # widths of weights differ
        model = prepare(specimen.model, method=method, bits=[_switch(*pair) for pair in filled], sample=specimen.sample, seed=3)
        for weight, activation in filled:
            set_bits(model, _switch(weight, activation))
            yield weight, activation, model
    else:
        for weight, activation in filled:
            model = prepare(
                specimen.model, method=_method(info), weight_bits=weight, activation_bits=activation, sample=specimen.sample, seed=3
            )
            yield weight, activation, model


def _switch(weight: int, activation: int | None) -> str:
    return switch_name(LayerBits(weight, activation))


def _method(info: MethodInfo) -> TrainingMethod:
    assert info.method is not None
    method = make_method(info.method, "training", {})
    assert isinstance(method, TrainingMethod)
    return method


@dataclass(frozen=True)
class Moment:
    """A point of a training run.

    Attributes:
        name: ``start``, ``middle`` or ``end``.
        place: A layer with copies of its quantizers.
        computed: The weight that the layer computes with in training mode.
    """

    name: str
    place: Place
    computed: Tensor


@dataclass(frozen=True)
class Course:
    """What a short training did.

    Attributes:
        moments: Its start, middle and end.
        losses: The loss of each step.
        gradients: Gradients of the weight as autograd computed them in a step and as the method handed them to the optimizer.
        bits: Bits of each weight before and after.
        note: What was trained.
    """

    moments: tuple[Moment, ...]
    losses: tuple[float, ...]
    gradients: tuple[Tensor, Tensor] | None
    bits: tuple[dict[str, int], dict[str, int]]
    note: str

    def staircases(self) -> tuple[list[tuple[str, Staircase]], list[tuple[str, Staircase]]]:
        """Of the weight's and of the activations' quantizer at each moment."""
        weights = [(m.name, staircase(m.place.weight_quantizer, m.place.weight, span=SPAN, points=COURSE_POINTS)) for m in self.moments]
        activations = [
            (m.name, staircase(m.place.activation_quantizer, m.place.activations, span=SPAN, points=COURSE_POINTS))
            for m in self.moments
            if m.place.activation_quantizer is not None and m.place.activations is not None
        ]
        return weights, activations

    def panels(self, weights: Sequence[tuple[str, Staircase]], activations: Sequence[tuple[str, Staircase]]) -> list[Panel]:
        """Panels of what changes in training; staircases where they do."""
        when = f" in training, {named_bits(self.moments[0].place.weight_quantizer.bit_width)}"
        columns = _columns(weights, activations, when) if _differ(weights) or _differ(activations) else []
        return [*columns, self._histogram(), self._besides()]

    def _histogram(self) -> Panel:
        floats = [m.place.weight for m in self.moments]
        has_moved = not torch.equal(floats[0], floats[-1])
        shown = floats if has_moved else [m.computed for m in self.moments]
        curves = [
            Curve(m.name, tuple(values.flatten().tolist()), form="histogram", colour=index)
            for index, (m, values) in enumerate(zip(self.moments, shown, strict=True))
        ]
        what = "float weights" if has_moved else "weights in use"
        return Panel(f"{what} in training", tuple(curves), "w", "% of them")

    def _besides(self) -> Panel:
        """Bits by layer where they changed, else gradients where the method rewrites them, else the loss."""
        before, after = self.bits
        if before != after:
            columns = [tuple(float(found.get(name, 0)) for name in before) for found in self.bits]
            curves = [Curve(name, range(len(before)), values, "bars") for name, values in zip(("start", "end"), columns, strict=True)]
            return Panel("bits of each layer", tuple(curves), up="bits", names=tuple(before))
        if self.gradients is not None:
            computed, handed = (tuple(tensor.flatten()[:400].tolist()) for tensor in self.gradients)
            ends = [min(computed), max(computed)]
            return Panel(
                "gradients, rewritten",
                (Curve("", ends, ends, "identity"), Curve("", computed, handed, "points")),
                "from autograd",
                "to the optimizer",
            )
        return Panel("loss in training", (Curve("", range(len(self.losses)), self.losses),), "step", "loss")


def _short_training(info: MethodInfo, specimen: Specimen) -> Course:
    """Train for a few steps, through the hooks that every loop calls."""
    method = _method(info)
    weight_bits = min(info.weight_bits, key=lambda bits: abs(bits - TRAINED_BITS))
    activation_bits = None if info.activation_bits is None else min(info.activation_bits, key=lambda bits: abs(bits - TRAINED_BITS))
    widths = (
        {
            "bits": [
                _switch(max(info.weight_bits), activation_bits and max(info.activation_bits or ())),
                _switch(weight_bits, activation_bits),
            ]
        }
        if method.switching is not None
        else {"weight_bits": weight_bits, "activation_bits": activation_bits}
    )
    model = prepare(specimen.model, method=method, sample=specimen.sample, seed=3, **widths).train()
    rate = 1e-5 if specimen.task.metric_name == "PSNR" else 0.01
    recipe = Recipe(EPOCHS, optimizer=OptimizerSpec(learning_rate=rate), seed=4)
    run = TrainRun(
        model, method_of(model), specimen.task, recipe, STEPS,
        given=GivenNetworks(teacher=copy.deepcopy(specimen.model), float_network=specimen.model),
        batches=functools.partial(_first_batches, specimen),
    )  # fmt: skip
    shown = None if method.switching is None else switches_of(model)[-1]
    name = _at_switch(copy.deepcopy(model), shown, specimen, weight_bits, activation_bits).layer
    before = _weight_bits(model)
    total = run.epochs * STEPS
    wanted = dict(zip((0, total // 2, total - 1), MOMENTS, strict=True))
    moments, losses, gradients = [], [], None
    for _ in run.each_epoch():
        for _ in range(STEPS):
            for turn in range(len(run.phase.turns)):
                run.before_step()
                if turn == 0 and run.step in wanted:
                    moments.append(_moment(run, wanted[run.step], name, specimen, shown, activation_bits))
                loss = run.loss(specimen.batch(run.step))
                loss.backward()
                computed = _gradient(model, name)
                run.after_backward()
                handed = _gradient(model, name)
                if computed is not None and handed is not None and not torch.allclose(computed, handed, rtol=1e-3):
                    gradients = computed, handed
                run.optimizer_step()
                run.after_step()
                if turn == 0:
                    losses.append(float(loss.detach()))
    note = f"Training: {total} steps at {_switch(weight_bits, activation_bits)} bits, to show what changes, not to converge."
    return Course(tuple(moments), tuple(losses), gradients, (before, _weight_bits(model)), note)


def _first_batches(specimen: Specimen, count: int) -> list[tuple[Tensor, Tensor]]:
    return [specimen.batch(step) for step in range(count)]


def _weight_bits(model: nn.Module) -> dict[str, int]:
    return {name: bits.weight or 32 for name, bits in get_bits(model).items()}


def _gradient(model: nn.Module, name: str) -> Tensor | None:
    gradient = insert.quantized_weights(model)[name].original.grad
    return None if gradient is None else gradient.detach().clone()


def _at_switch(model: nn.Module, switch: LayerBits | None, specimen: Specimen, weight_bits: int, activation_bits: int | None) -> Place:
    """A layer of ``model``, which is put at ``switch`` where it has several."""
    if switch is not None:
        set_bits(model, switch)
    return place_of(model, specimen.sample, weight_bits, activation_bits)


def _moment(run: TrainRun, name: str, layer: str, specimen: Specimen, switch: LayerBits | None, activation_bits: int | None) -> Moment:
    """Copies of what a layer has at this point of the run; the run is not changed."""
    model = copy.deepcopy(run.model)
    if switch is not None:
        set_bits(model, switch)
    site = insert.quantized_weights(model)[layer]
    with torch.no_grad():
        computed = getattr(site.layer, site.parameter).detach().clone()
    assert site.quantizer is not None
    found = place_of(model, specimen.sample, site.quantizer.bit_width, activation_bits)
    place = replace(found, layer=layer, weight=site.original.detach().clone(), weight_quantizer=site.quantizer)
    return Moment(name, place, computed)
