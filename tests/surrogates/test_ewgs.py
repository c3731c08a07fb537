from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.surrogates import ElementwiseGradientScaling, bounded_straight_through, make_surrogate

X = [-0.4, 0.0, 0.3, 0.5, 1.5, 1.6, 3.0, 3.2]


def gradient(surrogate: object, values: list[float], grad: list[float] | None = None) -> tuple[Tensor, Tensor]:
    x = torch.tensor(values, requires_grad=True)
    y = surrogate(x, 0, 3)  # type: ignore[operator]
    y.backward(torch.ones_like(y) if grad is None else torch.tensor(grad))
    assert x.grad is not None
    return y.detach(), x.grad


def test_codes_are_rounded_half_to_even_and_clamped() -> None:
    assert gradient(ElementwiseGradientScaling(0.7), X)[0].tolist() == [0, 0, 0, 0, 2, 2, 3, 3]


def test_gradients_are_scaled_by_the_error_on_a_range_of_one() -> None:
    _, found = gradient(ElementwiseGradientScaling(0.6), X)
    errors = torch.tensor([0, 0, 0.3, 0.5, -0.5, -0.4, 0, 0]) / 3
    inside = torch.tensor([0, 1, 1, 1, 1, 1, 1, 0])
    torch.testing.assert_close(found, (1 + 0.6 * errors) * inside)


def test_an_element_that_moves_towards_its_decision_point_gets_more() -> None:
    # descent moves against the gradient: a negative one raises 0.7, away from the threshold 0.5 below it
    _, found = gradient(ElementwiseGradientScaling(0.9), [0.7, 0.7, 1.0, 0.7], [1.0, -1.0, 2.0, 0.0])
    torch.testing.assert_close(found, torch.tensor([1 - 0.09, -1 - 0.09, 2.0, 0.0]))


def test_a_strength_of_zero_is_straight_through_to_the_bit() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(3).tolist()
    assert torch.equal(gradient(ElementwiseGradientScaling(0.0), values)[1], gradient(bounded_straight_through, values)[1])


def test_factors_are_bounded_by_half_a_step() -> None:
    values = torch.linspace(0, 3, 301).tolist()
    _, found = gradient(ElementwiseGradientScaling(0.8), values)
    assert found.max().item() == pytest.approx(1 + 0.8 / 6) and found.min().item() == pytest.approx(1 - 0.8 / 6)


def test_bounds_may_be_tensors() -> None:
    x = torch.tensor([[-1.0, 0.4], [2.0, 5.0]], requires_grad=True)
    y = ElementwiseGradientScaling(0.5)(x, torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [3.0]]))  # type: ignore[arg-type]
    y.sum().backward()
    assert y.tolist() == [[0, 0], [2, 3]] and x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0, 1 + 0.5 * 0.4], [1, 0]]))


def test_the_second_derivative_takes_error_and_sign_as_constants() -> None:
    x = torch.tensor([0.3, 1.2], requires_grad=True)
    y = ElementwiseGradientScaling(0.6)(x, 0, 3)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    factors = 1 + 0.6 * torch.tensor([0.0, 0.2 / 3])  # the gradient of the first one is 2 * 0 and has no sign
    torch.testing.assert_close(first, 2 * torch.tensor([0.0, 1.0]) * factors)
    # through y once with the factor of the outer gradient's sign, once with that of the inner one's
    outer = 1 + 0.6 * torch.tensor([0.3, 0.2]) / 3
    torch.testing.assert_close(second, 2 * factors * outer)


def test_the_strength_is_saved_but_not_learned() -> None:
    surrogate = make_surrogate("ewgs")
    assert isinstance(surrogate, ElementwiseGradientScaling)
    assert list(surrogate.state_dict()) == ["delta"] and not list(surrogate.parameters())
    other = ElementwiseGradientScaling(0.25)
    surrogate.load_state_dict(other.state_dict())
    assert float(surrogate.delta) == 0.25


@pytest.mark.parametrize("delta", [-0.1, float("nan")])
def test_a_strength_below_zero_is_refused(delta: float) -> None:
    with pytest.raises(SpecError, match="delta of 0 or more"):
        ElementwiseGradientScaling(delta)
