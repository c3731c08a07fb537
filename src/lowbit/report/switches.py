"""A network with several widths in words and drawings: its accuracy over bits, and which layer takes how many bits along the greedy path."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from lowbit.qat.task import format_metric
from lowbit.report import svg
from lowbit.report.formatting import NOTHING, format_bytes, format_count
from lowbit.report.results import MetricResult, Report, SelectionResult, SwitchResult

POINT = 0.01  # the narrowest vertical axis of a metric in percent
ROW, NAME_WIDTH, TOP = 16.0, 150.0, 18.0  # units of a drawing
LONGEST_NAME = 24


def accuracy_over_bits(switches: Sequence[SwitchResult], metric: str, unit: str, baseline: float | None) -> Markup:
    """The metric at each width, from the fewest bits on; nothing where it was not measured.

    Args:
        switches: From the highest on.
        metric, unit: Its name and unit.
        baseline: That of the float network, drawn across.
    """
    ordered = [switch for switch in reversed(switches) if switch.accuracy is not None and math.isfinite(switch.accuracy)]
    if not ordered:
        return Markup("")
    values = [float(switch.accuracy or 0.0) for switch in ordered]
    return _curve(values, [switch.name for switch in ordered], metric, unit, baseline, f"{metric} over bits of weights and activations")


def accuracy_along_path(selection: SelectionResult, metric: str, unit: str) -> Markup:
    """The metric over the average bits of the greedy path, from the fewest on."""
    averages = [f"{average:.3g}" for average in reversed(selection.average_bits)]
    return _curve(list(reversed(selection.accuracies)), averages, metric, unit, None, f"{metric} over average bits on the greedy path")


def _curve(values: Sequence[float], names: Sequence[str], metric: str, unit: str, baseline: float | None, title: str) -> Markup:
    shown = [*values, *([] if baseline is None else [baseline])]
    factor = 100 if unit == "%" else 1
    room = max(0.08 * (max(shown) - min(shown)), POINT / 2 if unit == "%" else 0.05 * abs(shown[0]) or 1.0)
    return svg.curves(
        [svg.Series(metric, "main", [factor * value for value in values])],
        [f"{name} bits" for name in names],
        None if baseline is None else factor * baseline,
        unit=unit,
        format_value=lambda value: format_metric(value / factor, unit),
        span=(factor * (min(shown) - room), factor * (max(shown) + room)),
        below=names,
        size=svg.NARROW,
        title=title,
    )


def bits_along_path(selection: SelectionResult) -> Markup:
    """A row for each layer and a column for each move, the darker the more bits; what a move lowers is framed."""
    moves, most = len(selection.trace), max(map(max, selection.trace))
    width, _ = svg.WIDE
    column = (width - NAME_WIDTH - 4) / moves
    parts = []
    for row, name in enumerate(selection.layers):
        y = TOP + ROW * row
        short = name if len(name) <= LONGEST_NAME else f"\N{HORIZONTAL ELLIPSIS}{name[1 - LONGEST_NAME :]}"
        parts.append(svg.label(NAME_WIDTH - 6, y + ROW - 4, short, "end"))
        for move, bits in enumerate(selection.trace):
            is_lowered = move > 0 and selection.trace[move - 1][row] != bits[row]
            words = f"{name}: {bits[row]} bits after move {move}, {selection.average_bits[move]:.3g} on average"
            parts.append(
                svg.element(
                    "rect", svg.element("title", words), x=f"{NAME_WIDTH + column * move:.1f}", y=f"{y:.1f}", width=f"{column - 1:.1f}",
                    height=f"{ROW - 1:g}", fill_opacity=f"{bits[row] / most:.3f}", class_="cell lowered" if is_lowered else "cell",
                )
            )  # fmt: skip
            if column > 14 and (move == 0 or is_lowered):
                parts.append(svg.label(NAME_WIDTH + column * (move + 0.5), y + ROW - 4, str(bits[row]), class_="tick strong"))
    height = TOP + ROW * len(selection.layers) + 22
    parts.append(svg.label(NAME_WIDTH, height - 8, f"all layers at {most} bits", "start"))
    parts.append(svg.label(width - 6, height - 8, f"after {moves - 1} moves: {selection.average_bits[-1]:.3g} bits on average", "end"))
    return svg.drawing(width, height, "Bits of each layer along the greedy path", *parts)


def width_columns(metric: str) -> tuple[str, ...]:
    """The headings of ``width_rows``."""
    return ("bits", metric, "bit operations", "time, 1 sample", "a file of its own")


def width_rows(report: Report) -> list[tuple[str, ...]]:
    """The figures of each width as text."""
    unit = report.metrics.get(report.metric, MetricResult(None, None)).unit
    return [
        (
            one.name,
            format_metric(one.accuracy, unit),
            format_count(one.bops),
            NOTHING if one.latency_ms is None else f"{one.latency_ms:.2f} ms",
            format_bytes(one.single_bytes),
        )
        for one in report.switches
    ]


def one_file_words(report: Report) -> str:
    """How the file with all widths compares with a file for each; nothing for a network of one width, or without a file."""
    if not report.size_packed or not report.size_packed_singly:
        return ""
    return (
        f"model.lowbit holds all widths in {report.size_packed:,} bytes; a file for each takes {report.size_packed_singly:,} bytes together, "
        f"{report.size_packed_singly / report.size_packed:.2f} times as much"
    )
