"""Gradient surrogates, one per file, usable with any quantizer whose levels are evenly spaced."""

from collections.abc import Callable

from lowbit.errors import unknown_name
from lowbit.surrogates.approx_sign import ApproxSign
from lowbit.surrogates.base import Surrogate, pass_gradient, scale_gradient
from lowbit.surrogates.daq import DistanceAwareRounding
from lowbit.surrogates.dsq import SoftTanh
from lowbit.surrogates.ede import ErrorDecay
from lowbit.surrogates.ewgs import ElementwiseGradientScaling
from lowbit.surrogates.sigmoids import Sigmoids
from lowbit.surrogates.straight_through import (
    bounded_straight_through,
    clipped_straight_through,
    inner_straight_through,
    round_straight_through,
    straight_through,
)
from lowbit.surrogates.swish_sign import SwishSign

SURROGATES: dict[str, Callable[[], Surrogate]] = {
    "ste": lambda: straight_through,
    "clipped_ste": lambda: bounded_straight_through,
    "ewgs": ElementwiseGradientScaling,
    "daq": DistanceAwareRounding,
    "dsq": SoftTanh,
    "sigmoids": Sigmoids,
    "approx_sign": ApproxSign,
    "ede": ErrorDecay,
    "swish_sign": SwishSign,
}


def make_surrogate(name: str) -> Surrogate:
    """A new surrogate by name; those with parameters or state are modules. UnknownNameError with the nearest name otherwise."""
    if name not in SURROGATES:
        raise unknown_name("surrogate", name, SURROGATES)
    return SURROGATES[name]()


__all__ = [
    "SURROGATES", "ApproxSign", "DistanceAwareRounding", "ElementwiseGradientScaling", "ErrorDecay", "Sigmoids", "SoftTanh", "Surrogate",
    "SwishSign", "bounded_straight_through", "clipped_straight_through", "inner_straight_through", "make_surrogate", "pass_gradient",
    "round_straight_through", "scale_gradient", "straight_through",
]  # fmt: skip
