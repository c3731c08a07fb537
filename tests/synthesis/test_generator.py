from __future__ import annotations

import pytest
import torch

from lowbit.errors import SpecError
from lowbit.synthesis.generator import Generator


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 28, 20), (2, 7, 13), (5, 9), (4, 4, 5, 6), (6,), (1, 1, 1)], ids=str)
def test_samples_have_the_shape_asked_for_and_mean_0_and_variance_1_in_each_channel(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    samples = Generator(shape, latent=8, width=4)(torch.randn(32, 8))
    assert samples.shape == (32, *shape)
    by_channel = samples.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(by_channel.mean(1), torch.zeros(shape[0]), rtol=0, atol=1e-5)
    torch.testing.assert_close(by_channel.var(1, correction=0), torch.ones(shape[0]), rtol=0, atol=5e-2)


def test_layers_are_those_of_the_program() -> None:
    shapes = [tuple(p.shape) for name, p in Generator((3, 32, 32)).named_parameters() if name.endswith("weight")]
    assert shapes == [(128 * 8 * 8, 256), (128,), (128, 128, 3, 3), (128,), (64, 128, 3, 3), (64,), (3, 64, 3, 3)]


def test_a_seed_decides_and_every_parameter_learns() -> None:
    torch.manual_seed(1)
    first = Generator((2, 6, 6), latent=5, width=3)
    torch.manual_seed(1)
    second = Generator((2, 6, 6), latent=5, width=3)
    z = torch.randn(4, 5)
    assert torch.equal(first(z), second(z))
    first(z).square().mul(torch.randn(4, 2, 6, 6)).sum().backward()
    assert all(p.grad is not None and bool(torch.isfinite(p.grad).all()) for p in first.parameters())


@pytest.mark.parametrize("shape", [(3, 2, 2, 2, 2), (0, 8, 8), (3, 0, 8)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SpecError, match="channels and up to three sizes"):
        Generator(shape)
