"""Random bits within a budget: what every search has to beat.

There is no paper. Each layer draws one of its widths, all alike likely. While the network costs too much, a layer drawn at random is lowered to
its next width; then, in random order, layers are raised as far as the budget lets them, so that it is used up as by a search.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.assignment.costs import Assignment
from lowbit.assignment.problem import Found, SearchMethod, SearchProblem
from lowbit.errors import SpecError
from lowbit.registry import MethodInfo, register
from lowbit.spec import LayerBits


@register(
    MethodInfo(
        name="random_bits",
        title="Random bits within a budget",
        paper="none",
        section="mixed_precision",
        axes=("assignment",),
        kind="search",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=(),
        fidelity="baseline",
        summary="bits drawn at random that use up the budget: what a search has to beat",
    )
)
@dataclass
class RandomBits(SearchMethod):
    """Bits drawn at random, different ones for each seed."""

    def search(self, problem: SearchProblem) -> Found:
        if not problem.limits:
            raise SpecError("random_bits uses up a budget, and there is none. Give budget=.")
        generator = problem.generator("random_bits")

        def drawn(count: int) -> int:
            return int(torch.randint(count, (), generator=generator))

        bits = {name: widths[drawn(len(widths))] for name, widths in problem.choices.items()}
        while not problem.fits(bits):
            lower = [name for name, width in bits.items() if width != problem.choices[name][-1]]
            if not lower:
                raise SpecError("random_bits: these limits cannot be met together, even with the fewest bits in every layer. Allow more.")
            name = lower[drawn(len(lower))]
            bits[name] = _next(problem, name, bits[name], 1)
        for place in torch.randperm(len(bits), generator=generator).tolist():
            name = list(bits)[place]
            while bits[name] != problem.choices[name][0] and problem.fits(higher := _with(problem, bits, name)):
                bits = dict(higher)
        return Found(bits, None)


def _next(problem: SearchProblem, name: str, width: LayerBits, step: int) -> LayerBits:
    widths = problem.choices[name]
    return widths[widths.index(width) + step]


def _with(problem: SearchProblem, bits: Assignment, name: str) -> Assignment:
    """``bits`` with one layer at its next higher width."""
    return {**bits, name: _next(problem, name, bits[name], -1)}
