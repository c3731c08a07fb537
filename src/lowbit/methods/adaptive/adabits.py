"""AdaBits: one network for several bit-widths, whose codes at fewer bits are the upper bits of those at more.

Paper: Jin, Yang, Liao 2020, "AdaBits: Neural Network Quantization with Adaptive Bit-Widths", CVPR.
    Section 3.2 (modified DoReFa: floor), 3.3 (joint training, switchable batch norm and clipping levels), and direct and progressive
    adaptation, with which it is compared.
    Jin, Yang, Liao, Qian 2020, "Towards Efficient Training for Neural Network Quantization" (SAT), for the scale of the last layer and
    the gradient of the clip.
Symbols: k -> bit_width, alpha -> clip, q_k -> unit_codes; the authors' "modified" -> floor, "original" -> nearest.
Differs from the paper:
    - Weights are ``centered`` and clips start at the least error unless options say otherwise: with the paper's ``floor`` widths of 2 bits
      ruin all others within a short training from a float network, and the authors' program recommends the former for them.
    - The first and the last layer have 8 bits for their inputs too. In the paper the first layer's input is the image itself, and the last
      one's follows the switch; a policy says so: ``with_rule(match="conv1", weight=8, activation="float")``.
    - The last layer is scaled in evaluation as in training. The authors leave its weight alone there and divide its bias instead, which
      divides all logits by one number; ``rescales_in_evaluation=False`` does that too.
    - In a float switch weights are as they are; the authors' code divides them by their maximum.
    - With direct and progressive adaptation the norms of widths that are not trained follow the batches of the training, instead of
      being calibrated after it.
    - A weight of zeros, or of equal values where it is scaled, is not divided by 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor, nn

from lowbit.methods.quantization_aware.dorefa import largest_tanh
from lowbit.methods.quantizer_design.pact import SMALLEST_CLIP, ClipInit, PactActivation
from lowbit.network import insert
from lowbit.network.bits import set_bits, switches_of
from lowbit.network.layers import CONVOLUTIONS
from lowbit.network.surgery.switchable_norm import SwitchableNorm
from lowbit.options import Above
from lowbit.qat import AdaptiveMethod, OptimizerSpec, QatJob, Recipe, Slot, TrainRun
from lowbit.qat.recipe import Role
from lowbit.qat.task import Batch
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid
from lowbit.quantizers.qtensor import AffineDecoder, QTensor
from lowbit.quantizers.switchable import SwitchableQuantizer, for_widths
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity, LayerBits, switch_name
from lowbit.surrogates import Surrogate, pass_gradient, straight_through

Rounding = Literal["floor", "centered", "nearest"]
Rescale = Literal["none", "constant", "stddev"]
CONVOLUTION_CLIP, LINEAR_CLIP = 8.0, 10.0  # where the authors' clips start


def steps_of(bit_width: int, rounding: Rounding) -> int:
    """Steps between 0 and 1: ``2**k - 1`` for the nearest level, of which one is 1, else ``2**k``."""
    return int(2**bit_width) - int(rounding == "nearest")


def unit_codes(u: Tensor, bit_width: int, rounding: Rounding, surrogate: Surrogate = straight_through) -> Tensor:
    """Integer codes of values in ``[0, 1]``, as floats.

    Forward: ``round((2**k - 1) u)`` for ``nearest``, else ``min(floor(2**k u), 2**k - 1)``: with ``floor`` and ``centered`` the code at
    ``j < k`` bits is ``code >> (k - j)``, bit for bit. Backward: the surrogate's, times the number of steps.

    Args:
        u: Values in ``[0, 1]``, any shape.
        bit_width: ``k``, 1 to 8.
        rounding: Where the levels lie.
        surrogate: Backward rule of the rounding.

    Source: Section 3.2.

        >>> u = torch.tensor([0.0, 0.3, 0.5, 1.0])
        >>> unit_codes(u, 4, "floor"), unit_codes(u, 2, "floor")
        (tensor([ 0.,  4.,  8., 15.]), tensor([0., 1., 2., 3.]))
    """
    position, top = u * steps_of(bit_width, rounding), 2**bit_width - 1
    if rounding == "nearest":
        return surrogate(position, 0, top)
    # floor rounds half a step lower; only the gradient may come from there, for both differ where values lie on a threshold
    return pass_gradient(surrogate(position - 0.5, 0, top), position.detach().floor().clamp(0, top))


def half_step(rounding: Rounding) -> float:
    """How far above its lower end the value of a step lies, in steps."""
    return 0.5 * (rounding == "centered")


def quantize_k(u: Tensor, bit_width: int, rounding: Rounding, surrogate: Surrogate = straight_through) -> Tensor:
    """``q_k``: the level in ``[0, 1]`` of values in ``[0, 1]``. Source: Section 3.2.

    >>> quantize_k(torch.tensor([0.3, 1.0]), 2, "floor"), quantize_k(torch.tensor([0.3, 1.0]), 2, "centered")
    (tensor([0.2500, 0.7500]), tensor([0.3750, 0.8750]))
    """
    return (unit_codes(u, bit_width, rounding, surrogate) + half_step(rounding)) / steps_of(bit_width, rounding)


def normalized(weight: Tensor) -> Tensor:
    """``tanh(w) / max|tanh(w)|``, in ``[-1, 1]``, differentiable; what weights are before they are rounded. Source: Section 3.2."""
    return torch.tanh(weight) / largest_tanh(weight)


def deviation(values: Tensor) -> Tensor:
    """The unbiased standard deviation of all values; 0 of a single one. Shape ``()``."""
    return values.std() if values.numel() > 1 else values.new_zeros(())


class AdabitsWeight(Quantizer):
    """Weights ``2 q_k((normalized(w) + 1) / 2) - 1``, times a factor where they are rescaled.

    Codes are signed, the integers that a two's complement holds: ``y = (code + half) * scale`` with ``scale = 2 / steps``. With ``floor`` a
    half of 0, ``scale = 2**(1 - k)`` and levels from -1 to ``1 - scale``; with ``centered`` and ``nearest`` half is 1/2. The codes of ``floor``
    and ``centered`` nest: ``codes at j bits == codes at k bits >> (k - j)`` for each weight.
    Backward: the surrogate's for the rounding, everything else by differentiation, the maximum included; nothing through the factor.

    Args:
        bit_width: 2 to 8.
        rounding: ``floor``, ``centered`` (floor, with values in the middle of the steps) or ``nearest``.
        rescale: The standard deviation that all values are scaled to: ``constant`` ``1 / sqrt(outputs)``, ``stddev`` the float weight's.
        outputs: Number of output units, times the size of the kernel.
    """

    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, rounding: Rounding = "floor", rescale: Rescale = "none", outputs: int = 1) -> None:
        super().__init__(bit_width, Granularity.tensor())
        self.rounding, self.rescale, self.outputs = rounding, rescale, outputs
        self.surrogate: Surrogate = straight_through

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def codes(self, weight: Tensor) -> Tensor:
        """Signed codes as floats, with the gradient of the rounding."""
        return unit_codes((normalized(weight) + 1) / 2, self.bit_width, self.rounding, self.surrogate) - float(2 ** (self.bit_width - 1))

    def decoder(self, codes: Tensor, weight: Tensor) -> AffineDecoder:
        """What these codes of a weight stand for."""
        half = 0.0 if self.rounding == "floor" else 0.5
        step = 2 / steps_of(self.bit_width, self.rounding)
        plain = AffineDecoder(weight.new_tensor(step), weight.new_tensor(-half), self.granularity)
        return plain if self.rescale == "none" else replace(plain, scale=plain.scale * self.factor(plain.decode(codes), weight))

    def factor(self, values: Tensor, weight: Tensor) -> Tensor:
        """What brings ``values`` to the standard deviation that ``rescale`` asks for; 1 where they have none. Source: SAT, section 3."""
        wanted = deviation(weight) if self.rescale == "stddev" else weight.new_tensor(1 / math.sqrt(self.outputs))
        factor = wanted / deviation(values)
        return torch.where(torch.isfinite(factor) & (factor > 0), factor, torch.ones_like(factor))

    def forward(self, x: Tensor) -> Tensor:
        weight = x.float()
        if not self.training:
            codes = self.codes(weight)
            return self.decoder(codes.detach(), weight.detach()).decode(codes).to(x.dtype)
        # the authors' order of operations, as in dorefa; with floor and centered it makes no difference
        values = 2 * quantize_k((normalized(weight) + 1) / 2, self.bit_width, self.rounding, self.surrogate) - 1
        return (values if self.rescale == "none" else values * self.factor(values.detach(), weight.detach())).to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        weight = x.detach().float()
        codes = self.codes(weight)
        return QTensor(codes.to(torch.int8), self.decoder(codes, weight), self.bit_width)

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, rounding={self.rounding!r}, rescale={self.rescale!r}"


class UnscaledWeight(AdabitsWeight):
    """A weight that is rescaled in training alone; in evaluation the layer's bias is divided by the factor, and with it all that the layer gives."""

    def __init__(self, bit_width: int, *, rounding: Rounding = "floor", rescale: Rescale = "constant", outputs: int = 1) -> None:
        super().__init__(bit_width, rounding=rounding, rescale=rescale, outputs=outputs)
        self.register_buffer("last_factor", torch.ones(()))  # of the weight, which the bias does not see
        self.last_factor: Tensor

    def initialize(self, x: Tensor) -> None:
        """Find the factor."""
        self.forward(x.detach())

    def factor(self, values: Tensor, weight: Tensor) -> Tensor:
        self.last_factor = super().factor(values, weight).detach()
        return self.last_factor if self.training else torch.ones_like(self.last_factor)

    def scale_bias(self, bias: Tensor) -> Tensor:
        """``bias / factor`` in evaluation, ``bias`` in training."""
        return bias if self.training else bias / self.last_factor

    def _change_bit_width(self, bits: int, values: Tensor | None) -> None:
        super()._change_bit_width(bits, values)
        if values is not None:
            self.initialize(values)


