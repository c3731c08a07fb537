from __future__ import annotations

import re
from xml.etree import ElementTree

from lowbit.report.html import render_html
from lowbit.report.results import MetricResult, Report, SelectionResult, SwitchResult
from lowbit.report.switches import accuracy_over_bits, bits_along_path, one_file_words, width_rows

SWITCHES = [SwitchResult(8, 8, 0.9, 64e6, 1.25, 1500), SwitchResult(4, 8, 0.85, 32e6, 1.0, 1000), SwitchResult(1, None, None, 8e6)]
PATH = SelectionResult(("a", "b<c>"), ((4, 4), (4, 2), (2, 2)), (4.0, 3.0, 2.0), (0.9, 0.88, 0.7), 100)


def report(**more: object) -> Report:
    metrics = {"accuracy": MetricResult(0.95, 0.9, "%")}
    return Report("m", 8, 8, 0, metric="accuracy", metrics=metrics, switches=SWITCHES, size_packed=2000, **more)  # type: ignore[arg-type]


def test_accuracy_is_drawn_from_the_fewest_bits_on_with_the_line_of_the_float_network() -> None:
    drawing = str(accuracy_over_bits(SWITCHES, "accuracy", "%", 0.95))
    titles = re.findall(r"<title>([^<]*)</title>", drawing)
    assert titles == ["4/8 bits, accuracy: 85.00 %", "8/8 bits, accuracy: 90.00 %"]  # the third was not measured
    assert drawing.index(">4/8<") < drawing.index(">8/8<") and 'class="baseline"' in drawing
    assert str(accuracy_over_bits(SWITCHES[2:], "accuracy", "%", None)) == ""


def test_each_field_of_the_path_says_its_bits_and_the_lowered_ones_are_framed() -> None:
    svg = ElementTree.fromstring(str(bits_along_path(PATH)))
    cells = svg.findall("rect")
    assert [cell.get("class") for cell in cells] == ["cell", "cell", "cell lowered", "cell", "cell lowered", "cell"]
    assert [float(str(cell.get("fill-opacity"))) for cell in cells] == [1, 1, 0.5, 1, 0.5, 0.5]
    assert cells[4].findtext("title") == "b<c>: 2 bits after move 1, 3 on average"


def test_rows_and_words_hold_the_figures() -> None:
    assert width_rows(report())[0] == ("8/8", "90.00 %", "64 M", "1.25 ms", "1.5 kB")
    assert width_rows(report())[2] == ("1/float", "\N{EN DASH}", "8 M", "\N{EN DASH}", "\N{EN DASH}")
    assert (
        one_file_words(report())
        == "model.lowbit holds all widths in 2,000 bytes; a file for each takes 2,500 bytes together, 1.25 times as much"
    )
    assert one_file_words(Report("m", 8, 8, 0, size_packed=2000)) == ""


def test_the_file_lists_every_width_and_the_path() -> None:
    data = report(selection=PATH).to_dict()
    expected = {"weight_bits": 1, "activation_bits": None, "accuracy": None, "bops": 8e6, "latency_ms": None, "single_bytes": None}
    assert data["switches"][2] == expected  # type: ignore[index]
    assert data["selection"]["trace"] == ((4, 4), (4, 2), (2, 2))  # type: ignore[index]
    assert data["size_bytes"]["packed_singly"] == 2500  # type: ignore[index]
    plain = Report("m", 8, 8, 0).to_dict()
    assert plain["switches"] == [] and plain["selection"] is None


def test_the_page_has_a_section_on_widths_where_there_are_several() -> None:
    page = render_html(report(selection=PATH))
    assert "<h2>Widths</h2>" in page and "Accuracy over average bits" in page and "b&lt;c&gt;" in page and "b<c>" not in page
    assert "<h2>Widths</h2>" not in render_html(Report("m", 8, 8, 0))
