"""XNOR-Net and BWN: weights, or weights and inputs, become plus and minus one times a scale.

Paper: Rastegari, Ordonez, Redmon, Farhadi 2016, "XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
    ECCV. Section 3.1 (binary weights, Eq. 4 to 6), section 3.2 (binary inputs, Eq. 11 for K; block order in Figure 3), Algorithm 1.
Symbols: W -> weight, B -> its signs, alpha -> scale, I -> x, A -> mean magnitude over channels, K -> ``InputScale.scale_map``.
Activations left in float give the paper's BWN, activations of one bit give XNOR-Net.
Differs from the paper:
    - The gradient of the weights follows the chain rule (``corrected``), because the paper's formula lacks a sum.
    - Weights are centred and clamped as in the authors' code, but right after each step instead of before it, so that the network is
      always the one that the next step trains.
    - A layer with one input channel per group (depthwise) is not centred, because nothing would be left of it.
    - Zero counts as positive, because the authors' ``sign(0) = 0`` cannot be stored in one bit (``zero_inputs`` trains with theirs).
    - Blocks keep their order, as reordering them to the paper's norm, sign, convolution, pooling takes knowledge of the network. Where
      inputs are never negative (behind a ReLU their signs would all be equal), ``input_norm`` inserts a norm before the sign.
    - K also exists for grouped layers (one map per group) and transposed ones (the mean over the inputs that reach an output).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.network import insert
from lowbit.network.layers import TRANSPOSED, WEIGHT
from lowbit.options import Above
from lowbit.qat import OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.qat.attach.input_norm import NormPlaces, insert_with_norms
from lowbit.quantizers import Quantizer, ScaledSignQuantizer, SignQuantizer
from lowbit.quantizers.ops import input_scale, mark_input_scale
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient, scale_gradient

WeightGradient = Literal["corrected", "paper", "ste"]


def input_channels(layer: nn.Module, parameter: str = WEIGHT) -> int:
    """Input channels that one output channel of ``layer`` sees."""
    weight = insert.float_weight(layer, parameter)
    return weight.shape[0] // int(layer.groups) if isinstance(layer, TRANSPOSED) else weight.shape[1]


def centre(weight: Tensor, *, groups: int = 1, is_transposed: bool = False) -> Tensor:
    """``weight`` minus its mean over the input channels, one mean for each output channel and kernel position.

    Args:
        weight: ``[out, in / groups, ...]``, transposed ``[in, out / groups, ...]``.
        groups: Number of groups.
        is_transposed: Whether the layer is a transposed convolution.

    Returns:
        Shaped like ``weight``; ``weight`` itself where there is one input channel.

    Source: authors' code, before each iteration.
    """
    by_group = weight.unflatten(0, (groups, -1)) if is_transposed else weight
    if by_group.shape[1] == 1:
        return weight
    centred = by_group - by_group.mean(1, keepdim=True)
    return centred.flatten(0, 1) if is_transposed else centred


def weight_proxy(weight: Tensor, scale: Tensor, size: int, gradient: WeightGradient) -> Tensor:
    """An expression whose gradient is that of ``scale * sign(weight)`` by the rule ``gradient``; its value has no meaning.

    With ``g`` the gradient of the binary weight, ``n = size`` and the sum over the elements of a filter:

    - ``corrected``: ``scale * [|w| <= 1] * g + sign(w) / n * sum(g * sign(w))``, the chain rule with the clipped estimator;
    - ``paper``: ``g * (1 / n + scale * [|w| < 1])``;
    - ``ste``: ``scale * g``.

    Args:
        weight: Any shape.
        scale: ``mean |weight|`` of each filter, differentiable, broadcasting with ``weight``.
        size: Elements of a filter.
        gradient: The rule.

    Source: section 3.1 below Eq. 6 (``paper``).
    """
    fixed, size_of = scale.detach(), weight.detach().abs()
    if gradient == "ste":
        return weight * fixed
    if gradient == "paper":
        return weight * (1 / size + fixed * (size_of < 1))
    signs = torch.where(weight.detach() >= 0, 1.0, -1.0)
    return scale * signs + weight * (fixed * (size_of <= 1))


def sign_with_zero(x: Tensor) -> Tensor:
    """The authors' binary input, which has a third value: ``sign(x)`` with ``sign(0) = 0``. Backward: 1 where ``|x| < 1``, else 0."""
    return pass_gradient(x * (x.detach().abs() < 1), x.detach().sign())


class XnorActivation(SignQuantizer):
    """The sign of inputs; in training with ``has_zero`` the authors' sign, in which 0 stays 0."""

    def __init__(self, *, has_zero: bool = False) -> None:
        super().__init__()
        self.has_zero = has_zero

    def forward(self, x: Tensor) -> Tensor:
        if self.has_zero and self.training and self.surrogate is None:
            return sign_with_zero(x.float()).to(x.dtype)
        return super().forward(x)


