"""HAWQ: layers whose loss is curved more sharply get more bits, and are retrained first.

Paper: Dong, Yao, Gholami, Mahoney, Keutzer 2019, "HAWQ: Hessian AWare Quantization of Neural Networks With Mixed-Precision", ICCV.
    Section 3.2 (power iteration, Eq. 4 and 5), 3.3 (the order of bits, Eq. 6), 3.4 (the order of retraining, Eq. 7).
Symbols: lambda_i -> eigenvalue, n_i -> the number of weights, S_i -> score, Q -> HawqWeight, Omega_i -> omega.
Differs from the paper:
    - The authors choose bits by hand along the order of scores. Here every assignment along it is looked at, and of those within the budget
      the one of the least sum of Omega is taken, or with ``prefer="fit"`` the one that uses most of the budget. That one often is the
      uniform assignment, where a uniform one uses up the budget.
    - A block is one layer, and the first and the last layer keep their bits unless they are searched too.
    - An eigenvalue of largest magnitude that is negative, as where training has not converged, counts by its magnitude.
    - Without labels the loss is the cross-entropy with the network's own answers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lowbit.assignment.parallel import Measure, measurements
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem
from lowbit.assignment.solve import Table, thinned, undominated
from lowbit.errors import SpecError
from lowbit.measure.hessian import Hessian, exact_spectrum, gaussian, top_eigenvalues
from lowbit.measure.loss_surface import LossSurface
from lowbit.methods.mixed_precision.hawq_quantizers import HawqWeight
from lowbit.network.insert import WeightSite
from lowbit.options import AtLeast, Interval
from lowbit.registry import MethodInfo, register
from lowbit.spec import Granularity, LayerBits

MOST_ASSIGNMENTS = 5_000_000
Preference = Literal["omega", "fit"]
FRONTIER = 100  # options that a search gives at most


def scores(eigenvalues: Sequence[float], counts: Sequence[int]) -> list[float]:
    """``S_i = |lambda_i| / n_i``, whose order is that of precision. Source: Eq. 6.

    >>> scores([8.0, -6.0], [4, 2])
    [2.0, 3.0]
    """
    return [abs(value) / count for value, count in zip(eigenvalues, counts, strict=True)]


def omega(curvatures: Sequence[float], perturbations: Table) -> list[list[float]]:
    """``Omega_i(b) = curvature_i ||Q_b(W_i) - W_i||^2`` for each layer and width. Source: HAWQ Eq. 7; HAWQ-V2 Eq. 9.

    Args:
        curvatures: Eigenvalues, or average traces.
        perturbations: ``[layers][widths]``, see ``perturbation``.

    >>> omega([2.0, 1.0], [[3.0, 1.0], [5.0, 0.5]])
    [[6.0, 2.0], [5.0, 0.5]]
    """
    return [[curvature * float(value) for value in row] for curvature, row in zip(curvatures, perturbations, strict=True)]


def descending(values: Sequence[float]) -> list[int]:
    """Indices from the largest value to the smallest; equal ones in their order."""
    return sorted(range(len(values)), key=lambda index: -values[index])


def perturbation(weight: Tensor, bit_width: int, granularity: Granularity | None = None) -> float:
    """``||Q(W) - W||_2^2``, the sum over all weights, with ``HawqWeight``; added up in float64."""
    values = weight.detach().float()
    return float((HawqWeight(bit_width, granularity=granularity).encode(values).decode() - values).double().square().sum())


def ordered_assignments(order: Sequence[int], widths: int) -> NDArray[np.int64]:
    """Every assignment of widths whose bits never rise along ``order``: ``C(L + m - 1, m - 1)`` of them in place of ``m**L``.

    Args:
        order: Layers from the most bits to the fewest.
        widths: How many widths there are, ``m``; 0 stands for the most bits.

    Returns:
        ``[assignments, layers]``, widths by index.

    Raises:
        SpecError: There are too many to look at.

    >>> ordered_assignments([1, 0], 2).tolist()
    [[1, 1], [1, 0], [0, 0]]
    """
    layers = len(order)
    count = math.comb(layers + widths - 1, widths - 1)
    if count > MOST_ASSIGNMENTS:
        raise SpecError(
            f"{layers} layers have {count} assignments of {widths} widths along an order; pass fewer candidates, at most 4 or 5."
        )
    ends = np.zeros((1, 0), dtype=np.int64)  # where the layers of one width end and those of the next begin
    for _ in range(widths - 1):
        last = ends[:, -1] if ends.shape[1] else np.zeros(len(ends), dtype=np.int64)
        repeats = layers + 1 - last
        starts = np.repeat(np.cumsum(repeats) - repeats, repeats)
        new = np.arange(int(repeats.sum())) - starts + np.repeat(last, repeats)
        ends = np.column_stack([np.repeat(ends, repeats, axis=0), new])
    found = np.empty((count, layers), dtype=np.int64)
    found[:, list(order)] = (ends[:, :, None] <= np.arange(layers)).sum(1)
    return found


def totals(table: Table, assignments: NDArray[np.int64]) -> NDArray[np.float64]:
    """The sum over layers of each assignment's values."""
    values = np.asarray(table, dtype=np.float64)
    found: NDArray[np.float64] = values[np.arange(values.shape[0]), assignments].sum(1)
    return found


