"""Binary super-resolution: weights and activations of one bit, each layer binarizing what the layers of its block before it have as well.

Paper: Xin, Wang, Jiang, Li, Huang, Gao 2020, "Binarized Neural Network for Single Image Super Resolution", ECCV.
    Bit accumulation mechanism (BAM): Eq. 3 to 6 for weights, Eq. 8 for their gradient, Eq. 9 and 10 for activations; Algorithm 1; BSRN in figure 3.
Symbols: W_n^B -> BamWeight, alpha -> coefficients, A_n -> activations, beta_n^scale -> Accumulator.scales, E(|W_n|) -> the scale of a weight.
Differs from the paper:
    - The authors published no program, and their paper leaves much open. All that follows is our choice.
    - The norm of accumulated weights has neither parameters nor statistics: a weight is compared with the mean of its output channel.
    - alpha is 1, which the paper's ablation has too, or searched by coordinate descent among -1, -1/2, 0, 1/2 and 1 with alpha_n = 1.
    - The norm of accumulated activations is a batch norm. Gradients pass the sign where the norm's output is at most 1 in size; the mean over
      channels in beta gets none.
    - beta is shared by all layers of a block that use an activation. ``absolute`` takes the mean of magnitudes in beta, which flips no signs.
    - Norms before signs take the place of those in a block and of its activation functions, and binary convolutions have no bias, which fits the
      paper's count of parameters.
    - Where a network has such blocks nothing else is binary, as in the paper (``layers``). In any other network each layer is a block of its own: its
      weight by itself, its input behind a batch norm.
    - Convolutions pad with 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import SpecError
from lowbit.models.bsrn import LocalBlock
from lowbit.models.srresnet import SrResNetBlock
from lowbit.network import insert
from lowbit.network.layers import NORMS
from lowbit.options import AtLeast
from lowbit.qat import OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod
from lowbit.qat.attach.input_norm import insert_with_norms
from lowbit.quantizers import Quantizer, SignQuantizer
from lowbit.quantizers.qtensor import BinaryDecoder, QTensor
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient

CANDIDATES = (-1.0, -0.5, 0.0, 0.5, 1.0)
Alpha = Literal["ones", "search"]
_BETWEEN = (nn.ReLU, nn.PReLU, nn.LeakyReLU, nn.Identity, *NORMS)  # what the norms before signs take the place of


class BamWeight(Quantizer):
    """The sign of accumulated weights times the mean magnitude of the layer's own, for each output channel.

    Forward: ``E|W_n| sign(S - mean(S))`` with ``S = alpha_1 W_1 + ... + alpha_{n-1} W_{n-1} + alpha_n W_n``, mean and ``E`` over all but the output
    channel; 0 counts as positive. Backward: 1 to ``W_n``, nothing to the others. Source: Eq. 3 and 8.

    Args:
        granularity: The output channels.
        alpha: ``ones``, or ``search``: what ``search`` finds in every pass.

    Attributes:
        earlier: The weights ``W_1 ... W_{n-1}``; parameters of other layers.
        coefficients: ``alpha``, where it is given, of all ``n``.

    >>> BamWeight(granularity=Granularity.channel())(torch.tensor([[1.0, 2.0, 6.0]]))
    tensor([[-3., -3.,  3.]])
    """

    def __init__(self, *, granularity: Granularity, alpha: Alpha = "ones") -> None:
        super().__init__(1, granularity)
        self.alpha: Alpha = alpha
        self.earlier: tuple[Tensor, ...] = ()  # in a tuple, because they are no parameters of the quantizer
        self.coefficients: Tensor | None = None

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def scale(self, x: Tensor) -> Tensor:
        """``E|W_n|``, shaped to broadcast."""
        return self.granularity.flatten(x.abs()).mean(1).reshape(self.granularity.scale_shape(x))

    def chosen(self, x: Tensor) -> Tensor:
        """``alpha`` of all weights, ``[n]``."""
        if self.coefficients is not None:
            return self.coefficients.to(x)
        return self.search(x) if self.alpha == "search" and self.earlier else x.new_ones(len(self.earlier) + 1)

    def codes(self, x: Tensor, alpha: Tensor) -> Tensor:
        """1 where the binary weight is positive, else 0, as bool."""
        weights = (*(weight.detach().to(x) for weight in self.earlier), x)
        total = torch.stack([factor * weight for factor, weight in zip(alpha, weights, strict=True)]).sum(0)
        mean = self.granularity.flatten(total).mean(1).reshape(self.granularity.scale_shape(x))
        return total >= mean

    @torch.no_grad()
    def error(self, x: Tensor, alpha: Tensor) -> Tensor:
        """``||W_n - W_n^B||**2`` at these coefficients, the paper's J."""
        x = x.detach().float()
        return (x - torch.where(self.codes(x, alpha), self.scale(x), -self.scale(x))).square().sum()

    @torch.no_grad()
    def search(self, x: Tensor) -> Tensor:
        """The coefficients ``[n]`` of least error that coordinate descent reaches from (0, ..., 0, 1); the last one is 1."""
        alpha = torch.zeros(len(self.earlier) + 1, device=x.device)
        alpha[-1] = 1
        best, improves = self.error(x, alpha), True
        while improves:
            improves = False
            for place in range(len(self.earlier)):
                for candidate in CANDIDATES:
                    trial = alpha.clone()
                    trial[place] = candidate
                    error = self.error(x, trial)
                    if bool(error < best):
                        alpha, best, improves = trial, error, True
        return alpha

    def forward(self, x: Tensor) -> Tensor:
        return pass_gradient(x, self.encode(x).decode().to(x.dtype))

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        values = x.detach().float()
        codes = self.codes(values, self.chosen(values)).to(torch.uint8)
        return QTensor(codes, BinaryDecoder(self.scale(values), self.granularity), 1)


