"""K-means codebooks: Lloyd's iterations, empty clusters, frozen clusters, the law of encode and decode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from lowbit.quantizers.kmeans import KMeansQuantizer, lloyd, spread_centroids


def weights(count: int = 300, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def test_one_iteration_moves_centroids_to_the_means_of_what_is_nearest() -> None:
    values = torch.tensor([0.0, 1.0, 2.0, 9.0, 11.0])
    centroids, labels = lloyd(values, torch.tensor([10.0, 3.0]), 1)
    assert centroids.tolist() == [10.0, 1.0]
    assert labels.tolist() == [1, 1, 1, 0, 0]


def test_an_empty_cluster_takes_over_the_farthest_value_which_leaves_its_old_cluster() -> None:
    values = torch.tensor([0.0, 1.0, 8.0])
    centroids, _ = lloyd(values, torch.tensor([1.0, 100.0]), 1)
    assert centroids.tolist() == [0.5, 8.0]


def test_several_empty_clusters_take_the_farthest_values_in_descending_order() -> None:
    values = torch.tensor([0.0, 1.0, 6.0, 9.0])
    centroids, labels = lloyd(values, torch.tensor([0.5, 50.0, 60.0]), 1)
    assert centroids.tolist() == [0.5, 9.0, 6.0]
    assert labels.tolist() == [0, 0, 2, 1]


def test_iterations_end_where_centroids_hardly_move() -> None:
    values = torch.cat([torch.zeros(1000), torch.ones(1000), torch.tensor([0.49, 0.51])])
    start = torch.tensor([0.0, 1.0])
    one, _ = lloyd(values, start, 1)
    many, _ = lloyd(values, start, 50)
    assert torch.equal(one, many)  # the shifts are 0.0005 each, 5e-7 in total, below 1e-4 of the variance
    assert one.tolist() == pytest.approx([0.49 / 1001, (1000 + 0.51) / 1001], abs=1e-9)


def test_clusters_are_those_of_scikit_learn() -> None:
    cluster = pytest.importorskip("sklearn.cluster")
    for seed in range(8):
        values, start = weights(200, seed), torch.linspace(-2, 5, 8)  # the highest ones get nothing at first
        wanted = cluster.KMeans(8, init=start[:, None].numpy(), n_init=1, max_iter=3 + 5 * seed).fit(values[:, None].numpy())
        centroids, labels = lloyd(values, start, 3 + 5 * seed)
        torch.testing.assert_close(centroids.float(), torch.as_tensor(wanted.cluster_centers_[:, 0]), rtol=1e-4, atol=1e-5)
        assert labels.tolist() == wanted.labels_.tolist()


def test_initial_centroids_are_different_values_and_likelier_far_away() -> None:
    values = torch.cat([torch.zeros(50), torch.full((50,), 0.25), torch.tensor([100.0])]).double()
    for seed in range(20):
        chosen = spread_centroids(values, 2, torch.Generator().manual_seed(seed))
        assert 100.0 in chosen.tolist()  # its squared distance outweighs all others by more than 1e3
    assert sorted(spread_centroids(values, 8, torch.Generator().manual_seed(0)).tolist()) == [0.0, 0.25, 100.0]


@pytest.mark.parametrize("bits", range(1, 9))
def test_there_are_at_most_two_to_the_bits_values_and_codes_decode_to_them(bits: int) -> None:
    weight = weights().reshape(10, 30)
    quantizer = KMeansQuantizer(bits).eval()
    quantizer.initialize(weight)
    quantized = quantizer(weight)
    assert len(quantized.unique()) <= 2**bits
    assert torch.equal(quantizer.encode(weight).decode(), quantized)
    assert (quantized - weight).square().mean() < weight.var() / 1.5 ** (2 * bits)


def test_few_different_values_are_kept_as_they_are() -> None:
    weight = torch.tensor([[0.5, -1.0], [0.5, 2.0]])
    quantizer = KMeansQuantizer(4)
    quantizer.initialize(weight)
    assert quantizer.levels.shape == (1, 16)
    assert torch.equal(quantizer(weight), weight)
    quantizer.initialize(torch.zeros(3, 3))
    assert torch.equal(quantizer(torch.zeros(3, 3)), torch.zeros(3, 3))


def frozen(weight: Tensor, bits: int = 2) -> KMeansQuantizer:
    quantizer = KMeansQuantizer(bits)
    quantizer.initialize(weight)
    quantizer.freeze(weight)
    return quantizer


def test_frozen_clusters_follow_the_means_of_their_moved_values() -> None:
    quantizer = KMeansQuantizer(1)
    quantizer.set_centroids(torch.tensor([4.0, 0.0]))
    weight = torch.tensor([[0.0, 1.0], [4.0, 6.0]])
    quantizer.freeze(weight)
    moved = torch.tensor([[9.0, 1.0], [4.0, -2.0]])  # nearest levels would now be others
    assert quantizer(moved).tolist() == [[5.0, 5.0], [1.0, 1.0]]
    assert torch.equal(quantizer.encode(moved).decode(), quantizer(moved))
    assert bool((quantizer.encode(moved).decoder.tensors()["levels"].diff() >= 0).all())


def test_the_projection_is_idempotent_and_keeps_the_mean_of_a_cluster() -> None:
    weight = weights()
    quantizer = frozen(weight)
    moved = weight + 0.1 * weights(seed=1)
    once = quantizer(moved)
    assert torch.allclose(quantizer(once), once, atol=1e-6)
    for label in range(4):
        inside = quantizer.labels == label
        assert once[inside].mean().item() == pytest.approx(moved[inside].mean().item(), abs=1e-6)


def test_the_gradient_of_a_frozen_weight_is_the_mean_over_its_cluster() -> None:
    quantizer = KMeansQuantizer(1)
    quantizer.set_centroids(torch.tensor([0.0, 4.0]))
    weight = torch.tensor([0.0, 1.0, 4.0], requires_grad=True)
    quantizer(weight).backward(torch.tensor([1.0, 3.0, 5.0]))
    assert weight.grad is not None
    assert weight.grad.tolist() == [1.0, 3.0, 5.0]  # not frozen: unchanged
    weight.grad = None
    quantizer.freeze(weight)
    quantizer(weight).backward(torch.tensor([1.0, 3.0, 5.0]))
    assert weight.grad.tolist() == [2.0, 2.0, 5.0]


def test_sgd_on_a_frozen_weight_is_that_of_the_paper() -> None:
    weight = weights(60)
    quantizer, target = frozen(weight), weights(60, seed=2)
    ours = torch.nn.Parameter(quantizer(weight).detach())
    theirs = ours.detach().clone()
    optimizer, velocity = torch.optim.SGD([ours], 0.1, momentum=0.9, weight_decay=0.01), torch.zeros(60)
    for _ in range(5):
        optimizer.zero_grad()
        (quantizer(ours) - target).square().sum().backward()
        optimizer.step()
        velocity = 0.9 * velocity + 2 * (theirs - target) + 0.01 * theirs  # a step for each weight, then each cluster gets its mean
        theirs = theirs - 0.1 * velocity
        theirs = torch.stack([theirs[quantizer.labels == label].mean() for label in quantizer.labels])
    torch.testing.assert_close(quantizer(ours), theirs, rtol=1e-4, atol=1e-5)


def test_an_empty_cluster_keeps_its_level() -> None:
    quantizer = KMeansQuantizer(2)
    quantizer.set_centroids(torch.tensor([0.0, 1.0, 5.0, 9.0]))
    quantizer.freeze(torch.tensor([0.0, 1.0, 9.0]))
    assert quantizer(torch.tensor([0.5, 1.0, 8.0])).tolist() == [0.5, 1.0, 8.0]
    assert quantizer.encode(torch.tensor([0.5, 1.0, 8.0])).decoder.tensors()["levels"].tolist() == [[0.5, 1.0, 5.0, 8.0]]


def test_each_width_has_its_own_codebook_and_clusters() -> None:
    weight = weights()
    quantizer = frozen(weight, bits=3)
    before = quantizer(weight)
    quantizer.set_bit_width(2, weight)
    assert not quantizer.is_frozen
    assert len(quantizer(weight).unique()) <= 4
    quantizer.set_bit_width(3)
    assert quantizer.is_frozen
    assert torch.equal(quantizer(weight), before)


def test_a_state_dict_holds_levels_and_clusters() -> None:
    weight = weights()
    quantizer = frozen(weight)
    other = KMeansQuantizer(2)
    other.load_state_dict(quantizer.state_dict())
    for moved in (weight, weight + 0.3 * weights(seed=3)):
        assert torch.equal(other(moved), quantizer(moved))
        assert torch.equal(copy.deepcopy(quantizer)(moved), quantizer(moved))
