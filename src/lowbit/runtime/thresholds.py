"""A sign behind operators that are monotone in each channel is a comparison with one number for each channel.

Batch norm, shifts, clips and the like between a layer and a sign need not be computed: ``sign(f(x)) = +1`` is ``x >= t``, or ``x < t``
where ``f`` falls. Source: Umuroglu et al. 2017, "FINN", section 4.2.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STEPS = 33  # halve the interval of all finite float32 numbers until one is left


def sign_threshold(function: Callable[[Tensor], Tensor], channels: int) -> tuple[Tensor, Tensor | None]:
    """The smallest float32 number of each channel from which on the sign of ``function`` is what it is for large numbers.

    Args:
        function: Monotone in each channel; takes and returns float32 ``[channels]``, and is called a few dozen times.
        channels: How many.

    Returns:
        ``threshold`` and ``flip``, both ``[channels]``: ``function(x) >= 0`` is ``(x >= threshold) != flip`` for finite ``x``. ``flip`` is
        ``None`` where the function falls in no channel. Exact: rounding inside ``function`` is seen by the search.
    """
    low, high = torch.full((channels,), -_LAST), torch.full((channels,), _LAST)  # numbered in the order of float32 numbers
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
    """The float32 numbers at these places of their order: ``0`` is zero, ``1`` the smallest positive one, ``-1`` the largest negative one."""
    bits = torch.where(position >= 0, position, torch.tensor(2**31) - position)
    return torch.where(bits >= 2**31, bits - 2**32, bits).to(torch.int32).view(torch.float32)