def best_within(
    costs: Sequence[Table], limits: Sequence[float], losses: Table, assignments: NDArray[np.int64], prefer: Preference = "omega"
) -> int | None:
    """The assignment that is within all limits and loses least, or that uses most of the first limit.

    Args:
        costs: A table ``[layers][widths]`` for each limit.
        limits: Largest total costs.
        losses: A table like them.
        assignments: ``[assignments, layers]``.
        prefer: ``omega``: least loss, of equal ones the cheapest; ``fit``: largest cost, of equal ones that of least loss.

    Returns:
        Its row in ``assignments``; ``None`` where none is within the limits.
    """
    found = [totals(table, assignments) for table in costs]
    rows = np.flatnonzero(np.all([cost <= limit * (1 + 1e-12) for cost, limit in zip(found, limits, strict=True)], axis=0))
    if not len(rows):
        return None
    cost, loss = found[0][rows], totals(losses, assignments[rows])
    return int(rows[np.lexsort((cost, loss) if prefer == "omega" else (loss, -cost))[0]])


@dataclass(frozen=True)
class Curved:
    """The weights of a problem, in order, with what quantizing them does.

    Attributes:
        names: The weights.
        counts: How many numbers each holds.
        widths: The choices of each.
        perturbations: ``||Q_b(W) - W||^2`` of each for each of its choices.
    """

    names: tuple[str, ...]
    counts: tuple[int, ...]
    widths: tuple[tuple[LayerBits, ...], ...]
    perturbations: list[list[float]]

    @staticmethod
    def of(problem: SearchProblem) -> Curved:
        """All weights of ``problem``, quantized at each of their widths."""
        rows = []
        with problem.progress.stage("weights at each width", total=len(problem.layers)) as stage:
            for name, site in problem.layers.items():
                by_bits = {bits: perturbation_of(site, bits) for bits in {choice.weight for choice in problem.choices[name]}}
                rows.append([by_bits[choice.weight] for choice in problem.choices[name]])
                stage.advance()
        counts = tuple(site.original.numel() for site in problem.layers.values())
        return Curved(tuple(problem.layers), counts, tuple(tuple(problem.choices[name]) for name in problem.layers), rows)

    def costs(self, problem: SearchProblem) -> tuple[list[list[list[float]]], list[float]]:
        """Tables of the costs that have a limit, and what the limits leave for these layers; without a limit those of the main cost."""
        kinds = list(problem.limits) or [problem.main]
        tables = [[[problem.costs[kind].table[name][bits] for bits in row] for name, row in self.rows] for kind in kinds]
        return tables, [problem.limits.get(kind, math.inf) - problem.costs[kind].fixed for kind in kinds]

    @property
    def rows(self) -> list[tuple[str, tuple[LayerBits, ...]]]:
        """Each weight with its choices."""
        return list(zip(self.names, self.widths, strict=True))

    def bits(self, choices: Sequence[int]) -> dict[str, LayerBits]:
        """The bits of each weight from the indices of its choices."""
        return {name: row[choice] for (name, row), choice in zip(self.rows, choices, strict=True)}

    def by_bits(self, table: Table) -> dict[str, dict[LayerBits, float]]:
        """A table by names and bits."""
        return {name: dict(zip(row, map(float, values), strict=True)) for (name, row), values in zip(self.rows, table, strict=True)}


def perturbation_of(site: WeightSite, bits: int | None) -> float:
    """``perturbation`` of a layer's weight, a scale for each output channel; none in float."""
    return 0.0 if bits is None else perturbation(site.original, bits, Granularity.channel(site.channel_axis))


def surface_of(problem: SearchProblem, samples: int, why: str) -> LossSurface:
    """The loss of the problem's network over its first ``samples`` samples."""
    return LossSurface(problem.model, problem.need_batches(why), problem.loss, predict=problem.task.predict, samples=samples)


def check_widths(problem: SearchProblem, method: str, *, is_ordered: bool) -> None:
    """SpecError where a width has no grid of ``HawqWeight``, or where bits are to follow an order of layers and there are two of each."""
    for name, choices in problem.choices.items():
        if any(bits.weight == 1 for bits in choices):
            raise SpecError(f"{method}: layer {name!r} may have 1 bit, for which its quantizer has no grid. Pass candidates from 2 to 8.")
        if is_ordered and len({bits.activation for bits in choices}) > 1:
            raise SpecError(
                f"{method}: an order of layers is one of weights, and layer {name!r} may have several widths of activations. Pass one, or "
                "choose hawq_v2 with selection='exact'."
            )


