"""PAMS: activations clipped at a learned largest magnitude that starts from an epoch of statistics, and attention maps of a float teacher.

Paper: Li, Yan, Lin, Zheng, Zhang, Yang, Ji 2020, "PAMS: Quantized Super-Resolution via Parameterized Max Scale", ECCV, arXiv 2011.04212.
    Parameterized max scale, its gradient, structured knowledge transfer, and the initialization in the first epoch.
Symbols: alpha -> clip, q -> qmax, A(F) -> attention_map, L_SKT -> transfer_loss, lambda -> transfer_weight.
Differs from the paper:
    - Its weights of the network are the float ones, as the paper says; the authors' program starts its student at random.
    - A tensor that a block and its shortcut read is quantized once for both, where the policy asks for sums in few bits (``policy="paper"`` does);
      the authors' program gives the block's first convolution the float tensor (``block_input="float"``).
    - Clips start from the statistic of the first batch in place of 10, which only counts until the first step of training, and stay positive.
    - An input of exactly the clip gives its gradient to both, as in PACT; the authors' minimum and maximum halve it.
    - All layers have the bits that the policy asks for; the paper has everything outside of residual blocks in float (``blocks_only``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.network.graph.blocks import residual_layers
from lowbit.network.layers import CONVOLUTIONS, TRANSPOSED, evaluating
from lowbit.network.placement import Placement, Site, place_at_layers, place_at_tensors
from lowbit.network.surgery.sums import sums_of
from lowbit.network.taps import Tap, tapped
from lowbit.options import AtLeast, Interval
from lowbit.qat import Companion, GivenNetworks, OptimizerSpec, Procedure, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.recipe import Role
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid, GridQuantizer, fake_quantize_grid
from lowbit.registry import MethodInfo, register
from lowbit.spec import BitPolicy, Granularity, LayerBits
from lowbit.surrogates import bounded_straight_through, straight_through

TEACHER = "attention"  # the companion whose features are compared; not "teacher", whose outputs would enter the loss
STEPS = "quantizers.steps"  # the role of learned steps, beside clips
SMALLEST = 1e-8
_UPSAMPLING = (nn.PixelShuffle, nn.Upsample, *TRANSPOSED)


def _symmetric(bit_width: int) -> tuple[int, int]:
    top: int = 2 ** (bit_width - 1) - 1
    return -top, top


class PamsWeight(GridQuantizer):
    """Weights in even steps up to their largest magnitude, with a level at 0.

    Forward: ``round(w q / m) m / q`` with ``m = max|w| + 1e-8`` of the current weights and ``q = 2**(k - 1) - 1``. Backward: 1, nothing through
    ``m``.

    Source: symmetric weights up to their largest magnitude, in the authors' code.

    Args:
        bit_width: 2 to 8; 1 bit would leave nothing but 0.
        granularity: Which elements share ``m``.

    >>> PamsWeight(2)(torch.tensor([-1.0, 0.2, 0.6]))
    tensor([-1.,  0.,  1.])
    """

    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, granularity: Granularity | None = None) -> None:
        _check(bit_width)
        super().__init__(bit_width, *_symmetric(bit_width), granularity=granularity, surrogate=straight_through)

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return _symmetric(bit_width)

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def grid(self, x: Tensor) -> Grid:
        largest = self.granularity.flatten(x.detach()).abs().amax(1).reshape(self.granularity.scale_shape(x))
        step = (largest + SMALLEST) / self.qmax
        zero = torch.zeros_like(step)
        return Grid(zero, step, step, zero)


class PamsActivation(GridQuantizer):
    """Activations in even steps up to a learned ``clip``, with a level at 0, also where they are never negative.

    Forward: ``round(min(max(x, -clip), clip) q / clip) clip / q`` with ``q = 2**(k - 1) - 1``. Backward: 1 to ``x`` where ``|x| <= clip``,
    else 0; to ``clip`` the sum of the gradients times ``sign(x)`` where ``|x| >= clip``, and times ``y / clip - x / clip`` inside.

    In training, while ``epoch <= statistic_epochs``, each pass first sets ``clip`` to ``max_value``: to the mean over the samples of their
    largest magnitudes, in the first epoch that of the batch alone, later ``decay`` times the one before it and ``1 - decay`` times that
    of the batch. Nothing is clipped meanwhile, so that codes beyond ``q`` occur.

    Source: parameterized max scale, its gradient, and its start from the statistics of the first epoch.

    Args:
        bit_width: 2 to 8; 1 bit would leave nothing but 0.
        statistic_epochs: Epochs in which the clip follows the inputs.
        decay: Of the moving average.

    Attributes:
        epoch: Number of the epoch, from 1, which the training loop sets.

    >>> quantizer = PamsActivation(2).eval()
    >>> quantizer.initialize(torch.tensor([[2.0, -1.0]]))
    >>> quantizer(torch.tensor([-5.0, 0.9, 1.1])).tolist()
    [-2.0, 0.0, 2.0]
    """

    tables = ("clip",)
    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, statistic_epochs: int = 1, decay: float = 0.9997) -> None:
        _check(bit_width)
        super().__init__(bit_width, *_symmetric(bit_width))
        del self._buffers["clip"]
        self.clip = nn.Parameter(torch.tensor(float("nan")))
        self.register_buffer("max_value", torch.ones(()))
        self.max_value: Tensor
        self.statistic_epochs, self.decay, self.epoch = statistic_epochs, decay, 1

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return _symmetric(bit_width)

    @property
    def follows_inputs(self) -> bool:
        """Whether the clip is that of the inputs, and nothing is clipped."""
        return self.training and self.epoch <= self.statistic_epochs

    @staticmethod
    def statistic(x: Tensor) -> Tensor:
        """The mean over the samples of their largest magnitudes, shape ``()``."""
        values = x.detach().float().abs()
        return (values.flatten(1).amax(1).mean() if values.dim() > 1 else values.amax()).clamp(min=SMALLEST)

    def initialize(self, x: Tensor) -> None:
        """Set clip and ``max_value`` to the statistic of ``x``."""
        self._set_table("clip", self.statistic(x))
        self.max_value.copy_(self.clip.detach())

    def grid(self, x: Tensor) -> Grid:
        step, zero = self.clip / self.qmax, torch.zeros_like(self.clip)
        return Grid(zero, step, step, zero, (-self.clip, self.clip))

    def forward(self, x: Tensor) -> Tensor:
        if not self.follows_inputs:
            return super().forward(x)
        with torch.no_grad():
            current = self.statistic(x)
            self.max_value.copy_(current if self.epoch == 1 else (1 - self.decay) * current + self.decay * self.max_value)
            self.clip.copy_(self.max_value)
        grid, values = replace(self.grid(x), ends=None), x.float()
        most = 2 ** (self.bit_width + 16)  # beyond every code that occurs
        return fake_quantize_grid(values, grid, -most, most, bounded_straight_through).to(x.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the clip positive."""
        self.clip.clamp_(min=SMALLEST)


