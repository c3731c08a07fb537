"""The straight-through estimator: the step counts as the identity in the backward pass.

Source: Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons"; Hubara et al. 2016 for the clipped form.
"""

from __future__ import annotations

from torch import Tensor

from lowbit.surrogates.base import clamp, pass_gradient


def round_straight_through(x: Tensor) -> Tensor:
    """Forward: ``round(x)``, half to even. Backward: 1 everywhere."""
    return pass_gradient(x, x.round())


def straight_through(position: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Forward: ``clamp(round(position), low, high)``. Backward: 1 everywhere, also outside the range."""
    return pass_gradient(position, clamp(position.detach().round(), low, high))


def clipped_straight_through(position: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Forward: ``clamp(round(position), low, high)``. Backward: 1 where ``low <= round(position) <= high``, else 0.

    Bounds that need a gradient (a learned range) get it from the clamp: the sum over the clipped elements.
    """
    return clamp(round_straight_through(position), low, high)


def bounded_straight_through(position: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Forward: ``clamp(round(position), low, high)``. Backward: 1 where ``low <= position <= high``, else 0."""
    return round_straight_through(clamp(position, low, high))


def inner_straight_through(position: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Forward: ``clamp(round(position), low, high)``. Backward: 1 where ``low < position < high``, else 0, the bounds included."""
    inside = (position > low) & (position < high)
    return pass_gradient(position * inside, clamp(position.detach().round(), low, high))