@register(
    MethodInfo(
        name="hawq",
        title="HAWQ: Hessian AWare Quantization of Neural Networks with Mixed-Precision",
        paper="Dong, Yao, Gholami, Mahoney, Keutzer, ICCV 2019",
        url="https://arxiv.org/abs/1905.03696",
        section="mixed_precision",
        axes=("assignment",),
        kind="search",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("pretrained",),
        fidelity="equations",
        summary="more bits where the largest eigenvalue of the Hessian, for each weight, is larger",
        evidence="eigenvalues and quantizers are checked against the authors' code; the search was never published",
    )
)
@dataclass
class Hawq(SearchMethod):
    """Bits that never rise along the order of ``|lambda| / n``, within the budget.

    What is predicted for a layer is ``Omega = |lambda| ||Q(W) - W||^2``. Layers are to be retrained in its order at the bits that were
    found, the largest first, each quantized while those after it are still in float.

    Attributes:
        samples: Samples that the Hessian is taken over, in whole batches.
        eigenvalues: By ``power`` iteration, or ``exact`` from the whole matrix, as many products as a layer has weights.
        tolerance: Relative change of an eigenvalue at which power iteration stops.
        max_iterations: Most iterations for an eigenvalue.
        prefer: Which assignment along the order is taken of those within the budget: that of the least sum of ``omega``, or the best ``fit``,
            which uses most of it.
    """

    samples: Annotated[int, AtLeast(1)] = 256
    eigenvalues: Literal["power", "exact"] = "power"
    tolerance: Annotated[float, Interval(0, 1)] = 1e-3
    max_iterations: Annotated[int, AtLeast(1)] = 100
    prefer: Preference = "omega"

    def search(self, problem: SearchProblem) -> Found:
        """The best assignment along the order within the budget, and all along it that no other beats in cost and omega."""
        check_widths(problem, "hawq", is_ordered=True)
        curved = Curved.of(problem)
        values, unsettled = self._eigenvalues(problem)
        score = scores(values, curved.counts)
        losses = omega([abs(value) for value in values], curved.perturbations)
        assignments = ordered_assignments(descending(score), max(map(len, curved.widths)))
        tables, limits = curved.costs(problem)
        best = best_within(tables, limits, losses, assignments, self.prefer)
        if best is None:
            raise SpecError(
                f"hawq: no assignment along the order of scores ({', '.join(curved.names[layer] for layer in descending(score))}) is within "
                f"{', '.join(f'{kind}={limit:.6g}' for kind, limit in problem.limits.items())}. Raise a limit, or choose hawq_v2."
            )
        lost = [row[choice] for row, choice in zip(losses, assignments[best], strict=True)]
        frontier = thinned(undominated(totals(tables[0], assignments), totals(losses, assignments)), FRONTIER)
        return Found(
            curved.bits(assignments[best].tolist()),
            math.fsum(lost),
            tuple(problem.option(curved.bits(assignments[row].tolist()), float(totals(losses, assignments[[row]])[0])) for row in frontier),
            curved.by_bits(losses),
            tuple(curved.names[layer] for layer in descending(lost)),
            {
                "eigenvalues": dict(zip(curved.names, values, strict=True)),
                "scores": dict(zip(curved.names, score, strict=True)),
                "unsettled": unsettled,
            },
        )

    def _eigenvalues(self, problem: SearchProblem) -> tuple[list[float], list[str]]:
        """The top eigenvalue of each weight's Hessian, and the weights at which power iteration did not settle."""
        jobs = {name: site.path for name, site in problem.layers.items()}
        prepare, facts = partial(_top_eigenvalue, method=self), {"method": self.hyper_parameter_values()}
        found = measurements(problem, jobs, prepare, name="eigenvalues of the Hessian", facts=facts)
        return [found[name]["value"] for name in jobs], [name for name in jobs if not found[name]["is_settled"]]


def _top_eigenvalue(problem: SearchProblem, *, method: Hawq) -> Measure:
    """What gives the top eigenvalue of the Hessian by the parameter that a job names."""
    surface = surface_of(problem, method.samples, "the Hessian")

    def measure(path: str) -> dict[str, object]:
        hessian = Hessian(surface, {path: [path]})
        if method.eigenvalues == "exact":
            return {"value": exact_spectrum(hessian).eigenvalues[0], "is_settled": True}
        draw = gaussian(torch.default_generator)  # seeded for each job
        (pair, *_) = top_eigenvalues(hessian, draw, tolerance=method.tolerance, max_iterations=method.max_iterations)
        return {"value": pair.value, "is_settled": pair.is_converged}

    return measure
