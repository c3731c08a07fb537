"""K-means quantization of weights: a codebook of cluster means, found by Lloyd's iterations on the flattened weights.

Source: Wang, Liu, Lin, Lin, Han, CVPR 2019, "HAQ", section 4.3 (k-means for the model size); Han, Mao, Dally 2016, "Deep Compression",
section 3. Seeding: Arthur, Vassilvitskii 2007, "k-means++". Empty clusters and the end of the iterations are those of scikit-learn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowbit.quantizers.codebook import CodebookQuantizer, nearest_level
from lowbit.quantizers.qtensor import CodebookDecoder, QTensor
from lowbit.spec import Granularity

TOLERANCE = 1e-4  # of the iterations: the squared shift of all centroids over the variance of the values


def spread_centroids(values: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Initial centroids by k-means++: each is one of the values, drawn in proportion to its squared distance from those before it.

    Args:
        values: ``[n]``, at least one.
        clusters: Number of centroids.
        generator: Random numbers, on the CPU.

    Returns:
        ``[clusters]`` in the order drawn; fewer where there are fewer different values.
    """
    chosen = values[torch.randint(len(values), (1,), generator=generator).to(values.device)]
    distances = (values - chosen).square()
    for _ in range(clusters - 1):
        total = distances.cumsum(0)
        if not bool(total[-1] > 0):
            break
        drawn = torch.rand((1,), generator=generator, dtype=values.dtype).to(values.device) * total[-1]
        index = torch.searchsorted(total, drawn, right=True).clamp(max=len(values) - 1)
        chosen = torch.cat([chosen, values[index]])
        distances = torch.minimum(distances, (values - values[index]).square())
    return chosen


def nearest_centroid(values: Tensor, centroids: Tensor) -> Tensor:
    """Index of the centroid nearest to each value, int64 ``[n]``; midway the smaller centroid, of equal ones the first."""
    order = centroids.argsort(stable=True)
    return order[nearest_level(values[None], centroids[order][None])[0]]


def lloyd(values: Tensor, centroids: Tensor, max_iterations: int) -> tuple[Tensor, Tensor]:
    """Clusters of least squared distance from given initial centroids.

    Each iteration assigns every value to the nearest centroid and moves centroids to the means of what they got. A centroid that got
    nothing takes over the value farthest from its own centroid, several of them the farthest values in descending order; such a
    value no longer counts for the mean of its old cluster. It ends where no assignment changes, or where
    ``sum_j shift_j**2 <= 1e-4 * var(values)`` (population variance), or after ``max_iterations``.

    Args:
        values: ``[n]``.
        centroids: Initial centroids, ``[k]``, in any order.
        max_iterations: 1 or more.

    Returns:
        ``(centroids, labels)``: float64 ``[k]`` in the order of the initial ones, and the index of the nearest of them, int64 ``[n]``.
    """
    values, centroids = values.double(), centroids.double()
    tolerance = TOLERANCE * values.var(correction=0)
    before = None
    for _ in range(max_iterations):
        labels = nearest_centroid(values, centroids)
        moved = _means(values, labels, centroids)
        shift, centroids = (moved - centroids).square().sum(), moved
        if (before is not None and torch.equal(labels, before)) or bool(shift <= tolerance):
            break
        before = labels
    return centroids, nearest_centroid(values, centroids)


def _means(values: Tensor, labels: Tensor, centroids: Tensor) -> Tensor:
    """Means of the clusters, after each empty one took over a value; one for which none is left stays where it is."""
    sums = torch.zeros_like(centroids).index_add_(0, labels, values)
    counts = torch.zeros_like(centroids).index_add_(0, labels, torch.ones_like(values))
    empty = (counts == 0).nonzero()[:, 0]
    distances = (values - centroids[labels]).square()
    if len(empty) and bool(distances.max() > 0):
        empty = empty[: len(values)]
        farthest = distances.argsort(descending=True, stable=True)[: len(empty)]
        taken = values[farthest]
        ones = torch.ones_like(taken)
        sums.index_add_(0, labels[farthest], -taken).index_copy_(0, empty, taken)
        counts.index_add_(0, labels[farthest], -ones).index_copy_(0, empty, ones)
    return torch.where(counts > 0, sums / counts.clamp(min=1), centroids)


