"""The Hessian of the loss with respect to weights or activations of the float network, known by its products with vectors.

``H v`` is the gradient of ``<g, v>``, where ``g`` is the gradient of the loss: two backward passes, and no matrix. From products alone come
the eigenvalues of largest magnitude (power iteration) and the trace (Hutchinson's estimate).

Paper: Pearlmutter 1994, "Fast Exact Multiplication by the Hessian"; Hutchinson 1990, "A stochastic estimator of the trace of the influence
    matrix"; Yao, Gholami, Keutzer, Mahoney 2020, "PyHessian: Neural Networks Through the Lens of the Hessian".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lowbit.autograd import records_gradients
from lowbit.errors import SpecError
from lowbit.measure.loss_surface import Graph, LossSurface, Place
from lowbit.network.taps import Tap

Draw: TypeAlias = Callable[[Tensor], Tensor]  # a vector shaped like a tensor


def rademacher(generator: torch.Generator) -> Draw:
    """Draws vectors of +-1 with equal odds; on the processor, so that devices draw alike."""

    def draw(like: Tensor) -> Tensor:
        return (torch.randint(0, 2, like.shape, generator=generator) * 2 - 1).to(like)

    return draw


def gaussian(generator: torch.Generator) -> Draw:
    """Draws vectors of the standard normal distribution; on the processor, so that devices draw alike."""
    return lambda like: torch.randn(like.shape, generator=generator).to(like)


def product_with(gradients: Sequence[Tensor | None], tensors: Sequence[Tensor], vectors: Sequence[Tensor]) -> list[Tensor]:
    """``H v``: the gradients of ``<gradients, vectors>``; zeros where the loss is linear in a tensor or does not depend on it.

    Args:
        gradients: Gradients of the loss with respect to ``tensors``, with their graph, which is kept.
        tensors: Tensors at which the Hessian is taken.
        vectors: Shaped like ``tensors``.
    """
    curved = [(g, v) for g, v in zip(gradients, vectors, strict=True) if g is not None and g.requires_grad]
    if not curved:
        return [torch.zeros_like(tensor) for tensor in tensors]
    outputs, weights = zip(*curved, strict=True)
    found = torch.autograd.grad(outputs, tensors, weights, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(tensor) if product is None else product for tensor, product in zip(tensors, found, strict=True)]


def inner_product(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    """Sum of the products of all elements, added up in float64."""
    return sum(float(torch.dot(a.detach().flatten().double(), b.detach().flatten().double())) for a, b in zip(first, second, strict=True))


class Hessian:
    """The Hessian of a loss surface with respect to blocks of parameters or activations, all together.

    With respect to activations it is that of the loss of every sample by what the layer reads or gives for it: in evaluation mode samples
    do not interact, so that over a batch it is block diagonal, with ``1 / N`` of each sample's. A module that is called several times has
    the activations of all calls, unless its tap names one.

    Args:
        surface: The loss.
        blocks: For each name parameters (``"conv1.weight"``) or taps; everything else is constant. Several blocks are for
            ``hutchinson_traces``, which tells them apart.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> surface = LossSurface(model, [torch.tensor([[1.0, 0.0], [0.0, 2.0]])], lambda output, batch: output.square().mean())
        >>> Hessian(surface, {"all": ["weight"]}).product([torch.ones(1, 2)])
        [tensor([[1., 4.]])]
    """

    def __init__(self, surface: LossSurface, blocks: Mapping[str, Sequence[Place]]) -> None:
        self.surface = surface
        self.blocks = {name: tuple(places) for name, places in blocks.items()}
        self._kept: Graph | None = None

    def graphs(self) -> Iterator[Graph]:
        """Gradients of every batch; those of a single batch are computed once."""
        for index in range(len(self.surface.batches)):
            if len(self.surface.batches) > 1:
                yield self.surface.graph(index, self.blocks)
            else:
                self._kept = self._kept or self.surface.graph(index, self.blocks)
                yield self._kept

    @records_gradients
    def product(self, vectors: Sequence[Tensor]) -> list[Tensor]:
        """``H v``, the sum over batches of ``share H_batch v``: the product of the mean over all samples, however they are cut into batches.

        Args:
            vectors: Shaped like the tensors of all blocks, in order.

        Raises:
            SpecError: Activations of several batches, which are different tensors.
        """
        if len(self.surface.batches) > 1 and any(isinstance(place, Tap) for places in self.blocks.values() for place in places):
            raise SpecError(f"activations of {len(self.surface.batches)} batches are different tensors. Join the batches, or take one.")
        total = [torch.zeros_like(vector) for vector in vectors]
        for graph in self.graphs():
            for added, product in zip(total, self._product(graph, vectors), strict=True):
                added.add_(product.detach(), alpha=graph.share)
        return total

    def probe(self, draw: Draw) -> dict[str, float]:
        """For every block ``z_i' (H z)_i``, with ``z`` drawn over all blocks; parameters have one ``z`` for all batches, activations their own."""
        found, kept = dict.fromkeys(self.blocks, 0.0), dict[int, Tensor]()
        for graph in self.graphs():
            is_weight = [isinstance(tensor, nn.Parameter) for tensor in graph.tensors]
            vectors = [kept[i] if i in kept else draw(tensor) for i, tensor in enumerate(graph.tensors)]
            kept = {i: vector for i, vector in enumerate(vectors) if is_weight[i]}
            for name, vector, product in zip(graph.blocks, vectors, self._product(graph, vectors), strict=True):
                found[name] += graph.share * inner_product([vector], [product])
        return found

    def elements(self) -> dict[str, float]:
        """For every block the number of its weights, or of its activations for one sample, the mean over samples."""
        found = dict.fromkeys(self.blocks, 0.0)
        for graph in self.graphs():
            for name, tensor in zip(graph.blocks, graph.tensors, strict=True):
                found[name] += graph.share * (tensor.numel() if isinstance(tensor, nn.Parameter) else tensor.numel() / graph.samples)
        return found

    @records_gradients
    def _product(self, graph: Graph, vectors: Sequence[Tensor]) -> list[Tensor]:
        try:
            return product_with(graph.gradients, graph.tensors, vectors)
        except RuntimeError as error:
            raise self.surface.undifferentiable(0, str(error)) from error


