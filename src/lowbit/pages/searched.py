"""Pictures of search methods: the bits that a small search gives each layer, and what it decided by."""

from __future__ import annotations

from lowbit.assignment.result import SearchResult
from lowbit.options import hyper_parameters_of
from lowbit.pages.specimen import specimen_for
from lowbit.plotting import Curve, Panel, Picture
from lowbit.registry import MethodInfo
from lowbit.workflows.search import search

BUDGET = "average=5"
CANDIDATES = (2, 4, 8)
LABELLED = 2  # batches


def searched_picture(info: MethodInfo) -> Picture:
    """What the method finds for the digits network within four bits a weight, with its settings for a first try."""
    specimen = specimen_for(info)
    trial = {name: value for name, value in getattr(info.method, "trial", {}).items() if name in hyper_parameters_of(info)}
    result = search(
        specimen.model,
        method=info.method,  # type: ignore[arg-type]
        budget=BUDGET,
        data=list(specimen.batches[:LABELLED]),
        candidates=CANDIDATES,
        progress=False,
        **trial,
    )
    panels = [_bits(result)]
    if result.sensitivity:
        panels.append(_sensitivity(result))
    if len(result.frontier) > 1:
        panels.append(_frontier(result))
    if rewards := _history(result):
        panels.append(rewards)
    notes = (f"Found for {specimen.name} within {BUDGET.replace('average=', '')} bits a weight on average; candidates 2, 4 and 8 bits.",)
    return Picture(f"{info.name}: bits of each layer", tuple(panels), notes)


def _bits(result: SearchResult) -> Panel:
    layers = result.searched
    weights = tuple(float(result.found.bits[layer].weight or 32) for layer in layers)
    return Panel("bits that were found", (Curve("", range(len(layers)), weights, "bars"),), up="bits", names=layers, is_wide=True)


def _sensitivity(result: SearchResult) -> Panel:
    layers = [layer for layer in result.searched if layer in result.sensitivity]
    curves = []
    for colour, bits in enumerate(CANDIDATES):
        column = [
            next((loss for width, loss in result.sensitivity[layer].items() if width.weight == bits), float("nan")) for layer in layers
        ]
        curves.append(Curve(f"{bits} bits", range(len(layers)), tuple(column), "points", colour))
        curves.append(Curve("", range(len(layers)), tuple(column), "line", colour))
    values = [value for curve in curves for value in curve.y]
    return Panel(
        "predicted loss of each layer", tuple(curves), up="loss", names=tuple(layers), is_wide=True,
        is_logarithmic=all(isinstance(value, float) and value > 0 for value in values),
    )  # fmt: skip


def _frontier(result: SearchResult) -> Panel:
    points = [(one.cost[result.main], one.loss) for one in result.frontier if one.loss is not None]
    x, y = zip(*points, strict=True)
    found = (result.found.cost[result.main],), (result.found.loss if result.found.loss is not None else float("nan"),)
    return Panel("frontier", (Curve("", x, y), Curve("found", *found, "points", 1)), f"{result.main}, {result.units[result.main]}", "loss")


def _history(result: SearchResult) -> Panel | None:
    """The first list of numbers that the method keeps of its course: rewards of episodes, losses of generations."""
    for name, value in result.facts.items():
        if isinstance(value, list | tuple) and len(value) > 2 and all(isinstance(number, int | float) for number in value):
            return Panel(name, (Curve("", range(len(value)), tuple(map(float, value))),), "round", name)
    return None
