"""What a search method is, and the problem that it gets: a float network, the widths of each layer, and budgets."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lowbit.assignment.budget import Budget, CostKind
from lowbit.assignment.costs import Assignment, Choices, Cost, average_cost, bops_cost, latency_cost, policy_of, size_cost
from lowbit.errors import DataError, LayerError, SpecError
from lowbit.inputs import Calibration, Inputs
from lowbit.measure.cost import FLOAT_BITS
from lowbit.measure.latency_table import LatencyTable
from lowbit.measure.macs import count_macs
from lowbit.measure.outputs import class_dimension, output_tensor
from lowbit.network.insert import WeightSite
from lowbit.network.job import NetworkJob
from lowbit.network.unwrap import plain_copy
from lowbit.options import Method
from lowbit.progress import Progress
from lowbit.qat.task import Batch, Output, Task
from lowbit.spec import BitPolicy, LayerBits, parse_bits


@dataclass(frozen=True)
class Option:
    """One way to give bits to the searched layers.

    Attributes:
        bits: Bits of each searched layer.
        cost: What the network costs then, of the kind that the search is about (``SearchProblem.main``).
        loss: The loss that the method predicts, in a unit of its own; less is better.
    """

    bits: Assignment
    cost: float
    loss: float


@dataclass(frozen=True)
class Found:
    """What a search method found.

    Attributes:
        bits: Bits of each searched layer, within the budget.
        loss: The loss that the method predicts for them; ``None`` where it predicts none.
        frontier: Options of which none costs less and loses less than another, from the cheapest on; empty where the method finds one.
        sensitivity: Predicted loss of each layer at each width, the others in float; empty where the method has none.
        order: Layers in the order in which the paper retrains them; empty where it says none.
        facts: What else it knows of its search, as JSON holds it: traces, episodes, rewards.
    """

    bits: Assignment
    loss: float | None
    frontier: tuple[Option, ...] = ()
    sensitivity: Mapping[str, Mapping[LayerBits, float]] = field(default_factory=dict)
    order: tuple[str, ...] = ()
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchProblem:
    """A float network whose layers are to get bits under a budget.

    Attributes:
        model: The float network in evaluation mode; a method works on copies.
        sample: Inputs of one call.
        layers: The weights whose bits are searched, in the order in which they run.
        choices: The widths that each of them may have, from the highest to the lowest.
        fixed: Bits of all other weights: the first and the last layer.
        order: The names of all weights in the order in which they run.
        costs: What networks cost, by kind: ``average``, ``size``, ``bops``, and ``latency`` where there is a table.
        limits: The most of each kind that a network may cost, in the unit of ``costs``; empty: the method gives its whole frontier.
        calibration: Unlabelled samples, or ``None``.
        batches: Labelled batches, or unlabelled ones where ``has_labels`` says so; empty where there are none.
        has_labels: Whether ``batches`` hold targets.
        task: Loss and metrics.
        seed: Seed of everything random; the result does not depend on ``workers``.
        progress: Progress display.
        workers: Processes to use.
        ray: Address of a Ray cluster to use in their place, or ``None``.
        work_dir: Folder for what a killed search needs to go on, or ``None``.

    Example:
        >>> import torch, lowbit
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> sample = Inputs.of(torch.rand(2, 8), model)
        >>> problem = make_problem(
        ...     model, sample, budget=Budget(average=4), candidates=(2, 4), activation_bits=(8,), first_last=8, task=lowbit.Classification()
        ... )
        >>> list(problem.layers), problem.limits, [problem.fits(bits) for bits in problem.uniform().values()]
        (['1', '2'], {'average': 4}, [True, True])
    """

    model: nn.Module
    sample: Inputs
    layers: Mapping[str, WeightSite]
    choices: Choices
    fixed: Assignment
    order: Sequence[str]
    costs: Mapping[CostKind, Cost]
    limits: Mapping[CostKind, float]
    calibration: Calibration | None
    batches: Sequence[Batch]
    has_labels: bool
    task: Task
    seed: int = 0
    progress: Progress = field(default_factory=Progress.silent)
    workers: int = 1
    work_dir: Path | None = None
    ray: str | None = None

    @property
    def main(self) -> CostKind:
        """The kind of cost along which options are ordered: that of the first limit, or the size."""
        return next(iter(self.limits), "size")

    def fits(self, bits: Assignment) -> bool:
        """Whether a network with these bits is within every limit."""
        return all(self.costs[kind].of(bits) <= limit * (1 + 1e-12) for kind, limit in self.limits.items())

    def option(self, bits: Assignment, loss: float) -> Option:
        """An option with its cost."""
        return Option(dict(bits), self.costs[self.main].of(bits), loss)

    def all_bits(self, bits: Assignment) -> dict[str, LayerBits]:
        """``bits`` and those of ``fixed``, in the order in which the layers run."""
        return {name: bits[name] if name in bits else self.fixed[name] for name in self.order}

    def policy(self, bits: Assignment) -> BitPolicy:
        """The policy that gives every layer its bits, those of ``fixed`` included."""
        return policy_of(self.all_bits(bits))

    def uniform(self) -> dict[LayerBits, Assignment]:
        """Every searched layer at the same one of the widths that all of them have, from the highest to the lowest."""
        weight_only = {name for name, site in self.layers.items() if site.is_weight_only}
        shared = dict.fromkeys(
            bits
            for name, widths in self.choices.items()
            if name not in weight_only or len(weight_only) == len(self.layers)
            for bits in widths
        )
        return {bits: {name: LayerBits(bits.weight, None) if name in weight_only else bits for name in self.choices} for bits in shared}

    def generator(self, purpose: str = "") -> torch.Generator:
        """Random numbers that depend on the seed and on ``purpose`` alone, so that parts may run in any order."""
        digest = hashlib.sha256(f"{self.seed} {purpose}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def need_batches(self, why: str) -> Sequence[Batch]:
        """The batches, or DataError saying what needs them."""
        if not self.batches:
            raise DataError(f"{why} needs samples: pass calibration= (unlabelled) or data= (labelled).")
        return self.batches

    def need_labels(self, why: str) -> Sequence[Batch]:
        """The labelled batches, or DataError saying what needs them."""
        if not (self.batches and self.has_labels):
            raise DataError(f"{why} needs labels: pass data=, batches of inputs and targets.")
        return self.batches

    def loss(self, output: Output, batch: Batch) -> Tensor:
        """The task's loss on labels; without labels the distance from the network's own answers, whose gradient at the float network is zero."""
        return self.task.loss(output, batch) if self.has_labels else own_answers_loss(output)


def own_answers_loss(output: Output) -> Tensor:
    """Cross-entropy of a network's outputs with their own softmax held fixed, on average over samples.

    Its gradient is zero where it is taken, and its Hessian there is that of the expected loss over labels drawn from the network's answers.
    """
    logits = output_tensor(output)
    logits = logits.movedim(class_dimension(logits), -1) if logits.dim() > 2 else logits
    wanted = logits.detach().softmax(-1)
    return -(wanted * logits.log_softmax(-1)).sum(-1).mean()


class SearchMethod(Method, ABC):
    """Chooses bits for each layer; the fields of a subclass are the paper's hyper-parameters.

    Example:
        >>> import torch, lowbit
        >>> info = lowbit.MethodInfo(
        ...     name="widest", title="As many bits as all layers can have", paper="none", section="other", axes=("assignment",), kind="search",
        ...     weight_bits=range(1, 9), activation_bits=range(1, 9), needs=(), fidelity="unverified", summary="the widest uniform network",
        ... )
        >>> @lowbit.register(info)
        ... @dataclass
        ... class Widest(lowbit.SearchMethod):
        ...     def search(self, problem):
        ...         return Found(next(bits for bits in problem.uniform().values() if problem.fits(bits)), loss=None)
        >>> model = torch.nn.Sequential(*(torch.nn.Linear(8, 8) for _ in range(4)))
        >>> lowbit.search(model, method=Widest, budget="average=5", sample=torch.rand(2, 8)).cost["average"]
        4.0
    """

    trial: ClassVar[Mapping[str, object]] = MappingProxyType({})  # hyper-parameters for a first try, where the paper's take long

    @abstractmethod
    def search(self, problem: SearchProblem) -> Found:
        """Bits within the limits of ``problem``; with no limit at all the frontier, from which the caller chooses.

        Raises:
            SpecError: The method needs a limit and there is none.
            DataError: It needs samples or labels that are not there.
        """


def make_problem(
    model: nn.Module,
    sample: Inputs,
    *,
    budget: Budget,
    candidates: Sequence[int],
    activation_bits: Sequence[int | None],
    first_last: int | None,
    task: Task,
    calibration: Calibration | None = None,
    batches: Iterable[Batch] = (),
    has_labels: bool = False,
    latency_table: LatencyTable | None = None,
    **settings: Any,
) -> SearchProblem:
    """The problem for ``model``, its costs counted and its budget checked.

    Args:
        model: The float network, in evaluation mode.
        sample: Inputs of one call.
        budget: Limits, each of which has to be possible.
        candidates: Widths of weights.
        activation_bits: Widths of what layers read; with several, each layer may have any pair.
        first_last: Least bits of the first and the last layer, which are not searched; ``None``: they are searched as all others.
        task, calibration, batches, has_labels: See ``SearchProblem``.
        latency_table: Times of layers.
        **settings: ``seed``, ``progress``, ``workers``, ``work_dir``, ``ray``.

    Raises:
        SpecError: Widths out of range, a budget that cannot be met, or a latency table that does not fit.
        LayerError: A network that is quantized already, or that has no layer to search.
    """
    weights = _widths(candidates, "candidates")
    inputs = _widths(activation_bits, "activation_bits")
    network = plain_copy(model).eval()
    job = NetworkJob(network, BitPolicy.uniform(8, 8), sample, settings.get("seed", SearchProblem.seed))  # refuses what cannot be quantized
    is_searched = {name: first_last is None or job.positions.get(name, "inner") == "inner" for name in job.weights}
    choices, fixed = {}, {}
    for name, site in job.weights.items():
        read: tuple[int | None, ...] = (None,) if site.is_weight_only else inputs
        if is_searched[name]:
            choices[name] = tuple(LayerBits(weight, activation) for weight in weights for activation in read)
        else:
            fixed[name] = LayerBits(first_last, None if read[0] is None else max(read[0], first_last or 0))
    if not choices:
        raise LayerError(
            f"{type(model).__name__} has no layer to search: it has {', '.join(fixed)}, and the first and the last layer keep "
            f"{first_last} bits. Pass first_last=None to search them too."
        )
    counts = {name: site.original.numel() for name, site in job.weights.items()}
    costs: dict[CostKind, Cost] = {
        "average": average_cost(counts, choices),
        "size": size_cost(network, sample, choices, fixed),
        "bops": bops_cost(count_macs(network, sample), choices, fixed),
    }
    if latency_table is not None:
        costs["latency"] = latency_cost(latency_table, choices, fixed)
    limits: dict[CostKind, float] = {}
    for limit in budget.limits:
        if limit.kind not in costs:
            raise SpecError(
                "a budget of latency needs latency_table=: a table of this network's layers, which 'lowbit latency-table' measures."
            )
        limits[limit.kind] = costs[limit.kind].limit(limit)
    return SearchProblem(
        network, sample, {name: job.weights[name] for name in choices}, choices, fixed, tuple(job.weights), costs, limits, calibration, tuple(batches), has_labels,
        task, **settings,
    )  # fmt: skip


def _widths(given: Sequence[int | None], where: str) -> tuple[int | None, ...]:
    """The widths from the highest to the lowest; SpecError where one is no width, or comes twice."""
    widths = [parse_bits(width, where) for width in given]
    if not widths or len(set(widths)) < len(widths):
        raise SpecError(f"{where} must list different widths from 1 to 8, such as (2, 4, 8), got {list(given)}")
    return tuple(sorted(widths, key=lambda width: -(width or FLOAT_BITS)))
