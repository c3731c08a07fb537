"""Quantizers that work on values normalised to a learned interval, and a learned scale of the layer's output.

Weights become ``2 q - 1`` and activations ``q`` with ``q`` in ``[0, 1]``; what that does to the size of the layer's output is undone by
the output scale. It multiplies the levels of the weight, and the bias, so that the layer stays an ordinary one in exported files.

Source: Lee et al. 2021, "Network Quantization with Element-wise Gradient Scaling", section 3.1; Kim et al. 2021, "Distance-aware
Quantization", section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor, nn

from lowbit.network import insert
from lowbit.network.layers import WEIGHT
from lowbit.options import AtLeast
from lowbit.qat import OptimizerSpec, Recipe, Slot, TrainingMethod
from lowbit.qat.attach.output_ratio import output_ratio
from lowbit.qat.recipe import Role
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.ranges.scale_search import SMALLEST_SCALE
from lowbit.surrogates import Surrogate


class NormalizedQuantizer(GridQuantizer):
    """Evenly spaced levels on the learned interval ``[lower, upper]``.

    Forward: ``q = round(clamp((x - lower) / (upper - lower), 0, 1) N) / N`` with ``N = 2**k - 1``; activations become ``q``, weights and
    signed activations ``2 q - 1``, times ``|output_scale|`` where there is one.
    Backward: the surrogate's for the rounding, everything else by differentiation.
    All bit-widths share the interval and the output scale.

    Args:
        bit_width: 1 to 8.
        is_centred: Whether the values are ``2 q - 1``.
        has_output_scale: Whether the levels are multiplied by a learned output scale.
        learns_lower: Whether the lower end is learned too; else it is 0, or ``-upper`` where values are centred.
        surrogate: Backward rule of the rounding.
    """

    bit_widths = range(1, 9)

    def __init__(
        self, bit_width: int, *, is_centred: bool, has_output_scale: bool = False, learns_lower: bool = True, surrogate: Surrogate
    ) -> None:
        super().__init__(bit_width, *self.code_range(bit_width), surrogate=surrogate)
        self.is_centred, self.learns_lower = is_centred, learns_lower
        self.upper = nn.Parameter(torch.tensor(float("nan")))
        self.lower = nn.Parameter(torch.tensor(float("nan"))) if learns_lower else None
        self.output_scale = nn.Parameter(torch.ones(())) if has_output_scale else None
        self.is_probed = False
        self.discretized: Tensor | None = None  # q of the last pass, while it is probed

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    def set_interval(self, lower: Tensor, upper: Tensor) -> None:
        """Start at this interval; one of no width gets the width 1."""
        upper = torch.where(is_open(lower, upper), upper, lower + 1)
        self.upper.data.copy_(upper)
        if self.lower is not None:
            self.lower.data.copy_(lower)

    def interval(self) -> tuple[Tensor, Tensor]:
        """``(lower, upper)``, differentiable."""
        if self.lower is not None:
            return self.lower, self.upper
        return (-self.upper if self.is_centred else torch.zeros_like(self.upper)), self.upper

    def grid(self, x: Tensor) -> Grid:
        lower, upper = self.interval()
        scale = torch.full_like(self.upper, (2 if self.is_centred else 1) / self.qmax)
        if self.output_scale is not None:
            scale = scale * self.output_scale.abs()
        return Grid(lower, (upper - lower) / self.qmax, scale, torch.full_like(self.upper, self.qmax / 2 if self.is_centred else 0.0))

    def scale_bias(self, bias: Tensor) -> Tensor:
        """``|output_scale| * bias``: the scale is that of a layer's whole output."""
        return bias if self.output_scale is None else bias * self.output_scale.abs()

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_probed:
            return super().forward(x)
        values = x.float()
        grid = self.grid(values)
        self.discretized = self.surrogate((self.prepare(values) - grid.lower) / grid.step, self.qmin, self.qmax) / self.qmax
        return ((self.discretized * self.qmax - grid.zero_point) * grid.scale).to(x.dtype)

    @torch.no_grad()
    def project(self) -> None:
        """Keep the interval from closing."""
        lower = self.interval()[0] if self.lower is not None else torch.zeros_like(self.upper)
        self.upper.copy_(torch.where(is_open(lower, self.upper), self.upper, lower + smallest_width(lower)))


def spread_of(values: Tensor) -> Tensor:
    """Three (unbiased) standard deviations; of values that are all alike their magnitude, so that they keep their sign."""
    largest = values.abs().max()
    spread = 3 * values.std() if values.numel() > 1 else torch.zeros_like(largest)
    return torch.where(spread > 1e-5 * largest, spread, largest)


def is_open(lower: Tensor, upper: Tensor) -> Tensor:
    """Whether the interval has a width, however small its ends are, beyond their rounding."""
    return (upper - lower > 1e-6 * lower.abs()) & (upper - lower > SMALLEST_SCALE)


def smallest_width(lower: Tensor) -> Tensor:
    """The least width of an interval that starts at ``lower``: far above the rounding of float32, far below what data need."""
    return 1e-8 + 1e-6 * lower.abs()


@torch.no_grad()
def initialize_output_scale(layer: nn.Module, x: Tensor | None, parameter: str = WEIGHT) -> None:
    """``mean |layer(x)|`` in float over ``mean |layer(x)|`` with its initialized quantizers, bias included in both.

    Without an input the same of the weight, see ``output_ratio``.
    """
    owner = output_scale_owner(layer, parameter)
    if owner is not None and owner.output_scale is not None:
        owner.output_scale.fill_(1)
        owner.output_scale.copy_(output_ratio(layer, x, parameter=parameter))


def output_scale_owner(layer: nn.Module, parameter: str = WEIGHT) -> NormalizedQuantizer | None:
    """The quantizer that holds the layer's output scale: the weight's, or the input's where the weight stays in float."""
    for quantizer in (insert.weight_quantizer(layer, parameter), insert.input_quantizer(layer)):
        if isinstance(quantizer, NormalizedQuantizer) and quantizer.output_scale is not None:
            return quantizer
    return None


def needs_output_scale(slot: Slot) -> bool:
    """Whether the quantizer of a layer's input has to hold the output scale, because the weight has no quantizer that does."""
    return insert.weight_quantizer(slot.layer) is None


@dataclass
class NormalizingMethod(TrainingMethod):
    """A method whose quantizers are normalized ones.

    Attributes:
        quantizer_learning_rate: Adam learning rate of intervals and output scales, as a fraction of the weights'.
    """

    quantizer_learning_rate: Annotated[float, AtLeast(0)] = 0.01

    def initialize_layer(self, layer: nn.Module, x: Tensor | None, parameter: str = WEIGHT) -> None:
        super().initialize_layer(layer, x, parameter)
        initialize_output_scale(layer, x, parameter)

    def optimizers(self, recipe: Recipe) -> Mapping[Role, OptimizerSpec]:
        roles = dict(super().optimizers(recipe))
        return {**roles, "quantizers": replace(roles["quantizers"], kind="adam")}
