"""The place that a method creates a quantizer for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from lowbit.network.layers import WEIGHT, output_channel_axis
from lowbit.network.placement import Purpose
from lowbit.quantizers import Quantizer
from lowbit.spec import Position


@dataclass(frozen=True)
class Slot:
    """A place for a quantizer.

    Attributes:
        name: Name of the layer, for one of its several weights that of the parameter, such as ``lstm.weight_ih_l0``; for a tensor between
            layers its place, such as ``layer1.0.norm2.output``.
        layer: The layer itself; for a tensor between layers the module that the quantizer is hooked at.
        bit_width: Bit-width that the policy asks for.
        is_signed: Whether the values can be negative (True for weights, and where no values were seen yet).
        position: Whether the layer is the first or the last one to run.
        purpose: What is quantized: a layer's ``weight``, ``input`` or ``output``, or a tensor between layers that takes part in a
            ``sum`` or a ``concatenation``, goes into a ``pool``, or is a ``gate`` that another one is multiplied with.
        operand_of: The sums and concatenations that read the tensor, by name; quantizers of one merge can be one and the same.
        result_of: The sum or concatenation that the tensor comes from, or "".
        widths: The bit-widths that the quantizer has to have, from the highest on, in a network that switches between several; ``bit_width`` is
            the first one. Empty where it has one.
        parameter: The name of the layer's parameter, where a weight is quantized: ``weight``, or one of several such as ``weight_ih_l0``.

    Example:
        >>> import torch, lowbit
        >>> slot = lowbit.Slot("conv", torch.nn.ConvTranspose2d(3, 8, 3), bit_width=4)
        >>> str(slot), slot.channel_axis
        ("layer 'conv' (ConvTranspose2d)", 1)
    """

    name: str
    layer: nn.Module
    bit_width: int
    is_signed: bool = True
    position: Position = "inner"
    purpose: Purpose = "weight"
    operand_of: tuple[str, ...] = ()
    result_of: str = ""
    parameter: str = WEIGHT
    widths: tuple[int, ...] = ()

    @property
    def channel_axis(self) -> int:
        """The axis of the weight that counts output channels."""
        return output_channel_axis(self.layer)

    def __str__(self) -> str:
        kind = "layer" if self.purpose in ("weight", "input", "output") else self.purpose
        return f"{kind} {self.name!r} ({type(self.layer).__name__.removeprefix('Parametrized')})"


QuantizerFactory = Callable[[Slot], Quantizer]
MergeFactory = Callable[[Slot], Quantizer | None]  # None: the tensor stays float
