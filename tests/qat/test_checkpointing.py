"""Gradient checkpointing computes parts of a network twice: that must not change what any method trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit

X = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(32) % 4


class Net(nn.Module):
    """Two inner layers that are recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first, self.inner, self.last = (
            nn.Linear(8, 16),
            nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.last(self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant))


def losses(method: str, reentrant: bool | None) -> Tensor:
    torch.manual_seed(0)
    info = lowbit.get_method(method)
    bits = min(max(2, info.weight_bits.start), info.weight_bits.stop - 1)
    activations = info.activation_bits
    network = Net(reentrant)
    model = lowbit.prepare(
        network,
        method=method,
        weight_bits=bits,
        activation_bits=None if activations is None else min(max(2, activations.start), activations.stop - 1),
        sample=X,
    ).train()
    run, found = lowbit.training(model, steps_per_epoch=3, epochs=4, batches=[(X, Y)], float_network=network), []
    optimizer = torch.optim.SGD(run.parameter_groups(learning_rate=0.05))
    for _ in range(12):
        run.before_step(optimizer)
        loss = run.loss((X, Y))
        loss.backward()
        run.after_backward()
        optimizer.step()
        run.after_step()
        found.append(loss.item())
    return torch.tensor(found)


@pytest.mark.parametrize("method", [info.name for info in lowbit.list_methods(kind="training")])
def test_every_method_trains_as_without_checkpointing(method: str) -> None:
    expected = losses(method, None)
    assert len(set(expected.tolist())) > 2
    for reentrant in (True, False):
        torch.testing.assert_close(losses(method, reentrant), expected, rtol=1e-5, atol=1e-6, msg=f"reentrant={reentrant}")
