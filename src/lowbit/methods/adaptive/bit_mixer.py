"""Bit-Mixer: every layer can take any of several bit-widths when the network runs.

Paper: Bulat, Tzimiropoulos 2021, "Bit-Mixer: Mixed-precision networks with runtime bit-width selection", ICCV.
    Abstract; the rest as a later paper, Huang et al. 2025, "Nearly Lossless Adaptive Bit Switching", tells it: learned step sizes of
    which integers of fewer bits are cut out of those of more, a batch norm for each transition between widths, three stages, greedy selection.
Symbols: B -> widths, s -> scale, q_max and q_b -> codes of the highest and of the current width, Q_b -> top, p -> progress.
Differs from the paper:
    - No program of the authors is known: the formulas of the quantizers, the sampling of widths and the shares of the stages are
      reconstructed.
    - Steps of activations are initialized for all widths before the training, those of weights again when they are first quantized.
    - The shared step starts where the errors of all widths are least, because with the start of LSQ widths far below the highest one have
      nothing but zeros; ``step_start="lsq"`` is the reconstructed start. Its gradient is scaled for the current width;
      ``step_gradient="highest"`` is the reconstructed scale, which is ``4**6`` times as large for 2 of 8 bits.
    - Where a layer's input can be negative, its activations have a learned zero point.
    - A convolution in a shortcut always has the bits of the last convolution that it goes around, and its norm the pair of that one's.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, cast

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.network import insert
from lowbit.network.bits import set_bits, switches_of, switching_layers
from lowbit.network.graph.dataflow import capture
from lowbit.network.graph.neighbours import Neighbours
from lowbit.network.surgery.switchable_norm import SwitchableNorm, pair_key, switch_norms
from lowbit.options import Above, AtLeast
from lowbit.qat import AdaptiveMethod, Companion, GivenNetworks, OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainRun
from lowbit.qat.procedure import split_epochs
from lowbit.qat.recipe import Role
from lowbit.qat.task import Batch, Output
from lowbit.quantizers import LearnedScaleQuantizer, QTensor, Quantizer
from lowbit.quantizers.qtensor import AffineDecoder
from lowbit.quantizers.switchable import for_widths
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient, scale_gradient

Rounding = Literal["trunc", "floor"]
Start = Literal["least_error", "lsq"]
StepGradient = Literal["current", "highest"]
CANDIDATES, SEARCHED = 50, 2**15  # steps that are tried at the start, on about so many weights
Pair = Literal["producer_consumer", "previous_producer", "none"]
ACTIVATIONS, WEIGHTS, LAYERS = "activations", "weights", "layers"  # the stages


class MixedWeight(LearnedScaleQuantizer):
    """Weights of several widths on one learned step, whose codes are cut out of those of the highest width.

    Forward: ``q_max = clip(round(w / s), -Q_max, Q_max)``, ``q_b = clip(trunc(q_max / 2**(B - b)), -Q_b, Q_b)``,
    ``y = q_b * (s * 2**(B - b))`` with ``Q_b = 2**(b - 1) - 1`` and ``B`` the highest width; ``floor`` in place of ``trunc`` on request. Codes of
    ``b`` bits are those of ``B`` bits, sign and magnitude, without their last ``B - b`` bits.
    Backward: the surrogate's for the first rounding, 1 for the second; 1 to ``w`` where ``|w / s| <= Q_max``, else 0; to ``s``
    ``q_b 2**(B - b) - w / s`` there, else ``q_b 2**(B - b)``, times ``1 / sqrt(elements * Q_max)`` (``highest``), or times
    ``4**(b - B) / sqrt(elements * Q_b)`` (``current``): the relative change that LSQ gives the step of ``b`` bits, ``s 2**(B - b)``.
    With a single width this is LSQ on a symmetric grid.

    Args:
        widths: 2 to 8, the highest one first.
        rounding: How bits are dropped.
        start: Where the step starts: at ``2 mean|w| / sqrt(Q_max)`` (``lsq``), or where the squared errors of all widths have the least
            sum (``least_error``).
        gradient: What the step's gradient is multiplied by.
    """

    tables_by_width = ()

    def __init__(
        self, widths: Sequence[int], *, rounding: Rounding = "trunc", start: Start = "least_error", gradient: StepGradient = "current"
    ) -> None:
        self.widths, self.rounding, self.start, self.gradient = tuple(widths), rounding, start, gradient
        super().__init__(max(widths), signed=True, granularity=Granularity.tensor())

    @property
    def bit_widths(self) -> Sequence[int]:  # type: ignore[override]
        return self.widths

    def code_range(self, bit_width: int) -> tuple[int, int]:
        """That of the highest width, in which weights are rounded."""
        top = 2 ** (max(self.widths) - 1) - 1
        return -top, top

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        super().initialize(x)
        weight = x.detach().float().flatten()
        weight = weight[:: max(weight.numel() // SEARCHED, 1)]
        if self.start == "lsq" or not bool((weight != 0).any()):
            return
        current, errors = self.bit_width, {}
        for share in range(1, CANDIDATES + 1):
            step = weight.abs().max() * (share / CANDIDATES / self.qmax)
            errors[step] = sum(self._squared_error(weight, step, bits) for bits in self.widths)
        self.bit_width = current
        self._set_table("scale", min(errors, key=errors.__getitem__))

    def _squared_error(self, weight: Tensor, step: Tensor, bits: int) -> float:
        self.bit_width = bits
        return float((self.codes(weight, step) * (step * self.dropped) - weight).square().sum())

    @property
    def dropped(self) -> float:
        """``2**(B - b)``."""
        return float(2 ** (max(self.widths) - self.bit_width))

    @property
    def top(self) -> int:
        """``Q_b``."""
        return int(2 ** (self.bit_width - 1)) - 1

    def codes(self, weight: Tensor, scale: Tensor) -> Tensor:
        """``q_b`` as floats, differentiable."""
        shifted = self.surrogate(weight / scale, self.qmin, self.qmax) / self.dropped
        whole = shifted.detach().trunc() if self.rounding == "trunc" else shifted.detach().floor()
        return pass_gradient(shifted, whole.clamp(-self.top, self.top))

    def forward(self, x: Tensor) -> Tensor:
        weight = x.float()
        codes, share = (self.qmax, 1.0) if self.gradient == "highest" else (self.top, self.dropped**-2)
        scale = scale_gradient(self.scale, share / math.sqrt(max(weight.numel() * codes, 1)))
        return (self.codes(weight, scale) * (scale * self.dropped)).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        scale = self.scale.detach()
        codes = self.codes(x.detach().float(), scale)
        decoder = AffineDecoder(scale * self.dropped, torch.zeros_like(scale), self.granularity)
        return QTensor(codes.to(torch.int8), decoder, self.bit_width)


def transitional_norm(norm: nn.Module, widths: Mapping[str, Sequence[int]], layers: tuple[str | None, str | None]) -> SwitchableNorm | None:
    """A norm for each pair of widths of two layers, in their order; ``None`` where neither has a choice.

    Args:
        norm: What all start from.
        widths: The widths of each layer that has a choice.
        layers: The two layers, ``None`` or one of a single width for "in full precision".

    Source: Abstract; Huang et al., section 2.
    """
    mixed = tuple(layer if layer in widths else None for layer in layers)
    if mixed == (None, None):
        return None
    first, second = ([None] if layer is None else list(widths[layer]) for layer in mixed)
    return SwitchableNorm(norm, [pair_key(*pair) for pair in itertools.product(first, second)], mixed)


def start_from_diagonal(norm: SwitchableNorm, producer: int) -> None:
    """Let the norms of two different widths start from that of the producer's width on both sides.

    Args:
        norm: Norms for pairs of widths; those for one layer in full precision have no diagonal and stay.
        producer: Place of the producer's width in a pair, 0 or 1.
    """
    for key, own in norm.norms.items():
        width = key.split(">")[producer]
        diagonal = f"{width}>{width}"
        if None not in norm.layers and key != diagonal:
            own.load_state_dict(norm.norms[diagonal].state_dict())


def draw_widths(widths: Sequence[int], progress: Tensor, u_base: Tensor, u_redraw: Tensor, u_choice: Tensor) -> Tensor:
    """A width for each layer: that of the batch, or with the probability ``progress`` one of its own.

    ``widths[floor(u_choice |B|)]`` where ``u_redraw < progress``, else ``widths[floor(u_base |B|)]``.

    Args:
        widths: ``B``.
        progress: From 0 to 1, shape ``[...]``, as ``u_base``.
        u_base: Uniform numbers in ``[0, 1)``.
        u_redraw, u_choice: Uniform numbers, ``[..., layers]``.

    Returns:
        ``[..., layers]``, int64.

        >>> u = torch.tensor([0.1, 0.4, 0.9])
        >>> draw_widths([4, 3, 2], torch.tensor(0.5), torch.tensor(0.0), u, u)
        tensor([4, 3, 4])
    """
    table, count = torch.tensor(widths), len(widths)
    base, own = (u_base * count).long(), (u_choice * count).long()
    return table[torch.where(u_redraw < progress[..., None], own, base[..., None])]


def enable_weights(model: nn.Module, *, is_enabled: bool) -> None:
    """Quantize weights from now on, or leave them in float as the first stage does; activations keep their bits."""
    for site in insert.quantized_weights(model).values():
        cast(Quantizer, site.quantizer).enabled = is_enabled


@register(
    MethodInfo(
        name="bit_mixer",
        title="Bit-Mixer: Mixed-precision networks with runtime bit-width selection",
        paper="Bulat, Tzimiropoulos, ICCV 2021",
        url="https://arxiv.org/abs/2103.17267",
        section="adaptive",
        axes=("weight_quantizer", "activation_quantizer", "surgery", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="partial",
        summary="each layer takes any of several bit-widths at run time: norms for each transition, widths drawn at random in training",
        evidence="checked against an independent reference written from a description; no program of the authors is known",
        margin_points=40,
    )
)
@dataclass
class BitMixer(AdaptiveMethod):
    """Any of several widths in each layer. With several widths the network has to be one that can be exported.

    Three stages: activations of one random width for the whole network in each step, weights in float; weights too; layers that leave that width
    for one of their own, ever more often. ``lowbit.select_bits`` chooses widths for a budget afterwards.

    Attributes:
        pair: Whose widths choose a norm: the layers before and behind it (``producer_consumer``), the two before it
            (``previous_producer``), or ``none``: one norm for all widths, for comparison.
        weight_sharing: ``integers``: one step, codes of fewer bits are cut out of those of the most; ``latent``: a step for each width, on
            the float weights, which have to be kept.
        step_start: Where steps of weights start: ``least_error`` (the least sum of the squared errors of all widths) or ``lsq`` (LSQ's for
            the highest width, with which all weights are 0 at widths far below that).
        step_gradient: What the gradient of a weight's step is multiplied by: LSQ's factor for the step of the ``current`` width, or for
            that of the ``highest`` one at every width, with which steps leap where widths lie far apart.
        rounding: How bits of the integers are dropped: ``trunc`` (of the magnitude) or ``floor``, which shifts weights down by half a step.
        activation_share, weight_share, layer_share: Relative lengths of the three stages.
        distillation: Learn from a teacher's outputs as well (``add``) or instead of the labels (``replace``): the user's, or else the float
            network.
        temperature: Temperature of the softmax of the teacher's outputs.
    """

    switching = "layer"
    ends = "float"

    pair: Pair = "producer_consumer"
    weight_sharing: Literal["integers", "latent"] = "integers"
    step_start: Start = "least_error"
    step_gradient: StepGradient = "current"
    rounding: Rounding = "trunc"
    activation_share: Annotated[float, AtLeast(0)] = 1.0
    weight_share: Annotated[float, AtLeast(0)] = 1.0
    layer_share: Annotated[float, AtLeast(0)] = 1.0
    distillation: Literal["none", "add", "replace"] = "none"
    temperature: Annotated[float, Above(0)] = 1.0

    def default_recipe(self) -> Recipe:
        """160 epochs on ImageNet; the rest is as usual."""
        return Recipe(160, 256, OptimizerSpec("adam", 1e-3, weight_decay=0.0))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        widths = slot.widths or (slot.bit_width,)
        if self.weight_sharing == "integers":
            return MixedWeight(widths, rounding=self.rounding, start=self.step_start, gradient=self.step_gradient)
        return for_widths(widths, lambda bits: MixedWeight((bits,), start=self.step_start))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        widths = slot.widths or (slot.bit_width,)
        return for_widths(widths, lambda bits: LearnedScaleQuantizer(bits, signed=False, learn_offset=slot.is_signed))

    def insert_norms(self, job: QatJob) -> None:
        widths = {name: found for name, site in job.weights.items() if len(found := job.widths(name, site.layer, "weight")) > 1}
        if len(job.switches) == 1:
            return
        if len({switch.weight for switch in job.switches} - {None}) < len(job.switches):
            raise SpecError(
                "bits: bit_mixer mixes widths by those of their weights, which have to differ and cannot be in float. Give some such as [4, 3, 2]."
            )
        if self.pair == "none":
            switch_norms(job.model, lambda *_: None)
            return
        neighbours = Neighbours(capture(job.model, job.sample))
        job.tied.update({name: main for name, main in neighbours.shortcuts.items() if name in widths and main in widths})

        def make(name: str, norm: nn.Module) -> SwitchableNorm | None:
            producer = neighbours.producer(name)
            if self.pair == "producer_consumer":
                return transitional_norm(norm, widths, (producer, neighbours.consumer(name)))
            return transitional_norm(norm, widths, (None if producer is None else neighbours.previous(producer), producer))

        switch_norms(job.model, make)

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        role = super().role(name, parameter, owner)
        return role if role != "quantizers" else "quantizers.weights" if "parametrizations." in name else "quantizers.activations"

    def phases(self, recipe: Recipe) -> list[Phase]:
        specs = self.optimizers(recipe)
        of_stage = {
            ACTIVATIONS: {
                **{role: spec for role, spec in specs.items() if role != "quantizers"},
                "quantizers.activations": specs["quantizers"],
            },
            WEIGHTS: specs,
            LAYERS: specs,
        }
        counts = split_epochs(recipe.epochs, (self.activation_share, self.weight_share, self.layer_share))
        ends = list(itertools.accumulate(counts))
        return [
            Phase(name, count, of_stage[name], recipe.clip_norm, span=((end - count) / recipe.epochs, end / recipe.epochs))
            for name, count, end in zip(of_stage, counts, ends, strict=True)
            if count
        ]

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        found = super().companions(model, given)
        if self.distillation == "none" or "teacher" in found:
            return found
        return {**found, "teacher": Companion(given.float_twin(), is_saved=False)}

    def start_phase(self, run: TrainRun) -> None:
        """Steps of weights that were in float until now; norms of pairs of different widths."""
        if run.phase_index and run.phases[run.phase_index - 1].name == ACTIVATIONS:
            for site in insert.quantized_weights(run.model).values():
                cast(Quantizer, site.quantizer).initialize(site.original.detach())
        if run.phase.name == LAYERS:
            for module in run.model.modules():
                if isinstance(module, SwitchableNorm) and module.layers:
                    start_from_diagonal(module, producer=int(self.pair == "previous_producer"))

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """One loss, at widths that are drawn; they stay until ``after_backward``, as a backward pass may compute outputs again."""
        self._draw(run)
        if run.phase.name == ACTIVATIONS:
            enable_weights(run.model, is_enabled=False)
        yield self._loss(run, batch, run.predict(batch)) + run.penalty()

    def after_backward(self, run: TrainRun) -> None:
        """Back to the highest widths."""
        enable_weights(run.model, is_enabled=True)
        set_bits(run.model, switches_of(run.model)[0])

    def _draw(self, run: TrainRun) -> None:
        """Set the widths of a step."""
        switches, layers = switches_of(run.model), switching_layers(run.model)
        progress = run.phase_progress if run.phase.name == LAYERS else 0.0
        u_base, u_redraw, u_choice = (torch.rand(shape, generator=run.generator) for shape in ((), len(layers), len(layers)))
        places = draw_widths(range(len(switches)), torch.tensor(progress), u_base, u_redraw, u_choice)
        if layers:
            set_bits(run.model, {layer: switches[place] for layer, place in zip(layers, places.tolist(), strict=True)})

    def _loss(self, run: TrainRun, batch: Batch, output: Output) -> Tensor:
        if self.distillation == "none":
            return run.loss_of(output, batch)
        with torch.no_grad():
            target = run.task.predict(run.networks["teacher"], batch)
        soft = run.task.with_temperature(self.temperature).distillation_loss(output, target)
        return soft if self.distillation == "replace" else run.task.loss(output, batch) + soft
