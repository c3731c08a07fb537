"""FP auxiliary: a float side branch with a classifier of its own, which gives low-bit layers a second gradient and is left out in the end.

Paper: Zhuang, Liu, Tan, Shen, Reid 2020, "Training Quantized Neural Networks with a Full-precision Auxiliary Module", CVPR,
    arXiv 1903.11236. Section 3 (auxiliary module, joint training); stages, heads and the stream as in the authors' code.
Symbols: phi_p -> AuxiliaryBlock.adaptor, D_p -> AuxiliaryBlock.resample, o_p -> feature, g_p -> stream, F -> the network,
    lambda -> auxiliary_weight, k -> bit_width.
Differs from the paper:
    - The clip to [0, 1] sits at the inputs of layers and not in place of the ReLUs, so that shortcuts carry what was not clipped; where an
      input can be negative it goes from -1 to 1.
    - Blocks are those of any network: the sums at the ends of residual blocks, and where there is no shortcut each layer whose output, behind
      its norm, goes into an activation function. The first of them is the stem.
    - Where the sizes of two blocks are not those of a strided 1x1 convolution, the stream takes the nearest positions.
    - Both stages train with the recipe's optimizer; in the authors' code the float one has SGD, the quantized one Adam.
    - In the first stage nothing is clipped; the authors' code has ReLU6 there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import ceil
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import GraphError, LoopError, SpecError
from lowbit.methods.quantization_aware.dorefa import Dorefa, DorefaActivation
from lowbit.network.bits import lower_bits
from lowbit.network.graph.dataflow import Dataflow, Node, capture
from lowbit.network.graph.trunk import ACTIVATIONS, before_activations, channel_axis
from lowbit.network.layers import CONVOLUTIONS
from lowbit.network.taps import Tap, tapped, taps_of
from lowbit.options import AtLeast, Interval
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Phase, Procedure, QatJob, Recipe, Slot, TrainRun
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.quantizers.base import disabled
from lowbit.quantizers.grid import Grid
from lowbit.registry import MethodInfo, register
from lowbit.spec import LayerBits

AUXILIARY = "auxiliary"
FLOAT, QUANTIZED = "float", "quantized"
ActivationRange = Literal["paper", "range6_code"]


class Range6Activation(DorefaActivation):
    """``round(n clip(x, 0, 6)) / n`` with ``n = 2**k - 1``, as in the authors' code: ``6 n + 1`` levels, which are more than ``2**k``.

    Backward: 1 where ``x`` is inside the clip, bounds included, else 0.
    """

    bit_widths = range(1, 6)  # the largest code, 6 n, fits a byte

    def __init__(self, bit_width: int) -> None:
        if bit_width not in self.bit_widths:
            raise SpecError(
                f"fp_auxiliary: activation_range 'range6_code' has 1 to 5 bits, got {bit_width}: its codes would not fit a byte. "
                "Choose activation_range='paper'."
            )
        super().__init__(bit_width)

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 6 * (2**bit_width - 1)

    def grid(self, x: Tensor) -> Grid:
        zero, step, top = (x.new_tensor(value, dtype=torch.float32) for value in (0.0, 6 / self.qmax, 6.0))
        return Grid(zero, step, step, zero, (zero, top))


@dataclass
class FpAuxiliaryQuantizers(Dorefa):
    """The quantizers of DoReFa-Net.

    Attributes:
        activation_range: Clip of activations: ``paper``: from 0 to 1; ``range6_code``: from 0 to 6 in steps of the same size, as in the authors'
            code, which takes more levels than there are bits.
    """

    activation_range: ActivationRange = "paper"

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        if self.activation_range == "range6_code" and not slot.is_signed:
            return Range6Activation(slot.bit_width)
        return super().activation_quantizer(slot)

    def attach(self, job: QatJob) -> None:
        super().attach(job)
        if any(isinstance(quantizer, Range6Activation) for _, quantizer in job.inserted):
            job.table.note("activations of 'range6_code' have 6 (2**k - 1) + 1 levels, which take more than the k bits that are named")


@dataclass(frozen=True)
class Place:
    """A tensor of the network that the auxiliary module reads, before its activation.

    Attributes:
        taps: What is tapped; the tensor is its sum.
        channel_axis: The dimension over channels.
        pool: Name of torch's function and arguments of the max pooling that follows the activation, before anything else reads it.
        shape: Channels, then sizes, of what is read for one sample of those that the network was prepared with, behind the pooling.
    """

    taps: tuple[Tap, ...]
    channel_axis: int
    shape: tuple[int, ...]
    pool: tuple[str, tuple[object, ...]] | None = None

    def read(self, features: Mapping[Tap, Tensor]) -> Tensor:
        """The tensor with its channels in dimension 1, pooled as the network pools what comes from it: max pooling and an activation that only rises commute.

        Raises:
            LoopError: The network did not run a module that it ran when it was prepared.
        """
        for tap in self.taps:
            if tap not in features:
                raise LoopError(
                    f"fp_auxiliary: the network has not run {tap.module!r} in this step as it did when it was prepared. The auxiliary module "
                    "needs a network that takes the same way in every step."
                )
        first, *others = (features[tap] for tap in self.taps)
        x = sum(others, start=first).movedim(self.channel_axis, 1)
        if self.pool is None:
            return x
        pooled: Tensor = getattr(torch, self.pool[0])(x, *self.pool[1])
        return pooled


def find_places(flow: Dataflow, batch_size: int) -> list[Place]:
    """What the auxiliary module reads of a network: the ends of its blocks, before their activations."""
    found = []
    for node in before_activations(flow):
        taps, axis = taps_of(flow, node), channel_axis(flow, node)
        if not taps or axis is None or not 2 <= len(node.shape) <= 5 or node.shape[0] != batch_size:
            continue
        pool = _pool_behind(flow, node) if axis == 1 else None
        behind = node if pool is None else pool
        shape = (behind.shape[axis], *(size for dim, size in enumerate(behind.shape) if dim not in (0, axis)))
        found.append(Place(taps, axis, shape, None if pool is None else (pool.op, pool.arguments[1:])))
    return found


def _pool_behind(flow: Dataflow, node: Node) -> Node | None:
    """The max pooling that alone reads what an activation function makes of the tensor."""
    for _ in range(2):
        readers = flow.consumers(node)
        if len(readers) != 1 or not (readers[0].op in ACTIVATIONS or readers[0].op.startswith("max_pool")):
            return None
        node = readers[0]
    return node if node.op.startswith("max_pool") and node.op[-1] == "d" else None


_NORMS = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # by the number of dimensions behind the channels


def pointwise(in_channels: int, out_channels: int, strides: Sequence[int]) -> nn.Sequential:
    """A 1x1 convolution without bias, and its batch norm; a stride for each dimension behind the channels.

    The weight starts normal with variance ``2 / out_channels`` (Kaiming, fan-out).
    """
    if strides:
        convolution = CONVOLUTIONS[len(strides) - 1]
        layer: nn.Module = convolution(in_channels, out_channels, 1, tuple(strides), bias=False)  # type: ignore[arg-type]
    else:
        layer = nn.Linear(in_channels, out_channels, bias=False)
    nn.init.kaiming_normal_(layer.get_parameter("weight"), mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, _NORMS[len(strides)](out_channels))


def stride_between(before: int, after: int) -> int:
    """The stride with which a 1x1 convolution makes ``after`` positions of ``before``, 1 where there is none.

    >>> stride_between(8, 4), stride_between(7, 4), stride_between(8, 6), stride_between(4, 8)
    (2, 2, 1, 1)
    """
    stride = ceil(before / after)
    return stride if ceil(before / stride) == after else 1


class AuxiliaryBlock(nn.Module):
    """``ReLU(D(stream) + phi(feature))``: the float stream past one block of the network.

    ``phi`` is a 1x1 convolution with a batch norm. ``D`` is the identity where the shapes are the same, else a 1x1 convolution with the
    block's stride and a batch norm; where that does not lead to the size of the feature, the nearest of its positions count. A stream
    with other dimensions than the feature is averaged over its positions first. Source: section 3, and the authors' code.

    Args:
        before: Channels and sizes of the stream.
        shape: Channels and sizes of the feature, and so of the stream behind it.
    """

    def __init__(self, before: Sequence[int], shape: Sequence[int]) -> None:
        super().__init__()
        self.adaptor = pointwise(shape[0], shape[0], [1] * len(shape[1:]))
        self.resample: nn.Module = nn.Identity()
        if tuple(before) != tuple(shape):
            are_alike = len(before) == len(shape)
            strides = [stride_between(a, b) for a, b in zip(before[1:], shape[1:], strict=True)] if are_alike else [1] * len(shape[1:])
            self.resample = pointwise(before[0], shape[0], strides)

    def forward(self, stream: Tensor, feature: Tensor) -> Tensor:
        if stream.dim() != feature.dim():
            stream = averaged(stream).reshape(*stream.shape[:2], *[1] * (feature.dim() - 2))
        stream = self.resample(stream)
        if stream.shape[2:] != feature.shape[2:]:
            stream = functional.interpolate(stream, feature.shape[2:])
        return functional.relu(stream + self.adaptor(feature))


def averaged(x: Tensor) -> Tensor:
    """The mean over all positions: ``[N, C]`` of ``[N, C, ...]``."""
    return x.flatten(2).mean(2) if x.dim() > 2 else x


class Auxiliary(nn.Module):
    """The auxiliary module: a float stream that gathers the ends of the network's blocks, and a classifier.

    ``g_0 = phi_0(o_0)``, ``g_p = ReLU(D_p(g_{p-1}) + phi_p(o_p))``; the output is a linear layer of the mean of ``g_P`` over positions.

    Args:
        places: What it reads, in the order in which the network computes it; the first is the stem.
        outputs: Outputs of the classifier.
    """

    def __init__(self, places: Sequence[Place], outputs: int) -> None:
        super().__init__()
        self.places = tuple(places)
        shapes = [place.shape for place in places]
        self.stem = pointwise(shapes[0][0], shapes[0][0], [1] * len(shapes[0][1:]))
        self.blocks = nn.ModuleList(AuxiliaryBlock(*pair) for pair in pairwise(shapes))
        self.head = nn.Linear(shapes[-1][0], outputs)

    @property
    def taps(self) -> list[Tap]:
        """Everything that it reads, each once."""
        return list(dict.fromkeys(tap for place in self.places for tap in place.taps))

    def forward(self, features: Mapping[Tap, Tensor]) -> Tensor:
        """The classifier's output ``[N, outputs]`` for what was tapped in a pass of the network."""
        first, *others = (place.read(features) for place in self.places)
        stream = self.stem(first)
        for block, feature in zip(self.blocks, others, strict=True):
            stream = block(stream, feature)
        output: Tensor = self.head(averaged(stream))
        return output


