"""Plots as inline SVG: text and colours come from the page's style sheet, so they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape


def element(name: str, *children: str, **attributes: object) -> Markup:
    """``<name a="b">children</name>``; text children and attribute values are escaped, Markup is not. ``class_`` becomes ``class``."""
    parts = [f' {key.rstrip("_").replace("_", "-")}="{escape(value)}"' for key, value in attributes.items()]
    return Markup("<{}{}>{}</{}>").format(name, Markup("".join(parts)), Markup("").join(children), name)


def drawing(width: float, height: float, label: str, *children: str, class_: str = "plot") -> Markup:
    """An SVG of ``width x height`` units that scales with the page; ``label`` is read by screen readers."""
    return element("svg", *children, viewBox=f"0 0 {width:g} {height:g}", role="img", aria_label=label, class_=class_)


@dataclass(frozen=True)
class Axis:
    """Maps values ``low .. high`` onto ``start .. stop`` units."""

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.stop - self.start)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within ``low .. high``, about ``most`` at the most: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if not (math.isfinite(span) and span > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(span / most))
    step = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(first * step + index * step, 10) for index in range(int((high - first * step) / step + 1e-9) + 1)]


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return element("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=class_)


def label(x: float, y: float, text: str, anchor: str = "middle", class_: str = "tick") -> Markup:
    """Text at a point."""
    return element("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, class_=class_)


def histogram(
    counts: Sequence[float],
    low: float,
    high: float,
    levels: Sequence[float],
    name: str,
    unit: str,
    *,
    what: str = "",
    clips: tuple[float, float] | None = None,
) -> Markup:
    """Values in bins as an area, quantization levels as lines below the axis (across the area where there are few).

    Args:
        counts: Heights of the bins from ``low`` to ``high``.
        low, high: Range of the bins.
        levels: Values to draw lines at.
        name, unit: What was counted, in which unit, for screen readers.
        what: Text for screen readers; default: the weights of ``name`` with their levels.
        clips: Two values to mark as the ends of a grid.
    """
    width, height, base = 260.0, 120.0, 88.0
    x = Axis(low, high, 4, width - 4)
    top = max([*counts, 1])
    edges = [x(low + (high - low) * index / len(counts)) for index in range(len(counts) + 1)]
    points = [f"{edges[0]:.1f},{base:g}"]
    for index, count in enumerate(counts):
        y = base - (base - 6) * count / top
        points += [f"{edges[index]:.1f},{y:.1f}", f"{edges[index + 1]:.1f},{y:.1f}"]
    points.append(f"{edges[-1]:.1f},{base:g}")
    start = 6.0 if len(levels) <= 32 else base
    path = "".join(f"M{x(level):.1f} {start:g}V{base + 7:g}" for level in levels)
    marks = [label(x(value), height - 10, f"{value:g}") for value in ticks(low, high) if 16 < x(value) < width - 16]
    return drawing(
        width,
        height,
        what or f"Histogram of the weights of {name} with {len(levels)} levels, in units of {unit}",
        element("polygon", points=" ".join(points), class_="area"),
        *([element("path", d=path, class_="level")] if levels else []),
        *(line(x(clip), 2, x(clip), base + 7, "clip") for clip in clips or ()),
        line(0, base, width, base, "axis"),
        *marks,
        class_="plot small",
    )


@dataclass(frozen=True)
class Series:
    """One line of a plot: a name, a style class, and values of which ``None`` and infinities are gaps."""

    name: str
    class_: str
    values: Sequence[float | None]


def _db(value: float) -> str:
    return f"{value:.1f} dB"


def _plain(value: float) -> str:
    return f"{value:g}"


WIDE, NARROW = (900.0, 300.0), (440.0, 250.0)  # units of a plot over the whole page, and of one that shares it


def curves(
    series: Sequence[Series],
    names: Sequence[str],
    baseline: float | None,
    marked: Sequence[int] = (),
    *,
    unit: str = "dB",
    format_value: Callable[[float], str] = _db,
    tick: Callable[[float], str] = _plain,
    span: tuple[float, float] | None = None,
    across: Sequence[float] = (),
    across_unit: str = "",
    below: Sequence[str] = (),
    size: tuple[float, float] = WIDE,
    title: str = "SQNR of the network's output with single quantizers on and off",
) -> Markup:
    """Values over ``names`` as lines with dots that show their value on hover.

    Args:
        series: Lines, each as long as ``names``.
        names: What the horizontal axis counts.
        baseline: A value to draw across, or ``None``.
        marked: Positions to number on the plot.
        unit: Unit of the values, shown at the vertical axis.
        format_value: Function that formats a value.
        tick: Function that formats a value of the vertical axis.
        span: Range of the vertical axis; default: from 0 to slightly above the largest value.
        across: The number of each position, for ticks at the horizontal axis; default: none.
        across_unit: What these numbers count.
        below: Text at the horizontal axis for each position, in place of numbers; left out where it would overlap.
        size: Width and height in units of the drawing.
        title: Text for screen readers.
    """
    (width, height), left, bottom = size, 54.0 if size == NARROW else 44.0, 38.0 if across or below else 24.0
    shown = [v for s in series for v in s.values if v is not None and math.isfinite(v)] + ([baseline] if baseline is not None else [])
    if not shown:
        return Markup("")
    low, high = span or (min(0.0, *shown), max(shown) * 1.05 + 1)
    x, y = Axis(0, max(len(names) - 1, 1), left + 10, width - 10), Axis(low, high, height - bottom, 20 if unit else 10)
    parts: list[Markup] = []
    for value in ticks(low, high):
        parts += [line(left, y(value), width, y(value), "grid"), label(left - 6, y(value) + 4, tick(value), "end")]
    if unit:
        parts.append(label(2, 11, unit, "start"))
    if across:
        numbers = Axis(across[0], across[-1], x(0), x(len(across) - 1))
        parts += [label(numbers(v), height - bottom + 16, f"{v:g}") for v in ticks(across[0], across[-1]) if v == int(v)]
        parts.append(label(width - 10, height - 6, across_unit, "end"))
    for index, text in enumerate(below):
        if index % math.ceil(len(below) / 12) == 0:
            parts.append(label(x(index), height - bottom + 16, text))
    if baseline is not None:
        parts.append(line(left, y(baseline), width, y(baseline), "baseline"))
    for one in series:
        points = [(index, v) for index, v in enumerate(one.values) if v is not None and math.isfinite(v)]
        path = "".join(f"{'M' if index == 0 else 'L'}{x(p):.1f} {y(v):.1f}" for index, (p, v) in enumerate(points))
        parts.append(element("path", d=path, class_=f"curve {one.class_}"))
        for p, v in points:
            tooltip = element("title", f"{names[p]}, {one.name}: {format_value(v)}")
            parts.append(element("circle", tooltip, cx=f"{x(p):.1f}", cy=f"{y(v):.1f}", r="3", class_=one.class_))
    for number, position in enumerate(marked, 1):
        parts += [
            line(x(position), 10, x(position), height - bottom, "mark"),
            label(x(position), height - 6, str(number), class_="tick strong"),
        ]
    return drawing(width, height, title, *parts, class_="plot" if size == WIDE else "plot half")
