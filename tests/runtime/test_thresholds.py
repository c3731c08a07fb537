from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.runtime.thresholds import sign_threshold


def sign(x: Tensor, threshold: Tensor, flip: Tensor | None) -> Tensor:
    is_one = x >= threshold
    return is_one if flip is None else is_one ^ flip


def test_a_batch_norm_before_a_sign_is_a_comparison_also_next_to_the_threshold() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(64).eval()
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert tensor is not None
        tensor.copy_(torch.randn(64))
    norm.running_var.abs_()  # type: ignore[union-attr]
    with torch.no_grad():
        threshold, flip = sign_threshold(lambda x: norm(x[None])[0], 64)
        assert flip is not None and 10 < int(flip.sum()) < 54
        nearby = [threshold]
        for direction in (-torch.inf, torch.inf):
            x = threshold
            for _ in range(20):
                x = torch.nextafter(x, torch.tensor(direction))
                nearby.append(x)
        for x in (*nearby, *torch.randn(50, 64), *(torch.randn(50, 64) * 1e6)):
            assert torch.equal(sign(x, threshold, flip), norm(x[None])[0] >= 0)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: x, 0.0),
        (lambda x: x + 0.5, -0.5),
        (lambda x: (x - 3).clamp(-1, 1), 3.0),
        (lambda x: x.relu(), -torch.inf),
        (lambda x: x * 0 - 1, torch.inf),
    ],
)
def test_known_thresholds(function: object, expected: float) -> None:
    threshold, flip = sign_threshold(function, 3)  # type: ignore[arg-type]
    assert threshold.tolist() == [expected] * 3
    assert flip is None


def test_a_falling_function_is_flipped() -> None:
    threshold, flip = sign_threshold(lambda x: 2 - x, 1)
    assert flip is not None and bool(flip)
    assert sign(torch.tensor([2.0]), threshold, flip)
    assert not sign(torch.nextafter(torch.tensor([2.0]), torch.tensor(3.0)), threshold, flip)