@dataclass(frozen=True)
class Eigenpair:
    """An eigenvalue of a Hessian and its eigenvector.

    Attributes:
        value: The eigenvalue, with its sign.
        vector: The eigenvector, of norm 1, as parts shaped like the Hessian's tensors.
        estimates: The eigenvalue after each iteration.
        is_converged: Whether the last two estimates agree within the tolerance.
    """

    value: float
    vector: list[Tensor]
    estimates: tuple[float, ...]
    is_converged: bool


def top_eigenvalues(
    hessian: Hessian,
    draw: Draw,
    *,
    count: int = 1,
    tolerance: float = 1e-3,
    max_iterations: int = 100,
    advance: Callable[[], object] = bool,
) -> list[Eigenpair]:
    """The eigenvalues of largest magnitude, by power iteration with deflation; negative ones keep their sign.

    ``v <- H v / ||H v||``, with ``lambda = <H v, v>``, until ``lambda`` changes by less than ``tolerance`` of itself. Before each product
    the parts of ``v`` along the eigenvectors that were found are taken out.

    Args:
        hessian: The Hessian with respect to all of its blocks together.
        draw: Draws the start vectors: ``gaussian(generator)``.
        count: How many eigenvalues.
        tolerance: Relative change of the eigenvalue at which to stop.
        max_iterations: Maximum number of products for each eigenvalue.
        advance: Called after each product.

    Returns:
        Eigenpairs in the order in which they were found: of decreasing magnitude, as far as iterations converge.

    Source: Yao et al. 2020, section 3, algorithm 1; without its 1e-6 in the norms, which biases eigenvalues below 1e-3.
    """
    tensors = next(hessian.graphs()).tensors
    if not 1 <= count <= sum(tensor.numel() for tensor in tensors):
        raise SpecError(f"count must be at least 1 and at most the number of weights, {sum(t.numel() for t in tensors)}; got {count}")
    found: list[Eigenpair] = []
    for _ in range(count):
        vector, estimates, is_converged = [draw(tensor) for tensor in tensors], list[float](), False
        while len(estimates) < max_iterations and not is_converged:
            vector = _normalized(_without(vector, found))
            product = hessian.product(vector)
            estimates.append(inner_product(product, vector))
            advance()
            is_flat = not any(bool(part.any()) for part in product)  # every vector is an eigenvector of 0
            is_settled = len(estimates) > 1 and abs(estimates[-1] - estimates[-2]) < tolerance * abs(estimates[-2])
            is_converged = is_flat or is_settled
            vector = vector if is_flat else product
        found.append(Eigenpair(estimates[-1], _normalized(vector), tuple(estimates), is_converged))
    return found


def _normalized(vector: list[Tensor]) -> list[Tensor]:
    norm = math.sqrt(inner_product(vector, vector))
    return [part / norm for part in vector] if norm > 0 else vector


def _without(vector: list[Tensor], found: Iterable[Eigenpair]) -> list[Tensor]:
    """``vector`` without its parts along eigenvectors."""
    for pair in found:
        along = inner_product(vector, pair.vector)
        vector = [part - along * other for part, other in zip(vector, pair.vector, strict=True)]
    return vector


@dataclass(frozen=True)
class Trace:
    """An estimate of the trace of a Hessian.

    Attributes:
        values: ``z' H z`` of each probe.
        elements: Number of weights, or of activations for one sample.
    """

    values: tuple[float, ...]
    elements: float

    @property
    def mean(self) -> float:
        """The estimated trace, the mean over probes; of activations the mean over samples of each one's trace."""
        return math.fsum(self.values) / len(self.values)

    @property
    def average(self) -> float:
        """The estimated mean of all eigenvalues: the trace for each element."""
        return self.mean / self.elements

    @property
    def error(self) -> float:
        """Standard error of ``mean``; infinite for a single probe."""
        if len(self.values) < 2:
            return math.inf
        squares = math.fsum((value - self.mean) ** 2 for value in self.values)
        return math.sqrt(squares / (len(self.values) - 1) / len(self.values))


