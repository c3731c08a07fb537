"""The base class of training methods: the quantizers they insert, and what they do during training.

Everything has a default, so that a method's file holds only what its paper changes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from lowbit.network import insert
from lowbit.network.layers import NORMS, WEIGHT
from lowbit.network.slot import Slot
from lowbit.options import AtLeast, Method
from lowbit.qat.attach.job import QatJob, learned_scale
from lowbit.qat.networks import Companion, GivenNetworks
from lowbit.qat.recipe import OptimizerSpec, Phase, Recipe, Role
from lowbit.qat.run import TrainRun
from lowbit.qat.task import Batch, Scores
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo, list_methods

Measure = Callable[[], Scores]  # the task's metrics of the network as it is


@dataclass
class TrainingMethod(Method, ABC):
    """Trains a network with quantizers in it; the fields of a subclass are the paper's hyper-parameters.

    Attributes:
        quantizer_learning_rate: Learning rate of the quantizers' parameters as a fraction of the weights'.
        quantizer_weight_decay: L2 penalty on the quantizers' parameters.

    Example:
        >>> import torch, lowbit
        >>> from lowbit.quantizers import BinaryQuantizer, LearnedScaleQuantizer
        >>> info = lowbit.MethodInfo(
        ...     name="signs", title="Binary weights", paper="none", section="other", axes=("weight_quantizer",), kind="training",
        ...     weight_bits=range(1, 2), activation_bits=range(1, 9), needs=("labels",), fidelity="unverified", summary="signs of weights",
        ... )
        >>> @lowbit.register(info)
        ... class Signs(lowbit.TrainingMethod):
        ...     def weight_quantizer(self, slot):
        ...         return BinaryQuantizer(granularity=lowbit.Granularity.channel(slot.channel_axis))
        ...     def activation_quantizer(self, slot):
        ...         return LearnedScaleQuantizer(slot.bit_width, signed=slot.is_signed, is_batched=True)
        >>> policy = lowbit.BitPolicy.uniform(1, 4, first_last=None)
        >>> model = lowbit.prepare(torch.nn.Linear(4, 2), method=Signs, policy=policy, sample=torch.rand(8, 4))
        >>> model.weight[0].abs().unique().numel()
        1
    """

    switching: ClassVar[Literal["network", "layer"] | None] = None  # whether it trains several widths, of the network or of each layer

    allows_procedure: ClassVar[bool] = True  # whether its quantizers can be trained by another procedure than its own

    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 1.0
    quantizer_weight_decay: Annotated[float, AtLeast(0)] = 0.0

    def default_recipe(self) -> Recipe:
        """Recipe of the paper, which users select with ``recipe="paper"``; by default the library's default recipe."""
        return Recipe()

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

    def initialize_layer(self, layer: nn.Module, x: Tensor | None, parameter: str = WEIGHT) -> None:
        """Set up the quantizers of ``layer``, whose input in the first batch is ``x``; ``None`` where only its weight is used.

        ``parameter`` names the weight of a layer that has several.
        """
        weights, activations = insert.weight_quantizer(layer, parameter), insert.input_quantizer(layer)
        if weights is not None:
            weights.initialize(insert.float_weight(layer, parameter).detach())
        if activations is not None and x is not None:
            activations.initialize(x.detach())

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        """The role of a parameter of the network; ``owner`` is the module that holds it.

        ``weights`` lie behind a quantizer, ``quantizers`` are a quantizer's or its surrogate's, all else are ``others``, and
        ``others.norms`` where a norm holds them.
        """
        if isinstance(owner, ParametrizationList) and any(isinstance(part, insert.WeightParametrization) for part in owner):
            return "weights"
        if isinstance(owner, NORMS):  # one that a weight's quantizer folds into its layer as well
            return "others.norms"
        of_weight = "parametrizations." in name and ".quantizer." in name
        if of_weight or not {insert.INPUT, insert.OUTPUT}.isdisjoint(name.split(".")):
            return "quantizers"
        return "others"

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

    def generated_steps(self) -> int | None:
        """Steps of an epoch of a method that makes its own samples and is trained without data; ``None``: it is trained on data.

        Its batches only say how many samples to make: any with ``lowbit.inputs.sample_count(batch)`` samples.
        """
        return None

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        """Companion networks of the prepared ``model``; by default the user's teacher, unchanged.

        Called when a run is made, with torch's random numbers at the recipe's seed.
        """
        return {} if given.teacher is None else {"teacher": Companion(given.teacher, is_saved=False)}

    def start_phase(self, run: TrainRun) -> None:
        """Called when a phase starts, before its optimizers are built."""

    def start_epoch(self, run: TrainRun) -> None:
        """Called before the first step of every epoch."""

    def before_step(self, run: TrainRun) -> None:
        """Called before the first forward pass of every step, and of every turn where a step has several."""

    def loss(self, run: TrainRun, batch: Batch) -> Tensor:
        """The loss of one batch: the task's, the teacher's, and the quantizers' penalties."""
        return run.task_loss(batch) + run.penalty()

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """The losses of one batch in the turn ``run.turn``, for methods with several passes; the default is ``loss`` alone.

        Yield one after the other: each is followed by its backward pass, and gradients add up.
        """
        yield self.loss(run, batch)

    @property
    def has_own_loss(self) -> bool:
        """Whether it is trained on another loss than the task's, the teacher's and the penalties, so that loops have to ask it for that."""
        return type(self).loss is not TrainingMethod.loss or type(self).losses is not TrainingMethod.losses

    def after_backward(self, run: TrainRun) -> None:
        """Called when all gradients of a step are there, before they are clipped."""

    def after_step(self, run: TrainRun) -> None:
        """Called after the optimizers' step."""

    def evaluate(self, run: TrainRun, measure: Measure) -> Scores:
        """The metrics at the end of an epoch, with the network in evaluation mode; a network of several widths measures each of them."""
        return measure()


def without_data() -> str:
    """What does without training data, in words."""
    names = [info.name for info in list_methods(kind="training") if generates_samples(info)]
    return f"choose a method that makes its own samples ({', '.join(names)})" if names else "quantize without training"


def generates_samples(info: MethodInfo) -> bool:
    """Whether a training method makes its own samples."""
    return getattr(info.method, "generated_steps", TrainingMethod.generated_steps) is not TrainingMethod.generated_steps
