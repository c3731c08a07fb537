"""HAWQ's retraining: layers are quantized one after the other, those that the loss feels most first, each trained before the next.

Paper: Dong, Yao, Gholami, Mahoney, Keutzer 2019, "HAWQ: Hessian AWare Quantization of Neural Networks With Mixed-Precision", ICCV.
    Section 3.4, the order of Omega (Eq. 7).
Symbols: Omega_i -> the order of the policy, which the search ``hawq`` finds.
Differs from the paper:
    - A block is one layer. Layers that the order does not name, such as the first and the last one, are quantized from the start.
    - The paper does not say how long each phase is. Here all layers but the last one get the same number of epochs, and the whole network
      ``last_share`` of them; where there are fewer epochs than layers, several are quantized at once.
    - Where no order is given, that of ``||Q(W) - W||^2`` is taken: Omega with the same eigenvalue everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lowbit.methods.mixed_precision.hawq_quantizers import HawqActivation, HawqWeight
from lowbit.network.bits import get_bits, quantize_only
from lowbit.network.insert import WeightSite, quantized_weights
from lowbit.options import Interval
from lowbit.qat import OptimizerSpec, Phase, Procedure, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity

LAST = "all layers"


def squared_error(site: WeightSite) -> float:
    """``||Q(W) - W||^2`` of a weight with its quantizer, added up in float64. Source: the second factor of Omega, Eq. 7."""
    weight = site.original.detach()
    assert site.quantizer is not None
    return float((site.quantizer.encode(weight).decode().double() - weight.double()).square().sum())


@dataclass
class HawqQuantizers(TrainingMethod):
    """Weights scaled by the largest magnitude of their channel, activations by a running range.

    Attributes:
        momentum: How much of an activation's range stays with each batch; -1: the smallest and largest value so far.
    """

    momentum: Annotated[float, Interval(-1, 1)] = 0.95

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return HawqWeight(slot.bit_width, granularity=Granularity.channel(slot.channel_axis))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return HawqActivation(slot.bit_width, is_signed=slot.is_signed, momentum=self.momentum)


@register(
    MethodInfo(
        name="hawq",
        title="HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision",
        paper="Dong, Yao, Gholami, Mahoney, Keutzer, ICCV 2019",
        url="https://arxiv.org/abs/1905.03696",
        section="mixed_precision",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(2, 9),
        needs=("labels", "pretrained"),
        fidelity="equations",
        summary="layers quantized one after the other, in the order of a policy that the search found",
        evidence="quantizers are checked against the authors' code, which does not hold the retraining",
        margin_points=5,
    )
)
@dataclass
class HawqRetraining(Procedure):
    """A phase for each layer of the policy's order, quantized from then on, and one for the whole network.

    Source: section 3.4.

    Attributes:
        last_share: Share of the epochs in which all layers are quantized.
    """

    quantizers = HawqQuantizers

    last_share: Annotated[float, Interval(0, 1, closed="right")] = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.order: tuple[str, ...] = ()

    def default_recipe(self) -> Recipe:
        """The authors' later defaults on ImageNet."""
        return Recipe(90, 128, OptimizerSpec(learning_rate=1e-4, weight_decay=1e-4, schedule="step", milestones=(1 / 3, 2 / 3)))

    def attach(self, job: QatJob) -> None:
        super().attach(job)
        self.order = tuple(name for name in job.policy.order if name in job.weights)
        if not self.order:
            errors = {name: squared_error(site) for name, site in job.weights.items() if not job.is_excepted(name)}
            self.order = tuple(sorted(errors, key=lambda name: -errors[name]))
            job.table.note(
                "the policy has no order of retraining: layers are quantized in that of the squared errors of their weights. lowbit.search with "
                "method 'hawq' finds the order by the Hessian"
            )

    def phases(self, recipe: Recipe) -> list[Phase]:
        """One for each layer but the last, and one for all."""
        earlier = self.order[:-1]
        share = (1 - self.last_share) / max(len(earlier), 1)
        return self.split(recipe, {**{name: share for name in earlier if share}, LAST: self.last_share})

    def start_phase(self, run: TrainRun) -> None:
        """Quantize the layer of the phase, and those whose own phase had no epoch."""
        super().start_phase(run)
        before = get_bits(run.model)
        waiting = () if run.phase.name == LAST else self.order[self.order.index(run.phase.name) + 1 :]
        quantize_only(run.model, set(before).difference(waiting))
        for name, site in quantized_weights(run.model).items():
            if before[name].weight is None and name not in waiting:
                self.initialize_layer(site.layer, None, site.parameter)  # it has learned in float since
