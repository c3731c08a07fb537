"""Moments of tensors without data, held against samples."""

from __future__ import annotations

import math

import pytest
import torch
from tests.networks import TinyNet, settled
from torch import Tensor, nn

from lowbit.inputs import Inputs
from lowbit.network.graph.dataflow import capture
from lowbit.network.graph.moments import Moments, MomentsWalk, added, clipped, clipped_normal_moments, limited, mapped, multiplied
from lowbit.network.surgery.fold import fold_batch_norms

MEAN, STD = torch.tensor([-1.0, 0.3, 2.0, 5.0]), torch.tensor([0.5, 1.0, 2.0, 0.1])
SAMPLES = MEAN[:, None] + STD[:, None] * torch.randn(4, 400_000, generator=torch.Generator().manual_seed(0))


def normal() -> Moments:
    return Moments.normal(MEAN, STD, 6.0)


def assert_matches(found: Moments, values: Tensor, tolerance: float = 0.01) -> None:
    torch.testing.assert_close(found.mean.float(), values.mean(1), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found.std.float(), values.std(1), rtol=tolerance, atol=tolerance)
    assert bool((found.lo <= values.amin(1) + 1e-3).all())
    assert bool((found.hi >= values.amax(1) - 1e-3).all())


@pytest.mark.parametrize(("low", "high"), [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0), (-math.inf, math.inf)])
def test_clipped_moments_are_those_of_samples(low: float, high: float) -> None:
    mean, variance = clipped_normal_moments(MEAN, STD, low, high)
    values = SAMPLES.clamp(low, high)
    torch.testing.assert_close(mean.float(), values.mean(1), rtol=0.01, atol=0.01)
    torch.testing.assert_close(variance.float(), values.var(1), rtol=0.02, atol=0.01)
    assert_matches(clipped(normal(), low, high), values)


def test_a_relu_is_the_limit_of_a_far_clip() -> None:
    torch.testing.assert_close(clipped_normal_moments(MEAN, STD), clipped_normal_moments(MEAN, STD, 0.0, 1e4), rtol=1e-9, atol=1e-9)


def test_a_channel_without_deviation_is_clipped_itself() -> None:
    mean, variance = clipped_normal_moments(torch.tensor([-2.0, 3.0, 9.0]), torch.zeros(3), 0.0, 6.0)
    assert mean.tolist() == [0.0, 3.0, 6.0]
    assert variance.tolist() == [0.0, 0.0, 0.0]


def test_far_tails_do_not_cancel() -> None:
    mean, variance = clipped_normal_moments(torch.tensor([-8.0]), torch.tensor([1.0]))
    assert mean.item() == pytest.approx(7.55e-17, rel=0.01)  # by expansion of the tail
    assert 0 <= variance.item() < 1e-15


def test_other_activations_sums_and_products_match_samples() -> None:
    assert_matches(mapped(normal(), torch.sigmoid), SAMPLES.sigmoid())
    assert_matches(mapped(normal(), nn.functional.silu), nn.functional.silu(SAMPLES))
    other = SAMPLES.flip(1)  # independent of it, nearly
    assert_matches(added(normal(), normal(), 6.0), SAMPLES + other, 0.02)
    product = multiplied(normal(), normal())
    torch.testing.assert_close(product.mean.float(), (SAMPLES * other).mean(1), rtol=0.02, atol=0.02)
    torch.testing.assert_close(product.std.float(), (SAMPLES * other).std(1), rtol=0.02, atol=0.02)


def test_every_tensor_of_a_network_is_told_from_its_norms() -> None:
    torch.manual_seed(0)
    model = settled(TinyNet(), torch.randn(64, 3, 16, 16))
    x = torch.randn(256, 3, 16, 16)
    graph = capture(model, Inputs.of(x[:2]))
    statistics = {folded.layer: (folded.out_mean, folded.out_std) for folded in fold_batch_norms(model, graph)}
    inputs = Moments(
        torch.tensor([0.0]).double(), torch.tensor([1.0]).double(), torch.tensor([-6.0]).double(), torch.tensor([6.0]).double()
    )
    seen: list[str] = []
    walk = MomentsWalk(model, graph, statistics, inputs, at_layer=lambda name, _: seen.append(name))
    assert seen == ["stem", "conv1", "conv2", "head"]
    captured: dict[str, Tensor] = {}
    for name in ("stem", "conv1", "conv2"):
        model.get_submodule(name).register_forward_hook(lambda _m, _a, y, name=name: captured.update({name: y}))
    with torch.no_grad():
        model(x)
    for name, values in captured.items():
        (node,) = graph.of_layer(name)
        rows = values.transpose(0, 1).flatten(1)
        torch.testing.assert_close(walk.known[node.name].mean.float(), rows.mean(1), rtol=0.1, atol=0.1)
        torch.testing.assert_close(walk.known[node.name].std.float(), rows.std(1), rtol=0.15, atol=0.1)
    (head,) = graph.of_layer("head")
    assert head.name in walk.known


def test_a_limit_of_each_channel_clips_each_by_itself() -> None:
    limit = torch.tensor([0.1, 0.5, 3.0, -1.0])
    values = torch.minimum(SAMPLES.relu(), limit.clamp(min=0)[:, None])
    assert_matches(limited(normal(), limit.double()), values)


def test_the_operation_that_blocks_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(torch.sort(self.first(x))[0]))

    model = Sorted().eval()
    graph = capture(model, Inputs.of(torch.randn(2, 4)))
    walk = MomentsWalk(model, graph, {}, Moments.uniform(-1, 1))
    (reader,) = graph.of_layer("second")
    (before, *_) = graph.producers(reader)
    assert before.name not in walk.known
    assert walk.blocking(before.name).op == "sort"
