"""``report.html`` of a search: the frontier, the sensitivity of each layer at each width, and the bits along the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowbit.assignment.budget import REFERENCES, CostKind
from lowbit.assignment.result import Candidate, SearchResult
from lowbit.files import write_text
from lowbit.qat.task import format_metric
from lowbit.report import svg
from lowbit.report.formatting import NOTHING, format_bits, format_bytes, format_count, format_number
from lowbit.report.scatter import Point, scatter
from lowbit.spec import LayerBits, switch_name

ROW, NAME_WIDTH, TOP = 16.0, 150.0, 26.0  # units of a drawing
LONGEST_NAME, LONGEST_UNDER_BAR = 24, 12
NAMES: dict[CostKind, str] = {
    "average": "bits of a weight",
    "size": "stored size",
    "bops": "bit operations",
    "latency": "time by the table",
}
HEADS = ("network", "predicted loss", "metric")


def format_cost(kind: CostKind, value: float, unit: str) -> str:
    """A cost as people read it.

    >>> format_cost("size", 12300.0, "bytes"), format_cost("average", 3.5, "bits"), format_cost("latency", 2.0, "ms")
    ('12.3 kB', '3.50', '2 ms')
    """
    if math.isnan(value):
        return NOTHING
    if kind == "size":
        return format_bytes(value)
    return f"{value:.2f}" if kind == "average" else format_count(value) if kind == "bops" else f"{value:.3g} {unit}"


def cost_heads(result: SearchResult) -> tuple[str, ...]:
    """Headings of ``network_rows``."""
    return (HEADS[0], *(NAMES[kind] for kind in result.cost), HEADS[1], result.metric_name or HEADS[2])


def network_rows(result: SearchResult) -> list[tuple[str, ...]]:
    """The network that was found beside the budget, the float network and the uniform ones, as text."""
    costs = tuple(result.cost)

    def row(name: str, cost: Mapping[CostKind, float], loss: float | None, metric: float | None) -> tuple[str, ...]:
        found = (format_cost(kind, cost[kind], result.units[kind]) if kind in cost else NOTHING for kind in costs)
        return (name, *found, format_number(loss), format_metric(metric, result.metric_unit))

    rows = [row("found", result.cost, result.found.loss, result.found.metric)]
    if result.limits:
        rows.append(row("budget", result.limits, None, None))
    rows += [row(one.name, one.cost, one.loss, one.metric) for one in result.uniform]
    return [*rows, row("float", {}, None, result.float_metric)]


def layer_rows(result: SearchResult) -> list[tuple[str, str, str, str]]:
    """Each layer with its bits and the loss predicted for them, as text."""
    rows = []
    for name, bits in result.found.bits.items():
        loss = result.sensitivity.get(name, {}).get(bits)
        note = "" if name in result.searched else "not searched"
        rows.append(
            (name, format_bits(bits.weight), format_bits(bits.activation), format_number(loss) if loss is not None else note or NOTHING)
        )
    return rows


def frontier_plot(result: SearchResult, *, measured: bool) -> Markup | None:
    """Predicted loss, in logarithms, or the measured metric, over the main cost: the frontier, uniform networks and the one that was found."""
    kind = result.main

    def height(candidate: Candidate) -> float | None:
        if measured:
            return candidate.metric
        return math.log10(candidate.loss) if candidate.loss is not None and candidate.loss > 0 else None

    def points(candidates: Sequence[Candidate], label: str) -> list[Point]:
        found = ((one, height(one)) for one in candidates)
        return [Point(one.name, one.cost[kind], y, y, y, label) for one, y in found if y is not None and kind in one.cost]

    drawn = [*points([result.found], "found"), *points(result.frontier, "frontier"), *points(result.uniform, "uniform")]
    if len(drawn) < 2:
        return None
    return scatter(
        drawn,
        higher_is_better=measured,
        x_label=NAMES[kind],
        y_label=result.metric_name if measured else "predicted loss",
        format_x=lambda value: format_cost(kind, value, result.units[kind]),
        format_y=lambda value: format_metric(value, result.metric_unit) if measured else f"{10**value:.2g}",
        label_front=measured,
    )


def heat_map(sensitivity: Mapping[str, Mapping[LayerBits, float]], found: Mapping[str, LayerBits]) -> Markup:
    """A row for each layer and a column for each width, the darker the more loss (in logarithms); what was chosen is framed."""
    widths = list(dict.fromkeys(bits for losses in sensitivity.values() for bits in losses))
    width, _ = svg.WIDE
    column = (width - NAME_WIDTH - 4) / max(len(widths), 1)
    shown = [math.log10(loss) for losses in sensitivity.values() for loss in losses.values() if loss > 0]
    low, high = (min(shown), max(shown)) if shown else (0.0, 1.0)
    parts = [svg.label(NAME_WIDTH + column * (place + 0.5), TOP - 8, switch_name(bits)) for place, bits in enumerate(widths)]
    for row, (name, losses) in enumerate(sensitivity.items()):
        y = TOP + ROW * row
        parts.append(svg.label(NAME_WIDTH - 6, y + ROW - 4, short_name(name), "end"))
        for place, bits in enumerate(widths):
            if bits not in losses:
                continue
            loss = losses[bits]
            share = (math.log10(loss) - low) / ((high - low) or 1.0) if loss > 0 else 0.0
            words = f"{name} at {switch_name(bits)} bits: predicted loss {loss:.4g}"
            parts.append(
                svg.element(
                    "rect", svg.element("title", words), x=f"{NAME_WIDTH + column * place:.1f}", y=f"{y:.1f}", width=f"{column - 1:.1f}",
                    height=f"{ROW - 1:g}", fill_opacity=f"{0.05 + 0.95 * share:.3f}", class_="cell lowered" if found.get(name) == bits else "cell",
                )
            )  # fmt: skip
            if column > 60:
                parts.append(svg.label(NAME_WIDTH + column * (place + 0.5), y + ROW - 4, f"{loss:.3g}", class_="tick strong"))
    return svg.drawing(width, TOP + ROW * len(sensitivity) + 6, "Predicted loss of each layer at each width", *parts)


def bit_bars(bits: Mapping[str, LayerBits]) -> Markup:
    """Bits of each layer's weights, as bars in the order in which the layers run, with those of its input as a mark."""
    width, height = svg.WIDE
    base, left = height - 64.0, 34.0
    most = max([8, *(b.weight or 0 for b in bits.values())])
    y = svg.Axis(0, most, base, 14.0)
    column = (width - left - 6) / max(len(bits), 1)
    parts = [svg.line(left, y(value), width - 6, y(value), "grid") for value in range(2, most + 1, 2)]
    parts += [svg.label(left - 6, y(value) + 4, str(value), "end") for value in range(0, most + 1, 2)]
    for place, (name, own) in enumerate(bits.items()):
        x = left + column * place
        words = f"{name}: weights {format_bits(own.weight)}, input {format_bits(own.activation)}"
        if own.weight is not None:
            parts.append(
                svg.element(
                    "rect", svg.element("title", words), x=f"{x + 1:.1f}", y=f"{y(own.weight):.1f}", width=f"{max(column - 2, 1):.1f}",
                    height=f"{base - y(own.weight):.1f}", class_="bits",
                )
            )  # fmt: skip
        if own.activation is not None:
            parts.append(svg.line(x + 1, y(own.activation), x + column - 1, y(own.activation), "mark"))
        if column > 9:
            middle = x + column / 2
            parts.append(
                svg.element(
                    "text", short_name(name, LONGEST_UNDER_BAR), x=f"{middle:.1f}", y=f"{base + 10:.1f}", text_anchor="end", class_="tick",
                    transform=f"rotate(-45 {middle:.1f} {base + 10:.1f})",
                )
            )  # fmt: skip
    return svg.drawing(width, height, "Bits of each layer along the network", *parts)


