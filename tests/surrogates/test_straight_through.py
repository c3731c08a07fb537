from __future__ import annotations

import torch

from lowbit.surrogates import clipped_straight_through, round_straight_through, straight_through

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
