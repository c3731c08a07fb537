"""Where the time of a packed or compiled network goes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch

from lowbit.formats.packed.network import PackedNetwork
from lowbit.formats.program.calls import OperatorCall
from lowbit.inputs import Inputs

WARMUP = 2


@dataclass(frozen=True)
class OperatorTime:
    """Median milliseconds of one operator call, all pieces of a batch together.

    Attributes:
        name: Name of the call in the graph.
        operator: Name of the operator.
        milliseconds: Median over the runs.
    """

    name: str
    operator: str
    milliseconds: float


@dataclass(frozen=True)
class Profile:
    """Where the time of one call of a network goes.

    Attributes:
        milliseconds: Median of whole calls, which are timed separately.
        operators: One entry for each operator call, in order.
    """

    milliseconds: float
    operators: tuple[OperatorTime, ...]

    def shares(self) -> dict[str, float]:
        """Milliseconds by operator, the largest first; ``between`` is the time outside of the operators."""
        found: dict[str, float] = {}
        for entry in self.operators:
            found[entry.operator] = found.get(entry.operator, 0.0) + entry.milliseconds
        found["between"] = max(self.milliseconds - sum(found.values()), 0.0)
        return dict(sorted(found.items(), key=lambda item: -item[1]))


@torch.no_grad()
def profile(network: PackedNetwork, sample: object, *, runs: int = 20) -> Profile:
    """Time whole calls and each operator call of ``network`` on ``sample``, ``runs`` times each after warming up."""
    inputs = Inputs.of(sample, network)
    seconds: dict[str, list[float]] = {}
    operators: dict[str, str] = {}

    def observe(node: OperatorCall, passed: float, _result: object) -> None:
        found = seconds.setdefault(node.name, [0.0] * runs)
        found[turn] += passed
        operators[node.name] = node.operator.removesuffix(".default").partition(".")[2] or node.operator

    whole = []
    try:
        for turn in range(-WARMUP, runs):
            network.packed_observer = None
            start = time.perf_counter()
            network(*inputs.args, **inputs.kwargs)
            if turn >= 0:
                whole.append(time.perf_counter() - start)
                network.packed_observer = observe
                network(*inputs.args, **inputs.kwargs)
    finally:
        network.packed_observer = None
    times = tuple(OperatorTime(name, operators[name], 1e3 * statistics.median(found)) for name, found in seconds.items())
    return Profile(1e3 * statistics.median(whole), times)