class XnorWeightQuantizer(ScaledSignQuantizer):
    """Two levels for each output channel: plus and minus its mean magnitude.

    Forward: ``mean |w| * sign(w)``, ``sign(0) = 1``. Backward: ``weight_proxy``, times ``multiplier``, times the elements of a
    filter where ``multiplies_by_size``.

    Args:
        granularity: One scale for each of these.
        gradient: ``corrected``, ``paper`` or ``ste``.
        multiplier: Factor of the gradient.
        multiplies_by_size: Multiply it by the elements of a filter too.
    """

    def __init__(
        self, *, granularity: Granularity, gradient: WeightGradient = "corrected", multiplier: float = 1.0, multiplies_by_size: bool = False
    ) -> None:
        super().__init__(granularity=granularity)
        self.gradient, self.multiplier, self.multiplies_by_size = gradient, multiplier, multiplies_by_size

    def proxy(self, x: Tensor) -> Tensor:
        size = max(x.numel() // max(math.prod(self.granularity.scale_shape(x)), 1), 1)
        factor = self.multiplier * (size if self.multiplies_by_size else 1)
        if factor != 1:
            x = scale_gradient(x, factor)
        return weight_proxy(x, self.scale(x), size, self.gradient)


class InputScale(nn.Module):
    """The paper's K: the output of a layer with binary inputs times the mean magnitude of the inputs that each output sees.

    ``A = mean |x|`` over the channels (of a group), ``K = A`` convolved with a constant kernel of sum 1 at the layer's stride,
    padding and dilation; behind a linear layer the mean over the features of each sample. The bias is not scaled.

    Args:
        layer: The layer whose outputs are scaled.
        has_gradient: Whether gradients pass through ``|x|``.

    Source: section 3.2, Eq. 11.
    """

    before_bias = True

    def __init__(self, layer: nn.Module, *, has_gradient: bool = True) -> None:
        super().__init__()
        self.has_gradient = has_gradient
        self.is_transposed = isinstance(layer, TRANSPOSED)
        self.kernel_size: tuple[int, ...] = getattr(layer, "kernel_size", ())
        self.groups: int = getattr(layer, "groups", 1)
        self.stride: tuple[int, ...] = getattr(layer, "stride", ())
        self.padding: tuple[int, ...] | str = getattr(layer, "padding", ())
        self.dilation: tuple[int, ...] = getattr(layer, "dilation", ())
        self.padding_mode: str = getattr(layer, "padding_mode", "zeros")

    def scale_map(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        """K for the input ``x``: ``[N, groups, *size]``, ``size`` being the dimensions of space of the output; linear ``[..., 1]``."""
        x = x if self.has_gradient else x.detach()
        dims = len(self.kernel_size)
        if not dims:
            return x.abs().mean(-1, keepdim=True)
        if self.is_transposed:
            by_group = x.abs().unflatten(-dims - 1, (self.groups, -1)).mean(-dims - 1)
            ones = by_group.new_ones(self.groups, 1, *self.kernel_size)
            return self._spread(by_group, ones, size) / self._spread(torch.ones_like(by_group), ones, size).clamp(min=1)
        sides = self._sides()
        if self.padding_mode != "zeros" or any(first != last for first, last in sides):
            mode = self.padding_mode if self.padding_mode != "zeros" else "constant"
            x, sides = functional.pad(x, [pad for pair in reversed(sides) for pad in pair], mode=mode), [(0, 0)] * dims
        scale = mark_input_scale if torch.compiler.is_exporting() else input_scale
        padding = [first for first, _ in sides]
        found: Tensor = scale(x, list(self.kernel_size), list(self.stride), padding, list(self.dilation), self.groups)
        return found

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        dims = len(self.kernel_size)
        scale = self.scale_map(x, tuple(output.shape[-dims:]) if dims else ()).to(output.dtype)
        if dims and self.groups > 1:
            scale = scale.repeat_interleave(output.shape[-dims - 1] // self.groups, -dims - 1)
        return output * scale

    def _spread(self, x: Tensor, kernel: Tensor, size: tuple[int, ...]) -> Tensor:
        """The transposed convolution whose result has the dimensions ``size``, which the caller of the layer may have chosen."""
        assert not isinstance(self.padding, str)
        given = zip(size, x.shape[-len(size) :], self.kernel_size, self.stride, self.padding, self.dilation, strict=True)
        extra = [out - ((n - 1) * stride - 2 * padding + dilation * (k - 1) + 1) for out, n, k, stride, padding, dilation in given]
        convolve = (functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)[len(size) - 1]
        return convolve(x, kernel, None, self.stride, self.padding, extra, self.groups, self.dilation)

    def _sides(self) -> list[tuple[int, int]]:
        """Padding before and behind, for each dimension of space."""
        if isinstance(self.padding, str):
            totals = [d * (k - 1) if self.padding == "same" else 0 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
            return [(total // 2, total - total // 2) for total in totals]
        return [(padding, padding) for padding in self.padding]


@register(
    MethodInfo(
        name="xnor_net",
        title="XNOR-Net: ImageNet Classification Using Binary Convolutional Neural Networks",
        paper="Rastegari, Ordonez, Redmon, Farhadi, ECCV 2016",
        url="https://arxiv.org/abs/1603.05279",
        section="quantization_aware",
        axes=("weight_quantizer", "activation_quantizer", "procedure"),
        kind="training",
        weight_bits=range(1, 2),
        activation_bits=range(1, 2),
        needs=("labels",),
        fidelity="exact",
        summary="binary weights with a scale for each filter; binary inputs too, or float ones (BWN)",
        evidence="checked against the authors' code and two ports",
        margin_points=40,
    )
)
@dataclass
class XnorNet(TrainingMethod):
    """Binary weights and inputs.

    Attributes:
        weight_gradient: ``corrected`` (chain rule), ``paper`` (without its sum) or ``ste`` (times the scale).
        centre: Keep the mean of a stored weight over its input channels at 0.
        clamp: Keep stored weights within -1 and 1, where the estimator passes gradients.
        centring_gradient: Multiply the gradient of weights by ``1 - 1 / input channels``, as both programs do for the centring.
        gradient_multiplier: Factor of the gradient of weights. The authors' code uses ``1e9`` with Adam (for all parameters, and
            instead of ``multiply_by_size``), which makes weight decay and epsilon negligible.
        multiply_by_size: Multiply the gradient of weights by the elements of a filter, as the authors' code does with SGD. The scale
            in the gradient otherwise makes steps so small that few signs change in a short run. With Adam it makes no difference.
        input_scaling: Multiply outputs by K, the mean magnitude of the inputs that they come from (binary inputs only). The paper has
            it and finds that it adds less than 1 % accuracy; the authors' code does not.
        input_scaling_gradient: Let gradients pass through K.
        input_norm: Put a batch norm before the sign: ``unsigned`` (where inputs are never negative), ``always`` or ``never``.
        norm_epsilon: Epsilon of that batch norm.
        zero_inputs: Let inputs of exactly 0 stay 0 in training, as in the authors' code; otherwise 0 counts as positive.
    """

    ends = "float"

    weight_gradient: WeightGradient = "corrected"
    centre: bool = True
    clamp: bool = True
    centring_gradient: bool = False
    gradient_multiplier: Annotated[float, Above(0)] = 1.0
    multiply_by_size: bool = False
    input_scaling: bool = False
    input_scaling_gradient: bool = True
    input_norm: NormPlaces = "unsigned"
    norm_epsilon: Annotated[float, Above(0)] = 1e-4
    zero_inputs: bool = False

    def default_recipe(self) -> Recipe:
        """Network in network on CIFAR-10, in the PyTorch port."""
        return Recipe(320, 128, OptimizerSpec("adam", 0.01, weight_decay=1e-5, schedule="step", milestones=(3 / 8, 5 / 8, 3 / 4, 7 / 8)))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        channels = input_channels(slot.layer, slot.parameter)
        centring = 1 - 1 / channels if self.centring_gradient and channels > 1 else 1
        return XnorWeightQuantizer(
            granularity=Granularity.channel(slot.channel_axis),
            gradient=self.weight_gradient,
            multiplier=self.gradient_multiplier * centring,
            multiplies_by_size=self.multiply_by_size,
        )

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return XnorActivation(has_zero=self.zero_inputs)

    def attach(self, job: QatJob) -> None:
        def activation_quantizer(slot: Slot) -> Quantizer:
            if self.input_scaling:
                insert.set_output_transform(slot.layer, InputScale(slot.layer, has_gradient=self.input_scaling_gradient))
            return self.activation_quantizer(slot)

        def weight_quantizer(slot: Slot) -> Quantizer:
            self.prepare_weight(slot.layer, slot.parameter)
            return self.weight_quantizer(slot)

        insert_with_norms(
            job, weight_quantizer, activation_quantizer, self.initialize_layer, norm=self.input_norm, epsilon=self.norm_epsilon
        )

    def prepare_weights(self, model: nn.Module) -> None:
        """Centre and clamp all stored weights that this method made binary."""
        for site in insert.quantized_weights(model).values():
            if isinstance(site.quantizer, XnorWeightQuantizer):
                self.prepare_weight(site.layer, site.parameter)

    @torch.no_grad()
    def prepare_weight(self, layer: nn.Module, parameter: str = WEIGHT) -> None:
        """Centre and clamp the stored weight of ``layer``, unless it is frozen."""
        weight = insert.float_weight(layer, parameter)
        if not weight.requires_grad:
            return
        if self.centre:
            weight.copy_(centre(weight, groups=int(getattr(layer, "groups", 1)), is_transposed=isinstance(layer, TRANSPOSED)))
        if self.clamp:
            weight.clamp_(-1, 1)

    def after_step(self, run: TrainRun) -> None:
        """Centre and clamp the weights for the next step."""
        self.prepare_weights(run.model)