class AdabitsActivation(PactActivation):
    """Activations ``|clip| q_k(x / |clip|)`` on ``[0, |clip|]``; with ``is_signed`` ``|clip| (2 q_k((x / |clip| + 1) / 2) - 1)``, without a 0.

    Backward: the surrogate's for the rounding; 1 to ``x`` strictly within the range, else 0. To ``clip``, times its sign: the sign of ``x``
    where it is at or beyond an end; within the range the level less ``x``, in units of the clip, which SAT calls calibrated; 0 where ``x`` is 0
    or less and the range ends there. Source: SAT, section 3; the authors' code for the sign and both sides.

    Args:
        bit_width: 1 to 8.
        rounding: As for weights.
        clip: Initial clip, as in ``PactActivation``.
        is_signed: Whether the range has a negative half.
    """

    def __init__(
        self, bit_width: int, *, rounding: Rounding = "nearest", clip: ClipInit = CONVOLUTION_CLIP, is_signed: bool = False
    ) -> None:
        super().__init__(bit_width, clip=clip, is_signed=is_signed)
        self.rounding, self.surrogate = rounding, straight_through

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    def prepare(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return x  # codes are cut off at the same places
        clip = self.clip.abs()
        low = -clip if self.is_signed else torch.zeros_like(clip)
        return torch.where(x >= clip, clip, torch.where(x <= low, low, x))

    def grid(self, x: Tensor) -> Grid:
        clip = self.clip.abs()
        step = clip * ((2 if self.is_signed else 1) / steps_of(self.bit_width, self.rounding))
        low, zero_point = (-clip, steps_of(self.bit_width, self.rounding) / 2) if self.is_signed else (torch.zeros_like(clip), 0.0)
        lower = low if self.rounding == "nearest" else low + step / 2
        return Grid(lower, step, step, torch.full_like(clip, zero_point - half_step(self.rounding)))

    @torch.no_grad()
    def project(self) -> None:
        """Keep the clip away from 0."""
        self.clip.masked_fill_(self.clip.abs() < SMALLEST_CLIP, SMALLEST_CLIP)


class IntegerImage(nn.Module):
    """``round(255 x)``: an image in ``[0, 1]`` as the integers that it came from. Source: the authors' code."""

    def forward(self, x: Tensor) -> Tensor:
        return (255 * x).round()


@register(
    MethodInfo(
        name="adabits",
        title="AdaBits: Neural Network Quantization with Adaptive Bit-Widths",
        paper="Jin, Yang, Liao, CVPR 2020; SAT: Jin, Yang, Liao, Qian, BMVC 2020",
        url="https://arxiv.org/abs/1912.09666",
        section="adaptive",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="exact",
        summary="one network for several bit-widths: codes that nest, norms and clips of each width, all trained together",
        evidence="checked against the authors' code",
        margin_points=55,
    )
)
@dataclass
class Adabits(AdaptiveMethod):
    """One set of weights for several bit-widths of the network.

    Attributes:
        adaptation: What is trained: all widths in each step (``joint``), the highest (``direct``) or the lowest one alone (``direct_lowest``),
            or one after the other in equal shares of the training, from the highest on (``descending``) or from the lowest on
            (``ascending``). The norms of widths that are not trained follow the batches, with the affine parameters and clips of the one
            that is.
        weight_rounding: Levels of weights: ``floor`` (the paper's), which have 0 among them and are half a step too low on average, or
            ``centered`` (the authors' program since 2022), both with the same codes, which nest; or ``nearest``, DoReFa's, whose codes do not.
        activation_rounding: Levels of activations, in the same words.
        switchable_clip: Give each width a clip of its own.
        clip_init: Initial clip of activations: a number, ``max`` (the largest magnitude of the first batch), ``least_error`` (the least
            squared error on it, best for short runs) or ``paper`` (8 in convolutions, 10 in linear layers).
        rescale: Standard deviation of the last layer's quantized weight: ``constant`` (1 / sqrt(outputs)), ``stddev`` (that of the float
            weight) or ``none`` (not rescaled).
        rescale_convolutions: Rescale all convolutions too, as for CIFAR-10 in the authors' program.
        rescales_in_evaluation: Rescale weights in evaluation too; else the bias is divided by the factor there.
        switchable_norms: Give each width norms of its own; one norm for all cannot follow the statistics of each, and is there for comparison.
        shares_affine: Let all norms of one place share their weight and bias; statistics stay each width's own.
        integer_images: Multiply the first layer's input, images in [0, 1], by 255 and round it, as the authors do with their data.
    """

    adaptation: Literal["joint", "direct", "direct_lowest", "descending", "ascending"] = "joint"
    weight_rounding: Rounding = "centered"
    activation_rounding: Rounding = "nearest"
    switchable_clip: bool = True
    clip_init: Annotated[float | Literal["max", "least_error", "paper"], Above(0)] = "least_error"
    rescale: Rescale = "constant"
    rescale_convolutions: bool = False
    rescales_in_evaluation: bool = True
    switchable_norms: bool = True
    shares_affine: bool = False
    integer_images: bool = False

    def default_recipe(self) -> Recipe:
        """ResNet-20 on CIFAR-10 in the authors' program."""
        return Recipe(200, 128, OptimizerSpec(learning_rate=0.1, nesterov=True, weight_decay=4e-5, schedule="step", milestones=(0.5, 0.75)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        is_rescaled = slot.position == "last" or (self.rescale_convolutions and isinstance(slot.layer, CONVOLUTIONS))
        if self.rescale == "none" or not is_rescaled:
            return AdabitsWeight(slot.bit_width, rounding=self.weight_rounding)
        kind = AdabitsWeight if self.rescales_in_evaluation or isinstance(slot.layer, CONVOLUTIONS) else UnscaledWeight
        return kind(slot.bit_width, rounding=self.weight_rounding, rescale=self.rescale, outputs=outputs_of(slot))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        clip: ClipInit
        if self.clip_init == "paper":
            clip = LINEAR_CLIP if isinstance(slot.layer, nn.Linear) else CONVOLUTION_CLIP
        else:
            clip = self.clip_init

        def make(bits: int) -> Quantizer:
            return AdabitsActivation(bits, rounding=self.activation_rounding, clip=clip, is_signed=slot.is_signed)

        widths = slot.widths or (slot.bit_width,)
        return for_widths(widths, make) if self.switchable_clip else make(widths[0])

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        return self.weight_quantizer(slot) if slot.purpose == "weight" else self.activation_quantizer(slot)

    def attach(self, job: QatJob) -> None:
        super().attach(job)
        if self.integer_images:
            for name, position in job.positions.items():
                if position == "first":
                    insert.set_input_transform(job.weights[name].layer, IntegerImage())

    def insert_norms(self, job: QatJob) -> None:
        if self.switchable_norms:
            super().insert_norms(job)
        if self.shares_affine:
            for module in job.model.modules():
                if isinstance(module, SwitchableNorm):
                    module.share_affine()

    def role(self, name: str, parameter: nn.Parameter, owner: nn.Module) -> Role:
        role = super().role(name, parameter, owner)
        is_depthwise = role == "weights" and parameter.dim() == 4 and parameter.shape[1] == 1
        return "weights.depthwise" if is_depthwise else role

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        """Weight decay on weights alone, but for depthwise ones."""
        specs, plain = super().optimizers(recipe), replace(recipe.optimizer, weight_decay=0.0)
        return {**specs, "weights.depthwise": plain, "others": plain}

    def training_switches(self, run: TrainRun) -> Iterable[LayerBits]:
        switches = switches_of(run.model)
        if self.adaptation == "joint":
            return switches
        stage = min(int(run.progress * len(switches)), len(switches) - 1)
        place = {"direct": 0, "direct_lowest": -1, "descending": stage, "ascending": -1 - stage}[self.adaptation]
        return (switches[place],)

    def losses(self, run: TrainRun, batch: Batch) -> Iterable[Tensor]:
        """As in every adaptive method; where one width is trained the others follow it.

        They do so first: behind the loss, whose backward pass may be still to come, no parameter may change.
        """
        if self.adaptation != "joint":
            (trained,) = self.training_switches(run)
            self._follow(run, batch, trained)
        yield from super().losses(run, batch)

    @torch.no_grad()
    def _follow(self, run: TrainRun, batch: Batch, trained: LayerBits) -> None:
        """Let the norms of the other widths see the batch, with the affine parameters and the clips of the one that is trained."""
        switches = switches_of(run.model)
        for switch in switches:
            if switch != trained:
                copy_parameters(run.model, trained, switch)
                set_bits(run.model, switch)
                run.predict(batch)
        set_bits(run.model, switches[0])


def outputs_of(slot: Slot) -> int:
    """The output units of a layer, times the size of its kernel."""
    channels = getattr(slot.layer, "out_channels", slot.layer.get_parameter(slot.parameter).shape[0])
    return int(channels) * math.prod(getattr(slot.layer, "kernel_size", ()))


def copy_parameters(model: nn.Module, source: LayerBits, target: LayerBits) -> None:
    """Give the norms and the clips of the switch ``target`` the parameters that ``source`` has."""
    for module in model.modules():
        if isinstance(module, SwitchableNorm):
            held, keys = module.norms, (switch_name(source), switch_name(target))
        elif isinstance(module, SwitchableQuantizer):
            held, keys = module.at, (str(source.activation), str(target.activation))
        else:
            continue
        if all(key in held for key in keys):
            for given, taken in zip(held[keys[0]].parameters(), held[keys[1]].parameters(), strict=True):
                taken.copy_(given)
