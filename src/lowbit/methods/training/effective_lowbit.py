"""Effective low-bitwidth networks: weights before activations, bits that come down step by step, and a float twin that learns alongside.

Paper: Zhuang, Shen, Tan, Liu, Reid 2018, "Towards Effective Low-bitwidth Convolutional Neural Networks", arXiv 1711.00205.
    Section 3.2 (two-stage optimization), 3.3 (progressive quantization), 3.4 (guided training), on the quantizers of DoReFa-Net.
    Zhuang et al. 2021, arXiv 1908.04680, and the authors' code: guidance by outputs in place of features.
Symbols: F -> teacher, Q -> the network, R -> distance, lambda -> guidance_weight and teacher_guidance_weight, k -> bit_width.
Differs from the paper:
    - Widths above 8 bits (16 in the paper) are left out: what they round away is below what training notices.
    - The clip to [0, 1] sits at the inputs of layers and not in place of the ReLUs, so that shortcuts carry what was not clipped; where an
      input can be negative it goes from -1 to 1.
    - Weights have 2 bits or more. For 1 bit: a method that has it, such as dorefa, through this procedure without ``progressive``.
    - Features are those that layers read, on the grid of the layer's own quantizer. R is their mean squared distance, as in the
      authors' code; the paper has half of the sum of squares, and says no lambda.
    - Half of the epochs are spent at the bits asked for (``last_share``), because budgets here are short.
    - One network learns beside the twin; the authors' code for CIFAR-100 trains two of different widths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.inputs import map_tensors, tensors_of
from lowbit.methods.quantization_aware.dorefa import Dorefa, DorefaActivation, DorefaWeight
from lowbit.network import insert
from lowbit.network.bits import lower_bits
from lowbit.network.layers import WEIGHT, evaluating
from lowbit.network.taps import tapped
from lowbit.options import Above, AtLeast, Interval
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Phase, Procedure, QatJob, Recipe, Slot, TrainRun
from lowbit.qat.task import Batch, Output
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import BitPolicy, LayerBits

TEACHER = "teacher"
ASKED = LayerBits(1, 1)  # a stage below which nothing is asked for: each layer at its own bits
GUIDED_LAYERS = 2
Guidance = Literal["none", "feature", "logit_mse", "kl"]


class ClippedActivation(DorefaActivation):
    """``quantize_k(clip(x, 0, 1))``, and while ``clips``, where it does not quantize, ``clip(x, 0, 1)``; with ``is_signed`` from -1.

    Attributes:
        clips: Whether values are clipped while the quantizer is not enabled. Backward then: 1 inside the clip, bounds included, else 0.
    """

    def __init__(self, bit_width: int, *, is_signed: bool = False) -> None:
        super().__init__(bit_width, is_signed=is_signed)
        self.clips = False

    def __call__(self, x: Tensor) -> Tensor:
        return x.clamp(-1.0 if self.is_signed else 0.0, 1.0) if self.clips and not self.enabled else super().__call__(x)


class ScaledLogitWeight(DorefaWeight):
    """The weight of a last layer whose bias is quantized too, on the same levels, and whose output has a factor that is learned.

    Forward: ``logit_scale * (2 quantize_k(squash(w)) - 1)``, and the same of the bias, so that the layer's output is that of its quantized
    weight and bias times ``logit_scale``. Source: the authors' code of 2018, where the factor starts at 0.01.
    """

    def __init__(self, bit_width: int) -> None:
        super().__init__(bit_width, rescale=True)
        self.logit_scale = nn.Parameter(torch.tensor(0.01))

    def size(self, x: Tensor) -> Tensor:
        return self.logit_scale

    def scale_bias(self, bias: Tensor) -> Tensor:
        return self(bias)


@dataclass
class EffectiveQuantizers(Dorefa):
    """The quantizers of DoReFa-Net.

    Attributes:
        scaled_logits: Quantize the last layer's bias as its weight, and multiply the logits by a scalar that is learned (2018). The policy
            has to quantize the last layer, as ``policy="paper"`` then does.
    """

    scaled_logits: bool = False

    def default_policy(self, bits: LayerBits) -> BitPolicy:
        return BitPolicy(bits) if self.scaled_logits else super().default_policy(bits)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return ScaledLogitWeight(slot.bit_width) if self._has_scaled_logits(slot) else super().weight_quantizer(slot)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return ClippedActivation(slot.bit_width, is_signed=slot.is_signed)

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        return ScaledLogitWeight(slot.bit_width) if self._has_scaled_logits(slot) else super().edge_quantizer(slot)

    def _has_scaled_logits(self, slot: Slot) -> bool:
        return self.scaled_logits and slot.position == "last" and slot.purpose == "weight" and slot.parameter == WEIGHT


def last_of_each_shape(features: Mapping[str, Tensor]) -> list[str]:
    """For each shape of a sample the last of these features that has it, in their order; batches in the first dimension."""
    found: dict[tuple[int, ...], str] = {}
    for name, feature in features.items():
        found.pop(tuple(feature.shape[1:]), None)
        found[tuple(feature.shape[1:])] = name
    return list(found.values())


def squared_distance(own: Output, other: Output) -> Tensor:
    """The mean squared difference of all values of ``own`` and of ``other``, which is a constant.

    Raises:
        SpecError: They have other shapes.
    """
    pairs = [(a, b.detach()) for a, b in zip(tensors_of(own), tensors_of(other), strict=True) if a.is_floating_point()]
    for a, b in pairs:
        if a.shape != b.shape:
            raise SpecError(
                f"network and teacher must give values of the same shape to be guided by them, got {tuple(a.shape)} and {tuple(b.shape)}. "
                "Leave the teacher out, so that the network learns beside its own float twin."
            )
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum() / sum(a.numel() for a, _ in pairs)


def on_grid(quantizer: Quantizer, x: Tensor) -> Tensor:
    """``quantizer(x)``, differentiable in ``x`` alone; neither parameters nor statistics of the quantizer learn from it."""
    state = {name: tensor.detach().clone() for name, tensor in (*quantizer.named_parameters(), *quantizer.named_buffers())}
    found: Tensor = torch.func.functional_call(quantizer, state, (x,))
    return found


@register(
    MethodInfo(
        name="effective_lowbit",
        title="Towards Effective Low-bitwidth Convolutional Neural Networks",
        paper="Zhuang, Shen, Tan, Liu, Reid, CVPR 2018",
        url="https://arxiv.org/abs/1711.00205",
        section="training",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="partial",
        summary="weights before activations, ever fewer bits, beside a float twin that learns as well; on DoReFa's quantizers",
        evidence="quantizers, distances and joint training checked against the authors' code; the clip sits at layers' inputs, not at ReLUs",
        margin_points=55,
    )
)
@dataclass
class EffectiveLowbit(Procedure):
    """Two stages, progressive bits and guidance by a float twin, each of which can be switched off.

    Each width has a phase of its own, or two with ``two_stage``; optimizers and learning rates start again with each.

    Attributes:
        two_stage: Train weights at their bits with activations in float before both are quantized.
        progressive: Come down over ``widths`` before the bits that are asked for.
        widths: Bits of weights and activations on the way, descending; those that no layer is below are left out.
        last_share: Share of the epochs in which weights and activations have the bits asked for; all other phases have the same.
        guidance: What network and float twin tell each other: ``feature``: what layers read, by squared distance; ``logit_mse``: outputs, by squared
            distance; ``kl``: softened outputs, by their divergence; ``none``: there is no twin.
        guided_layers: Layers whose inputs are compared by ``feature``. Default: for each shape of features the last layer that reads it, and
            of these the last two.
        temperature: Temperature of the softened outputs of ``kl``.
        ce_weight: Weight of the task's loss for the network.
        guidance_weight: Weight of its distance to the twin.
        teacher_ce_weight: Weight of the task's loss for the twin.
        teacher_guidance_weight: Weight of its distance to the network.
        teacher_learning_rate: Learning rate of the twin as a fraction of the weights'.
    """

    quantizers = EffectiveQuantizers

    two_stage: bool = True
    progressive: bool = True
    widths: Annotated[tuple[int, ...], Interval(2, 8)] = (8, 4)
    last_share: Annotated[float, Interval(0, 1, closed="right")] = 0.5
    guidance: Guidance = "kl"
    guided_layers: tuple[str, ...] = ()
    temperature: Annotated[float, Above(0)] = 1.0
    ce_weight: Annotated[float, AtLeast(0)] = 1.0
    guidance_weight: Annotated[float, AtLeast(0)] = 0.5
    teacher_ce_weight: Annotated[float, AtLeast(0)] = 1.0
    teacher_guidance_weight: Annotated[float, AtLeast(0)] = 0.5
    teacher_learning_rate: Annotated[float, AtLeast(0)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lowest = ASKED  # the fewest bits that the policy asks for
        self.hints: list[str] = []  # layers whose inputs are compared
        if any(after >= before for before, after in pairwise(self.widths)):
            raise SpecError(f"effective_lowbit: widths must descend, got {', '.join(map(str, self.widths))}")

    @property
    def replaces_loss(self) -> bool:  # type: ignore[override]
        return self.guidance != "none"

    @property
    def has_own_loss(self) -> bool:
        return self.guidance != "none" or self.base.has_own_loss

    def default_recipe(self) -> Recipe:
        """ImageNet in the paper: 30 epochs for each of the six phases that lead to 2 bits."""
        spec = OptimizerSpec(learning_rate=1e-3, nesterov=True, schedule="step", milestones=(1 / 3, 2 / 3))
        return Recipe(180, 256, spec)

    def steps(self) -> dict[str, LayerBits]:
        """The bits of each phase by its name."""
        passed = [width for width in self.widths if self.progressive and any(low is not None and low < width for low in self._lows)]
        is_split = self.two_stage and None not in self._lows
        found = {}
        for width in [*passed, None]:
            suffix = "" if width is None else f" at {width} bits"
            bits = ASKED if width is None else LayerBits(width, width)
            if is_split:
                found[f"weights{suffix}"] = replace(bits, activation=None)
            found[f"weights and activations{suffix}"] = bits
        return found

    @property
    def _lows(self) -> tuple[int | None, int | None]:
        return self.lowest.weight, self.lowest.activation

    def stages(self) -> Sequence[LayerBits]:
        return list(self.steps().values())[:-1]

    def phases(self, recipe: Recipe) -> list[Phase]:
        *passed, last = self.steps()
        share = (1 - self.last_share) / max(len(passed), 1)
        parts = self.split(recipe, {**dict.fromkeys(passed, share), last: self.last_share}, restart=True)
        if self.guidance == "none":
            return parts
        teacher = replace(recipe.optimizer, learning_rate=recipe.optimizer.learning_rate * self.teacher_learning_rate)
        return [replace(phase, optimizers={**phase.optimizers, TEACHER: teacher}) for phase in parts]

    def attach(self, job: QatJob) -> None:
        asked = [job.bits(name) for name in job.weights]
        activations = job.activation_bits.values()
        self.lowest = LayerBits(min((bits.weight for bits in asked if bits.weight), default=None), min(activations, default=None))
        super().attach(job)
        self.hints = self._choose_layers(job) if self.guidance == "feature" else []

    def _choose_layers(self, job: QatJob) -> list[str]:
        readers = list(job.activation_bits)
        for name in self.guided_layers:
            if name not in readers:
                raise SpecError(
                    f"effective_lowbit: guided_layers names {name!r}, which is no layer whose input is quantized. Those are: {', '.join(readers)}."
                )
        if not readers:
            raise SpecError(
                "effective_lowbit: guidance 'feature' compares what layers read, and no layer's input is quantized. Choose 'logit_mse' or 'kl'."
            )
        if self.guided_layers:
            return list(self.guided_layers)
        inner = [name for name in readers if not job.is_excepted(name)] or readers
        with torch.no_grad(), evaluating(job.model), tapped(job.model, inner, "input") as features:
            job.model(*job.sample.args, **job.sample.kwargs)
        return last_of_each_shape(features)[-GUIDED_LAYERS:]

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        found = super().companions(model, given)
        return found if self.guidance == "none" else {**found, TEACHER: Companion(given.teacher or given.float_twin())}

    def start_phase(self, run: TrainRun) -> None:
        super().start_phase(run)
        bits = self.steps()[run.phase.name]
        lower_bits(run.model, bits)
        for module in run.model.modules():
            if isinstance(module, ClippedActivation):
                module.clips = bits.activation is None

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """The network's loss and the twin's, each with what the other gave as constants."""
        if self.guidance == "none":
            yield from super().losses(run, batch)
            return
        twin, places = run.networks[TEACHER], [f"{name}.{insert.INPUT}" for name in self.hints]
        with tapped(twin, self.hints, "input") as theirs:
            target = run.task.predict(twin, batch)
        with tapped(run.model, self.hints, "input") as read, tapped(run.model, places) as quantized:
            output = run.predict(batch)
        pairs: list[tuple[Output, Output]] = [] if self.hints else [(output, target)]
        for name, place in zip(self.hints, places, strict=True):
            quantizer = run.model.get_submodule(place)
            assert isinstance(quantizer, Quantizer)
            feature = quantized.get(place)  # a quantizer that is not enabled leaves none, but may clip
            pairs.append((quantizer(read[name]) if feature is None else feature, on_grid(quantizer, theirs[name])))
        own = sum(self.distance(run, a, b) for a, b in pairs)
        yield self.ce_weight * run.task.loss(output, batch) + self.guidance_weight * own + run.penalty()
        other = sum(self.distance(run, b, a) for a, b in pairs)
        yield self.teacher_ce_weight * run.task.loss(target, batch) + self.teacher_guidance_weight * other

    def distance(self, run: TrainRun, own: Output, other: Output) -> Tensor:
        """How far ``own`` is from ``other``, which is a constant."""
        if self.guidance != "kl":
            return squared_distance(own, other)
        return run.task.with_temperature(self.temperature).distillation_loss(own, map_tensors(other, Tensor.detach))
