"""Gradient surrogates, one per file, usable with any quantizer."""

from lowbit.surrogates.base import Surrogate, pass_gradient
from lowbit.surrogates.straight_through import clipped_straight_through, round_straight_through, straight_through

SURROGATES: dict[str, Surrogate] = {"ste": straight_through, "clipped_ste": clipped_straight_through}

__all__ = ["SURROGATES", "Surrogate", "clipped_straight_through", "pass_gradient", "round_straight_through", "straight_through"]
