from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from lowbit.report import svg

HOSTILE = """<script>alert("x")</script>'&"""


def parsed(drawing: str) -> ElementTree.Element:
    return ElementTree.fromstring(str(drawing))


def all_of(drawing: ElementTree.Element, tag: str, class_: str) -> list[ElementTree.Element]:
    return [element for element in drawing.iter(tag) if element.get("class") == class_]


def test_an_axis_maps_its_ends_and_its_middle() -> None:
    axis = svg.Axis(-1, 3, 100, 0)
    assert (axis(-1), axis(1), axis(3)) == (100, 50, 0)


def test_an_axis_without_width_maps_to_its_start() -> None:
    assert svg.Axis(2, 2, 10, 90)(2) == 10


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (-8, 7, [-5, 0, 5]),
        (0, 0.3, [0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (3, 3, [3]),
        (0, math.inf, [0]),
        (math.nan, 1, [math.nan]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low: float, high: float, expected: list[float]) -> None:
    assert svg.ticks(low, high) == pytest.approx(expected, nan_ok=True)


def test_text_and_attributes_are_escaped_and_markup_is_not() -> None:
    element = svg.element("g", svg.element("title", HOSTILE), aria_label=HOSTILE, class_="a")
    root = parsed(element)
    assert (root.get("aria-label"), root.get("class")) == (HOSTILE, "a")
    assert [child.tag for child in root] == ["title"]
    assert root[0].text == HOSTILE


def test_a_histogram_draws_counts_to_scale_and_a_line_for_each_level() -> None:
    drawing = parsed(svg.histogram([0, 2, 4, 1], -2, 2, [-1.0, 0.0, 1.0], HOSTILE, "scale"))
    assert HOSTILE in str(drawing.get("aria-label"))
    points = [tuple(map(float, point.split(","))) for point in str(all_of(drawing, "polygon", "area")[0].get("points")).split()]
    assert len(points) == 2 + 2 * 4
    heights = [points[0][1] - y for _, y in points[1:-1:2]]
    assert heights == pytest.approx([0, 41, 82, 20.5], abs=0.1)
    path = str(all_of(drawing, "path", "level")[0].get("d"))
    assert [float(move.split()[0]) for move in path.split("M")[1:]] == [67, 130, 193]
    assert [text.text for text in all_of(drawing, "text", "tick")] == ["-1", "0", "1"]


def test_many_levels_are_drawn_below_the_axis_only() -> None:
    few, many = (parsed(svg.histogram([1], 0, 1, [i / count for i in range(count)], "w", "weight")) for count in (32, 33))
    assert all(" 6V" in move for move in str(all_of(few, "path", "level")[0].get("d")).split("M")[1:])
    assert all(" 88V" in move for move in str(all_of(many, "path", "level")[0].get("d")).split("M")[1:])


def test_a_histogram_of_nothing_is_flat() -> None:
    drawing = parsed(svg.histogram([0, 0], 0, 1, [], "w", "weight"))
    assert {float(point.split(",")[1]) for point in str(all_of(drawing, "polygon", "area")[0].get("points")).split()} == {88}


def test_curves_leave_gaps_where_there_is_no_number() -> None:
    series = svg.Series("only this", "main", [10.0, None, math.inf, math.nan, 20.0])
    drawing = parsed(svg.curves([series], [HOSTILE, "b", "c", "d", "e"], 15.0, marked=[4]))
    dots = all_of(drawing, "circle", "main")
    assert [dot[0].text for dot in dots] == [f"{HOSTILE}, only this: 10.0 dB", "e, only this: 20.0 dB"]
    assert float(str(dots[0].get("cy"))) > float(str(dots[1].get("cy")))  # more decibels are higher up
    baseline = float(str(all_of(drawing, "line", "baseline")[0].get("y1")))
    assert baseline == pytest.approx((float(str(dots[0].get("cy"))) + float(str(dots[1].get("cy")))) / 2, abs=0.2)
    assert [text.text for text in all_of(drawing, "text", "tick strong")] == ["1"]


def test_curves_of_nothing_are_no_plot() -> None:
    assert svg.curves([svg.Series("a", "main", [None, math.inf])], ["x", "y"], None) == ""
