"""The surrogates that stand for the derivative of a sign: a parabola, and a curve of two swishes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.quantizers import SignQuantizer
from lowbit.surrogates import ApproxSign, Surrogate, SwishSign, make_surrogate
from lowbit.surrogates.approx_sign import approx_sign
from lowbit.surrogates.swish_sign import swish_sign

X = torch.linspace(-2.0, 2.0, 41)


def slope(x: Tensor, surrogate: Surrogate) -> Tensor:
    """The gradient of the sign with this surrogate."""
    quantizer = SignQuantizer()
    quantizer.surrogate = surrogate
    x = x.clone().requires_grad_()
    y = quantizer(x)
    assert torch.equal(y, torch.where(x >= 0, 1.0, -1.0))
    y.sum().backward()
    assert x.grad is not None
    return x.grad


def test_the_parabola_has_its_derivative_and_an_area_of_two() -> None:
    torch.testing.assert_close(slope(X, ApproxSign()), (2 - 2 * X.abs()).clamp(min=0))
    dense = torch.linspace(-1.5, 1.5, 30001)
    assert abs(torch.trapezoid(slope(dense, ApproxSign()), dense) - 2) < 1e-3
    assert torch.equal(approx_sign(torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0])), torch.tensor([-1, -1, -0.75, 0, 0.75, 1, 1]))


@pytest.mark.parametrize("beta", [1.0, 5.0, 10.0])
def test_the_swishes_have_the_paper_s_derivative_and_tend_to_the_sign(beta: float) -> None:
    z = beta * X.double()
    expected = beta * (2 - z * torch.tanh(z / 2)) / (1 + torch.cosh(z))
    torch.testing.assert_close(slope(X, SwishSign(beta)).double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(swish_sign(torch.tensor([-50.0, 0.0, 50.0]), beta), torch.tensor([-1.0, 0.0, 1.0]))
    with pytest.raises(SpecError, match="positive beta"):
        SwishSign(-beta)


@pytest.mark.parametrize("name", ["approx_sign", "swish_sign", "ede"])
def test_on_more_levels_the_same_curve_lies_around_each_decision_point(name: str) -> None:
    surrogate = make_surrogate(name)
    offsets = torch.linspace(-0.45, 0.45, 7)
    position = torch.cat([point + offsets for point in (0.5, 1.5, 2.5)]).requires_grad_()
    code = surrogate(position, 0, 3)
    assert torch.equal(code, position.detach().clamp(0, 3).round())
    code.sum().backward()
    by_point = position.grad.view(3, 7)
    torch.testing.assert_close(by_point[1], by_point[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_point[2], by_point[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(by_point[0], slope(2 * offsets, make_surrogate(name)), rtol=1e-4, atol=1e-5)
