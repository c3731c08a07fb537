"""ZeroQ, mixed precision: bits from the divergence that each layer's quantization causes at the network's output.

Paper: Cai, Yao, Dong, Gholami, Mahoney, Keutzer 2020, "ZeroQ: A Novel Zero Shot Quantization Framework", CVPR. Section 3.3 (sensitivity,
    Eq. 5; Pareto frontier); the quantizer is that of the released program.
Symbols: Omega_i(k) -> sensitivity, k -> bit_width, P_i k_i -> cost; those of the quantizer are in lowbit.quantizers.running_range.
Differs from the paper:
    - The samples are those that the user gives (distilled data, as in the paper, or real ones).
    - The best setting within the budget is found exactly, by integer programming, under several limits at once. The frontier is exact while it
      has no more than 2**14 parts; the paper's program bins sizes and merges groups of layers, and was never released.
    - The budget can be any cost, not only the size.
    - Where layers may have several activation widths, what they read is quantized with the weight, over the range of all samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from torch import Tensor

from lowbit.assignment.activations import searched_inputs
from lowbit.assignment.additive import choose
from lowbit.assignment.costs import Assignment
from lowbit.assignment.parallel import LossOf, table
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem
from lowbit.errors import SpecError
from lowbit.measure.sensitivity import (
    Distance,
    LossIncrease,
    QuantizedLayer,
    SensitivityMeter,
    softmax_divergence,
    squared_error,
)
from lowbit.network.insert import WeightSite
from lowbit.options import AtLeast
from lowbit.qat.tasks import MultiLabel, Regression
from lowbit.quantizers.running_range import MinMaxWeightQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity, LayerBits

DistanceKind = Literal["kl", "mse", "loss"]


def quantized_weight(site: WeightSite, bit_width: int | None) -> Tensor | None:
    """The weight of ``site`` after quantization; ``None`` where it stays in float."""
    if bit_width is None:
        return None
    return MinMaxWeightQuantizer(bit_width, Granularity.channel(site.channel_axis))(site.original.detach())


def sensitivity(problem: SearchProblem, distance: DistanceKind) -> LossOf:
    """``Omega``: the distance between the outputs of the float network and of the one with some layers quantized, on average over samples."""
    input_at = searched_inputs(problem)
    meter = SensitivityMeter(problem.model, problem.batches, _distance(problem, distance), problem.task.predict)

    def layer(name: str, bits: LayerBits) -> QuantizedLayer:
        return QuantizedLayer(quantized_weight(problem.layers[name], bits.weight), input_at(name, bits))

    def omega(assignment: Assignment) -> float:
        return meter.of({name: layer(name, bits) for name, bits in assignment.items()})

    return omega


def _distance(problem: SearchProblem, kind: DistanceKind) -> Distance:
    distances: dict[DistanceKind, Distance] = {"kl": softmax_divergence, "mse": squared_error, "loss": LossIncrease(problem.loss)}
    return distances[kind]


@register(
    MethodInfo(
        name="zeroq_pareto",
        title="ZeroQ: A Novel Zero Shot Quantization Framework (mixed precision)",
        paper="Cai, Yao, Dong, Gholami, Mahoney, Keutzer, CVPR 2020",
        url="https://arxiv.org/abs/2001.00281",
        section="mixed_precision",
        axes=("assignment",),
        kind="search",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="equations",
        summary="weighs what each layer's quantization changes at the network's output against its cost, exactly",
        evidence="its quantizer equals the authors' program; their search was never released, so the frontier follows the paper",
    )
)
@dataclass
class ZeroqPareto(SearchMethod):
    """``min_b sum_i Omega_i(b_i)`` within the budget, ``Omega_i(k) = 1/N sum_j KL(M(x_j) || M(x_j) with layer i alone at k bits)``.

    Attributes:
        distance: How outputs are compared: ``kl``, the divergence of softmax outputs, which are the classes' probabilities (the paper's);
            ``mse``, the mean squared difference, for networks whose outputs are no logits of classes; ``loss``, the task's loss increase, with
            labels.
        options: Most options of the frontier that are given, evenly spread over all of them.
    """

    distance: DistanceKind = "kl"
    options: Annotated[int, AtLeast(2)] = 100

    def search(self, problem: SearchProblem) -> Found:
        problem.need_batches(self.info.name)
        if self.distance == "loss":
            problem.need_labels(f"{self.info.name} with distance='loss'")
        if self.distance == "kl" and isinstance(problem.task, (Regression, MultiLabel)):
            raise SpecError(
                f"{self.info.name}: distance='kl' compares probabilities of classes, and a network for {type(problem.task).__name__} gives none. "
                "Pass distance='mse', or distance='loss' with labels."
            )
        prepare = partial(sensitivity, distance=self.distance)
        found = table(problem, prepare, name="zeroq sensitivity", facts={"distance": self.distance})
        return choose(problem, found, options=self.options)
