from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.errors import SpecError
from lowbit.qat import Classification, Recipe, TrainRun
from lowbit.qat.prepare import method_of
from lowbit.quantizers import SignQuantizer
from lowbit.surrogates import ErrorDecay, make_surrogate
from lowbit.surrogates.ede import error_decay


def at(steepness: float) -> ErrorDecay:
    surrogate = ErrorDecay()
    surrogate.set_curve(max(1 / steepness, 1.0), steepness)
    return surrogate


def slope(surrogate: ErrorDecay, x: Tensor, low: float = 0, high: float = 3) -> Tensor:
    x = x.clone().requires_grad_()
    surrogate(x, low, high).sum().backward()
    assert x.grad is not None
    return x.grad


def slope_of_sign(surrogate: ErrorDecay, x: Tensor) -> Tensor:
    quantizer = SignQuantizer()
    quantizer.surrogate = surrogate
    x = x.clone().requires_grad_()
    quantizer(x).sum().backward()
    assert x.grad is not None
    return x.grad


def test_codes_are_rounded_half_to_even_and_clipped_whatever_the_steepness() -> None:
    x = torch.tensor([-3.0, -0.5, 0.5, 1.5, 2.5, 9.0])
    for steepness in (0.1, 10.0):
        assert at(steepness)(x, 0, 3).tolist() == [0, 0, 0, 2, 2, 3]


@pytest.mark.parametrize("steepness", [0.1, 0.7, 1.0, 10.0])
def test_the_slope_for_a_sign_is_the_papers_and_nothing_cuts_it_off(steepness: float) -> None:
    x = torch.tensor([-5.0, -1.0, -0.3, 0.0, 0.2, 1.0, 1.5, 4.0])
    height = max(1 / steepness, 1)
    expected = height * steepness / torch.cosh(steepness * x.double()).square()
    torch.testing.assert_close(slope_of_sign(at(steepness), x), expected.float(), rtol=1e-4, atol=1e-6)
    assert (slope_of_sign(at(0.1), x) > 0.7).all()


@pytest.mark.parametrize("steepness", [0.5, 10.0])
def test_the_area_under_the_slope_for_a_sign_is_twice_the_height(steepness: float) -> None:
    x = torch.linspace(-20, 20, 400_001)
    assert float(slope_of_sign(at(steepness), x).sum() * 1e-4) == pytest.approx(2 * max(1 / steepness, 1), rel=1e-3)


def test_on_several_levels_the_shape_around_each_decision_point_is_that_of_the_sign() -> None:
    surrogate, offsets = at(3.0), torch.linspace(-0.49, 0.49, 15)
    expected = slope_of_sign(surrogate, 2 * offsets)
    for decision in (-1.5, -0.5, 0.5, 1.5):
        torch.testing.assert_close(slope(surrogate, decision + offsets, -2, 2), expected, rtol=1e-4, atol=1e-5)
    beyond = slope(surrogate, torch.tensor([2.25, -2.25]), -2, 2)  # 0.75 from the outermost decision points
    torch.testing.assert_close(beyond, slope_of_sign(surrogate, torch.tensor([1.5, -1.5])), rtol=1e-4, atol=1e-5)


def test_the_slope_is_continuous_at_levels() -> None:
    below, above = slope(at(2.0), torch.tensor([1 - 1e-4, 1 + 1e-4])).tolist()
    assert below == pytest.approx(above, rel=1e-3)


def test_the_schedule_grows_from_a_line_to_the_sign() -> None:
    assert error_decay(0, 400) == pytest.approx((10.0, 0.1))
    assert error_decay(200, 400) == pytest.approx((1.0, 1.0))
    assert error_decay(400, 400) == pytest.approx((1.0, 10.0))
    assert error_decay(1, 4, t_min=0.001, t_max=10) == pytest.approx((100.0, 0.01))
    pairs = [error_decay(epoch, 60) for epoch in range(60)]
    steepness = [t for _, t in pairs]
    assert steepness == sorted(steepness) and len(set(steepness)) == 60
    for k, t in pairs:
        assert k * t == pytest.approx(max(t, 1.0))


def test_the_curve_follows_progress_and_is_kept_in_the_state() -> None:
    surrogate = ErrorDecay(0.1, 10.0)
    assert (float(surrogate.height), float(surrogate.steepness)) == pytest.approx((10.0, 0.1))
    surrogate.set_progress(0.75)
    assert (float(surrogate.height), float(surrogate.steepness)) == pytest.approx((1.0, 10**0.5))
    other, x = ErrorDecay(), torch.tensor([0.2, 0.7, 1.4])
    other.load_state_dict(surrogate.state_dict())
    assert torch.equal(slope(other, x), slope(surrogate, x))
    assert not list(surrogate.parameters())


def test_it_moves_with_the_run_behind_any_quantizer() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(16, 6)
    model = lowbit.prepare(net, method="lsq", weight_bits=2, activation_bits=2, sample=x, surrogate="ede").train()
    run = TrainRun(model, method_of(model), Classification(), Recipe(2), 2)
    found = [module for module in model.modules() if isinstance(module, ErrorDecay)]
    assert len(found) == 6  # a weight and an input of three layers
    run.start_phase()
    for step in range(4):
        run.step = step
        run.before_step()
        assert [float(surrogate.steepness) for surrogate in found] == pytest.approx([0.1 * 100 ** (step / 4)] * 6, rel=1e-5)
    run.loss((x, torch.zeros(16, dtype=torch.int64))).backward()
    assert all(parameter.grad is not None and torch.isfinite(parameter.grad).all() for parameter in model.parameters())


@pytest.mark.parametrize("bounds", [(0.0, 5.0), (-1.0, 5.0), (2.0, 1.0), (1.0, math.inf), (math.nan, 5.0)])
def test_steepness_must_be_positive_and_grow(bounds: tuple[float, float]) -> None:
    with pytest.raises(SpecError, match="ede: steepness must be positive and grow"):
        ErrorDecay(*bounds)


def test_it_has_a_name() -> None:
    assert isinstance(make_surrogate("ede"), ErrorDecay)