def cluster_means(x: Tensor, labels: Tensor, levels: Tensor) -> Tensor:
    """The mean of each cluster, differentiable in ``x``, so that the gradient of a value is the mean gradient of its cluster.

    Args:
        x: Values.
        labels: The cluster of each value, shaped like ``x``.
        levels: ``[k]``, which clusters without a value keep.
    """
    places, zeros = labels.reshape(-1).long(), torch.zeros_like(levels, dtype=torch.float64)
    sums = zeros.index_add(0, places, x.reshape(-1).double())
    counts = zeros.index_add(0, places, torch.ones_like(places, dtype=torch.float64))
    return torch.where(counts > 0, (sums / counts.clamp(min=1)).to(levels.dtype), levels)


class KMeansQuantizer(CodebookQuantizer):
    """``2**bit_width`` cluster means of a weight, one codebook for the whole tensor.

    Forward: the nearest mean, the gradient passes unchanged (straight-through). After ``freeze`` every value keeps the cluster that it had,
    and its level is the mean of what the values of this cluster are now: a projection of the weight, applied in every forward pass. Its
    gradient is the mean gradient of the cluster, so that training moves levels and nothing else.

    Args:
        bit_width: 1 to 8.
        max_iterations: Most iterations of Lloyd's algorithm.
        seed: Seed of the initial centroids.

    Attributes:
        levels: The means, ascending, ``[1, 2**bit_width]``; the last one several times where there are fewer different values.
        labels: The cluster of each value once ``freeze`` has run, uint8 shaped like the weight; empty before.

    Source: HAQ, section 4.3.
    """

    tables: tuple[str, ...] = ("levels", "labels")
    tables_by_width: tuple[str, ...] = ("levels", "labels")

    def __init__(self, bit_width: int, *, max_iterations: int = 50, seed: int = 0) -> None:
        super().__init__(bit_width, granularity=Granularity.tensor())
        self.max_iterations, self.seed = max_iterations, seed
        self.register_buffer("labels", torch.empty(0, dtype=torch.uint8))
        self.labels: Tensor

    @property
    def is_frozen(self) -> bool:
        """Whether values keep their clusters."""
        return self.labels.numel() > 0

    def initialize(self, x: Tensor) -> None:
        """Cluster the values of ``x``, from centroids by k-means++."""
        values = x.detach().reshape(-1).double()
        start = spread_centroids(values, 2**self.bit_width, torch.Generator().manual_seed(self.seed))
        centroids, _ = lloyd(values, start, self.max_iterations)
        self.set_centroids(torch.cat([centroids, centroids.max().expand(2**self.bit_width - len(centroids))]))

    def set_centroids(self, centroids: Tensor) -> None:
        """Take ``[2**bit_width]`` centroids, in any order, as levels; values choose among them anew."""
        self.set_levels(centroids.sort().values)
        self._set_table("labels", self.labels.new_empty(0))

    def carry_over(self, old_bits: int) -> None:
        super().carry_over(old_bits)
        self._set_table("labels", self.labels.new_empty(0))

    @torch.no_grad()
    def freeze(self, x: Tensor) -> None:
        """Let every value of ``x`` keep the cluster of its nearest level from now on."""
        self._set_table("labels", nearest_level(x.detach().reshape(1, -1), self.levels).reshape(x.shape).to(torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        if not self.is_frozen:
            return super().forward(x)
        return cluster_means(x, self.labels, self.levels[0])[self.labels.long()].to(x.dtype)

    @torch.no_grad()
    def encode(self, x: Tensor) -> QTensor:
        if not self.is_frozen:
            return super().encode(x)
        means, order = cluster_means(x, self.labels, self.levels[0]).sort()  # training may carry one past another
        codes = order.argsort()[self.labels.long()].to(torch.uint8)
        return QTensor(codes, CodebookDecoder(means[None], self.granularity), self.bit_width)