def _check(bit_width: int) -> None:
    if bit_width == 1:
        raise SpecError("pams: this grid has 0 among its levels and needs 2 bits or more, got 1")


def attention_map(features: Tensor) -> Tensor:
    """Where features are strong: ``mean over channels of F**2``, as a vector of length 1 for each sample.

    Source: structured knowledge transfer, ``A(F)``.

    Args:
        features: ``[N, C, ...]`` with one or more dimensions of space.

    Returns:
        ``[N, positions]``.

    >>> attention_map(torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]))
    tensor([[0.4903, 0.8716],
            [1.0000, 0.0000]])
    """
    return functional.normalize(features.float().square().mean(1).flatten(1), dim=1, eps=1e-12)


def transfer_loss(features: Tensor, target: Tensor) -> Tensor:
    """The mean square of the difference of two attention maps: structured knowledge transfer, without its weight.

    Source: structured knowledge transfer, ``L_SKT``.

    Args:
        features, target: ``[N, C, ...]``; channels may differ.

    Raises:
        SpecError: Samples or positions differ.
    """
    if features.shape[:1] + features.shape[2:] != target.shape[:1] + target.shape[2:]:
        raise SpecError(
            f"pams compares features of network and teacher at the same positions, got {list(features.shape)} and {list(target.shape)}. "
            "Choose another teacher, or transfer_weight=0."
        )
    return (attention_map(features) - attention_map(target)).square().mean()


