from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lowbit.errors import SpecError
from lowbit.surrogates import SoftTanh


def gradients(surrogate: SoftTanh, values: list[float], low: float = 0, high: float = 3) -> tuple[list[float], Tensor | None]:
    x = torch.tensor(values, requires_grad=True)
    surrogate(x, low, high).sum().backward()
    assert x.grad is not None
    return x.grad.tolist(), surrogate.alpha.grad


def test_codes_are_rounded_half_to_even_and_clipped() -> None:
    x = torch.tensor([-3.0, 0.5, 1.5, 2.4999, 3.0, 9.0])
    assert SoftTanh()(x, 0, 3).tolist() == [0, 0, 2, 2, 3, 3]


def test_the_slope_is_that_of_the_tanh_between_two_levels() -> None:
    alpha, x = 0.2, 1.3
    c, s = math.log(2 / alpha - 1), 1 / (1 - alpha)
    expected = 0.5 * s * c / math.cosh(c * (x - 1.5)) ** 2
    assert gradients(SoftTanh(alpha), [x])[0] == pytest.approx([expected], rel=1e-5)


def test_the_slope_is_continuous_at_levels_and_the_last_level_belongs_to_the_last_step() -> None:
    below, above, last, beyond, before = gradients(SoftTanh(0.2), [1 - 1e-4, 1 + 1e-4, 3.0, 3 + 1e-4, -1e-4])[0]
    assert below == pytest.approx(above, rel=1e-4)
    assert last == pytest.approx(above, rel=1e-3)
    assert beyond == 0 and before == 0


def test_clipped_values_give_alpha_nothing() -> None:
    _, by_alpha = gradients(SoftTanh(0.2), [-1.0, 5.0])
    assert by_alpha is not None and by_alpha.item() == 0


def test_an_alpha_beyond_its_range_counts_as_its_end_and_is_not_driven_further() -> None:
    outside, end = SoftTanh(0.5), SoftTanh(0.5)
    outside.alpha.data.fill_(0.7)
    values = [0.2, 0.7]
    assert gradients(outside, values)[0] == gradients(end, values)[0]
    for at, driven_out in ((0.7, -1.0), (-0.2, 1.0)):
        for direction in (driven_out, -driven_out):
            surrogate = SoftTanh(0.2)
            surrogate.alpha.data.fill_(at)
            reference = SoftTanh(min(max(at, 1e-3), 0.5))
            x = torch.tensor([0.25])
            for one in (surrogate, reference):
                one(x, 0, 1).sum().backward()
            assert reference.alpha.grad is not None and reference.alpha.grad != 0
            sign = direction * float(reference.alpha.grad.sign())
            surrogate.alpha.grad = None
            surrogate(x, 0, 1).backward(torch.tensor([sign]))
            assert surrogate.alpha.grad is not None
            if direction == driven_out:
                assert surrogate.alpha.grad.item() == 0
            else:
                assert surrogate.alpha.grad.item() == pytest.approx(sign * reference.alpha.grad.item())


def test_a_fixed_alpha_is_no_parameter_but_part_of_the_state() -> None:
    surrogate = SoftTanh(0.4, is_learned=False)
    assert not list(surrogate.parameters()) and list(surrogate.state_dict()) == ["alpha"]
    learned = SoftTanh(0.4)
    assert gradients(surrogate, [0.3, 1.6])[0] == gradients(learned, [0.3, 1.6])[0]


@pytest.mark.parametrize("alpha", [0.0, -0.1, 0.6, math.nan])
def test_alpha_must_lie_in_its_range(alpha: float) -> None:
    with pytest.raises(SpecError, match=r"alpha must be 0\.001 to 0\.5"):
        SoftTanh(alpha)
