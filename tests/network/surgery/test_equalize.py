"""Equalization and absorption keep what the float network computes, and make ranges equal."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.networks import TinyNet, settled
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.inputs import Inputs
from lowbit.network.graph.dataflow import capture
from lowbit.network.surgery.equalize import (
    ChannelClip,
    LayerState,
    absorb_bias,
    chain_sets,
    equalize,
    equalize_set,
    find_links,
    limit_channels,
    open_clips,
    pair_scales,
    read_states,
    sets_of,
    triple_scales,
    write_states,
)


def spread(channels: int, seed: int = 0) -> Tensor:
    """Factors from 1/16 to 16."""
    return torch.exp2(torch.rand(channels, generator=torch.Generator().manual_seed(seed)) * 8 - 4)


class Separable(nn.Module):
    """Expand, depthwise, project, as in MobileNet, with a clip in between that a test chooses."""

    def __init__(self, clip: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 8, 1)
        self.act1 = clip()
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act2 = clip()
        self.project = nn.Conv2d(8, 4, 1)
        self.head = nn.Linear(4 * 4 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(self.act2(self.depthwise(self.act1(self.expand(x)))))
        return self.head(F.max_pool2d(F.leaky_relu(x, 0.1), 2).flatten(1))


def unbalanced(model: Separable) -> Separable:
    """The same function with channels of very different ranges."""
    first, second = spread(8, 1), spread(8, 2)
    with torch.no_grad():
        model.expand.weight *= first[:, None, None, None]
        model.expand.bias *= first
        model.depthwise.weight *= (second / first)[:, None, None, None]
        model.depthwise.bias *= second
        model.project.weight /= second[:, None, None]
    return model


def equalized(model: nn.Module, x: Tensor, *, cover: str = "pairs") -> tuple[nn.Module, list[tuple[str, ...]]]:
    model = copy.deepcopy(model)
    links = find_links(model, capture(model, Inputs.of(x)))
    states = read_states(model, links, {})
    sets = sets_of(model, links, cover)
    equalize(states, sets)
    write_states(model, states, {})
    return model, sets


# Maths


def test_a_pair_gets_equal_ranges_and_dead_channels_stay() -> None:
    first, second = torch.tensor([4.0, 1.0, 0.0, 2.0]), torch.tensor([1.0, 9.0, 3.0, 0.0])
    scale = pair_scales(first, second)
    torch.testing.assert_close(scale, torch.tensor([2.0, 1 / 3, 1.0, 1.0]))
    torch.testing.assert_close((first / scale)[:2], (second * scale)[:2])


def test_a_triple_gets_three_equal_ranges_with_the_product_preserved() -> None:
    r1, r2, r3 = spread(6, 1), spread(6, 2), spread(6, 3)
    s12, s23 = triple_scales(r1, r2, r3)
    after = torch.stack([r1 / s12, r2 * s12 / s23, r3 * s23])
    torch.testing.assert_close(after, after[:1].expand(3, -1))
    torch.testing.assert_close(after.prod(0), r1 * r2 * r3)


def test_repeated_pairs_reach_the_triple() -> None:
    torch.manual_seed(0)
    layers = {
        "a": LayerState(torch.randn(6, 3, 1, 1)),
        "b": LayerState(torch.randn(6, 1, 3, 3), groups=6),
        "c": LayerState(torch.randn(4, 6, 1, 1)),
    }
    together = copy.deepcopy(layers)
    equalize_set(list(together.values()))
    sweeps = equalize(layers, [("a", "b"), ("b", "c")])
    assert 2 < sweeps < 500
    for name in layers:
        torch.testing.assert_close(layers[name].weight, together[name].weight, rtol=1e-4, atol=1e-5)
    assert equalize(layers, [("a", "b"), ("b", "c")]) == 1  # nothing moves any more


def test_chains_are_covered_by_pairs_and_depthwise_triples() -> None:
    plain, depthwise, grouped = "plain", "depthwise", "grouped"
    assert chain_sets([plain, depthwise, plain, depthwise, plain]) == [(0, 1, 2), (2, 3, 4)]
    assert chain_sets([depthwise, plain, plain]) == [(0, 1), (1, 2)]
    assert chain_sets([plain, grouped, plain, plain]) == [(2, 3)]
    assert chain_sets([plain]) == []


def test_absorption_is_exact_where_every_value_exceeds_what_is_absorbed() -> None:
    torch.manual_seed(0)
    mean, std = torch.tensor([5.0, 1.0, 8.0]), torch.tensor([0.5, 1.0, -1.0])
    first = LayerState(torch.randn(3, 2), torch.randn(3), mean, std)
    second = LayerState(torch.randn(4, 3))
    before, weight = first.bias, second.weight
    absorbed = absorb_bias(first, second)
    torch.testing.assert_close(absorbed, torch.tensor([3.5, 0.0, 5.0]))
    h = mean + torch.rand(100, 3)  # above what is absorbed
    torch.testing.assert_close(F.relu(h - absorbed) @ weight.T + second.bias, F.relu(h) @ weight.T)
    assert before is not None
    torch.testing.assert_close(first.bias, before - absorbed)
    torch.testing.assert_close(first.mean, mean - absorbed)


# On networks


@pytest.mark.parametrize("cover", ["pairs", "sets"])
def test_the_function_stays_and_ranges_become_equal(cover: str) -> None:
    torch.manual_seed(0)
    model, x = unbalanced(Separable()).eval(), torch.randn(4, 3, 8, 8)
    result, sets = equalized(model, x, cover=cover)
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)
    wanted = {
        "pairs": [("expand", "depthwise"), ("depthwise", "project"), ("project", "head")],
        "sets": [("expand", "depthwise", "project"), ("project", "head")],
    }
    assert sets == wanted[cover]
    links = find_links(result, capture(result, Inputs.of(x)))
    states = read_states(result, links, {})
    for link in links:
        torch.testing.assert_close(states[link.first].output_ranges(), states[link.second].input_ranges(), rtol=1e-4, atol=0)


def test_scaling_channels_beforehand_changes_nothing_afterwards() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    plain = Separable().eval()
    one, _ = equalized(plain, x)
    other, _ = equalized(unbalanced(copy.deepcopy(plain)), x)
    for (name, weight), again in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, again, rtol=1e-3, atol=1e-5, msg=name)


def test_a_residual_add_ends_the_chain() -> None:
    model, x = settled(TinyNet(), torch.randn(4, 3, 8, 8)), torch.randn(2, 3, 8, 8)
    model.bn1, model.bn2 = nn.Identity(), nn.Identity()
    links = find_links(model, capture(model, Inputs.of(x)))
    assert [(link.first, link.second, link.activation, link.is_padded) for link in links] == [("conv1", "conv2", "relu", True)]


def test_relu6_gets_a_limit_for_each_channel_and_the_function_stays() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8) * 6
    model = Separable(nn.ReLU6).eval()
    with torch.no_grad():
        model.expand.weight *= spread(8)[:, None, None, None]
    result = copy.deepcopy(model)
    graph = capture(result, Inputs.of(x))
    links, blocked = open_clips(result, graph, find_links(result, graph), "scale")
    assert not blocked
    assert [link.limit for link in links] == [6.0, 6.0, None]
    states = read_states(result, links, {})
    equalize(states, sets_of(result, links))
    for link in links[:2]:
        limit_channels(result, graph, link, torch.as_tensor(6.0 / states[link.first].scale))
    write_states(result, states, {})
    assert isinstance(result.act1, ChannelClip)
    clipped = (model.act1(model.expand(x)) == 6).float().mean()
    assert 0.05 < clipped < 0.95
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-4)
    assert result.act1.limit.max() > 4 * result.act1.limit.min()


def test_relu6_becomes_relu_or_ends_the_chain() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = Separable(nn.ReLU6).eval()
    graph = capture(model, Inputs.of(x))
    links = find_links(model, graph)
    assert [len(link.clips) for link in links] == [1, 1, 0]
    kept, blocked = open_clips(model, graph, links, "keep")
    assert [(link.first, link.second) for link in kept] == [("project", "head")]
    assert not blocked
    opened, blocked = open_clips(model, graph, links, "replace")
    assert not blocked
    assert all(not link.clips and link.limit is None for link in opened)
    assert isinstance(model.act1, nn.ReLU)
    assert isinstance(model.act2, nn.ReLU)


@pytest.mark.parametrize("kind", ["replace", "scale"])
def test_clips_that_cannot_be_replaced_end_the_chain(kind: str) -> None:
    class Clipped(Separable):
        def forward(self, x: Tensor) -> Tensor:
            return self.project(F.relu6(self.depthwise(F.relu6(self.expand(x)))))

    x = torch.randn(2, 3, 8, 8)
    functional = Clipped().eval()
    graph = capture(functional, Inputs.of(x))
    opened, blocked = open_clips(functional, graph, find_links(functional, graph), kind)
    assert not opened
    assert len(blocked) == 2


def test_a_clip_that_runs_twice_gets_no_limit() -> None:
    model, x = Separable(nn.ReLU6).eval(), torch.randn(2, 3, 8, 8)
    model.act2 = model.act1
    graph = capture(model, Inputs.of(x))
    opened, blocked = open_clips(model, graph, find_links(model, graph), "scale")
    assert [(link.first, link.second) for link in opened] == [("project", "head")]
    assert len(blocked) == 2


@pytest.mark.parametrize(
    ("between", "is_link"),
    [
        (nn.ReLU(), True),
        (nn.PReLU(8), True),
        (nn.LeakyReLU(0.2), True),
        (nn.AvgPool2d(2), True),
        (nn.MaxPool2d(2), True),
        (nn.ZeroPad2d(1), True),
        (nn.Dropout(0.5), True),
        (nn.SiLU(), False),
        (nn.Sigmoid(), False),
        (nn.PixelShuffle(2), False),
        (nn.ConstantPad2d(1, 3.0), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_positively_homogeneous_operations_join_layers(between: nn.Module, is_link: bool) -> None:
    torch.manual_seed(0)
    inner = 2 if isinstance(between, nn.PixelShuffle) else 8
    model = nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(inner, 4, 3)).eval()
    x = torch.randn(2, 3, 12, 12)
    links = find_links(model, capture(model, Inputs.of(x)))
    assert bool(links) == is_link
    with torch.no_grad():
        model[0].weight *= spread(8)[:, None, None, None]
    result, _ = equalized(model, x)
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)


def test_shared_weights_and_layers_that_run_twice_are_left_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(F.relu(self.first(F.relu(self.first(x)))))

    model, x = Twice().eval(), torch.randn(3, 6)
    assert find_links(model, capture(model, Inputs.of(x))) == []
    shared = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    shared[2].weight = shared[0].weight
    assert find_links(shared, capture(shared, Inputs.of(x))) == []


def test_transposed_convolutions_and_linear_layers_behind_a_flatten_are_equalized_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 2, stride=2), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5)
    ).eval()
    with torch.no_grad():
        model[0].weight *= spread(6)[:, None, None]
        model[2].weight *= spread(4)[:, None, None, None]
    x = torch.randn(2, 3, 4, 4)
    result, sets = equalized(model, x)
    assert sets == [("0", "2"), ("2", "5")]
    torch.testing.assert_close(result(x), model(x), rtol=1e-4, atol=1e-5)
    rows = result[5].weight.reshape(5, 4, 36).abs().amax((0, 2))
    torch.testing.assert_close(result[2].weight.abs().flatten(1).amax(1), rows, rtol=1e-4, atol=0)
