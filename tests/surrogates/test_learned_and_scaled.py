"""Surrogates with a gradient of their own: scaled, distance-aware, soft, sigmoids."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import UnknownNameError
from lowbit.surrogates import (
    SURROGATES,
    DistanceAwareRounding,
    ElementwiseGradientScaling,
    Sigmoids,
    SoftTanh,
    bounded_straight_through,
    make_surrogate,
    scale_gradient,
)

POSITIONS = [-1.0, -0.2, 0.0, 0.3, 1.5, 2.5, 2.9, 3.0, 3.4, 9.0]


def gradient(surrogate: object, positions: list[float], incoming: list[float] | None = None) -> Tensor:
    x = torch.tensor(positions, requires_grad=True)
    y = surrogate(x, 0, 3)  # type: ignore[operator]
    y.backward(torch.ones_like(y) if incoming is None else torch.tensor(incoming))
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("name", SURROGATES)
def test_the_forward_pass_clamps_and_rounds_half_to_even(name: str) -> None:
    y = make_surrogate(name)(torch.tensor(POSITIONS), 0, 3)
    assert y.tolist() == [0, 0, 0, 0, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("name", [name for name in SURROGATES if name not in ("ste", "sigmoids", "approx_sign", "ede", "swish_sign")])
def test_values_beyond_the_range_get_no_gradient_and_its_ends_do(name: str) -> None:
    found = gradient(make_surrogate(name), POSITIONS)
    assert (found[[0, 1, 8, 9]] == 0).all()
    assert (found[[2, 3, 4, 5, 6, 7]] > 0).all()


def test_an_unknown_surrogate_names_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'ewgs'"):
        make_surrogate("ewg")


def test_the_bounded_estimator_is_one_inside() -> None:
    assert gradient(bounded_straight_through, POSITIONS).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_scaled_gradients_grow_towards_the_next_decision_point_and_shrink_away_from_it() -> None:
    found = gradient(ElementwiseGradientScaling(0.6), [1.3, 1.3, 0.7, 2.0], [1.0, -1.0, 2.0, 5.0])
    # error / (high - low): 0.1, 0.1, -0.1, 0
    torch.testing.assert_close(found, torch.tensor([1.06, -0.94, 2 * 0.94, 5.0]))


def test_no_strength_is_the_straight_through_estimator_bit_for_bit() -> None:
    x = torch.linspace(-1, 4, 101).tolist()
    assert torch.equal(gradient(ElementwiseGradientScaling(0.0), x), gradient(bounded_straight_through, x))


def test_scaled_gradients_can_be_differentiated_again() -> None:
    x = torch.tensor([1.3], requires_grad=True)
    y = ElementwiseGradientScaling(0.6)(x, 0, 3)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)  # 2 y (1 + 0.6 * 0.1)
    (second,) = torch.autograd.grad(first, x)
    assert first.item() == pytest.approx(2 * 1.06)
    assert second.item() == pytest.approx(2 * 1.06**2)


def test_distance_aware_gradients_are_largest_at_the_decision_point() -> None:
    found = gradient(DistanceAwareRounding(2.0, 1.0), [1.0, 1.25, 1.4999, 1.75])
    factor = 2 / (2 * math.sinh(2))
    expected = [factor / math.tanh(distance + 0.5) for distance in (0.5, 0.25, 0.0001, 0.25)]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)
    assert pytest.approx(float(found.min()), abs=1e-3) == 0.362
    assert pytest.approx(float(found.max()), abs=1e-3) == 0.597


@pytest.mark.parametrize("alpha", [0.05, 0.2, 0.4])
def test_the_soft_curve_has_slope_one_on_average_and_its_peak_at_the_decision_point(alpha: float) -> None:
    x = (torch.arange(20_000) + 0.5) / 10_000
    found = gradient(SoftTanh(alpha), x.tolist())
    assert float(found.mean()) == pytest.approx(1.0, abs=1e-3)
    assert float(found.max()) == pytest.approx(0.5 / (1 - alpha) * math.log(2 / alpha - 1), rel=1e-3)
    assert float(found.min()) >= 0


def test_the_gradient_of_alpha_is_the_derivative_of_the_soft_curve() -> None:
    position, alpha, h = 1.3, 0.2, 1e-4

    def curve(a: float) -> float:
        return 1 + (math.tanh(math.log(2 / a - 1) * (position - 1.5)) / (1 - a) + 1) / 2

    surrogate = SoftTanh(alpha)
    surrogate(torch.tensor([position]), 0, 3).sum().backward()
    assert surrogate.alpha.grad is not None
    assert surrogate.alpha.grad.item() == pytest.approx((curve(alpha + h) - curve(alpha - h)) / (2 * h), rel=1e-3)


def test_sigmoids_grow_steeper_with_training_and_keep_their_mass() -> None:
    surrogate = Sigmoids()
    masses, peaks = [], []
    x = torch.arange(-20_000, 50_000) / 10_000
    for progress in (0.0, 1.0):
        surrogate.set_progress(progress)
        found = gradient(surrogate, x.tolist())
        masses.append(float(found.sum()) / 10_000)
        peaks.append(float(found.max()))
    assert masses == pytest.approx([3.0, 3.0], rel=0.02)
    assert peaks[1] > 2 * peaks[0]


def test_a_scaled_gradient_leaves_the_value() -> None:
    x = torch.tensor([2.0], requires_grad=True)
    y = scale_gradient(x, 0.25)
    y.backward(torch.tensor([8.0]))
    assert y.item() == 2.0
    assert x.grad is not None and x.grad.item() == 2.0
