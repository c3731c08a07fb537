from __future__ import annotations

import pytest
import torch

from lowbit.errors import UnknownNameError
from lowbit.surrogates import (
    SURROGATES,
    bounded_straight_through,
    clipped_straight_through,
    make_surrogate,
    pass_gradient,
    round_straight_through,
    scale_gradient,
    straight_through,
)

X = [-3.0, -0.6, 0.5, 1.5, 2.6]


def grad_of(surrogate: object) -> tuple[list[float], list[float]]:
    x = torch.tensor(X, requires_grad=True)
    y = surrogate(x, -1, 2)  # type: ignore[operator]
    y.sum().backward()
    assert x.grad is not None
    return y.tolist(), x.grad.tolist()


def test_straight_through_passes_every_gradient() -> None:
    assert grad_of(straight_through) == ([-1.0, -1.0, 0.0, 2.0, 2.0], [1.0] * 5)


def test_clipped_straight_through_stops_gradients_outside_the_range() -> None:
    assert grad_of(clipped_straight_through) == ([-1.0, -1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 1.0, 1.0, 0.0])


def test_the_forward_value_is_exact_even_where_a_sum_would_round() -> None:
    x = (torch.rand(10_000) * 1e7).requires_grad_()
    assert torch.equal(round_straight_through(x), x.detach().round())


def test_bounded_straight_through_stops_positions_beyond_the_ends_even_where_they_round_to_one() -> None:
    x = torch.tensor([-1.2, -1.0, -0.4, 2.0, 2.2], requires_grad=True)
    y = bounded_straight_through(x, -1, 2)
    y.sum().backward()
    assert x.grad is not None
    assert (y.tolist(), x.grad.tolist()) == ([-1.0, -1.0, 0.0, 2.0, 2.0], [0.0, 1.0, 1.0, 1.0, 0.0])
    clipped = torch.tensor([-1.2, 2.2], requires_grad=True)
    clipped_straight_through(clipped, -1, 2).sum().backward()  # their codes are in the range
    assert clipped.grad is not None and clipped.grad.tolist() == [1.0, 1.0]


def test_bounds_that_are_learned_get_the_sum_of_what_they_clip() -> None:
    x, low, high = torch.tensor([-3.0, -2.0, 0.0, 4.0]), torch.tensor(-1.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    (clipped_straight_through(x, low, high) * torch.tensor([1.0, 2.0, 4.0, 8.0])).sum().backward()
    assert low.grad is not None and high.grad is not None
    assert (low.grad.item(), high.grad.item()) == (3.0, 8.0)


def test_rounding_is_half_to_even_in_every_form() -> None:
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5])
    for surrogate in (straight_through, clipped_straight_through, bounded_straight_through):
        assert surrogate(x, -4, 4).tolist() == [-2.0, 0.0, 0.0, 2.0]


def test_a_scaled_gradient_leaves_the_value_alone() -> None:
    x = torch.randn(5, requires_grad=True)
    y = scale_gradient(x, 0.25)
    assert torch.equal(y, x)
    (y * torch.arange(5.0)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, 0.25 * torch.arange(5.0))


def test_a_scaled_gradient_can_be_differentiated_again() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    (first,) = torch.autograd.grad(scale_gradient(x, 0.5) ** 2, x, create_graph=True)
    (second,) = torch.autograd.grad(first, x)
    assert (first.item(), second.item()) == (3.0, 0.5)  # the factor counts once for each pass through the value


def test_a_passed_gradient_goes_to_the_first_argument_alone() -> None:
    x, value = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
    y = pass_gradient(x, value)
    assert torch.equal(y, value)
    (3 * y).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [3.0] * 4 and value.grad is None


def test_every_named_surrogate_rounds_and_clamps_alike() -> None:
    x = torch.linspace(-1.4, 4.4, 117)
    expected = x.clamp(0, 3).round()
    for name in SURROGATES:
        assert torch.equal(make_surrogate(name)(x, 0, 3), expected), name


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match="ewgs"):
        make_surrogate("egws")
