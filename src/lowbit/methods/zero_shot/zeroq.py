"""ZeroQ: samples whose features have the statistics that batch norms keep from training, and quantization with them.

Paper: Cai, Yao, Dong, Gholami, Mahoney, Keutzer 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR. Section 3.1, Eq. 3 (distilled
    data). The quantizer and its places are those of the released program; the bits of each layer are in zeroq_pareto.
Symbols: mu_i, sigma_i -> kept.mean, kept.std; mu~_i, sigma~_i -> mean, std of a ChannelStatistics; x^r -> inputs; S, Z -> those of
    lowbit.quantizers.running_range.
Differs from the paper:
    - Statistics are those of each sample, as in the released program, and their squared distances are summed over channels and averaged over
      samples. The paper's are those of the batch.
    - They are taken of what norms read, so that it does not matter where a norm stands; in the released program of the i-th convolution's
      output for the i-th norm. Where a norm follows its convolution, both are the same.
    - Where a norm reads one value per channel and sample, statistics are those of the batch: a sample has none.
    - Quantization: a ReLU whose output only operations read that lowbit quantizes nothing of, such as a softmax, has no quantizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from lowbit.inputs import Calibration, Inputs
from lowbit.network import insert
from lowbit.network.layers import evaluating
from lowbit.network.placement import Placement, place_at_tensors
from lowbit.network.slot import Slot
from lowbit.options import Above, AtLeast, Finite, Interval, make_method
from lowbit.plugins import source_digest
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.quantizers import Quantizer
from lowbit.quantizers.running_range import MinMaxWeightQuantizer, RangeKind, RunningRangeQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.synthesis.descent import Loss, Schedule, descend
from lowbit.synthesis.problem import SynthesisMethod, SynthesisProblem, Synthesized, make_problem, normal

FACTOR = 0.1  # what the learning rate is multiplied by on a plateau
CODES = 255  # of the released start: integers from 0 to 254
CODES_MEAN, CODES_VARIANCE = 127.5, 5418.75  # what the released program subtracts, and divides by in place of its root


def statistic_distance(target: Tensor, statistic: Tensor) -> Tensor:
    """``(1/B) sum_bc (target_c - statistic_bc)^2``.

    Args:
        target: ``[C]``.
        statistic: ``[B, C]``.

    Source: the released program, ``own_loss``.

    >>> float(statistic_distance(torch.tensor([1.0]), torch.tensor([[1.0], [3.0]])))
    2.0
    """
    return (target - statistic).square().sum() / len(statistic)


def small_uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """The start of the released program: integers from 0 to 254, minus 127.5, divided by 5418.75: at most 0.0235 from 0."""
    return (torch.randint(CODES, tuple(shape), generator=generator) - CODES_MEAN) / CODES_VARIANCE


@register(
    MethodInfo(
        name="zeroq",
        title="ZeroQ: A Novel Zero Shot Quantization Framework",
        paper="Cai, Yao, Dong, Gholami, Mahoney, Keutzer, CVPR 2020",
        url="https://arxiv.org/abs/2001.00281",
        section="zero_shot",
        axes=("data",),
        kind="synthesis",
        weight_bits=range(1, 9),
        activation_bits=None,
        needs=("batch_norm",),
        fidelity="exact",
        summary="makes samples whose features have the means and deviations that batch norms keep",
        evidence="loss, gradient and images equal the authors' program",
    )
)
@dataclass
class ZeroqSamples(SynthesisMethod):
    """Descent on ``sum_i [ (1/B) |mu_i - m_i|^2 + (1/B) |sigma_i - s_i|^2 ]``, over what norms read and the inputs themselves (``i = 0``).

    ``m_i``, ``s_i`` are mean and deviation of each channel in each of the ``B`` samples, ``mu_i``, ``sigma_i`` what the norm keeps; for inputs
    0 and 1.

    Attributes:
        iterations: Steps of Adam on the samples.
        learning_rate: Adam's, at the start.
        patience: Steps without progress after which it falls to a tenth.
        min_learning_rate: Its least value.
        batch_size: Most samples that are optimized together; memory grows with it.
        start: First samples: uniform, near zero, as in the released program; or gaussian, as in the paper.
        input_mean, input_std: What the inputs of the network have after preprocessing, in each channel.
        input_weight: Weight of the term that holds the inputs to them.
    """

    trial = MappingProxyType({"iterations": 60})

    iterations: Annotated[int, AtLeast(1)] = 500
    learning_rate: Annotated[float, Above(0)] = 0.5
    patience: Annotated[int, AtLeast(0)] = 100
    min_learning_rate: Annotated[float, AtLeast(0)] = 1e-4
    batch_size: Annotated[int, AtLeast(1)] = 64
    start: Literal["uniform", "gaussian"] = "uniform"
    input_mean: Annotated[float, Finite()] = 0.0
    input_std: Annotated[float, AtLeast(0)] = 1.0
    input_weight: Annotated[float, AtLeast(0)] = 1.0

    def synthesize(self, problem: SynthesisProblem) -> Synthesized:
        return self.descend(problem, partial(self.loss, problem), self.first_inputs(problem))

    def first_inputs(self, problem: SynthesisProblem) -> Inputs:
        """Random inputs from which descent starts."""
        return problem.draw(small_uniform if self.start == "uniform" else normal)

    def descend(self, problem: SynthesisProblem, loss: Loss, start: Inputs) -> Synthesized:
        """Samples near ``start`` that minimize ``loss``, by the schedule of the hyper-parameters."""
        schedule = Schedule(self.iterations, self.learning_rate, self.patience, FACTOR, self.min_learning_rate, self.batch_size)
        facts = {"method": self.info.name, "source": source_digest(type(self)), "options": self.hyper_parameter_values()}
        return descend(problem, start, loss, schedule, facts)

    def loss(self, problem: SynthesisProblem, inputs: Inputs, places: range) -> Tensor:
        """The loss of the samples at ``places``."""
        return torch.stack([*self.norm_terms(problem, inputs, places), *self.input_terms(problem, inputs)]).sum()

    def norm_terms(self, problem: SynthesisProblem, inputs: Inputs, places: range) -> list[Tensor]:
        """For each norm in turn the distances of means and of deviations."""
        read = problem.statistics(inputs)
        return [term for one in read for term in (statistic_distance(one.kept.mean, one.mean), statistic_distance(one.kept.std, one.std))]

    def input_terms(self, problem: SynthesisProblem, inputs: Inputs) -> list[Tensor]:
        """The distances of the inputs' channels from the mean and the deviation that inputs have, weighted."""
        return [
            self.input_weight * statistic_distance(torch.full_like(values[0], target), values)
            for statistics in problem.input_statistics(inputs)
            for target, values in zip((self.input_mean, self.input_std), statistics, strict=True)
        ]


