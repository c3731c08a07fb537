"""How good guessing is: what an accuracy has to exceed to mean anything."""

from __future__ import annotations

import math

import torch

RISK = 1e-3  # probability with which guessing reaches the bound


def guessing_bound(samples: int, classes: int, risk: float = RISK) -> float:
    """The accuracy that guessing among equally likely classes reaches with a probability of at most ``risk``; infinite where it always may.

    The least ``k / samples`` with ``P(X >= k) <= risk``, where ``X`` is binomial with ``samples`` draws of probability ``1 / classes``.

    >>> guessing_bound(100, 10), guessing_bound(2, 2)
    (0.21, inf)
    """
    hits = torch.arange(samples + 1, dtype=torch.float64)
    misses, total = samples - hits, torch.tensor(samples + 1.0, dtype=torch.float64)
    ways = torch.lgamma(total) - torch.lgamma(hits + 1) - torch.lgamma(misses + 1)
    chances = (ways - hits * math.log(classes) + misses * math.log1p(-1 / classes)).exp()
    tail = chances.flip(0).cumsum(0).flip(0)  # P(X >= k)
    reached = (tail <= risk).nonzero()
    return float(reached[0]) / samples if len(reached) else math.inf
