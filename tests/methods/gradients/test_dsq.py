from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.methods.gradients.dsq import Dsq, DsqQuantizer, ObservedDsqQuantizer


def between(lower: float, upper: float, bit_width: int = 2, **options: object) -> DsqQuantizer:
    quantizer = DsqQuantizer(bit_width, **options)  # type: ignore[arg-type]
    quantizer.set_bounds(torch.tensor(lower), torch.tensor(upper))
    return quantizer


X = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 2


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.5])
def test_the_forward_pass_is_uniform_rounding_whatever_the_sharpness(alpha: float) -> None:
    y = between(-1.0, 2.0, alpha=alpha)(X)
    torch.testing.assert_close(y, X.clamp(-1, 2).add(1).round().sub(1), atol=1e-6, rtol=0)


def gradients(quantizer: DsqQuantizer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of every element to itself, and of each output alone to the bounds."""
    lower, upper = [], []
    x = x.clone().requires_grad_()
    y = quantizer(x)
    for index in range(len(x)):
        a, b = torch.autograd.grad(y[index], (quantizer.lower, quantizer.upper), retain_graph=True)
        lower.append(a)
        upper.append(b)
    (own,) = torch.autograd.grad(y.sum(), x)
    return own, torch.stack(lower), torch.stack(upper)


def test_moving_everything_moves_the_output_and_clipped_elements_belong_to_their_bound() -> None:
    x = X[:60]
    own, lower, upper = gradients(between(-1.0, 2.0), x)
    torch.testing.assert_close(own + lower + upper, torch.ones(60), atol=1e-4, rtol=0)
    below, above = x < -1, x > 2
    assert below.any() and above.any()
    torch.testing.assert_close(lower[below], torch.ones(int(below.sum())), atol=1e-5, rtol=0)
    torch.testing.assert_close(upper[above], torch.ones(int(above.sum())), atol=1e-5, rtol=0)
    assert (own[below | above] == 0).all()


def test_a_fixed_affine_grid_rounds_and_has_the_soft_gradient() -> None:
    x = torch.tensor([0.24, 0.26, 3.0], requires_grad=True)
    quantizer = ObservedDsqQuantizer(2, is_weight=True, alpha=0.4).eval()
    quantizer.set_parameters(torch.tensor(0.5), torch.tensor(2.0))
    y = quantizer(x)
    assert y.tolist() == [0.0, 0.5, 0.5]
    y.sum().backward()
    assert x.grad is not None
    assert x.grad[0].item() == pytest.approx(1.155, abs=0.01) and x.grad[2] == 0


def test_blended_bounds_learn_a_tenth_and_evaluation_uses_the_running_ones() -> None:
    quantizer = between(-1.0, 2.0, momentum=0.1)
    quantizer.upper.data.fill_(12.0)
    assert quantizer.train()(torch.tensor([99.0])).item() == pytest.approx(0.9 * 2 + 0.1 * 12)
    assert quantizer.eval()(torch.tensor([99.0])).item() == pytest.approx(2.0)


def test_levels_can_span_the_clipped_data() -> None:
    quantizer = between(-1.0, 2.0, spans_data=True)
    assert quantizer(torch.tensor([-0.5, 0.2, 0.7])).tolist() == pytest.approx([-0.5, 0.3, 0.7], abs=1e-6)
    assert torch.isfinite(quantizer(torch.full((3,), 0.25))).all()


def test_projection_keeps_the_range_open_and_the_sharpness_in_range() -> None:
    quantizer = between(0.0, 1.0)
    quantizer.upper.data.fill_(-2.0)
    quantizer.surrogate.alpha.data.fill_(3.0)  # type: ignore[attr-defined]
    quantizer.project()
    assert float(quantizer.upper) > 0 and float(quantizer.surrogate.alpha) == 0.5  # type: ignore[attr-defined]


def test_the_penalty_is_the_squared_sharpness() -> None:
    assert between(0.0, 1.0, alpha=0.3, alpha_decay=2.0).penalty().item() == pytest.approx(0.18)
    with pytest.raises(SpecError, match="alpha"):
        Dsq(alpha=0.7)
