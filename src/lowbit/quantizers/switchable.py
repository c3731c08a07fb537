"""A quantizer of several widths with parameters of its own at each of them, all trained side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from torch import Tensor, nn

from lowbit.quantizers.base import Quantizer
from lowbit.quantizers.qtensor import QTensor


class SwitchableQuantizer(Quantizer):
    """One quantizer for each width; calls go to that of the current one.

    Where ``Quantizer.set_bit_width`` puts the parameters of other widths aside, these are parameters all the time, so that an
    optimizer trains every width's own in one step. Parameters of a width that is not selected get no gradient.

    Args:
        widths: Bit-widths, the first one selected.
        make: Makes the quantizer of a width.

    Example:
        >>> import torch
        >>> from lowbit.quantizers import LearnedScaleQuantizer
        >>> quantizer = SwitchableQuantizer((8, 2), lambda bits: LearnedScaleQuantizer(bits, signed=False))
        >>> quantizer.initialize(torch.linspace(0, 1, 64))
        >>> quantizer.set_bit_width(2)
        >>> quantizer.bit_width, quantizer(torch.linspace(0, 9, 64)).unique().numel(), len(list(quantizer.parameters()))
        (2, 4, 2)
    """

    def __init__(self, widths: Iterable[int], make: Callable[[int], Quantizer]) -> None:
        made = {bits: make(bits) for bits in widths}
        first = next(iter(made.values()))
        super().__init__(next(iter(made)), first.granularity)
        self.at = nn.ModuleDict({str(bits): quantizer for bits, quantizer in made.items()})

    @property
    def current(self) -> Quantizer:
        """The quantizer of the current width."""
        return cast(Quantizer, self.at[str(self.bit_width)])

    @property
    def bit_widths(self) -> Sequence[int]:
        return tuple(map(int, self.at))

    def has_grid_for(self, bits: int) -> bool:
        return str(bits) in self.at

    def forward(self, x: Tensor) -> Tensor:
        return self.current(x)

    def encode(self, x: Tensor) -> QTensor:
        return self.current.encode(x)

    def initialize(self, x: Tensor) -> None:
        """Every width from the same data."""
        for quantizer in self.at.values():
            cast(Quantizer, quantizer).initialize(x)


def parts_of(quantizer: Quantizer) -> list[Quantizer]:
    """The quantizers of all widths, or the quantizer itself where it has no others inside."""
    return [cast(Quantizer, part) for part in quantizer.at.values()] if isinstance(quantizer, SwitchableQuantizer) else [quantizer]


def for_widths(widths: Sequence[int], make: Callable[[int], Quantizer]) -> Quantizer:
    """A quantizer with parameters of its own at each of ``widths``; the plain one where there is a single width."""
    return make(widths[0]) if len(widths) == 1 else SwitchableQuantizer(widths, make)
