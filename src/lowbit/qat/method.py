"""What a trained method is: the quantizers it puts in, and what it does in the course of training.

Everything has a default, so that a method's file holds only what its paper changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from lowbit.network import insert
from lowbit.network.slot import Slot
from lowbit.qat.attach.job import QatJob, learned_scale
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Role
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo

if TYPE_CHECKING:
    from lowbit.qat.run import TrainRun


@dataclass
class TrainingMethod(ABC):
    """Trains a network with quantizers in it; the fields of a subclass are the paper's hyper-parameters.

    Attributes:
        quantizer_learning_rate: Learning rate of the quantizers' parameters as a fraction of the weights'.
        quantizer_weight_decay: L2 penalty on the quantizers' parameters.
    """

    info: ClassVar[MethodInfo]

    quantizer_learning_rate: float = 1.0
    quantizer_weight_decay: float = 0.0

    @abstractmethod
    def weight_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of a weight."""

    @abstractmethod
    def activation_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of a layer's input."""

    def output_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of a layer's output, where the policy asks for one."""
        return learned_scale(slot)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        """The quantizer of a tensor that meets others in a sum or a concatenation, comes from one, or is pooled; ``None``: it stays float.

        Tensors of one merge share a grid where the same quantizer is returned for them (``slot.operand_of`` names the merges).
        """
        return learned_scale(slot)

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        """A quantizer of the first or the last layer, where the policy makes an exception for them (``slot.purpose`` says of what)."""
        return learned_scale(slot)

    def attach(self, job: QatJob) -> None:
        """Put quantizers into ``job.model`` and initialize them; a subclass may change the network as well."""
        job.insert(self.weight_quantizer, self.activation_quantizer)
        job.initialize(self.initialize_layer)

    def initialize_layer(self, layer: nn.Module, x: Tensor) -> None:
        """Set up the quantizers of ``layer``, whose input in the first batch is ``x``."""
        weights, activations = insert.weight_quantizer(layer), insert.input_quantizer(layer)
        if weights is not None:
            weights.initialize(insert.float_weight(layer).detach())
        if activations is not None:
            activations.initialize(x.detach())

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        """The role of a parameter of the network; ``owner`` is the module that holds it.

        ``weights`` lie behind a quantizer, ``quantizers`` are a quantizer's or its surrogate's, all else are ``others``.
        """
        if name.endswith("parametrizations.weight.original"):
            return "weights"
        of_weight = "parametrizations.weight." in name and ".quantizer." in name
        return "quantizers" if of_weight or not {insert.INPUT, insert.OUTPUT}.isdisjoint(name.split(".")) else "others"

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        """An optimizer for each role."""
        quantizers = replace(
            recipe.optimizer,
            learning_rate=recipe.optimizer.learning_rate * self.quantizer_learning_rate,
            weight_decay=self.quantizer_weight_decay,
        )
        return {"weights": recipe.optimizer, "others": recipe.optimizer, "quantizers": quantizers}

    def phases(self, recipe: Recipe) -> list[Phase]:
        """The phases of training; one unless the paper has more."""
        return [Phase("train", recipe.epochs, self.optimizers(recipe), recipe.clip_norm)]

    def start_phase(self, run: TrainRun) -> None:
        """Called when a phase starts, before its optimizers are built."""

    def start_epoch(self, run: TrainRun) -> None:
        """Called before the first step of every epoch."""

    def before_step(self, run: TrainRun) -> None:
        """Called before the forward pass of every step."""

    def loss(self, run: TrainRun, batch: Batch) -> Tensor:
        """The loss of one batch: the task's, the teacher's, and the quantizers' penalties."""
        return run.task_loss(batch) + run.penalty()

    def after_backward(self, run: TrainRun) -> None:
        """Called when all gradients of a step are there, before they are clipped."""

    def after_step(self, run: TrainRun) -> None:
        """Called after the optimizers' step."""