def hutchinson_traces(
    hessian: Hessian,
    draw: Draw,
    *,
    min_probes: int = 10,
    max_probes: int = 100,
    tolerance: float = 1e-3,
    floor: float = 0.0,
    advance: Callable[[], object] = bool,
) -> dict[str, Trace]:
    """The trace of every block of a Hessian, as the mean of ``z_i' (H z)_i`` over random vectors ``z`` with ``E[z z'] = 1``.

    With several blocks one product serves all: what comes from other blocks is zero on average, and adds to the variance. For vectors of
    +-1 a probe has the variance ``2 (||H||_F^2 - sum_j H_jj^2)``. It ends when no block's running mean changes by more than
    ``tolerance`` of itself, which may be by luck: hence the minimum.

    Args:
        hessian: The Hessian.
        draw: Draws ``z``: ``rademacher(generator)`` or ``gaussian(generator)``.
        min_probes: Fewest probes.
        max_probes: Most probes.
        tolerance: Relative change of the running mean at which to stop.
        floor: Added to the magnitude that the change is compared with; a change of a mean well below it counts as none.
        advance: Called after each probe.

    Source: Hutchinson 1990; Yao et al. 2020, section 3, algorithm 2; Dong et al. 2020 (HAWQ-V2), section 3.2.
    """
    if not 1 <= min_probes <= max_probes:
        raise SpecError(f"probes: the fewest, {min_probes}, must be at least 1 and at most the most, {max_probes}")
    values: dict[str, list[float]] = {name: [] for name in hessian.blocks}
    for count in range(1, max_probes + 1):
        for name, value in hessian.probe(draw).items():
            values[name].append(value)
        advance()
        if count >= min_probes and has_settled(values, tolerance, floor):
            break
    elements = hessian.elements()
    return {name: Trace(tuple(found), elements[name]) for name, found in values.items()}


def has_settled(values: Mapping[str, Sequence[float]], tolerance: float, floor: float = 0.0) -> bool:
    """Whether the last value changed no block's running mean by more than ``tolerance`` of it and ``floor``; that of no value is 0.

    >>> has_settled({"a": [1.0, 3.0, 2.0], "b": [1.0, 1.0, 1.0]}, 1e-3), has_settled({"a": [1.0, 3.0]}, 1e-3)
    (True, False)
    """
    for found in values.values():
        mean, before = math.fsum(found) / len(found), math.fsum(found[:-1]) / max(len(found) - 1, 1)
        if abs(mean - before) > tolerance * (abs(before) + floor):
            return False
    return True


@dataclass(frozen=True)
class Spectrum:
    """A whole Hessian, for blocks of at most some thousand elements.

    Attributes:
        matrix: ``[n, n]``, float64, on the processor.
        elements: Number of weights, or of activations for one sample.
    """

    matrix: Tensor
    elements: float

    @property
    def eigenvalues(self) -> list[float]:
        """All eigenvalues, by decreasing magnitude."""
        return sorted(torch.linalg.eigvalsh(self.matrix).tolist(), key=abs, reverse=True)

    @property
    def trace(self) -> float:
        """The sum of the eigenvalues; of activations the mean over samples of each one's."""
        return float(self.matrix.trace())

    @property
    def average(self) -> float:
        """The trace for each element."""
        return self.trace / self.elements

    @property
    def frobenius(self) -> float:
        """The root of the sum of all squared entries; a normal probe for the trace deviates by ``sqrt(2)`` times this."""
        return float(torch.linalg.matrix_norm(self.matrix))

    @property
    def off_diagonal(self) -> float:
        """The same without the diagonal; a probe of +-1 for the trace deviates by ``sqrt(2)`` times this."""
        return float(torch.linalg.matrix_norm(self.matrix - torch.diag(self.matrix.diagonal())))


def exact_spectrum(hessian: Hessian, *, advance: Callable[[], object] = bool) -> Spectrum:
    """The Hessian of all blocks together, column by column: as many products as it has elements.

    Args:
        hessian: The Hessian.
        advance: Called after each product.
    """
    tensors = next(hessian.graphs()).tensors
    sizes = [tensor.numel() for tensor in tensors]
    columns = []
    for index in range(sum(sizes)):
        axis = functional.one_hot(torch.tensor(index), sum(sizes)).split(sizes)
        product = hessian.product([part.view_as(tensor).to(tensor) for part, tensor in zip(axis, tensors, strict=True)])
        columns.append(torch.cat([part.flatten() for part in product]).double().cpu())
        advance()
    matrix = torch.stack(columns)
    return Spectrum((matrix + matrix.T) / 2, sum(hessian.elements().values()))
