"""Codebook quantization: any ascending levels; a value takes the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.ops import count_below, mark_codebook
from lowbit.quantizers.qtensor import CodebookDecoder, QTensor
from lowbit.spec import Granularity
from lowbit.surrogates import pass_gradient


def nearest_level(x: Tensor, levels: Tensor) -> Tensor:
    """Index of the level nearest to each value; a value midway takes the lower level, NaN the lowest.

    Args:
        x: ``[rows, n]``.
        levels: ``[rows, k]``, ascending in each row.

    Returns:
        int64 ``[rows, n]``, 0 to ``k - 1``.
    """
    return count_below(x, (levels[:, 1:] + levels[:, :-1]) / 2)


class CodebookQuantizer(TableQuantizer):
    """``2**bit_width`` free levels for each scale of the granularity.

    Forward: the nearest level (ties to the lower one). Backward: 1 (straight-through).
    Each bit-width has its own levels: those of a new width are interpolated between the current ones, at evenly spaced indices.
    """

    tables: tuple[str, ...] = ("levels",)
    tables_by_width: tuple[str, ...] = ("levels",)
    bit_widths = range(1, 9)

    def __init__(self, bit_width: int, *, granularity: Granularity | None = None) -> None:
        super().__init__(bit_width, granularity or Granularity.tensor())
        self.levels: Tensor

    def set_levels(self, levels: Tensor) -> None:
        """Fix the levels: ``[2**bit_width]`` or one row for each scale, ascending."""
        levels = levels if levels.dim() == 2 else levels.reshape(1, -1)
        if levels.shape[1] != 2**self.bit_width or bool((levels.diff(dim=1) < 0).any()) or not bool(torch.isfinite(levels).all()):
            raise SpecError(
                f"a {self.bit_width}-bit codebook needs rows of {2**self.bit_width} finite ascending levels, got shape {tuple(levels.shape)}"
            )
        self._set_table("levels", levels)

    def carry_over(self, old_bits: int) -> None:
        old = self.levels.detach()
        places = torch.arange(2**self.bit_width, device=old.device) * ((2**old_bits - 1) / (2**self.bit_width - 1))
        below = places.floor().long().clamp(max=2**old_bits - 2)
        self.set_levels(torch.lerp(old[:, below], old[:, below + 1], (places - below).to(old.dtype)))

    def initialize(self, x: Tensor) -> None:
        """Quantiles of the data as levels: each code is used equally often."""
        probabilities = (torch.arange(2**self.bit_width, device=x.device) + 0.5) / 2**self.bit_width
        rows = self.granularity.flatten(x.detach().float())
        ordered = rows.sort(dim=1).values
        picks = (probabilities * rows.shape[1]).long().clamp(max=rows.shape[1] - 1)
        self.set_levels(ordered[:, picks])

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting() and not self.granularity.axes:
            levels = self.levels[0]
            marked: Tensor = mark_codebook(x, (levels[1:] + levels[:-1]) / 2, levels)
            return marked
        return pass_gradient(x, self.encode(x).decode().to(x.dtype))

    def encode(self, x: Tensor) -> QTensor:
        levels = self.levels.detach()
        rows = nearest_level(self.granularity.flatten(x.detach()), levels)
        return QTensor(self.granularity.unflatten(rows, x.shape).to(torch.uint8), CodebookDecoder(levels, self.granularity), self.bit_width)
