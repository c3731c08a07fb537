"""DoReFa-Net: low-bit weights, activations and gradients on fixed uniform grids.

Paper: Zhou, Wu, Ni, Zhou, Wen, Zou 2016, "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth
    Gradients". Eq. 5 (quantize_k), Eq. 7-9 (weights), Eq. 10-11 (activations), Eq. 12 (gradients).
Symbols: k -> bit_width, f_w -> DorefaWeight, f_a -> DorefaActivation, f_g -> GradientQuantizer, N(k) -> noise.
Differs from the paper:
    - Where a layer's input can be negative, activations are clipped to [-1, 1] instead of [0, 1].
    - A sample whose gradient is all zero keeps it, and a weight that is all zero is not divided by its maximum, because the authors' code
      divides by zero there.
    - The clip replaces a ReLU in the paper; here the ReLU stays in the network, where it changes nothing.
    - Gradients stay in float unless ``gradient_bits`` is set, because quantizing them changes the
      training, not the exported network.
    - ``rescale`` is an addition for networks without batch norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lowbit.network import insert
from lowbit.options import Interval
from lowbit.qat import OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.quantizers import Quantizer
from lowbit.quantizers.binary import ScaledSignQuantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.registry import MethodInfo, register

_NOTHING = 1e-20  # weights below it count as zeros: dividing by their maximum would make their gradients infinite


def squash(weight: Tensor) -> Tensor:
    """``tanh(w) / (2 max|tanh(w)|) + 1/2``, in ``[0, 1]``; the maximum over the whole tensor has its gradient too. Source: Eq. 9."""
    t = torch.tanh(weight)
    return t / (2 * largest_tanh(weight)) + 0.5


def largest_tanh(weight: Tensor) -> Tensor:
    """``max|tanh(w)|`` over the whole tensor, differentiable; 1 for a weight of zeros. Shape ``()``."""
    largest = torch.tanh(weight).abs().max()
    return torch.where(largest > _NOTHING, largest, torch.ones_like(largest))


def symmetric_codes(bit_width: int) -> tuple[int, int]:
    """``(-n, n)`` with ``n = 2**(k - 1) - 1``, 0 among them; at 1 bit, where that leaves nothing, 0 and 1."""
    top = 2 ** (bit_width - 1) - 1
    return (-top, top) if top else (0, 1)


class DorefaWeight(GridQuantizer):
    """Weights of 2 bits and more: ``2 quantize_k(squash(w)) - 1``, the odd multiples of ``1 / (2**k - 1)`` in ``[-1, 1]``.

    Backward: the surrogate's for the rounding, everything else by differentiation, the maximum included. Source: Eq. 9.

    Args:
        bit_width: 2 to 8.
        rescale: Multiply by ``max|tanh(w)|``, a constant in the backward pass, so that weights keep about the size they have.
    """

    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, rescale: bool = False) -> None:
        super().__init__(bit_width, *self.code_range(bit_width))
        self.rescale = rescale

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def prepare(self, x: Tensor) -> Tensor:
        # multiplied here, not divided by a rounded step: zeros are ties, which training and evaluation must break alike
        return squash(x) * self.qmax

    def size(self, x: Tensor) -> Tensor:
        """What the largest level stands for, shape ``()``."""
        return largest_tanh(x.detach()) if self.rescale else x.new_ones(())

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        # the authors' order of operations: sums of such products often are 1 up to rounding, where the next layer's clip ends
        weight = x.float()
        y = 2 * (self.surrogate(self.prepare(weight), self.qmin, self.qmax) / self.qmax) - 1
        return (y * self.size(weight) if self.rescale else y).to(x.dtype)

    def grid(self, x: Tensor) -> Grid:
        lower, step, zero_point = (x.new_tensor(value, dtype=torch.float32) for value in (0.0, 1.0, self.qmax / 2))
        return Grid(lower, step, self.size(x) * (2 / self.qmax), zero_point)


class DorefaActivation(GridQuantizer):
    """``quantize_k(clip(x, 0, 1))``; with ``is_signed`` ``2**k - 1`` levels from -1 to 1, zero among them, at 1 bit -1 and 1.

    Backward: 1 where ``x`` is inside the clip, bounds included, else 0. Source: Eq. 10-11.
    """

    bit_widths = range(1, 9)

    def __init__(self, bit_width: int, *, is_signed: bool = False) -> None:
        self.is_signed = is_signed
        super().__init__(bit_width, *self.code_range(bit_width))

    @property
    def is_binary(self) -> bool:
        """Whether the levels are -1 and 1."""
        return self.is_signed and self.bit_width == 1

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return symmetric_codes(bit_width) if self.is_signed else (0, 2**bit_width - 1)

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def grid(self, x: Tensor) -> Grid:
        if self.is_binary:
            low, high, half = (x.new_tensor(value, dtype=torch.float32) for value in (-1.0, 1.0, 0.5))
            return Grid(low, high - low, high - low, half, (low, high))
        zero, step, top = (x.new_tensor(value, dtype=torch.float32) for value in (0.0, 1 / self.qmax, 1.0))
        # products of such activations and weights often are 1 up to rounding: the gradient's bounds must be the clip's own
        return Grid(zero, step, step, zero, (x.new_tensor(self.qmin / self.qmax, dtype=torch.float32), top))


class _QuantizeGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: GradientQuantizer) -> Tensor:
        ctx.owner = owner
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.owner.quantize(grad, ctx.owner.uniform(grad)), None


class GradientQuantizer(nn.Module):
    """The identity in the forward pass; in training quantizes the gradient on its way back.

    Backward: with ``M`` the largest ``|g|`` of each sample, ``n = 2**k - 1`` and noise uniform in ``[-1/2, 1/2) / n``:
    ``2 M (quantize_k(clip(g / (2 M) + 1/2 + noise, 0, 1)) - 1/2)``. Source: Eq. 12.

    Args:
        bit_width: 1 to 8.
    """

    def __init__(self, bit_width: int) -> None:
        super().__init__()
        self.bit_width = bit_width
        self.generator: torch.Generator | None = None

    def forward(self, output: Tensor, x: Tensor) -> Tensor:
        passed: Tensor = _QuantizeGradient.apply(output, self) if self.training and output.requires_grad else output
        return passed

    def uniform(self, grad: Tensor) -> Tensor:
        """Fresh noise in ``[0, 1)`` for every element."""
        return torch.rand(grad.shape, generator=self.generator).to(grad.device)

    def quantize(self, grad: Tensor, uniform: Tensor) -> Tensor:
        """The quantized gradient for noise ``uniform`` in ``[0, 1)``."""
        steps = 2**self.bit_width - 1
        largest = grad.abs().amax(dim=tuple(range(1, grad.dim())), keepdim=True)
        divisor = torch.where(largest > 0, largest, torch.ones_like(largest))
        share: Tensor = grad / (2 * divisor) + 0.5 + (uniform - 0.5) / steps
        quantized: Tensor = 2 * largest * ((share.clamp(0, 1) * steps).round() / steps - 0.5)
        return quantized.to(grad.dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "generator": None}  # the generator belongs to a run


@register(
    MethodInfo(
        name="dorefa",
        title="DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
        paper="Zhou, Wu, Ni, Zhou, Wen, Zou 2016",
        url="https://arxiv.org/abs/1606.06160",
        section="quantization_aware",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="exact",
        summary="fixed grids: weights squashed by tanh, activations clipped to [0, 1], gradients in few bits too",
        evidence="checked against the authors' code",
        margin_points=55,
    )
)
@dataclass
class Dorefa(TrainingMethod):
    """Fixed uniform grids.

    Weights lie in ``[-1, 1]`` whatever their scale was, and 2 bits have no zero. Each layer therefore needs a batch norm after it, whose
    statistics have to be learned from scratch.

    Attributes:
        gradient_bits: Bits of the gradients of layer outputs, 1 to 8; 32 leaves them in float.
        rescale: Multiply weights of 2 bits or more by their ``max|tanh(w)|``, for networks without a batch norm after each layer; with
            one it makes no difference to what is learned.
    """

    ends = "float"

    gradient_bits: Annotated[int | Literal[32], Interval(1, 8)] = 32
    rescale: bool = False

    def default_recipe(self) -> Recipe:
        """The SVHN network of the authors' code, without its weight decay of 1e-7 on the classifier."""
        return Recipe(200, 128, OptimizerSpec("adam", 1e-3, weight_decay=0.0, schedule="step", milestones=(0.5,), gamma=0.5))

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return ScaledSignQuantizer() if slot.bit_width == 1 else DorefaWeight(slot.bit_width, rescale=self.rescale)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return DorefaActivation(slot.bit_width, is_signed=slot.is_signed)

    def attach(self, job: QatJob) -> None:
        super().attach(job)
        if self.gradient_bits != 32:
            for name, layer in job.layers.items():
                if not job.is_excepted(name):
                    insert.set_output_transform(layer, GradientQuantizer(self.gradient_bits))

    def start_phase(self, run: TrainRun) -> None:
        for module in run.model.modules():
            if isinstance(module, GradientQuantizer):
                module.generator = run.generator