def accumulate(activations: Sequence[Tensor], scales: Sequence[Tensor] | Tensor, *, absolute: bool = False) -> Tensor:
    """``sum of scale_i E(A_i) A_i``, ``E`` being the mean over channels, of magnitudes where ``absolute``, without a gradient.

    Args:
        activations: Tensors ``[N, C, ...]`` of one shape.
        scales: One number for each.
        absolute: See above.

    Source: Eq. 9 and 10.

    >>> accumulate([torch.tensor([[[1.0], [3.0]]])], torch.tensor([0.5]))
    tensor([[[1.],
             [3.]]])
    """
    total = torch.zeros_like(activations[0])
    for x, scale in zip(activations, scales, strict=True):
        mean = (x.detach().abs() if absolute else x.detach()).mean(1, keepdim=True)
        total = total + (scale * mean) * x
    return total


@dataclass(frozen=True)
class Step:
    """One layer of a block.

    Attributes:
        layer: Its name within the module that runs it.
        reads: Which activations it accumulates: 0 is the block's input, ``i`` the output of its layer ``i``.
        weights: Names of the layers before it whose weights it accumulates.
    """

    layer: str
    reads: tuple[int, ...]
    weights: tuple[str, ...] = ()


def chain(layers: Sequence[str]) -> tuple[Step, ...]:
    """The steps of a block in which each layer accumulates everything before it.

    >>> chain(["a", "b"])
    (Step(layer='a', reads=(0,), weights=()), Step(layer='b', reads=(0, 1), weights=('a',)))
    """
    return tuple(Step(layer, tuple(range(place + 1)), tuple(layers[:place])) for place, layer in enumerate(layers))


class Accumulator(nn.Module):
    """The norms and coefficients of one block, whose layers belong to the module that runs it.

    Each layer reads ``norm(accumulate(activations that it reads))``; its input quantizer takes the sign. The output is the last activation, or with
    ``gives`` the accumulation of these.
    """

    def __init__(self, steps: Sequence[Step], channels: int, *, gives: tuple[int, ...], absolute: bool) -> None:
        super().__init__()
        self.steps, self.gives, self.absolute = tuple(steps), gives, absolute
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in self.steps)
        places = [place for step in self.steps for place in step.reads]
        self.scales = nn.Parameter(torch.ones(1 + max([*places, *gives])))

    def forward(self, x: Tensor, layers: Sequence[nn.Module]) -> Tensor:
        activations = [x]
        for step, norm, layer in zip(self.steps, self.norms, layers, strict=True):
            activations.append(layer(norm(self.accumulated(activations, step.reads))))
        return self.accumulated(activations, self.gives) if self.gives else activations[-1]

    def accumulated(self, activations: Sequence[Tensor], places: Sequence[int]) -> Tensor:
        """The accumulation of those of ``activations``."""
        return accumulate([activations[place] for place in places], [self.scales[place] for place in places], absolute=self.absolute)


