"""BRECQ: the rounding of all weights of a block is learned together, from the error at the block's output.

Paper: Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu 2021, "BRECQ: Pushing the Limit of Post-Training Quantization by Block
    Reconstruction", ICLR. Section 3.2 (blocks), section 3.3 (Fisher weights, activation scales), section 4 (settings).
Symbols: Delta -> scale, V -> logits, lambda -> regularization, beta -> beta.
Differs from the paper:
    - Activation quantizers sit where all methods of lowbit put them, on every tensor that a layer or an addition reads, the network's
      input included, so that exports of all methods have the same form.
    - Ranges of activations are initialized on all calibration samples and contain 0, as padding needs it.
    - Layers of 8 weight bits get a symmetric grid by default, because runtimes compute those fastest.
    - A unit for which nothing better was learned on the calibration data stays as it was, so that no unit gets worse.
    - Activation scales learn from the outputs of the preceding quantized blocks instead of the float network's, because the learned
      roundings compensate for their errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from lowbit.methods.post_training.adaround import reconstruct
from lowbit.network.graph.blocks import Block
from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.layers import quantizable_layers
from lowbit.network.slot import Slot
from lowbit.options import Above, AtLeast, Interval
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.post_training.reconstruction.objective import FisherKind, Objective, rounding_learning_rate
from lowbit.post_training.reconstruction.phases import LearnScales, RoundWeights
from lowbit.post_training.reconstruction.rounding import BetaSchedule, LossKind
from lowbit.post_training.reconstruction.unit_data import CacheKind
from lowbit.post_training.reconstruction.units import PlannedUnit, block_units, plan_units
from lowbit.quantizers import Quantizer, UniformQuantizer
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.registry import MethodInfo, register
from lowbit.spec import BitPolicy, Granularity

POWER = 2.4  # exponent of the error in the range search and the activation phase
PAPER_ITERATIONS = 20_000
WIDE = 8  # bits of the first and the last layer


@dataclass(frozen=True)
class ReleasedLayer:
    """Settings of one layer in the released code: bits of its weight and of its output, and whether it is reconstructed."""

    weight_bits: int
    output_bits: int
    is_reconstructed: bool


def released_layers(count: int, weight_bits: int, activation_bits: int) -> list[ReleasedLayer]:
    """The settings of ``count`` layers in definition order as the released code chooses them.

    Weights of the first and the last layer and outputs of the first and the second to last layer in definition order get 8 bits; the
    first layer is not reconstructed.

    Source: the released code, ``set_first_last_layer_to_8bit``.
    """
    ends, wide_outputs = {0, count - 1}, {0, count - 2}
    return [
        ReleasedLayer(WIDE if index in ends else weight_bits, WIDE if index in wide_outputs else activation_bits, index != 0)
        for index in range(count)
    ]


def released_policy(job: PtqJob, units: Sequence[Block], layers: Mapping[str, ReleasedLayer]) -> BitPolicy:
    """The job's policy with the bits that the released code gives ``layers``, where the policy's own rules say nothing.

    The output of a layer is what other layers read. The released code quantizes the result of a block as a whole, at the same bits as
    all others, instead of the output of its last layer. So the classifier behind a residual block keeps the bits of all layers, and gets
    8 bits where a layer outside of all blocks is both defined and computed just before it.
    """
    default, policy = job.policy.default, replace(job.policy, first_last=None, rules=())
    graph = None if default.activation is None else job.need_graph("first_last='released'")
    block_of = {layer: unit.name for unit in units if unit.kind == "block" for layer in unit.layers}
    for name, layer in layers.items():
        source = None if graph is None else _source(graph, name)
        activation: int | None
        if source is not None and block_of.get(source) in (None, block_of.get(name)):
            activation = layers[source].output_bits
        else:
            activation = default.activation if layer.is_reconstructed else WIDE  # the first layer reads the network's input
        weight = None if default.weight in (None, layer.weight_bits) else layer.weight_bits
        activation = None if default.activation in (None, activation) else activation
        if (weight, activation) != (None, None):
            policy = policy.with_rule(match=name, weight=weight, activation=activation)
    return replace(policy, rules=(*policy.rules, *job.policy.rules))


def _source(graph: Dataflow, layer: str) -> str | None:
    """The layer that the input of ``layer`` comes from, through operations of one operand."""
    for node in graph.of_layer(layer):
        while len(made_from := graph.producers(node)) == 1:
            (node,) = made_from
            if node.layer is not None:
                return node.layer
    return None


@register(
    MethodInfo(
        name="brecq",
        title="BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction",
        paper="Li, Gong, Tan, Yang, Hu, Zhang, Yu, Wang, Gu, ICLR 2021",
        url="https://arxiv.org/abs/2102.05426",
        section="post_training",
        axes=("weight_quantizer", "activation_quantizer", "reconstruction"),
        kind="post_training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="partial",
        summary="learns the rounding of a whole block at once, then the activation scales, from the error at the block's output",
        evidence="checked against the authors' code; activation quantizers sit in other places; its bit search is brecq_genetic",
        margin_db=2.0,
    )
)
@dataclass
class Brecq(PostTrainingMethod):
    """Block reconstruction.

    Attributes:
        weight_grid: ``affine``: as in the paper, with the range of least error to the power of 2.4; ``symmetric``; or ``mixed``:
            symmetric for layers of 8 weight bits, which runtimes can compute in integers, affine for all others.
        blocks: Patterns of the modules to reconstruct as a whole, for example ``layer*.*``; default: blocks found in the network.
        first_last: Bits at both ends of the network: ``intended``, those of the policy, by default 8 for the weights and inputs of the first
            and the last layer; or ``released``, those of the released code, which goes by the order of definition: the classifier's input
            has 8 bits only where the layer defined just before it is no part of a block. The policy's rules for single layers hold.
        reconstruct_first: Also reconstruct a first layer of 8 weight bits, which is hardly ever worthwhile.
        iterations: Steps of Adam for each block.
        batch_size: Calibration samples per step, drawn at random.
        learning_rate: Adam learning rate of the rounding logits. Default: the paper's 0.001 for its 20000 iterations, and proportionally
            more for fewer, at most 0.03.
        loss: Error at a block's output: ``mse`` (the released default), ``fisher_diag`` (the paper's) or ``fisher_full``.
        fisher: Weights of the Fisher losses: the gradients scaled to mean square 1 (``paper``), or ``|g| + 1`` (``released``).
        regularization: Weight of the regularizer (lambda); the authors use 0.1 for MobileNetV2 at 2 bits.
        warm_start: Share of the iterations without the regularizer.
        beta_start: The regularizer's exponent after the warm start.
        beta_end: The regularizer's exponent at the end; it falls linearly.
        asymmetric: Learn roundings from the outputs of the blocks quantized so far instead of the float network's.
        activation_iterations: Steps of Adam for each block's activation scales; 0 keeps the scales of the range search.
        activation_inputs: Inputs of that phase: outputs of the preceding ``quantized`` blocks, which the roundings were learned from too,
            or those of the ``float`` network, as in the released code.
        activation_learning_rate: Learning rate of the activation scales; falls to 0 along a cosine.
        precision: ``fp32``, or ``bf16`` for autocast: faster where the processor supports it, slightly less exact.
        cache: Storage of a block's inputs and targets: ``ram``, or ``disk`` for memory-mapped files.
        save_every: Iterations between saves of a block's state, from which a killed run resumes.
    """

    weight_grid: Literal["affine", "symmetric", "mixed"] = "mixed"
    blocks: tuple[str, ...] = ()
    first_last: Literal["intended", "released"] = "intended"
    reconstruct_first: bool = False
    iterations: Annotated[int, AtLeast(0)] = PAPER_ITERATIONS
    batch_size: Annotated[int, AtLeast(1)] = 32
    learning_rate: Annotated[float | None, Above(0)] = None
    loss: LossKind = "mse"
    fisher: FisherKind = "paper"
    regularization: Annotated[float, AtLeast(0)] = 0.01
    warm_start: Annotated[float, Interval(0, 1)] = 0.2
    beta_start: Annotated[float, Above(0)] = 20.0
    beta_end: Annotated[float, Above(0)] = 2.0
    asymmetric: bool = True
    activation_iterations: Annotated[int, AtLeast(0)] = 5000
    activation_inputs: Literal["quantized", "float"] = "quantized"
    activation_learning_rate: Annotated[float, Above(0)] = 4e-4
    precision: Literal["fp32", "bf16"] = "fp32"
    cache: CacheKind = "ram"
    save_every: Annotated[int, AtLeast(1)] = 500

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        is_symmetric = self.weight_grid == "symmetric" or (self.weight_grid == "mixed" and slot.bit_width == WIDE)
        if is_symmetric or self.weight_observer != "mse":
            return super().weight_quantizer(slot)
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        observer = make_observer("mse", granularity, power=POWER, contain_zero=False)
        return UniformQuantizer(slot.bit_width, signed=False, symmetric=False, granularity=granularity, observer=observer)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        if self.activation_observer != "mse":
            return super().activation_quantizer(slot)
        return UniformQuantizer(slot.bit_width, signed=False, symmetric=False, observer=make_observer("mse", power=POWER))

    def quantize(self, job: PtqJob) -> None:
        job.fold()
        blocks, released = block_units(job, self.blocks), self._released(job)
        if released:
            job.set_policy(released_policy(job, blocks, released))
        job.insert_weights(self.weight_quantizer)
        units = plan_units(job, blocks)
        facts: dict[str, object] = {"method": "brecq", **asdict(self)}
        weights = RoundWeights(job, self.rounding_objective(), is_symmetric=not self.asymmetric)
        reconstruct(job, self._without_stem(job, units, released), weights, facts, cache=self.cache, save_every=self.save_every)
        job.insert_activations(self)
        job.calibrate_activations()
        if self.activation_iterations:
            scales = LearnScales(job, self.scale_objective(), units, is_symmetric=self.activation_inputs == "float")
            reconstruct(job, units, scales, facts, cache=self.cache, save_every=self.save_every)

    def rounding_objective(self) -> Objective:
        """Objective that the roundings of a block minimise."""
        rate = rounding_learning_rate(self.learning_rate, self.iterations, PAPER_ITERATIONS)
        beta = BetaSchedule("linear", self.iterations, self.warm_start, self.beta_start, self.beta_end)
        return Objective(
            self.iterations, rate, self.batch_size, loss=self.loss, fisher=self.fisher, schedule=beta,
            regularization=self.regularization, precision=self.precision,
        )  # fmt: skip

    def scale_objective(self) -> Objective:
        """Objective that the activation scales of a block minimise."""
        return Objective(
            self.activation_iterations,
            self.activation_learning_rate,
            self.batch_size,
            power=POWER,
            is_annealed=True,
            precision=self.precision,
        )

    def _released(self, job: PtqJob) -> dict[str, ReleasedLayer]:
        """The layers in definition order with their settings in the released code, if those are asked for."""
        if self.first_last == "intended":
            return {}
        names, bits = quantizable_layers(job.model), job.policy.default
        return dict(zip(names, released_layers(len(names), bits.weight or WIDE, bits.activation or WIDE), strict=True))

    def _without_stem(self, job: PtqJob, units: Sequence[PlannedUnit], released: Mapping[str, ReleasedLayer]) -> list[PlannedUnit]:
        first = next(iter(job.layers))
        left = {name for name, layer in released.items() if not layer.is_reconstructed}
        if not released and job.bits(first).weight == WIDE:
            left = {first}
        if self.reconstruct_first or len(units) == 1:
            left = set()
        return [unit for unit in units if not left.issuperset(unit.layers)]
