from __future__ import annotations

import re
from pathlib import Path

import pytest
from tests.comparison.results import result, seeds

from lowbit.comparison.tables import make_tables
from lowbit.errors import DataError
from lowbit.report.comparison import (
    FILES,
    ComparisonReport,
    bibliography,
    comparison_html,
    comparison_picture,
    earlier_means,
    latex,
    markdown,
    render_page,
    write_comparison,
)
from lowbit.report.scatter import Point, by_bits, pareto_front, scatter

RESULTS = [
    *seeds([0.5, 0.6, 0.7], "lsq"),
    *seeds([0.6, 0.7, 0.8], "pact"),
    *seeds([0.4, 0.4, 0.4], "lsq", bits=(2, 2)),
    result(None, "ewgs", reason="<b>no & memory</b>"),
]


def test_markdown_has_means_differences_ranks_and_what_is_missing() -> None:
    text = markdown(make_tables(RESULTS, baseline="lsq"))
    assert "| pact | 1 | 70.00 % | 10.00 % | 60.00 % | 80.00 % | 3 of 3 | +10.00 [+10.00, +10.00] |" in text
    assert "| lsq | 2 | 60.00 % | 10.00 % | 50.00 % | 70.00 % | 3 of 3 | baseline |" in text
    assert "- ewgs failed (seed 0): <b>no & memory</b>" in text
    assert "### digits, 2/2, training, aligned" in text and "the float network has 95.00 %" in text


def test_ranks_that_are_shared_say_that_no_difference_is_shown() -> None:
    text = markdown(make_tables([*seeds([0.5, 0.6, 0.7], "lsq"), *seeds([0.6, 0.5, 0.7], "pact")], baseline="lsq"))
    assert text.count("| 1 |") == 2 and "no difference shown" in text


def test_latex_escapes_names_and_marks_the_best() -> None:
    text = latex(make_tables([*seeds([0.5] * 3, "a_b & 50%"), *seeds([0.6, 0.61, 0.62], "pact")]))
    assert r"a\_b \& 50\% & 50.00 $\pm$ 0.00 & 3 & 1000 \\" in text
    assert r"pact & \textbf{61.00 $\pm$ 1.00} & 3 & 1000 \\" in text and r"\toprule" in text


def test_the_bibliography_has_each_paper_once() -> None:
    text = bibliography(RESULTS)
    assert re.findall(r"@\w+\{(\w+),", text) == ["lsq", "pact", "ewgs"]
    assert "author = {Esser and McKinstry and Bablani and Appuswamy and Modha}" in text
    assert (
        "booktitle = {ICLR}" in text
        and "url = {https://arxiv.org/abs/1902.08153}" in text
        and "year = {2020}" in text
        and "Learned Step Size" in text
    )


def test_the_page_is_whole_and_escapes_what_users_wrote() -> None:
    page = render_page(ComparisonReport(make_tables(RESULTS), "suite: <i>", {RESULTS[0].key: "lowbit train <x>"}))
    assert "&lt;b&gt;no &amp; memory&lt;/b&gt;" in page and "<b>no" not in page and "suite: &lt;i&gt;" in page
    assert "lowbit train &lt;x&gt;" in page and page.count("<svg") == 2 and "Pareto" in page
    assert not re.search(r"src=|href=\"(?!#)", page)
    assert page.count('data-name="lsq"') == 2 + 6  # rows of tables and of cells


def test_earlier_results_are_read_back(tmp_path: Path) -> None:
    write_comparison(ComparisonReport(make_tables(RESULTS), ""), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    means = earlier_means(tmp_path / "results.csv")
    assert means["digits", "aligned", "lsq", "4", "4"] == pytest.approx(0.6) and len(means) == 3
    better = make_tables([*seeds([0.65, 0.65, 0.65], "lsq")])
    assert "| +5.00 |" in markdown(better, means)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"other\.csv: no results\.csv"):
        earlier_means(tmp_path / "other.csv")
    with pytest.raises(DataError, match="no such file"):
        earlier_means(tmp_path / "none.csv")


def test_the_front_holds_what_no_cheaper_point_beats() -> None:
    points = [Point(name, x, y, y, y) for name, x, y in (("a", 1, 5), ("b", 2, 4), ("c", 2, 6), ("d", 3, 6), ("e", 4, 7))]
    assert [p.name for p in pareto_front(points, higher_is_better=True)] == ["a", "c", "e"]
    assert [p.name for p in pareto_front(points, higher_is_better=False)] == ["a", "b"]


def test_plots_have_a_dot_for_each_point_and_stay_within_their_frame() -> None:
    points = [Point(f"m{i}", 10.0**i, i / 10, i / 10 - 0.05, i / 10 + 0.05) for i in range(5)]
    plots = [
        scatter(points, higher_is_better=True, x_label="bytes", y_label="accuracy", format_x=str, format_y=str),
        by_bits({"m": {"2/2": 0.5, "4/4": 0.6, "4/float": 0.7}, "n": {"4/4": 0.1}}, y_label="accuracy", format_value=str),
    ]
    for plot, dots in zip(plots, (5, 4), strict=True):
        places = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', plot)]
        assert len(places) == dots and all(0 < x < 900 and 0 < y < 340 for x, y in places)


def test_labels_lead_to_what_the_page_says_about_their_method() -> None:
    results = [*seeds([0.5] * 3, "lsq"), *seeds([0.6] * 3, "mine")]
    page = render_page(ComparisonReport(make_tables(results), "seeds: 3"))
    assert '<a href="#method-lsq">lsq</a>' in page and '<dt id="method-lsq">lsq</dt>' in page
    assert "Learned Step Size" in page and "<code>lowbit methods show lsq</code>" in page
    assert '<th scope="row">mine</th>' in page


def test_a_notebook_gets_a_dot_for_each_seed_and_the_tables() -> None:
    tables = make_tables(RESULTS, baseline="lsq")
    picture = comparison_picture(tables)
    assert [panel.title for panel in picture.panels] == [table.title for table in tables.tables]
    for panel, table in zip(picture.panels, tables.tables, strict=True):
        seeds, mean = panel.curves[:2]
        assert sorted(seeds.y) == sorted(value for row in table.rows for value in row.values.values())
        assert list(mean.y) == [row.spread.mean for row in table.rows if row.spread is not None]
    shown = comparison_html(tables)
    assert "<svg" in shown and all(f"<td>{row.label}</td>" in shown for table in tables.tables for row in table.rows)
