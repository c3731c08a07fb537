"""HAWQ-V2: the bits of least total curvature-weighted perturbation within the budget, with curvature as the average Hessian trace.

Paper: Dong, Yao, Cai, Arfeen, Gholami, Mahoney, Keutzer 2020, "HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks",
    NeurIPS. Section 3.1 (Lemma 1), 3.2 (Hutchinson), 3.3 (Eq. 9 and the Pareto frontier), 3.4 (activations).
    Appendix: Yao et al. 2021, "HAWQ-V3", section 3.4 (integer linear programming, limits as fractions, tied layers).
Symbols: Tr(H_i) / n_i -> average trace, Q -> HawqWeight and HawqActivation, Omega -> omega, z -> a probe.
Differs from the paper:
    - The least sum of Omega is found exactly, under several limits at once, where the paper draws the frontier and takes a point of it.
    - At least ten probes are drawn for a trace. With the authors' rule alone a first probe near the null space ends the estimate at 0.
    - One product probes all layers at once (``joint``), where the authors' code takes one for each.
    - A negative trace, as where training has not converged, counts as 0: it would make fewer bits look better.
    - Without labels the loss is the cross-entropy with the network's own answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lowbit.assignment.parallel import Measure, Prepare, measurements
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem
from lowbit.assignment.solve import Configuration, Table, frontier, solve, thinned, undominated
from lowbit.errors import SpecError
from lowbit.inputs import Inputs
from lowbit.measure.hessian import Hessian, Trace, exact_spectrum, gaussian, has_settled, hutchinson_traces, rademacher
from lowbit.measure.loss_surface import LossSurface, Place
from lowbit.methods.mixed_precision.hawq import (
    FRONTIER,
    Curved,
    check_widths,
    descending,
    omega,
    ordered_assignments,
    surface_of,
    totals,
)
from lowbit.methods.mixed_precision.hawq_quantizers import HawqActivation
from lowbit.network.calls import on_input
from lowbit.network.graph.dataflow import capture
from lowbit.network.layers import evaluating
from lowbit.network.taps import Tap
from lowbit.options import AtLeast, Interval
from lowbit.quantizers.ranges.observers import MinMaxObserver
from lowbit.registry import MethodInfo, register

PARTS = 20_000  # configurations that the frontier keeps from layer to layer
CHUNK = 10  # joint probes that are kept together
WEIGHTS, INPUTS = "weights", "inputs"  # what a Hessian is taken by


def limit_between(costs: Table, fraction: float) -> float:
    """``cheapest + fraction (dearest - cheapest)``, between all layers at their cheapest and at their dearest width.

    Source: HAWQ-V3, section 3.4.

    >>> limit_between([[4.0, 8.0], [40.0, 80.0]], 0.25)
    55.0
    """
    cheapest, dearest = (math.fsum(pick(row) for row in costs) for pick in (min, max))
    return cheapest + fraction * (dearest - cheapest)


def select(
    losses: Table,
    costs: Sequence[Table],
    limits: Sequence[float],
    groups: Sequence[Sequence[int]] = (),
    *,
    order: Sequence[int] | None = None,
    names: Sequence[str] = (),
) -> tuple[int, ...]:
    """The choices of least total ``omega`` within all limits.

    Args:
        losses: ``Omega_i(b)``, ``[layers][widths]``.
        costs: A table like it for each limit.
        limits: Largest total costs.
        groups: Indices of layers that are tied to the same choice.
        order: Layers along which bits never rise, widths being from the most bits to the fewest; default: any choice.
        names: What the limits limit, for errors.

    Returns:
        The index of each layer's width.

    Raises:
        SpecError: The limits cannot be met.

    Source: section 3.3, Eq. 9; with ``order`` as in the re-implementation of NNCF.
    """
    best = solve(losses, costs, limits, groups, names=names)  # says which limit cannot be met
    if order is None:
        return best
    assignments = ordered_assignments(order, len(losses[0]))
    fits = [totals(table, assignments) <= limit * (1 + 1e-12) for table, limit in zip(costs, limits, strict=True)]
    fits += [assignments[:, list(group)].min(1) == assignments[:, list(group)].max(1) for group in groups]
    kept = assignments[np.all(fits, axis=0)] if fits else assignments
    if not len(kept):
        raise SpecError("no assignment along the order of traces is within the limits. Raise a limit, or choose selection='exact'.")
    return tuple(kept[totals(losses, kept).argmin()].tolist())


def same_input(model: nn.Module, sample: Inputs, names: Sequence[str]) -> list[tuple[int, ...]]:
    """Indices of the layers that read the same tensor, such as the first convolution of a residual block and the one on its shortcut.

    Raises:
        GraphError: The network's dataflow cannot be captured.
    """
    flow, readers = capture(model, sample), dict[tuple[str, ...], list[int]]()
    for index, name in enumerate(names):
        read = tuple(producer.name for node in flow.of_layer(name) for producer in flow.producers(node))
        if read:
            readers.setdefault(read, []).append(index)
    return [tuple(group) for group in readers.values() if len(group) > 1]


def activation_perturbations(surface: LossSurface, layers: Sequence[str], widths: Sequence[int]) -> dict[str, dict[int, float]]:
    """``E ||Q_b(a) - a||^2`` of what each layer reads, the mean over samples, with ``HawqActivation`` of the range over all samples.

    Args:
        surface: The network and its samples.
        layers: Names of layers; of one that is called several times all calls count.
        widths: Bit-widths.
    """
    ranges = {name: MinMaxObserver() for name in layers}
    found = {name: dict.fromkeys(widths, 0.0) for name in layers}

    def see_range(name: str, x: Tensor) -> None:
        ranges[name].observe(x)

    def add_error(name: str, x: Tensor) -> None:
        lower, upper = ranges[name].extremes()
        for width in widths:
            quantizer = HawqActivation(width, is_signed=bool(lower < 0)).eval()
            quantizer.initialize(torch.cat([lower, upper]))
            found[name][width] += float((quantizer(x) - x).double().square().sum()) / surface.samples

    for see in (see_range, add_error):
        with _reading(surface.model, layers, see), evaluating(surface.model):
            for batch in surface.batches:
                surface.predict(surface.model, batch)
    return found


@contextmanager
def _reading(model: nn.Module, layers: Sequence[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Within the context ``see(name, x)`` gets what each layer reads."""
    handles = [on_input(model.get_submodule(name), partial(see, name)) for name in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _probing(problem: SearchProblem, *, method: HawqV2, purpose: str) -> Measure:
    """What gives ``z' H z`` of each of the blocks that a job names, and their sizes."""
    surface = surface_of(problem, method.samples, "the Hessian")
    vectors = rademacher if method.probes == "rademacher" else gaussian

    def measure(names: Sequence[str]) -> dict[str, dict[str, Any]]:
        blocks: dict[str, Sequence[Place]] = {
            name: [problem.layers[name].path] if purpose == WEIGHTS else [Tap(name, "input")] for name in names
        }
        hessian = Hessian(surface, blocks)
        if method.probes == "exact":
            (name,), spectrum = names, exact_spectrum(hessian)
            deviations = {"rademacher": math.sqrt(2) * spectrum.off_diagonal, "gaussian": math.sqrt(2) * spectrum.frobenius}
            return {"values": {name: [spectrum.average]}, "elements": {name: 1.0}, "deviations": deviations}
        draw = vectors(torch.default_generator)  # seeded for each job
        least, most = (CHUNK, CHUNK) if method.joint else (method.min_probes, method.max_probes)
        found = hutchinson_traces(hessian, draw, min_probes=least, max_probes=most, tolerance=method.tolerance)
        return {
            "values": {name: list(one.values) for name, one in found.items()},
            "elements": {n: one.elements for n, one in found.items()},
        }

    return measure


@register(
    MethodInfo(
        name="hawq_v2",
        title="HAWQ-V2: Hessian Aware trace-Weighted Quantization of Neural Networks",
        paper="Dong, Yao, Cai, Arfeen, Gholami, Mahoney, Keutzer, NeurIPS 2020",
        url="https://arxiv.org/abs/1911.03852",
        section="mixed_precision",
        axes=("assignment",),
        kind="search",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("pretrained",),
        fidelity="equations",
        summary="the bits of least perturbation, weighted by the average trace of the Hessian, found exactly",
        evidence="traces are checked against the authors' code, selections against HAWQ-V3's published ones; V2's was never published",
    )
)
@dataclass
class HawqV2(SearchMethod):
    """The least sum of ``Omega = trace / n * ||Q(W) - W||^2`` within every limit.

    Where layers may have several widths of activations, ``Omega`` of what a layer reads is added: the average trace by activations,
    times the mean squared error of a sample.

    Attributes:
        samples: Samples that the Hessian is taken over, in whole batches.
        probes: Random vectors of +-1 (``rademacher``) or normal ones (``gaussian``); or the ``exact`` trace, as many products as a layer has
            weights.
        min_probes: Fewest probes of a layer.
        max_probes: Most probes of a layer.
        tolerance: Relative change of the running mean at which probing stops.
        joint: Probe all layers with the same products: as many times faster as there are layers, and noisier. ``False``: layer by layer, as
            in the authors' code.
        selection: ``exact``; or ``ordered``: only assignments whose bits never rise along the order of average traces.
        tie: Layers that get the same bits: ``none``, or those that read the ``same_input``, as hardware that computes them at once needs.
        fraction: A further limit on the cost that the search is about: this share of the way from all layers at their cheapest width to all at
            their dearest.
    """

    trial = MappingProxyType({"max_probes": 15})

    samples: Annotated[int, AtLeast(1)] = 128
    probes: Literal["rademacher", "gaussian", "exact"] = "rademacher"
    min_probes: Annotated[int, AtLeast(1)] = 10
    max_probes: Annotated[int, AtLeast(1)] = 50
    tolerance: Annotated[float, Interval(0, 1)] = 1e-3
    joint: bool = True
    selection: Literal["exact", "ordered"] = "exact"
    tie: Literal["none", "same_input"] = "none"
    fraction: Annotated[float | None, Interval(0, 1)] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_probes > self.max_probes:
            raise SpecError(f"hawq_v2: min_probes must be at most max_probes, {self.max_probes}; got {self.min_probes}")

    def search(self, problem: SearchProblem) -> Found:
        """The assignment of least total omega within the limits, and the frontier of its cost and omega."""
        check_widths(problem, "hawq_v2", is_ordered=self.selection == "ordered")
        curved, surface = Curved.of(problem), surface_of(problem, self.samples, "the Hessian")
        traces, facts = self._traces(problem)
        averages = [traces[name] for name in curved.names]
        losses = omega([max(value, 0.0) for value in averages], curved.perturbations)
        facts |= {"average_traces": traces, "negative": [name for name, value in traces.items() if value < 0]}
        read = self._activations(problem, surface)
        if read is not None:
            facts["average_activation_traces"] = read[0]
            losses = [
                [value + read[1].get(name, {}).get(bits.activation, 0.0) for bits, value in zip(row, values, strict=True)]
                for (name, row), values in zip(curved.rows, losses, strict=True)
            ]
        tables, limits = curved.costs(problem)
        if self.fraction is not None:
            tables, limits = [tables[0], *tables], [limit_between(tables[0], self.fraction), *limits]
        groups = same_input(problem.model, problem.sample, curved.names) if self.tie == "same_input" else []
        order = descending(averages) if self.selection == "ordered" else None
        kinds = list(problem.limits) or [problem.main]
        names = [f"hawq_v2: {kind} of the searched layers" for kind in (kinds[:1] if self.fraction is not None else []) + kinds]
        choices = select(losses, tables, limits, groups, order=order, names=names)
        lost = [row[choice] for row, choice in zip(losses, choices, strict=True)]
        return Found(
            curved.bits(choices),
            math.fsum(lost),
            tuple(problem.option(curved.bits(point.choices), point.loss) for point in self._frontier(losses, tables[0], groups, order)),
            curved.by_bits(losses),
            tuple(curved.names[layer] for layer in descending(lost)),
            facts,
        )

    def _traces(self, problem: SearchProblem, purpose: str = WEIGHTS) -> tuple[dict[str, float], dict[str, object]]:
        """The average trace by each weight, or by what each layer reads, and how sure it is."""
        prepare, facts = partial(_probing, method=self, purpose=purpose), {"method": self.hyper_parameter_values()}
        names = [name for name in problem.layers if purpose == WEIGHTS or len({bits.activation for bits in problem.choices[name]}) > 1]
        title = f"traces of the Hessian by {purpose}"
        if self.probes == "exact" or not self.joint:
            parts = measurements(problem, {name: [name] for name in names}, prepare, name=title, facts=facts)
        else:
            parts = self._joint_probes(problem, names, prepare, title, facts)
        traces = {name: Trace(tuple(parts[name]["values"][name]), parts[name]["elements"][name]) for name in names}
        averages = {name: trace.average for name, trace in traces.items()}
        if self.probes == "exact":
            return averages, {"deviations_of_a_probe": {name: parts[name]["deviations"] for name in names}}
        errors = {name: trace.error / trace.elements if len(trace.values) > 1 else None for name, trace in traces.items()}
        return averages, {"standard_errors": errors}

    def _joint_probes(
        self, problem: SearchProblem, names: Sequence[str], prepare: Prepare, title: str, facts: Mapping[str, object]
    ) -> dict[str, Any]:
        """Probes of all blocks by the same products, ``CHUNK`` of them being one job, until no running mean changes any more."""
        chunks = [f"probes from {start}" for start in range(0, self.max_probes, CHUNK)]
        wanted: list[str] = []
        while True:
            wanted = chunks[: len(wanted) + problem.workers]
            parts = measurements(problem, {chunk: list(names) for chunk in wanted}, prepare, name=title, facts=facts)
            values = {name: [v for chunk in wanted for v in parts[chunk]["values"][name]][: self.max_probes] for name in names}
            counts = range(self.min_probes, len(values[names[0]]) + 1)
            enough = (n for n in counts if has_settled({name: found[:n] for name, found in values.items()}, self.tolerance))
            count = next(enough, None)
            if count is not None or len(wanted) == len(chunks):
                elements = parts[wanted[0]]["elements"]
                return {name: {"values": {name: values[name][:count]}, "elements": elements} for name in names}

    def _activations(
        self, problem: SearchProblem, surface: LossSurface
    ) -> tuple[dict[str, float], dict[str, dict[int | None, float]]] | None:
        """Average traces by what layers read and their omega at each width, where there are several."""
        widths = sorted({bits.activation for row in problem.choices.values() for bits in row if bits.activation is not None})
        names = [name for name, row in problem.choices.items() if len({bits.activation for bits in row}) > 1]
        if not names:
            return None
        traces, _ = self._traces(problem, INPUTS)
        errors = activation_perturbations(surface, names, widths)
        return traces, {name: {width: max(traces[name], 0.0) * value for width, value in errors[name].items()} for name in names}

    def _frontier(self, losses: Table, costs: Table, groups: Sequence[Sequence[int]], order: Sequence[int] | None) -> list[Configuration]:
        """At most ``FRONTIER`` configurations that no other beats."""
        if order is None:
            found = frontier(losses, costs, groups, points=PARTS)
        else:
            rows = ordered_assignments(order, len(losses[0]))
            cost, loss = totals(costs, rows), totals(losses, rows)
            found = [Configuration(float(cost[i]), float(loss[i]), tuple(rows[i].tolist())) for i in undominated(cost, loss)]
        return [found[index] for index in thinned(np.arange(len(found)), FRONTIER)]