def short_name(name: str, longest: int = LONGEST_NAME) -> str:
    """The end of a long name."""
    return name if len(name) <= longest else f"\N{HORIZONTAL ELLIPSIS}{name[1 - longest :]}"


def write_search_page(result: SearchResult, network: str, run: Mapping[str, object], path: Path) -> None:
    """Write the page; one file that needs no network. Everything that comes from users is escaped.

    Raises:
        OutputError: It cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("lowbit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    plots = {
        f"{result.metric_name} over {NAMES[result.main]}, measured": frontier_plot(result, measured=True),
        f"Predicted loss over {NAMES[result.main]}": frontier_plot(result, measured=False),
        "Bits along the network: bars are weights, marks are inputs": bit_bars(result.found.bits),
        "Predicted loss by layer and width (weights/inputs); what was chosen is framed": heat_map(result.sensitivity, result.found.bits)
        if result.sensitivity
        else None,
    }
    page = environment.get_template("search.html.jinja").render(
        result=result,
        network=network,
        plots={title: plot for title, plot in plots.items() if plot is not None},
        network_heads=cost_heads(result),
        network_rows=network_rows(result),
        layer_rows=layer_rows(result),
        shares={
            kind: f"{100 * result.cost[kind] / reference:.3g} % of {REFERENCES[kind]}"
            for kind, reference in result.reference.items()
            if kind in result.cost and reference == reference and REFERENCES[kind]
        },
        names=NAMES,
        cost={kind: format_cost(kind, value, result.units[kind]) for kind, value in result.cost.items()},
        policy=str(result.policy),
        run=run,
    )
    write_text(path, page)
