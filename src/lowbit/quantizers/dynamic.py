"""Activation quantizers whose grid is computed from each input: per tensor, per sample, or per sample and channel.

Nothing is learned or calibrated. ``encode`` returns the codes with the scales of that input, so the law of all quantizers holds.
As a runtime cannot know the scales in advance, exported networks compute the grid and the layer behind it in float; the export
report calls these layers "emulated".
"""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers.affine import affine_parameters, qrange
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.spec import Granularity
from lowbit.surrogates import Surrogate, straight_through


class DynamicQuantizer(GridQuantizer):
    """A quantizer whose grid follows from the statistics of each input.

    A subclass writes ``grid_of(x)``; statistics are taken along ``granularity.shared_axes(x)`` and get no gradient.
    ``Granularity.over(0)`` gives each sample its own grid and ``over(0, 1)`` each channel of each sample; samples of a batch then do
    not influence each other. Without axes the whole batch shares one.

    Args:
        bit_width: 1 to 8.
        qmin, qmax: Integer range of the codes.
        granularity: Which elements share a grid.
        surrogate: Backward rule of the rounding; the default passes the gradient of clipped values too.
    """

    is_dynamic = True

    def __init__(
        self, bit_width: int, qmin: int, qmax: int, *, granularity: Granularity | None = None, surrogate: Surrogate = straight_through
    ) -> None:
        super().__init__(bit_width, qmin, qmax, granularity=granularity, surrogate=surrogate)
        if self.granularity.group_size:
            raise SpecError(f"{type(self).__name__}: activations have no groups. Use axes, for example Granularity.over(0, 1).")

    @abstractmethod
    def grid_of(self, x: Tensor) -> Grid:
        """The grid for ``x``, float32; every part of the shape ``granularity.scale_shape(x)``."""

    def grid(self, x: Tensor) -> Grid:
        return self.grid_of(x.detach())

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def statistic(self, reduce: str, x: Tensor) -> Tensor:
        """``amin``, ``amax``, ``mean``, ``sum``, ... of ``x`` for each scale, shaped to broadcast."""
        axes = self.granularity.shared_axes(x)
        result: Tensor = getattr(x, reduce)(axes, keepdim=bool(self.granularity.axes)) if axes else x
        return result


class DynamicMinMaxQuantizer(DynamicQuantizer):
    """An affine grid from the smallest to the largest value of each input, widened to contain 0.

    Forward: ``(clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point) * scale``; values that are all 0 stay 0.
    Backward: the surrogate's; nothing through the range.

    Args:
        bit_width: 1 to 8; symmetric 2 to 8.
        symmetric: Signed codes with the zero point 0; else unsigned ones.
        granularity: Which elements share a range.
        surrogate: Backward rule of the rounding.

    >>> import torch
    >>> from lowbit import Granularity
    >>> from lowbit.quantizers.dynamic import DynamicMinMaxQuantizer
    >>> quantizer = DynamicMinMaxQuantizer(2, granularity=Granularity.over(0))
    >>> quantizer(torch.tensor([[0.0, 1.1, 3.0], [0.0, 11.0, 30.0]]))
    tensor([[ 0.,  1.,  3.],
            [ 0., 10., 30.]])
    """

    def __init__(
        self,
        bit_width: int,
        *,
        symmetric: bool = False,
        granularity: Granularity | None = None,
        surrogate: Surrogate = straight_through,
    ) -> None:
        if symmetric and bit_width == 1:
            raise SpecError("a symmetric signed grid needs at least 2 bits; use SignQuantizer for 1 bit")
        self.symmetric = symmetric
        super().__init__(bit_width, *self.code_range(bit_width), granularity=granularity, surrogate=surrogate)

    @property
    def bit_widths(self) -> range:
        return range(2 if self.symmetric else 1, 9)

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return qrange(bit_width, signed=self.symmetric)

    def grid_of(self, x: Tensor) -> Grid:
        lower, upper = self.statistic("amin", x), self.statistic("amax", x)
        scale, zero_point = affine_parameters(lower, upper, self.qmin, self.qmax, symmetric=self.symmetric)
        return Grid(-zero_point * scale, scale, scale, zero_point)