RELUS = frozenset({"relu", "relu6", "hardtanh", "clamp_min"})  # ReLU6 is a hardtanh in the dataflow


@register(
    MethodInfo(
        name="zeroq",
        title="ZeroQ: A Novel Zero Shot Quantization Framework",
        paper="Cai, Yao, Dong, Gholami, Mahoney, Keutzer, CVPR 2020",
        url="https://arxiv.org/abs/2001.00281",
        section="zero_shot",
        axes=("weight_quantizer", "activation_quantizer", "data"),
        kind="post_training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=(),
        fidelity="exact",
        summary="no data: ranges of weights as they are, of activations behind ReLUs on samples that it makes itself",
        evidence="weights, activations and ranges equal the authors' program",
        margin_db=-0.5,  # whole ranges, where the baseline takes those of least error
    )
)
@dataclass
class Zeroq(PostTrainingMethod):
    """Rounding between the smallest and the largest value: of each output channel of a weight, and of what ReLUs give over all samples.

    Without calibration data it makes its own. What no ReLU gives stays in float: the network's input, pooled features, sums without a ReLU.

    Attributes:
        weight_observer: Weights take the whole range that they have; ``min_max`` alone.
        activation_observer: How batches move the range of activations: minmax, their extremes; ema, the mean over samples of their extremes;
            perc, percentiles; mse, the upper end of least error in the last batch.
        percentile: Upper percentile of perc; the lower one is 100 minus it.
        placement: Where activations are quantized: relu, behind ReLUs, as in the paper; layers, what every layer, sum and pooling reads, as the
            other methods do, so that runtimes compute the whole network in integers.
        fold: Fold batch norms into the layers before them first; the paper leaves them as they are.
        synthesis: Synthesis method that makes samples where no calibration data are given.
        samples: How many.
        iterations: Its steps.
    """

    ends = "same"

    weight_observer: Literal["min_max"] = "min_max"
    activation_observer: RangeKind = "minmax"
    percentile: Annotated[float, Interval(50, 100)] = 99.999
    placement: Literal["relu", "layers"] = "relu"
    fold: bool = False
    synthesis: str = "zeroq"
    samples: Annotated[int, AtLeast(1)] = 64
    iterations: Annotated[int, AtLeast(1)] = 500

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return MinMaxWeightQuantizer(slot.bit_width, Granularity.parse(self.weight_granularity, slot.channel_axis))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return RunningRangeQuantizer(slot.bit_width, kind=self.activation_observer, percentile=self.percentile)

    def quantize(self, job: PtqJob) -> None:
        if job.activation_bits and job.calibration is None:
            job.calibration = self._synthesized(job)
        if self.fold:
            job.fold()
        placements = self._behind_relus(job)
        job.insert_weights(self.weight_quantizer)
        if placements is None:
            job.insert_activations(self)
        else:
            for placement in placements:
                job.place(placement, self.activation_quantizer(job.slot(placement)))
        self._calibrate(job)

    def _synthesized(self, job: PtqJob) -> Calibration:
        method = make_method(self.synthesis, "synthesis", {"iterations": self.iterations})
        assert isinstance(method, SynthesisMethod)
        problem = make_problem(job.model, job.sample, count=self.samples, seed=job.seed, progress=job.progress, work_dir=job.work_dir)
        made = method.synthesize(problem)
        job.table.note(f"activation ranges are those of {self.samples} samples that {self.synthesis} made; no data were used")
        return Calibration.of(made.inputs.to(problem.template.tensors[0].device))

    def _behind_relus(self, job: PtqJob) -> list[Placement] | None:
        """A place for each ReLU that is quantized; layers that read something else keep a float input. ``None`` where layers decide."""
        if self.placement == "layers" or not job.activation_bits:
            return None
        if job.graph is None:
            job.table.note(f"activations are quantized at layers, not behind ReLUs: {job.graph_error}")
            return None
        graph, merge_bits = job.graph, job.policy.merges if isinstance(job.policy.merges, int) else job.policy.default.activation
        found = place_at_tensors(graph, job.activation_bits, merge_bits=merge_bits)
        behind = [placement for placement in found if placement.tensor and graph[placement.tensor].op in RELUS]
        fed = {layer for placement in behind for layer in placement.layers}
        policy = job.policy
        for name in job.activation_bits:
            if name not in fed:
                policy = policy.with_rule(match=name, activation="float")
                job.remark(name, "its input stays in float, as no ReLU gives it")
        job.set_policy(policy)
        return behind

    @staticmethod
    def _calibrate(job: PtqJob) -> None:
        """Let every activation quantizer widen its range batch by batch, each on what the quantized network before it gives."""
        quantizers = list(insert.activation_quantizers(job.model).values())
        if not quantizers:
            return
        calibration = job.need_calibration("setting activation ranges")
        with job.progress.stage("activation ranges", total=calibration.samples) as stage, parametrize.cached(), evaluating(job.model):
            for quantizer in quantizers:
                quantizer.train()
            for inputs in calibration:
                job.model(*inputs.args, **inputs.kwargs)
                stage.advance(inputs.batch_size)
        job.model.eval()
