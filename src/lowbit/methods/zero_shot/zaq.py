"""ZAQ: the low-bit network learns from the float one on samples of a generator that looks for those on which the two differ most.

Paper: Liu, Zhang, Wang 2021, "Zero-shot Adversarial Quantization", CVPR. Output and intermediate discrepancy, activation regularization, and the
    two adversarial losses; as in the program that its authors published where that says more.
Symbols: P -> the float network (the companion ``teacher``), Q -> the network, G -> ``generator``, D_o -> ``output_discrepancy``,
    D_f -> ``feature_discrepancy``, S and Z -> those of lowbit.quantizers.running_range.
Differs from the paper:
    - The inputs of layers are quantized, instead of what ReLUs give; features are compared behind the quantizer that reads them, where one does.
    - A pixel whose channels are all 0 has no gradient through the normalization of features; in the program it gets 1e12 times that of others.
    - Ranges of activations are frozen in evaluation; in the program test images go on widening them.
    - The network of the last epoch is kept; the program keeps the one that was best on test images.
    - Features are those that the last activation function before each smaller size gives, at the four smallest sizes; in a residual network
      these are its stages, whose outputs the program takes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss

from lowbit.errors import GraphError, SpecError, unknown_name
from lowbit.inputs import Inputs, sample_count, tensors_of
from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.graph.trunk import ACTIVATIONS
from lowbit.network.layers import BATCH_NORMS, evaluating
from lowbit.network.taps import Tap, tapped, taps_of
from lowbit.options import Above, AtLeast
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Phase, QatJob, Recipe, Slot, TrainingMethod, TrainRun, Turn
from lowbit.qat.engine.processes import own_part
from lowbit.qat.task import Batch, Output
from lowbit.quantizers import Quantizer
from lowbit.quantizers.running_range import MinMaxWeightQuantizer, RunningRangeQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.synthesis.generator import Generator

Relation = Literal["scrm", "scrm_channel", "crm"]
TEACHER, GENERATOR, NETWORK = "teacher", "generator", "network"
MOST_FEATURES = 4
PROBES = 2  # samples that features are found with


def channels_and_pixels(feature: Tensor) -> Tensor:
    """``[N, C, positions]``."""
    return feature.flatten(2) if feature.dim() > 2 else feature.unsqueeze(2)


def normalized(x: Tensor, dim: int, epsilon: float) -> Tensor:
    """``x / ||x||_2`` along ``dim``; 0 without a gradient where the norm is at most ``epsilon``."""
    norm = x.norm(dim=dim, keepdim=True)
    is_safe = norm > epsilon
    scaled: Tensor = x * (is_safe / torch.where(is_safe, norm, 1.0))
    return scaled


def channel_map(x: Tensor, gamma: float) -> Tensor:
    """``gamma A x + x`` with ``A = softmax_j(max_j E_ij - E_ij)``, ``E = x x^T``: each channel with those most unlike it.

    Args:
        x: Normalized features ``[N, C, positions]``.
        gamma: Weight of the others.
    """
    energy = x @ x.mT
    others = (energy.amax(2, keepdim=True) - energy).softmax(2)
    return gamma * (others @ x) + x


def position_map(x: Tensor, gamma: float) -> Tensor:
    """``gamma x B^T + x`` with ``B = softmax_q((x^T x)_pq)``: each position with those most like it; as ``channel_map``."""
    return gamma * (x @ (x.mT @ x).softmax(2).mT) + x


def feature_discrepancy(
    student: Tensor, teacher: Tensor, relation: Relation = "scrm", *, gamma: float = 0.1, epsilon: float = 1e-6
) -> Tensor:
    """How differently the channels of two features are related; shape ``()``.

    ``scrm``: both are normalized over the channels of each position, and the mean absolute differences of their ``channel_map`` and of
    their ``position_map`` are added; ``scrm_channel``: the first alone. ``crm``: the mean absolute difference of ``R_ij = <f_i, f_j> / (||f_i|| ||f_j||)``
    over all pairs of channels, ``f_i`` a channel over its positions.

    Args:
        student, teacher: ``[N, C, ...]`` of one shape.
        relation: Which.
        gamma: Weight in the maps.
        epsilon: Norms up to this count as 0.
    """
    dim = 2 if relation == "crm" else 1
    x, y = (normalized(channels_and_pixels(feature), dim, epsilon) for feature in (student, teacher))
    if relation == "crm":
        return l1_loss(x @ x.mT, y @ y.mT)
    loss = l1_loss(channel_map(x, gamma), channel_map(y, gamma))
    return loss if relation == "scrm_channel" else loss + l1_loss(position_map(x, gamma), position_map(y, gamma))


def output_discrepancy(student: Output, teacher: Output) -> Tensor:
    """The mean of ``|P(x) - Q(x)|`` over samples and outputs; shape ``()``."""
    pairs = zip(tensors_of(student), tensors_of(teacher), strict=True)
    differences = [(a - b).abs().flatten() for a, b in pairs if a.is_floating_point()]
    return torch.cat(differences).mean()


@dataclass(frozen=True)
class View:
    """What a network makes of a batch.

    Attributes:
        output: Its output.
        features: Its features, in execution order.
    """

    output: Output
    features: Sequence[Tensor]


def find_features(flow: Dataflow, batch_size: int) -> list[Tap]:
    """What the last activation function gives before each smaller size, at the four smallest sizes; of layers where there is none.

    Tensors without positions, or with one, count only where there are no others.
    """

    def found(ops: Iterable[str] | None, least: int) -> dict[tuple[int, ...], Tap]:
        by_size: dict[tuple[int, ...], Tap] = {}
        for node in flow.nodes:
            fits = node.is_activation and len(node.shape) > 1 and node.shape[0] == batch_size and not flow.is_output(node)
            if not fits or not (node.layer is not None if ops is None else node.op in ops) or math.prod(node.shape[2:]) < least:
                continue
            taps = taps_of(flow, node)
            if len(taps) == 1:
                size = node.shape[2:] or node.shape
                by_size.pop(size, None)  # to stand where the last one does
                by_size[size] = taps[0]
        return by_size

    for ops, least in itertools.product((ACTIVATIONS, None), (2, 0)):
        if by_size := found(ops, least):
            return list(by_size.values())[-MOST_FEATURES:]
    return []


def quantized_taps(model: nn.Module, taps: Sequence[Tap], probe: Tensor) -> list[Tap]:
    """For each tap that of the quantizer which reads the very tensor, where one does."""
    inputs = {Tap(name, "input"): Tap(name) for name, module in model.named_modules() if isinstance(module, Quantizer)}
    with evaluating(model), tapped(model, [*taps, *inputs]) as found:
        model(probe)
    read = {id(found[place]): behind for place, behind in inputs.items() if place in found}
    return [read.get(id(found[tap]), tap) for tap in taps]


@register(
    MethodInfo(
        name="zaq",
        title="Zero-shot Adversarial Quantization",
        paper="Liu, Zhang, Wang, CVPR 2021",
        url="https://arxiv.org/abs/2103.15263",
        section="zero_shot",
        axes=("weight_quantizer", "activation_quantizer", "procedure", "data"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("pretrained",),
        fidelity="partial",
        summary="learns from the float network on samples of a generator that looks for where the two differ; needs no data",
        evidence="quantizers, relations, losses, generator and two rounds of training checked against the authors' program; quantizes layers' inputs",
        margin_points=1,
    )
)
@dataclass
class Zaq(TrainingMethod):
    """A game of two networks without data: steps of the network, which imitates the float one, then one of the generator.

    Network: ``D_o + alpha D_f``; generator: ``-D_o - alpha D_f - beta mean |last feature of the float network|``. See ``output_discrepancy`` and
    ``feature_discrepancy``, whose sum over the features is ``D_f``.

    Batches only say how many samples to make. Batch norms and ranges of activations learn from the samples of both kinds of steps.

    Attributes:
        alpha: Weight of the features' discrepancy.
        beta: Weight of the activation regularization.
        relation: How features are compared: ``scrm`` (the authors' program), ``scrm_channel`` (its first half, which takes less memory), or
            ``crm`` (the paper's formula).
        gamma: Weight of the other channels and positions in the maps of ``scrm``.
        epsilon: Largest norm of a feature that counts as 0.
        taps: Modules whose outputs are the features. Default: what the last activation function gives before each smaller size, at
            the four smallest sizes.
        latent: Size of the generator's noise.
        width: Channels of the generator's last hidden layer.
        generator_learning_rate: Learning rate of the generator, which follows the recipe's schedule.
        network_steps: Steps of the network before each step of the generator.
        rounds: Such rounds in an epoch.
        symmetric: Quantize with 0 in the middle of the codes, as the paper's text says; its program is asymmetric.
        norm_statistics: What batch norms compute with: ``generated``, those of each batch of samples, which they also learn for evaluation
            (the authors' program, which takes 90,000 steps of 256 samples); ``float``, those that the float network has kept from its data,
            which stay: for short trainings.
    """

    ends: ClassVar[Literal["wide", "float", "same"]] = "same"
    allows_procedure: ClassVar[bool] = False

    alpha: Annotated[float, AtLeast(0)] = 1.0
    beta: Annotated[float, AtLeast(0)] = 0.1
    relation: Relation = "scrm"
    gamma: Annotated[float, AtLeast(0)] = 0.1
    epsilon: Annotated[float, Above(0)] = 1e-6
    taps: tuple[str, ...] = ()
    latent: Annotated[int, AtLeast(1)] = 256
    width: Annotated[int, AtLeast(1)] = 64
    generator_learning_rate: Annotated[float, AtLeast(0)] = 1e-3
    network_steps: Annotated[int, AtLeast(1)] = 5
    rounds: Annotated[int, AtLeast(1)] = 60
    symmetric: bool = False
    norm_statistics: Literal["generated", "float"] = "generated"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.input_shape: tuple[int, ...] = ()  # of a sample
        self.teacher_taps: list[Tap] = []
        self.network_taps: list[Tap] = []

    def default_recipe(self) -> Recipe:
        """CIFAR."""
        spec = OptimizerSpec("sgd", 0.1, nesterov=False, weight_decay=5e-4, schedule="step", milestones=(1 / 3, 2 / 3))
        return Recipe(300, 256, spec)

    def generated_steps(self) -> int:
        return self.rounds

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return MinMaxWeightQuantizer(slot.bit_width, Granularity.channel(slot.channel_axis), symmetric=self.symmetric)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return RunningRangeQuantizer(slot.bit_width, symmetric=self.symmetric)

    def output_quantizer(self, slot: Slot) -> Quantizer:
        return self.activation_quantizer(slot)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        return self.activation_quantizer(slot)

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        return self.weight_quantizer(slot) if slot.purpose == "weight" else self.activation_quantizer(slot)

    def attach(self, job: QatJob) -> None:
        self.input_shape = _shape_of(job.sample)
        self.teacher_taps = self._find_taps(job)
        job.table.note(
            f"features are compared, in training alone, at {', '.join(f'{tap.side} of {tap.module}' for tap in self.teacher_taps)}"
        )
        super().attach(job)

    def phases(self, recipe: Recipe) -> list[Phase]:
        own = self.optimizers(recipe)
        generator = replace(recipe.optimizer, kind="adam", learning_rate=self.generator_learning_rate, weight_decay=0.0, betas=(0.9, 0.999))
        turns = [Turn(NETWORK, tuple(own))] * self.network_steps + [Turn(GENERATOR, (GENERATOR,))]
        return [Phase("adversarial", recipe.epochs, {**own, GENERATOR: generator}, recipe.clip_norm, turns=turns)]

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        teacher = given.teacher or given.float_twin()
        generator = Generator(self.input_shape, latent=self.latent, width=self.width)
        self._look_at(model, teacher)
        return {TEACHER: Companion(teacher, mode="eval"), GENERATOR: Companion(generator)}

    def start_phase(self, run: TrainRun) -> None:
        """Ranges start at 0, whatever the quantizers were initialized from."""
        for quantizer in run.quantizers():
            if isinstance(quantizer, RunningRangeQuantizer):
                quantizer.forget()

    def before_step(self, run: TrainRun) -> None:
        """Norms that keep the float network's statistics compute with them in training too."""
        if self.norm_statistics == "float":
            for module in run.model.modules():
                if isinstance(module, BATCH_NORMS):
                    module.eval()

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """That of the network or of the generator, whose turn it is, on new samples."""
        is_generators = run.turn.name == GENERATOR
        z = self.noise(run, sample_count(batch)).to(next(run.networks[GENERATOR].parameters()))
        with torch.set_grad_enabled(is_generators):
            samples = run.networks[GENERATOR](z)
            with tapped(run.networks[TEACHER], self.teacher_taps, copies=True) as found:
                teacher = View(run.task.predict(run.networks[TEACHER], samples), [])
            teacher = replace(teacher, features=[found[tap] for tap in self.teacher_taps])
        with tapped(run.model, self.network_taps, copies=True) as found:
            output = run.predict(samples)
        network = View(output, [found[tap] for tap in self.network_taps])
        yield self.generator_loss(network, teacher) if is_generators else self.network_loss(network, teacher)

    def noise(self, run: TrainRun, count: int) -> Tensor:
        """Standard normal ``[count, latent]``, new at each call and different in each process."""
        return own_part(lambda everything: torch.randn(everything, self.latent, generator=run.generator), count)

    def network_loss(self, network: View, teacher: View) -> Tensor:
        """``D_o + alpha D_f``."""
        return output_discrepancy(network.output, teacher.output) + self.alpha * self.relation_loss(network, teacher)

    def generator_loss(self, network: View, teacher: View) -> Tensor:
        """``-D_o - alpha D_f - beta mean |last feature of the float network|``."""
        return -self.network_loss(network, teacher) - self.beta * teacher.features[-1].abs().mean()

    def relation_loss(self, network: View, teacher: View) -> Tensor:
        """``D_f``: the sum of ``feature_discrepancy`` over the features."""
        pairs = zip(network.features, teacher.features, strict=True)
        terms = [feature_discrepancy(mine, theirs, self.relation, gamma=self.gamma, epsilon=self.epsilon) for mine, theirs in pairs]
        return torch.stack(terms).sum()

    def _find_taps(self, job: QatJob) -> list[Tap]:
        if self.taps:
            known = [name for name, _ in job.model.named_modules() if name]
            for name in self.taps:
                if name not in known:
                    raise unknown_name("module in taps", name, known)
            return [Tap(name) for name in self.taps]
        try:
            taps = find_features(job.dataflow(), job.sample.batch_size)
        except GraphError as error:
            raise GraphError(f"zaq looks for features in the dataflow of the network; name modules with taps= instead. {error}") from error
        if not taps:
            raise SpecError(
                f"zaq found no features in {type(job.model).__name__}: name modules whose outputs are to be compared with taps=."
            )
        return taps

    def _look_at(self, model: nn.Module, teacher: nn.Module) -> None:
        """Find the network's taps, and check that both networks have the same features.

        Raises:
            SpecError: They have not.
        """
        parameter = next(model.parameters())
        probe = torch.randn(PROBES, *self.input_shape, dtype=parameter.dtype).to(parameter.device)
        self.network_taps = quantized_taps(model, self.teacher_taps, probe)
        teacher.to(parameter.device)
        with evaluating(model), tapped(model, self.network_taps) as mine:
            model(probe)
        with evaluating(teacher), tapped(teacher, self.teacher_taps) as theirs:
            teacher(probe)
        for own, other in zip(self.network_taps, self.teacher_taps, strict=True):
            shapes = [list(found[tap].shape[1:]) if tap in found else None for found, tap in ((mine, own), (theirs, other))]
            if shapes[0] is None or shapes[0] != shapes[1]:
                raise SpecError(
                    f"zaq: the {other.side} of {other.module!r} has the shape {shapes[0]} in the network and {shapes[1]} in its teacher, but they are "
                    "compared. Leave teacher out: the float network itself is the teacher. Or name modules that both have with taps=."
                )


def _shape_of(sample: Inputs) -> tuple[int, ...]:
    """The shape of one sample; SpecError for a network that takes anything but one floating-point tensor."""
    tensors = list(sample.tensors)
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].dim() < 2:
        came = ", ".join(f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for t in tensors)
        raise SpecError(
            f"zaq makes samples for networks that take one floating-point tensor [N, channels, ...]; this one takes {came or 'none'}. "
            "Choose a method that is trained on data."
        )
    return tuple(tensors[0].shape[1:])
