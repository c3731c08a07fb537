"""ZeroQ: samples whose features have the statistics that batch norms keep from training.

Paper: Cai, Yao, Dong, Gholami, Mahoney, Keutzer 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR. Section 3.1, Eq. 3 (distilled
    data).
Symbols: mu_i, sigma_i -> kept.mean, kept.std; mu~_i, sigma~_i -> mean, std of a ChannelStatistics; x^r -> inputs.
Differs from the paper:
    - Statistics are those of each sample, as in the released program, and their squared distances are summed over channels and averaged over
      samples. The paper's are those of the batch.
    - They are taken of what norms read, so that it does not matter where a norm stands; in the released program of the i-th convolution's
      output for the i-th norm. Where a norm follows its convolution, both are the same.
    - Where a norm reads one value per channel and sample, statistics are those of the batch: a sample has none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.inputs import Inputs
from lowbit.options import Above, AtLeast, Finite
from lowbit.plugins import source_digest
from lowbit.registry import MethodInfo, register
from lowbit.synthesis.descent import Loss, Schedule, descend
from lowbit.synthesis.problem import SynthesisMethod, SynthesisProblem, Synthesized, normal

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