class BamBlocks(nn.Module):
    """Runs one block after the other, with layers that keep the names that they had where they come from.

    Args:
        blocks: The steps of each block.
        layers: The layers by their names; they lose their bias.
        gives: Activations of a block whose accumulation is its output, in place of the last one.
        residual: Whether there is a shortcut around all.
        absolute: Means of magnitudes in ``accumulate``.
    """

    def __init__(
        self,
        blocks: Sequence[Sequence[Step]],
        layers: Mapping[str, nn.Module],
        *,
        gives: tuple[int, ...] = (),
        residual: bool = False,
        absolute: bool = False,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.blocks = tuple(tuple(step.layer for step in steps) for steps in blocks)
        for name in (name for block in self.blocks for name in block):
            layers[name].bias = None  # type: ignore[assignment]
            self.add_module(name, layers[name])
        weight = next(iter(self.parameters()))
        channels = int(weight.shape[1])
        self.accumulators = nn.ModuleList(Accumulator(steps, channels, gives=gives, absolute=absolute) for steps in blocks)
        self.accumulators.to(weight)

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for block, accumulator in zip(self.blocks, self.accumulators, strict=True):
            out = accumulator(out, [self.get_submodule(name) for name in block])
        return out + x if self.residual else out


def put_blocks(model: nn.Module, *, size: int, absolute: bool) -> dict[str, tuple[str, ...]]:
    """Make BAM blocks of the residual blocks of SRResNet, of the local blocks of BSRN, and of rows of alike convolutions, in place.

    Returns:
        The layers in blocks by name, each with the layers whose weights it accumulates too.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, module in list(model.named_modules()):
        if not name:
            continue
        parts = dict(module.named_children())
        made: nn.Module | None = None
        blocks: list[tuple[Step, ...]] = []
        if isinstance(module, SrResNetBlock):
            blocks = [chain(block) for block in _rows_of(["conv1", "conv2"], size)]
            made = BamBlocks(blocks, parts, residual=True, absolute=absolute)
        elif isinstance(module, LocalBlock):
            blocks = [(Step("spatial", (0,)), Step("pointwise1", (1,)), Step("pointwise2", (1, 2), ("pointwise1",)))]
            made = BamBlocks(blocks, parts, gives=(1, 2, 3), absolute=absolute)
        elif type(module) is nn.Sequential and (row := _row(module)):
            blocks = [chain(block) for block in _rows_of(row, size)]
            made = BamBlocks(blocks, parts, absolute=absolute)
        if made is None:
            continue
        for step in (step for block in blocks for step in block):
            found[f"{name}.{step.layer}"] = tuple(f"{name}.{other}" for other in step.weights)
        _replace(model, name, made.train(module.training))
    return found | dict(_between_local_blocks(found))


def _row(module: nn.Sequential) -> list[str]:
    """The convolutions of a sequence that has nothing else but activation functions and norms; empty where they are not alike."""
    layers = {name: layer for name, layer in module.named_children() if isinstance(layer, nn.Conv2d)}
    rest = [part for part in module.children() if not isinstance(part, nn.Conv2d)]
    parts = list(layers.values())
    if len(layers) < 2 or not all(isinstance(part, _BETWEEN) for part in rest) or len({_shape(layer) for layer in parts}) > 1:
        return []
    return list(layers) if parts[0].in_channels == parts[0].out_channels and _keeps_size(parts[0]) else []


def _rows_of(names: Sequence[str], size: int) -> list[Sequence[str]]:
    return [names[start : start + size] for start in range(0, len(names), size)]


def _shape(layer: nn.Conv2d) -> tuple[object, ...]:
    return tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups


def _keeps_size(layer: nn.Conv2d) -> bool:
    if isinstance(layer.padding, str):
        return layer.padding == "same"
    sides = zip(layer.padding, layer.kernel_size, layer.dilation, strict=True)
    return set(layer.stride) == {1} and all(2 * pad == dilation * (kernel - 1) for pad, kernel, dilation in sides)


def _between_local_blocks(found: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The 3x3 convolutions of BSRN accumulate those of the local blocks before them in the same pair."""
    spatial = [name for name in found if name.endswith(".spatial")]
    for name in spatial:
        pair = name.removesuffix(".spatial").rpartition(".")[0]
        yield name, tuple(other for other in spatial[: spatial.index(name)] if other.startswith(f"{pair}."))


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@register(
    MethodInfo(
        name="binary_sr",
        title="Binarized Neural Network for Single Image Super Resolution",
        paper="Xin, Wang, Jiang, Li, Huang, Gao, ECCV 2020",
        url="https://doi.org/10.1007/978-3-030-58548-8_6",
        section="super_resolution",
        axes=("weight_quantizer", "activation_quantizer", "surgery"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=range(1, 2),
        needs=("labels",),
        fidelity="equations",
        summary="one bit for weights and activations; each layer of a block binarizes what the layers before it have as well",
        evidence="checked against an independent reference of the equations; the paper leaves norms, coefficients and gradients open",
        margin_points=45,
    )
)
@dataclass
class BinarySr(TrainingMethod):
    """Binary networks with bit accumulation.

    Attributes:
        alpha: Coefficients of accumulated weights: ``ones``, or ``search`` in every pass for those of least error.
        absolute: Take the mean of magnitudes over channels in the coefficients of activations; without, it is that of values, as the paper has it.
        accumulation: Accumulate over the layers of a block; without, each is binarized by itself, for comparison.
        block_size: Convolutions of a block in a plain row of them, such as VDSR's.
        layers: Which are binary: ``blocks``: those in blocks, an error without; ``all``: all that the policy says, those outside of blocks each by
            itself; ``auto``: those in blocks where there are any, else all.
    """

    ends = "float"

    alpha: Alpha = "ones"
    absolute: bool = False
    accumulation: bool = True
    block_size: Annotated[int, AtLeast(1)] = 3
    layers: Literal["auto", "blocks", "all"] = "auto"

    def default_recipe(self) -> Recipe:
        """From scratch on DIV2K; the paper's number of epochs is not known."""
        spec = OptimizerSpec("adam", 1e-4, weight_decay=2e-4, schedule="step", milestones=(1 / 3, 2 / 3), gamma=0.5, betas=(0.5, 0.999))
        return Recipe(600, 16, spec)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return BamWeight(granularity=Granularity.channel(slot.channel_axis), alpha=self.alpha)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return SignQuantizer(is_closed=True)

    def attach(self, job: QatJob) -> None:
        blocks = put_blocks(job.model, size=self.block_size if self.accumulation else 1, absolute=self.absolute)
        inside = [name for name in blocks if name in job.layers]
        if self.layers == "blocks" and not inside:
            raise SpecError(
                f"binary_sr: {type(job.model).__name__} has no blocks of alike convolutions to accumulate over. Choose layers='all' or another network."
            )
        if inside and self.layers != "all":
            job.keep_outside_float(inside, "blocks of binary layers")
        originals = {name: insert.float_weight(layer) for name, layer in job.layers.items()}

        def weights(slot: Slot) -> Quantizer:
            quantizer = self.weight_quantizer(slot)
            if isinstance(quantizer, BamWeight) and self.accumulation:
                quantizer.earlier = tuple(originals[name] for name in blocks.get(slot.name, ()) if name in originals)
            return quantizer

        insert_with_norms(job, weights, self.activation_quantizer, self.initialize_layer, norm=lambda slot: slot.name not in blocks)
        set_statistics(job)
        if inside:
            job.table.note(
                f"{len(inside)} layers accumulate bits within their blocks, whose norms and activation functions are before signs now"
            )


@torch.no_grad()
def set_statistics(job: QatJob) -> None:
    """Let the norms of BAM blocks start with the statistics of the sample, one after the other as it runs through the network."""
    accumulators = [module for module in job.model.modules() if isinstance(module, Accumulator)]
    was_training = {module: module.training for module in job.model.modules()}
    job.model.eval()

    def before(norm: nn.Module, args: tuple[Any, ...]) -> None:
        rows = args[0].float().movedim(1, 0).flatten(1)
        assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None and norm.running_var is not None
        norm.running_mean.copy_(rows.mean(1))
        norm.running_var.copy_(rows.var(1, correction=0))

    handles = [norm.register_forward_pre_hook(before) for accumulator in accumulators for norm in accumulator.norms]
    try:
        if accumulators:
            job.model(*job.sample.args, **job.sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
        for module, flag in was_training.items():
            module.training = flag