def find_feature(model: nn.Module, sample: Inputs) -> str:
    """The layer whose input is compared with the teacher's: the convolution before the first upsampling, else the last one; "" without any."""
    calls: list[tuple[str, nn.Module]] = []

    def note(name: str, module: nn.Module) -> None:
        calls.append((name, module))

    kinds = (*CONVOLUTIONS, *_UPSAMPLING)
    named = [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]
    handles = [module.register_forward_pre_hook(lambda m, _, name=name: note(name, m)) for name, module in named]
    try:
        with evaluating(model):
            model(*sample.args, **sample.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found = ""
    for name, module in calls:
        if isinstance(module, _UPSAMPLING) and (found or isinstance(module, TRANSPOSED)):
            return found or name
        if isinstance(module, CONVOLUTIONS):
            found = name
    return found


@dataclass
class PamsQuantizers(TrainingMethod):
    """The paper's quantizers: clips that are learned, and weights up to their largest magnitude.

    Attributes:
        weight_granularity: ``per_tensor``, as in the paper, or ``per_channel``, for networks whose channels differ much.
        ema_epoch: Epochs in which clips follow the statistics of their inputs before they are learned. With one it is that of its last
            batch; a moving average needs two or more.
        ema_decay: Of that moving average.
        blocks_only: Leave everything outside of residual blocks in float, as the paper does, whatever the policy asks for.
        block_input: Where sums are quantized, what the first layer of a block reads: ``quantized``: the same as the shortcut; ``float``, as
            in the authors' program, in networks whose sums are ``lowbit.network.surgery.sums.Sum``.
    """

    ends = "float"
    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 100.0
    weight_granularity: Literal["per_tensor", "per_channel"] = "per_tensor"
    ema_epoch: Annotated[int, AtLeast(0)] = 1
    ema_decay: Annotated[float, Interval(0, 1)] = 0.9997
    blocks_only: bool = False
    block_input: Literal["quantized", "float"] = "quantized"

    def default_recipe(self) -> Recipe:
        """EDSR and RDN on DIV2K, with 1,000 steps in an epoch."""
        return Recipe(30, 16, OptimizerSpec("adam", 1e-4, weight_decay=0.0, schedule="step", milestones=(1 / 3, 2 / 3), gamma=0.5))

    def default_policy(self, bits: LayerBits) -> BitPolicy:
        """Both operands of sums have the bits of activations."""
        return super().default_policy(bits).with_merges(bits.activation)

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        """Clips have Adam, for their gradient is a sum over all elements; beside another optimizer of the network with its learning rate."""
        found = super().optimizers(recipe)
        found = {**found, STEPS: replace(found["quantizers"], learning_rate=recipe.optimizer.learning_rate)}
        if recipe.optimizer.kind != "sgd":
            return found
        clips = replace(found["quantizers"], kind="adam", learning_rate=recipe.optimizer.learning_rate)
        return {**found, "quantizers": clips}

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        """Learned steps of the first and the last layer have a role of their own: they are far smaller than clips, which are in levels of pixels."""
        found = super().role(name, parameter, owner)
        return STEPS if found == "quantizers" and not isinstance(owner, PamsActivation) else found

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return PamsWeight(slot.bit_width, granularity=Granularity.parse(self.weight_granularity, slot.channel_axis))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return PamsActivation(slot.bit_width, statistic_epochs=self.ema_epoch, decay=self.ema_decay)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        return super().merge_quantizer(slot) if slot.bit_width == 1 else self.activation_quantizer(slot)

    def attach(self, job: QatJob) -> None:
        inside: set[str] | None = None
        if self.blocks_only:
            inside = residual_layers(job.model, job.dataflow())
            job.keep_outside_float(inside, "residual blocks")
        job.insert(self.weight_quantizer, self.activation_quantizer, self._placements(job, inside))
        job.initialize(self.initialize_layer)

    def _placements(self, job: QatJob, inside: set[str] | None) -> list[Placement] | None:
        """Where activations are quantized; ``None``: at the inputs of layers."""
        bits = job.merge_bits
        if bits is None or bits == 1:
            if self.block_input == "float":
                raise SpecError(
                    "pams: block_input='float' quantizes shortcuts in place of blocks' inputs, and the policy has no bits for sums. Set merge_bits."
                )
            return None
        if self.block_input == "float":
            found = self._at_sums(job, bits, inside)
        else:
            flow = job.dataflow()
            found = place_at_tensors(flow, job.activation_bits, merge_bits=bits)
            if inside is not None:
                found = [p for p in found if p.layers or any(_is_around(flow[merge].owner, inside) for merge in p.operand_of)]
        job.leave_merges_float(f"sums: {bits} bits at {sum(not p.layers for p in found)} places beside the inputs of layers")
        return found

    def _at_sums(self, job: QatJob, bits: int, inside: set[str] | None) -> list[Placement]:
        found: list[Placement] = []
        for name, readers in sums_of(job.dataflow(), job.model).items():
            if inside is not None and not _is_around(name, inside):
                continue
            for layer in set(readers) & set(job.activation_bits):
                job.keep_input_float(layer)
            found += [Placement((Site(f"{name}.{side}", "output"),), bits, purpose="sum", operand_of=(name,)) for side in ("left", "right")]
        if not found:
            raise SpecError(
                f"pams: block_input='float' needs sums that are modules of the class Sum, and {type(job.model).__name__} has none that runs once. "
                "Leave block_input out."
            )
        return [*place_at_layers(job.activation_bits), *found]

    def start_epoch(self, run: TrainRun) -> None:
        for quantizer in self.clips(run):
            quantizer.epoch = run.epochs_done + 1

    def after_backward(self, run: TrainRun) -> None:
        """All processes go on from the mean of their statistics."""
        for quantizer in self.clips(run):
            if quantizer.follows_inputs:
                run.reduce_mean(quantizer.max_value)
                quantizer.clip.data.copy_(quantizer.max_value)

    @staticmethod
    def clips(run: TrainRun) -> list[PamsActivation]:
        """The quantizers of activations, each once."""
        return [quantizer for quantizer in run.quantizers() if isinstance(quantizer, PamsActivation)]


def _is_around(sum_name: str, layers: set[str]) -> bool:
    """Whether the module with the sum, which is not the network itself, holds one of ``layers``."""
    block = sum_name.rpartition(".")[0]
    return bool(block) and any(layer.startswith(f"{block}.") for layer in layers)


@register(
    MethodInfo(
        name="pams",
        title="PAMS: Quantized Super-Resolution via Parameterized Max Scale",
        paper="Li, Yan, Lin, Zheng, Zhang, Yang, Ji, ECCV 2020",
        url="https://arxiv.org/abs/2011.04212",
        section="super_resolution",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(2, 9),
        needs=("labels", "teacher", "pretrained"),
        fidelity="exact",
        summary="learned largest magnitudes that start from an epoch of statistics, and attention maps of a float teacher",
        evidence="quantizers, blocks, a network and steps of training checked against the authors' code",
        margin_points=4,
    )
)
@dataclass
class Pams(Procedure):
    """Training with attention maps of the float network.

    Attributes:
        transfer_weight: Weight of the mean squared difference of network's and teacher's attention maps; 0 trains without a teacher.
        feature: Name of the layer whose input is compared. Empty: the convolution before the first upsampling, else the last one.
    """

    quantizers = PamsQuantizers

    transfer_weight: Annotated[float, AtLeast(0)] = 1000.0
    feature: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.tap: Tap | None = None

    def default_recipe(self) -> Recipe:
        return self.base.default_recipe()

    def attach(self, job: QatJob) -> None:
        name = ""
        if self.transfer_weight:
            name = self.feature or find_feature(job.model, job.sample)
            with evaluating(job.model), tapped(job.model, [name] if name else [], "input") as found:
                job.model(*job.sample.args, **job.sample.kwargs)
            if name and (name not in found or found[name].dim() < 3):
                shape = list(found[name].shape) if name in found else "nothing"
                raise SpecError(
                    f"pams: the input of {name!r} has no positions in space to compare, got {shape}. Name another layer as feature."
                )
            job.table.note(
                f"in training the input of {name} is compared with the teacher's"
                if name
                else "without a convolution there is no attention to transfer"
            )
        self.tap = Tap(name, "input") if name else None
        super().attach(job)

    def companions(self, model: nn.Module, given: GivenNetworks) -> Mapping[str, Companion]:
        if self.tap is None:
            return super().companions(model, given)
        teacher = given.teacher or given.float_twin()
        if self.tap.module not in dict(teacher.named_modules()):
            raise SpecError(
                f"pams compares the input of {self.tap.module!r} in network and teacher, and {type(teacher).__name__} has no such module. "
                "Leave the teacher out to learn from the float network, or set transfer_weight=0."
            )
        return {**super().companions(model, given), TEACHER: Companion(teacher)}

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """Those of the base, each with the distance of attention maps."""
        if self.tap is None:
            yield from super().losses(run, batch)
            return
        teacher = run.networks[TEACHER]
        with torch.no_grad(), tapped(teacher, [self.tap], copies=True) as theirs:
            run.task.predict(teacher, batch)
        with tapped(run.model, [self.tap], copies=True) as mine:
            for loss in super().losses(run, batch):
                yield loss + self.attention_loss(mine[self.tap], theirs[self.tap])

    def attention_loss(self, features: Tensor, target: Tensor) -> Tensor:
        """``transfer_loss`` times its weight."""
        return self.transfer_weight * transfer_loss(features, target)
