"""Plots of a comparison: a metric over a cost with the Pareto front, and a metric over bits with a line for each method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lowbit.comparison.cells import bits_order
from lowbit.report.svg import Axis, drawing, element, label, line, ticks

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 900.0, 340.0, 62.0, 40.0, 18.0, 14.0
LETTER = 6.4  # width of a letter of 11 pixels, on average
COLOURS = 8  # classes c0 to c7 of the style sheet


@dataclass(frozen=True)
class Point:
    """One method with its bits.

    Attributes:
        name: What it is.
        x: Its cost; smaller is better.
        y: Its mean.
        low, high: Least and greatest over seeds.
        method: Points of one method have one colour.
    """

    name: str
    x: float
    y: float
    low: float
    high: float
    method: str = ""


def pareto_front(points: Sequence[Point], *, higher_is_better: bool) -> list[Point]:
    """The points that no other one beats in cost and metric, cheapest first.

    >>> [p.name for p in pareto_front([Point("a", 1, 2, 2, 2), Point("b", 2, 1, 1, 1), Point("c", 3, 4, 4, 4)], higher_is_better=True)]
    ['a', 'c']
    """
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def scatter(
    points: Sequence[Point],
    *,
    higher_is_better: bool,
    x_label: str,
    y_label: str,
    format_x: Callable[[float], str],
    format_y: Callable[[float], str],
    label_front: bool = True,
) -> Markup:
    """Points with their spread over seeds, and the Pareto front as a line; ``label_front``: with the names of its points."""
    x = _axis([p.x for p in points], LEFT, WIDTH - RIGHT)
    y = _axis([value for p in points for value in (p.low, p.high, p.y)], HEIGHT - BOTTOM, TOP)
    front = pareto_front(points, higher_is_better=higher_is_better)
    path = "".join(f"{'M' if index == 0 else 'L'}{x(p.x):.1f} {y(p.y):.1f}" for index, p in enumerate(front))
    parts = [*_frame(y, y_label, format_y), element("path", d=path, class_="front")]
    parts += [label(x(value), HEIGHT - BOTTOM + 16, format_x(value)) for value in ticks(x.low, x.high)]
    parts.append(label((LEFT + WIDTH) / 2, HEIGHT - 4, x_label))
    methods = list(dict.fromkeys(p.method for p in points))
    for point in points:
        tooltip = element(
            "title", f"{point.name}: {format_y(point.y)} ({format_y(point.low)} to {format_y(point.high)}), {format_x(point.x)}"
        )
        colour = f"c{methods.index(point.method) % COLOURS}"
        parts += [
            line(x(point.x), y(point.low), x(point.x), y(point.high), f"spread {colour}"),
            element("circle", tooltip, cx=f"{x(point.x):.1f}", cy=f"{y(point.y):.1f}", r="5", class_=f"dot {colour}"),
        ]
    named = front if label_front else []
    parts += [label(x(p.x) + 8, y(p.y) - 7, p.name, "end" if x(p.x) > WIDTH * 0.8 else "start", "tick strong") for p in named]
    return drawing(WIDTH, HEIGHT, f"{y_label} over {x_label}, with the Pareto front", *parts)


def by_bits(lines: Mapping[str, Mapping[str, float]], *, y_label: str, format_value: Callable[[float], str]) -> Markup:
    """A line for each method over bits, fewest bits first."""
    bits = sorted({name for found in lines.values() for name in found}, key=bits_order)
    names = WIDTH - max(170.0, 34 + LETTER * max(map(len, lines), default=0))  # where the names of lines begin
    x = Axis(0, max(len(bits) - 1, 1), LEFT + 30, names - 20)
    y = _axis([value for found in lines.values() for value in found.values()], HEIGHT - BOTTOM, TOP)
    parts = [*_frame(y, y_label, format_value), *(label(x(place), HEIGHT - BOTTOM + 16, name) for place, name in enumerate(bits))]
    for number, (name, found) in enumerate(lines.items()):
        colour = f"c{number % COLOURS}"
        points = [(bits.index(one), value) for one, value in sorted(found.items(), key=lambda pair: bits.index(pair[0]))]
        path = "".join(f"{'M' if place == 0 else 'L'}{x(at):.1f} {y(value):.1f}" for place, (at, value) in enumerate(points))
        parts.append(element("path", d=path, class_=f"line {colour}"))
        for at, value in points:
            tooltip = element("title", f"{name}, {bits[at]}: {format_value(value)}")
            parts.append(element("circle", tooltip, cx=f"{x(at):.1f}", cy=f"{y(value):.1f}", r="4", class_=f"dot {colour}"))
        parts += [
            line(names, TOP + 18 * number + 8, names + 20, TOP + 18 * number + 8, f"line {colour}"),
            label(names + 26, TOP + 18 * number + 12, name, "start"),
        ]
    return drawing(WIDTH, max(HEIGHT, TOP + 18 * len(lines) + 20), f"{y_label} over bits, a line for each method", *parts)


def _frame(y: Axis, name: str, format_value: Callable[[float], str]) -> list[Markup]:
    parts = []
    for value in ticks(y.low, y.high):
        parts += [line(LEFT, y(value), WIDTH - RIGHT, y(value), "grid"), label(LEFT - 6, y(value) + 4, format_value(value), "end")]
    return [*parts, label(4, 12, name, "start")]


def _axis(values: Sequence[float], start: float, stop: float) -> Axis:
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Axis(low - margin, high + margin, start, stop)
