"""Gradient checkpointing computes parts of a network twice: that must not change what any method trains."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lowbit
from lowbit.errors import LoopError

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


OPTIONS: dict[str, dict[str, object]] = {  # what moves or counts in each pass does so in those that are computed again
    "fqsr": {"warm_up": 0, "calibration_weight": 0},
}


def losses(method: str, reentrant: bool | None) -> Tensor:
    torch.manual_seed(0)
    info = lowbit.get_method(method, "training")
    bits = min(max(2, info.weight_bits.start), info.weight_bits.stop - 1)
    activations = info.activation_bits
    network = Net(reentrant)
    model = lowbit.prepare(
        network,
        method=method,
        weight_bits=bits,
        activation_bits=None if activations is None else min(max(2, activations.start), activations.stop - 1),
        sample=X,
        **OPTIONS.get(method, {}),  # type: ignore[arg-type]
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
        if reentrant and method in ("fp_auxiliary", "zaq"):  # they read what reentrant checkpointing computes without gradients
            with pytest.raises(LoopError, match=r"'inner.*runs without gradients.*use_reentrant=False"):
                losses(method, reentrant)
            continue
        torch.testing.assert_close(losses(method, reentrant), expected, rtol=1e-5, atol=1e-6, msg=f"reentrant={reentrant}")


class Block(nn.Module):
    """A convolution and its norm that are recomputed in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        # the statistics of a norm see each batch twice where it is recomputed, which changes evaluation alone
        self.inner = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.inner(x) if self.reentrant is None else checkpoint(self.inner, x, use_reentrant=self.reentrant)
        return self.last(x.mean((2, 3)))


IMAGES = torch.randn(16, 2, 6, 6, generator=torch.Generator().manual_seed(0))


def gradients(method: str, reentrant: bool | None, *, options: dict[str, object], sums: bool) -> dict[str, Tensor]:
    """The gradients of one step, of the sum of the losses or of one loss after the other."""
    torch.manual_seed(0)
    model = lowbit.prepare(Block(reentrant), method=method, bits=[8, 4, 2], sample=IMAGES, **options).train()  # type: ignore[arg-type]
    run = lowbit.training(model, steps_per_epoch=3, epochs=3)
    run.before_step(torch.optim.SGD(run.parameter_groups(learning_rate=0.05)))
    batch = (IMAGES, torch.arange(16) % 3)
    for loss in [run.loss(batch)] if sums else run.losses(batch):
        loss.backward()
    run.after_backward()
    assert lowbit.get_bits(model)["inner.0"].weight == 8
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("method", "options"),
    [("adabits", {}), ("adabits", {"adaptation": "direct_lowest"}), ("sp_nets", {"quantizer": "lsq"}), ("bit_mixer", {})],
)
def test_each_loss_of_several_widths_is_recomputed_at_its_own(method: str, options: dict[str, object], reentrant: bool) -> None:
    expected = gradients(method, None, options=options, sums=False)
    for sums in (True, False):
        found = gradients(method, reentrant, options=options, sums=sums)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-6, msg=f"{name}, sums={sums}")
