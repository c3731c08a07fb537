"""SP-Nets: one network with several precisions, the lower of which learn from the higher ones.

Paper: Guerra, Zhuang, Reid, Drummond 2020, "Switchable Precision Neural Networks", arXiv 2002.02815.
    Section 3 (switches with batch norms of their own, self-distillation), as far as its abstract and introduction tell.
    Yu, Li, Chen, Lai, et al. 2021, "Any-Precision Deep Neural Networks", for distillation from the next higher switch; Fu et al. 2021,
    "InstantNet", for that from all higher ones and the squared distance.
Symbols: s -> switch, lambda -> self_distillation, tau -> temperature, z_s -> output.
Differs from the paper:
    - No program of the authors is known. Weight of the distillation, temperature, and the choice of quantizers are those of related ones.
    - One bit of activations has the levels 0 and 1 where a layer's input is never negative, and -1 and 1 where it can be: networks with a
      hard tanh instead of a ReLU have the latter.
    - In a float switch weights and activations are those of the network as it was given.
    - Weights are not clipped to [-1, 1] after each step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.methods.quantization_aware.dorefa import Dorefa
from lowbit.methods.quantizer_design.lq_nets import LqNets
from lowbit.methods.quantizer_design.lsq import Lsq
from lowbit.methods.quantizer_design.pact import Pact
from lowbit.network.bits import switches_of
from lowbit.network.layers import WEIGHT
from lowbit.options import Above, AtLeast, Interval
from lowbit.qat import AdaptiveMethod, Classification, OptimizerSpec, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.task import Batch, Output, Task
from lowbit.quantizers import Quantizer
from lowbit.quantizers.switchable import for_widths
from lowbit.registry import MethodInfo, register
from lowbit.spec import LayerBits

QUANTIZERS: dict[str, Callable[[], TrainingMethod]] = {
    "dorefa": Dorefa,
    "pact": partial(Pact, clip_init="least_error"),
    "lsq": Lsq,
    "lq_nets": LqNets,
}


def soft_cross_entropy(logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """``-T**2 mean(sum(softmax(teacher / T) log softmax(logits / T)))``: the divergence from the teacher plus the teacher's entropy.

    Args:
        logits, teacher_logits: ``[N, classes, ...]``; the teacher's get no gradient.
        temperature: ``T``, positive.

    Source: Any-Precision, section 3.3, at ``T = 1``.

        >>> soft_cross_entropy(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 1.0]]))
        tensor(0.6931)
    """
    target = functional.softmax(teacher_logits.detach() / temperature, 1)
    return functional.cross_entropy(logits / temperature, target) * temperature**2


@register(
    MethodInfo(
        name="sp_nets",
        title="Switchable Precision Neural Networks",
        paper="Guerra, Zhuang, Reid, Drummond 2020",
        url="https://arxiv.org/abs/2002.02815",
        section="adaptive",
        axes=("procedure",),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="partial",
        summary="one network for several precisions, with norms of each; the lower ones learn from the higher",
        evidence="checked against related programs (Any-Precision, a co-author's DoReFa); no program of the authors is known",
        margin_points=60,
    )
)
@dataclass
class SpNets(AdaptiveMethod):
    """Switches between precisions of one network; weights are shared, quantizers and norms are each switch's own.

    Attributes:
        quantizer: Whose quantizers: ``dorefa`` (fixed grids), ``pact`` (learned clips), ``lsq`` (learned step sizes) or ``lq_nets``
            (learned levels).
        self_distillation: Weight of the higher switches' outputs in the loss of a lower one; the rest is the targets'.
        temperature: Temperature of the softmax of these outputs.
        distance: Distance from these outputs: ``kl`` (the task's, which is the divergence for classes), ``cross_entropy`` (the same
            gradients for classes) or ``mse``.
        teacher_switch: Which switch teaches: the ``highest``, the one above (``previous``), or ``all_higher`` on average.
        switch_sampling: Switches of a step: ``all``, the highest and the lowest and ``random_switches`` between them (``sandwich``),
            or the highest and ``random_switches`` others (``random``).
        random_switches: Number of switches that are drawn.
    """

    ends = "float"

    quantizer: Literal["dorefa", "pact", "lsq", "lq_nets"] = "dorefa"
    self_distillation: Annotated[float, Interval(0, 1)] = 1.0
    temperature: Annotated[float, Above(0)] = 1.0
    distance: Literal["kl", "cross_entropy", "mse"] = "kl"
    teacher_switch: Literal["highest", "previous", "all_higher"] = "highest"
    switch_sampling: Literal["all", "sandwich", "random"] = "all"
    random_switches: Annotated[int, AtLeast(1)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.base = QUANTIZERS[self.quantizer]()

    def default_recipe(self) -> Recipe:
        """ResNet-18 on ImageNet as is usual; the paper's is not known."""
        return Recipe(90, 256, OptimizerSpec(learning_rate=0.1, weight_decay=1e-4, schedule="step", milestones=(1 / 3, 2 / 3)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        widths = slot.widths or (slot.bit_width,)
        return for_widths(widths, lambda bits: self.base.weight_quantizer(dataclasses.replace(slot, bit_width=bits, widths=())))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        widths = slot.widths or (slot.bit_width,)
        return for_widths(widths, lambda bits: self.base.activation_quantizer(dataclasses.replace(slot, bit_width=bits, widths=())))

    def initialize_layer(self, layer: nn.Module, x: Tensor | None, parameter: str = WEIGHT) -> None:
        self.base.initialize_layer(layer, x, parameter)

    def training_switches(self, run: TrainRun) -> Iterable[LayerBits]:
        switches = switches_of(run.model)
        if self.switch_sampling == "all":
            return switches
        always = {0, len(switches) - 1} if self.switch_sampling == "sandwich" else {0}
        others = [place for place in range(len(switches)) if place not in always]
        drawn = torch.randperm(len(others), generator=run.generator)[: self.random_switches]
        return [switches[place] for place in sorted(always.union(others[index] for index in drawn.tolist()))]

    def switch_loss(self, run: TrainRun, batch: Batch, output: Output, switch: LayerBits, higher: dict[LayerBits, Output]) -> Tensor:
        """``(1 - lambda) task + lambda distance`` for all but the highest switch."""
        weight = self.self_distillation if higher else 0.0
        hard = run.loss_of(output, batch) if weight < 1 else None
        if weight == 0 and hard is not None:
            return hard
        outputs = list(higher.values())
        teachers = {"highest": outputs[:1], "previous": outputs[-1:], "all_higher": outputs}[self.teacher_switch]
        soft = torch.stack([self._distance(run, output, teacher) for teacher in teachers]).mean()
        return weight * soft if hard is None else (1 - weight) * hard + weight * soft

    def _distance(self, run: TrainRun, output: Output, teacher: Output) -> Tensor:
        if self.distance == "kl":
            return run.task.with_temperature(self.temperature).distillation_loss(output, teacher)
        if self.distance == "mse":
            return Task.distillation_loss(run.task, output, teacher)
        if not isinstance(run.task, Classification):
            raise SpecError(f"distance='cross_entropy' compares classes, and the task is {type(run.task).__name__}. Choose 'kl' or 'mse'.")
        return soft_cross_entropy(run.task.output_in(output), run.task.output_in(teacher), self.temperature)

    def after_step(self, run: TrainRun) -> None:
        self.base.after_step(run)
