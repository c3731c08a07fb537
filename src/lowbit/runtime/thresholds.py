"""Monotone operators followed by a sign, replaced by a comparison with one threshold for each channel.

Batch norms, shifts, clips and the like between a layer and a sign need not be computed: ``sign(f(x)) = +1`` means ``x >= t``, or ``x < t``
where ``f`` decreases. Source: Umuroglu et al. 2017, "FINN", section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 33  # bisections until one of all finite float32 numbers is left


def sign_threshold(function: Callable[[Tensor], Tensor], channels: int) -> tuple[Tensor, Tensor | None]:
    """The smallest float32 number of each channel at which the sign of ``function`` is the same as for all larger numbers.

    Args:
        function: Monotone in each channel; takes and returns float32 ``[channels]``, and is called a few dozen times.
        channels: Number of channels.

    Returns:
        ``threshold`` and ``flip``, both ``[channels]``: ``function(x) >= 0`` is ``(x >= threshold) != flip`` for finite ``x``. ``flip`` is
        ``None`` where the function decreases in no channel. The result is exact: the search sees the rounding inside ``function``.
    """
    low, high = torch.full((channels,), -_LAST), torch.full((channels,), _LAST)  # positions in the order of float32 numbers
    at_high = function(_number(high)) >= 0
    changes = at_high != (function(_number(low)) >= 0)
    for _ in range(STEPS):
        middle = (low + high).div(2, rounding_mode="floor")
        is_there = (function(_number(middle)) >= 0) == at_high
        low, high = torch.where(is_there, low, middle), torch.where(is_there, middle, high)
    threshold = torch.where(changes, _number(high), torch.where(at_high, -torch.inf, torch.inf))
    flip = changes & ~at_high
    return threshold, flip if bool(flip.any()) else None


_LAST = int(torch.tensor(torch.finfo(torch.float32).max).view(torch.int32))


def _number(position: Tensor) -> Tensor:
    """The float32 numbers at these positions in ascending order: ``0`` is zero, ``1`` the smallest positive, ``-1`` the largest negative."""
    bits = torch.where(position >= 0, position, torch.tensor(2**31) - position)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
