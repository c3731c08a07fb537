"""The library computes the same wherever it is called from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit.network.unwrap import plain_copy

CONTEXTS = pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
OPTIONS = {
    "round_to_nearest": {},
    "lbq": {},
    "adaround": {"iterations": 10},
    "brecq": {"iterations": 10, "activation_iterations": 5},
    "white_paper": {"iterations": 10},
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(144, 4))


def pictures() -> Tensor:
    return torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@CONTEXTS
@pytest.mark.parametrize("method", OPTIONS)
def test_quantizing_without_gradients_gives_the_same_network(context: Callable[[], AbstractContextManager[None]], method: str) -> None:
    x, options = pictures(), {"method": method, "weight_bits": 4, **OPTIONS[method]}
    expected = lowbit.quantize(network().eval(), calibration=[x], **options)(x)
    with context():
        quantized = lowbit.quantize(network().eval(), calibration=[pictures()], **options)
    torch.testing.assert_close(quantized(x), expected, rtol=0, atol=0)


@CONTEXTS
def test_training_without_gradients_gives_the_same_network(context: Callable[[], AbstractContextManager[None]], tmp_path: Path) -> None:
    x, recipe = pictures(), lowbit.Recipe(epochs=2, batch_size=16)
    expected = lowbit.train(network(), [(x, torch.arange(16) % 4)], recipe=recipe)(x)
    with context():
        trained = lowbit.train(network(), [(pictures(), torch.arange(16) % 4)], recipe=recipe)
        lowbit.export(trained, tmp_path / "net.lowbit", sample=pictures())
    torch.testing.assert_close(trained(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(lowbit.load(tmp_path / "net.lowbit")(x), expected)


def test_a_network_prepared_in_inference_mode_can_be_trained_outside() -> None:
    with torch.inference_mode():
        prepared = lowbit.prepare(network(), sample=pictures())
    prepared.train()(pictures()).sum().backward()
    assert all(parameter.grad is not None for parameter in prepared.parameters())


def test_parameters_that_modules_share_are_shared_by_the_copy_of_a_network_from_inference_mode() -> None:
    with torch.inference_mode():
        first, second = nn.Linear(3, 3), nn.Linear(3, 3)
        second.weight = first.weight
    copied = plain_copy(nn.Sequential(first, second))
    assert copied[0].weight is copied[1].weight
    assert not copied[0].weight.is_inference()


def test_what_a_module_keeps_of_its_last_call_does_not_prevent_copying() -> None:
    layer = nn.Linear(3, 3)
    layer.last = layer(torch.ones(2, 3))
    copied = plain_copy(nn.Sequential(layer))
    assert torch.equal(copied[0].last, layer.last)
    assert not copied[0].last.requires_grad