@register(
    MethodInfo(
        name="fp_auxiliary",
        title="Training Quantized Neural Networks with a Full-precision Auxiliary Module",
        paper="Zhuang, Liu, Tan, Shen, Reid, CVPR 2020",
        url="https://arxiv.org/abs/1903.11236",
        section="training",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "graph", "pretrained"),
        fidelity="partial",
        summary="a float side branch with a classifier of its own, which sends low-bit layers a second gradient; on DoReFa's quantizers",
        evidence="quantizers, blocks, stream and joint loss checked against the authors' code; clips sit at layers' inputs, one optimizer for both stages",
        margin_points=55,
    )
)
@dataclass
class FpAuxiliary(Procedure):
    """Joint training with an auxiliary module, in float first, then with quantizers.

    The module is a companion of the run: the network, its copies and its files hold nothing of it.

    Attributes:
        auxiliary_weight: Weight of the loss of the auxiliary classifier.
        pretrain_share: Share of the epochs in which network and auxiliary module learn in float. Learning rates start again behind it.
    """

    quantizers = FpAuxiliaryQuantizers

    auxiliary_weight: Annotated[float, AtLeast(0)] = 1.0
    pretrain_share: Annotated[float, Interval(0, 1, closed="left")] = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.places: list[Place] = []
        self.outputs = 0  # of the network

    def default_recipe(self) -> Recipe:
        """ImageNet: 20 epochs in float and 30 with quantizers, with the optimizer of the second stage."""
        spec = OptimizerSpec("adam", 1e-3, weight_decay=0.0, schedule="step", milestones=(0.5, 5 / 6))
        return Recipe(50, 256, spec)

    def phases(self, recipe: Recipe) -> list[Phase]:
        parts = self.split(recipe, {FLOAT: self.pretrain_share, QUANTIZED: 1 - self.pretrain_share}, restart=True)
        return [replace(phase, optimizers={**phase.optimizers, AUXILIARY: recipe.optimizer}) for phase in parts]

    def attach(self, job: QatJob) -> None:
        super().attach(job)
        with disabled(quantizer for _, quantizer in job.inserted):
            try:
                flow = capture(job.model, job.sample)
            except GraphError as error:
                raise GraphError(f"fp_auxiliary looks for the blocks of the network in its dataflow: {error}") from error
        self.outputs = _outputs(flow, job.sample.batch_size)
        self.places = find_places(flow, job.sample.batch_size)
        if len(self.places) < 2:
            raise SpecError(
                f"fp_auxiliary: {type(job.model).__name__} has {len(self.places)} places for an auxiliary module, and 2 or more are needed: a first "
                "layer and a block. These are sums of two tensors, and what layers give to activation functions, with no way around them. Choose "
                "another method, or procedure."
            )
        names = (" + ".join(f"{tap.side} of {tap.module}" for tap in place.taps) for place in self.places)
        job.table.note(f"the auxiliary module reads, in training alone, {', '.join(names)}")

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        auxiliary = Auxiliary(self.places, self.outputs).to(next(model.parameters()).dtype)
        return {**super().companions(model, given), AUXILIARY: Companion(auxiliary)}

    def start_phase(self, run: TrainRun) -> None:
        super().start_phase(run)
        is_float = run.phase.name == FLOAT
        lower_bits(run.model, LayerBits(None, None) if is_float else LayerBits(1, 1))
        if not is_float and run.phase_index > 0:
            self.initialize_weights(run.model)

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """Those of the base, each with the task's loss of the auxiliary classifier; nothing is detached."""
        auxiliary = run.networks[AUXILIARY]
        assert isinstance(auxiliary, Auxiliary)
        with tapped(run.model, auxiliary.taps, copies=True) as features:
            for loss in super().losses(run, batch):
                if loss.requires_grad and not any(feature.requires_grad for feature in features.values()):
                    raise LoopError(
                        "fp_auxiliary: no gradient of the auxiliary loss reaches the network, whose layers are frozen. Train without this procedure."
                    )
                yield loss + self.auxiliary_weight * run.task.loss(auxiliary(features), batch)


def _outputs(flow: Dataflow, batch_size: int) -> int:
    """The number of outputs of a network that gives one tensor ``[N, outputs]``.

    Raises:
        SpecError: Any other network.
    """
    shapes = [node.shape for node in flow.nodes if flow.is_output(node)]
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != batch_size:
        came = ", ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
        raise SpecError(
            f"fp_auxiliary: the auxiliary classifier needs a network that gives one tensor of shape [N, outputs]; for {batch_size} samples it "
            f"gives {came or 'none'}. Choose another method, or procedure."
        )
    return shapes[0][1]
