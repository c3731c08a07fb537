from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lowbit.errors import SpecError
from lowbit.surrogates import Sigmoids, make_surrogate


def at(temperature: float) -> Sigmoids:
    return Sigmoids(temperature, temperature)


def slope(surrogate: Sigmoids, values: list[float], low: float = 0, high: float = 3) -> list[float]:
    x = torch.tensor(values, requires_grad=True)
    surrogate(x, low, high).sum().backward()
    assert x.grad is not None
    return x.grad.tolist()


def test_codes_are_rounded_half_to_even_and_clipped() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 1.5, 2.5, 9.0])
    assert at(5.0)(x, 0, 3).tolist() == [0, 0, 0, 2, 2, 3]


@pytest.mark.parametrize("temperature", [3.0, 10.0])
def test_the_slope_is_the_derivative_of_the_sum_of_sigmoids(temperature: float) -> None:
    x = torch.linspace(-1.4, 4.4, 59, dtype=torch.float64).requires_grad_()
    sum(torch.sigmoid(temperature * (x - step - 0.5)) for step in range(3)).sum().backward()
    found = slope(at(temperature), x.detach().float().tolist())
    torch.testing.assert_close(torch.tensor(found), x.grad.float(), rtol=1e-3, atol=2e-3)


def test_the_slope_at_a_decision_point_alone_is_a_quarter_of_the_temperature() -> None:
    far = 40 / (1 + math.exp(10)) / (1 + math.exp(-10))  # the argument of a sigmoid is clamped to 10
    assert slope(at(40.0), [0.5, 0.0, -7.0], 0, 1) == pytest.approx([10.0, far, far], rel=1e-3)


def test_the_mean_square_of_a_steep_slope_is_a_sixth_of_the_temperature() -> None:
    x = ((torch.arange(30_000) + 0.5) / 10_000).tolist()
    for temperature in (30.0, 60.0):
        squares = torch.tensor(slope(at(temperature), x)).square().mean()
        assert float(squares) == pytest.approx(temperature / 6, rel=0.01)


def test_the_temperature_follows_training_and_is_kept_in_the_state() -> None:
    surrogate = Sigmoids(2.0, 6.0)
    surrogate.set_progress(0.25)
    assert float(surrogate.temperature) == 3.0
    other = Sigmoids()
    other.load_state_dict(surrogate.state_dict())
    assert slope(other, [0.5, 0.7]) == slope(surrogate, [0.5, 0.7])


@pytest.mark.parametrize("start, end", [(0.0, 5.0), (-1.0, 5.0), (1.0, math.inf), (math.nan, 5.0)])
def test_temperatures_must_be_positive_and_finite(start: float, end: float) -> None:
    with pytest.raises(SpecError, match="sigmoids: temperatures must be positive"):
        Sigmoids(start, end)


def gradient_norm_through(depth: int, temperature: float) -> float:
    """Of the input of a chain of orthogonal maps with a quantizer after each, for a gradient of norm 1 at the end."""
    generator = torch.Generator().manual_seed(0)
    surrogate, x = at(temperature), torch.randn(64, 200, generator=generator).requires_grad_()
    y: torch.Tensor = x
    for _ in range(depth):
        matrix = torch.linalg.qr(torch.randn(200, 200, generator=generator)).Q
        y = surrogate(nn.functional.layer_norm(y @ matrix, (200,)), -4, 3)
    grad = torch.randn(y.shape, generator=generator)
    y.backward(grad / grad.norm())
    assert x.grad is not None
    return float(x.grad.norm())


def test_gradients_through_many_quantizers_keep_their_size_at_the_default_temperatures_and_explode_at_high_ones() -> None:
    default = make_surrogate("sigmoids")
    assert isinstance(default, Sigmoids)
    for temperature in (default.start, default.end):
        assert 0.5 < gradient_norm_through(8, temperature) < 10
    assert gradient_norm_through(8, 50.0) > 200
