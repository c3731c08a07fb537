from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.surrogates import DistanceAwareRounding


def gradient(values: Tensor, gamma: float = 2.0, sigma: float = 1.0) -> tuple[Tensor, Tensor]:
    x = values.clone().requires_grad_()
    y = DistanceAwareRounding(gamma, sigma)(x, 0, 3)
    y.sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def soft_rounding(v: Tensor, gamma: float, sigma: float) -> Tensor:
    """The paper's soft argmax over the two neighbouring levels, with the constants detached as the authors do."""
    floor = v.detach().floor()
    z = v - floor
    scores = torch.stack([torch.exp(-(z - c).abs()) for c in (0.0, 1.0)])
    other = math.exp(-1 / sigma**2)
    is_low = scores.detach()[0] >= scores.detach()[1]
    kernel = torch.stack([torch.where(is_low, 1.0, other), torch.where(is_low, other, 1.0)])
    weighted = scores * kernel
    sharpness = (gamma / (weighted[0] - weighted[1]).abs()).detach()
    probabilities = torch.softmax(sharpness * weighted, 0)
    low, high = -1 / (math.exp(gamma) - 1), 1 + 1 / (math.exp(gamma) - 1)
    return floor + low * probabilities[0] + high * probabilities[1]


@pytest.mark.parametrize(("gamma", "sigma"), [(2.0, 1.0), (2.0, 2.0), (0.5, 0.7), (4.0, 1.5)])
def test_value_and_gradient_equal_the_soft_argmax_of_the_paper(gamma: float, sigma: float) -> None:
    v = torch.linspace(0.013, 2.987, 200, dtype=torch.float64)
    y, found = gradient(v, gamma, sigma)
    soft = v.clone().requires_grad_()
    expected = soft_rounding(soft, gamma, sigma)
    expected.sum().backward()
    torch.testing.assert_close(y, expected.detach())
    torch.testing.assert_close(found, soft.grad)


def test_the_gradient_is_largest_at_decision_points_and_symmetric_about_them() -> None:
    distances = torch.linspace(0, 0.49, 20)
    _, above = gradient(1.5 + distances)
    _, below = gradient(1.5 - distances)
    torch.testing.assert_close(above, below)
    assert (above.diff() < 0).all()
    assert above[0].item() == pytest.approx(0.5967, abs=1e-4)  # gamma 2, sigma 1
    assert gradient(torch.tensor([1.0]))[1].item() == pytest.approx(0.362, abs=1e-3)


def test_every_step_has_the_same_gradient() -> None:
    z = torch.tensor([0.0, 0.25, 0.6])
    torch.testing.assert_close(gradient(z)[1], gradient(z + 2)[1])


def test_a_narrow_kernel_gives_a_constant_gradient() -> None:
    _, found = gradient(torch.linspace(0, 3, 50), 2.0, 0.05)
    torch.testing.assert_close(found, torch.full((50,), 1 / math.sinh(2)))


def test_clipped_values_get_none_and_both_ends_get_one() -> None:
    y, found = gradient(torch.tensor([-0.1, 0.0, 3.0, 3.1]))
    assert y.tolist() == [0, 0, 3, 3]
    assert (found > 0).tolist() == [False, True, True, False]


def test_rounding_is_half_to_even() -> None:
    assert gradient(torch.tensor([0.5, 1.5, 2.5]))[0].tolist() == [0, 2, 2]


@pytest.mark.parametrize(("gamma", "sigma"), [(0.0, 1.0), (-1.0, 1.0), (500.0, 1.0), (2.0, 0.0), (float("nan"), 1.0)])
def test_constants_out_of_range_are_refused(gamma: float, sigma: float) -> None:
    with pytest.raises(SpecError, match="gamma above 0"):
        DistanceAwareRounding(gamma, sigma)


def test_the_sharpest_assignment_has_a_gradient() -> None:
    assert gradient(torch.tensor([1.5]), 80.0)[1].item() > 0
