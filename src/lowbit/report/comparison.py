"""Files of a comparison: CSV, Markdown, LaTeX, BibTeX and one HTML page."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from lowbit.comparison.cells import MIXED, Result
from lowbit.comparison.statistics import CONFIDENCE, LEAST_SEEDS
from lowbit.comparison.tables import Row, Table, Tables
from lowbit.comparison.terms import SHOWN
from lowbit.comparison.verdicts import Verdict
from lowbit.errors import LowbitError
from lowbit.files import write_text
from lowbit.plotting import Curve, Panel, Picture, as_html
from lowbit.qat.task import format_metric
from lowbit.registry import MethodInfo, find_method
from lowbit.report.bibliography import bibtex
from lowbit.report.formatting import NOTHING, format_bytes
from lowbit.report.orderings import HEADS as ORDERING_HEADS, notes, ordering_cells, orderings_page
from lowbit.report.results_csv import read_results, results_csv
from lowbit.report.scatter import Point, by_bits, scatter

FILES = ("results.csv", "table.md", "table.tex", "methods.bib", "comparison.html", "suite.yaml")
HEADS = ("method", "rank", "mean", "sd", "least", "greatest", "seeds", "to baseline", "stored", "time of a cell")


@dataclass(frozen=True)
class ComparisonReport:
    """Everything that is written about a comparison.

    Attributes:
        tables: The tables.
        suite: The suite as YAML.
        commands: The command that makes a result, by its key.
        against: ``results.csv`` of an earlier comparison.
        verdicts: What the results say about orderings.
    """

    tables: Tables
    suite: str
    commands: Mapping[str, str] = field(default_factory=dict)
    against: Path | None = None
    verdicts: Sequence[Verdict] = ()


def write_comparison(report: ComparisonReport, folder: Path) -> list[Path]:
    """Write every file of ``FILES`` into ``folder``, and ``orderings.md`` where there are verdicts.

    Raises:
        OutputError: A file cannot be written.
        DataError: The earlier results cannot be read.
    """
    earlier = {} if report.against is None else earlier_means(report.against)
    texts = (
        results_csv(report.tables.results),
        markdown(report.tables, earlier),
        latex(report.tables),
        bibliography(report.tables.results),
        render_page(report, earlier),
        report.suite,
    )
    written = dict(zip(FILES, texts, strict=True)) | ({"orderings.md": orderings_page(report.verdicts)} if report.verdicts else {})
    for name, text in written.items():
        write_text(folder / name, text)
    return [folder / name for name in written]


def earlier_means(path: Path) -> dict[tuple[str, ...], float]:
    """Means over seeds in a ``results.csv``, by subject, track, label, weight bits and activation bits.

    Raises:
        DataError: There is no such file, or it is no ``results.csv`` of a comparison.
    """
    found: dict[tuple[str, ...], list[float]] = {}
    for result in read_results(path):
        if result.value is not None:
            cell = result.cell
            found.setdefault((cell.subject, cell.track, cell.label, *cell.operand_bits), []).append(result.value)
    return {key: math.fsum(values) / len(values) for key, values in found.items()}


def earlier_key(row: Row) -> tuple[str, ...]:
    """The key of a row in ``earlier_means``."""
    cell = row.results[0].cell
    return (cell.subject, cell.track, row.label, *cell.operand_bits)


def row_cells(table: Table, row: Row, earlier: Mapping[tuple[str, ...], float] | None = None) -> list[str]:
    """The cells of a row under ``HEADS``, as people read them; with ``earlier`` one more, the change to it."""
    formatted = lambda value: NOTHING if value is None else format_metric(value, table.unit)  # noqa: E731
    spread = row.spread
    cells = [
        row.label,
        NOTHING if row.rank is None else str(row.rank),
        *(formatted(None if spread is None else value) for value in (spread and spread.mean, spread and spread.deviation)),
        *(formatted(None if spread is None else value) for value in (spread and spread.least, spread and spread.greatest)),
        f"{0 if spread is None else spread.count} of {len(row.results)}",
        _difference(table, row),
        format_bytes(row.size_bytes),
        NOTHING if row.seconds is None else f"{row.seconds:.1f} s",
    ]
    if earlier:
        before = earlier.get(earlier_key(row))
        cells.append(NOTHING if before is None or spread is None else _signed(spread.mean - before, table.unit))
    return cells


def _difference(table: Table, row: Row) -> str:
    if row.label == table.baseline:
        return "baseline"
    if row.difference is None:
        return NOTHING
    text = f"{_signed(row.difference.mean, table.unit)} [{_signed(row.difference.low, table.unit)}, {_signed(row.difference.high, table.unit)}]"
    return text if row.difference.is_shown else f"{text}, no difference shown"


def _signed(value: float, unit: str) -> str:
    return f"{100 * value:+.2f}" if unit == "%" else f"{value:+.4g}"


def markdown(tables: Tables, earlier: Mapping[tuple[str, ...], float] | None = None) -> str:
    """All tables in Markdown."""
    lines = []
    for table in tables.tables:
        heads = [*HEADS, *(["to earlier"] if earlier else [])]
        lines += [f"### {table.title}", "", table_note(table), "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
        lines += [f"| {' | '.join(_escaped(cell) for cell in row_cells(table, row, earlier))} |" for row in table.rows]
        lines += [f"- {text}" for text in unfinished(table)] + [""]
    return "\n".join([*lines, *(f"- {text}" for text in remarks(tables))]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def table_note(table: Table) -> str:
    """A sentence about what is compared."""
    if not table.metric:
        return "No cell is done."
    better = "higher" if table.higher_is_better else "lower"
    float_value = "" if table.float_value is None else f"; the float network has {format_metric(table.float_value, table.unit)}"
    return f"{table.metric}, {better} is better{float_value}. Ranks are shared where the {CONFIDENCE:.0%} interval covers 0."


def unfinished(table: Table) -> list[str]:
    """Cells that are not done, with the reason; seeds with the same reason together."""
    found: dict[tuple[str, str, str], list[int]] = {}
    for row in table.rows:
        for result in row.unfinished:
            found.setdefault((row.label, result.status, result.reason), []).append(result.cell.seed)
    return [
        f"{label} {status} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}): {reason}"
        for (label, status, reason), seeds in found.items()
    ]


def remarks(tables: Tables) -> list[str]:
    """Remarks to read before the tables."""
    return [
        *(f"warning: {text}" for text in tables.warnings),
        *(f"separate tables: {text}" for text in tables.separated),
        *([f"{tables.superseded} older results of cells that have changed since are in no table"] if tables.superseded else []),
    ]


def latex(tables: Tables) -> str:
    """All tables for LaTeX with booktabs: mean and standard deviation, best rank in bold."""
    parts = ["% needs \\usepackage{booktabs}"]
    for table in tables.tables:
        parts += [
            f"% {table.title}",
            "\\begin{tabular}{lrrr}",
            "\\toprule",
            f"Method & {_tex(table.metric)} & seeds & bytes \\\\",
            "\\midrule",
        ]
        for row in table.rows:
            if row.spread is None:
                parts.append(f"{_tex(row.label)} & -- & 0 & -- \\\\")
                continue
            scale = 100 if table.unit == "%" else 1
            deviation = "" if row.spread.deviation is None else f" $\\pm$ {scale * row.spread.deviation:.2f}"
            value = f"{scale * row.spread.mean:.2f}{deviation}"
            value = f"\\textbf{{{value}}}" if row.rank == 1 else value
            parts.append(f"{_tex(row.label)} & {value} & {row.spread.count} & {row.size_bytes or 0:.0f} \\\\")
        parts += ["\\bottomrule", "\\end{tabular}", ""]
    return "\n".join(parts) + "\n"


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", **{c: f"\\{c}" for c in "&%$#_{}"}}


def _tex(text: str) -> str:
    return "".join(_TEX.get(letter, letter) for letter in text)


def method_infos(results: Sequence[Result]) -> Iterator[MethodInfo]:
    """The facts of every method in ``results`` that can be found here, each once."""
    for method, kind in dict.fromkeys((result.cell.method, result.cell.kind) for result in results):
        try:
            yield find_method(method, kind)
        except LowbitError:  # of a file that is elsewhere
            continue


def bibliography(results: Sequence[Result]) -> str:
    """BibTeX entries of the methods' papers."""
    return "\n".join(dict.fromkeys(filter(None, map(bibtex, method_infos(results)))))


def comparison_picture(tables: Tables) -> Picture:
    """The metric of every method in each table: one dot for a seed, another for the mean, and the float network's."""
    panels = []
    for table in tables.tables:
        rows = [row for row in table.rows if row.values]
        seeds = [(place, value) for place, row in enumerate(rows) for value in row.values.values()]
        curves = [Curve("seeds", [place for place, _ in seeds], [value for _, value in seeds], "points", 5)]
        curves.append(Curve("mean", range(len(rows)), [row.spread.mean for row in rows if row.spread is not None], "points", 0))
        if table.float_value is not None and rows:
            curves.append(Curve("float", [0, len(rows) - 1], [table.float_value] * 2, "line", 1, is_dashed=True))
        names = tuple(row.label for row in rows)
        panels.append(Panel(table.title, tuple(curves), up=table.metric, names=names, is_wide=True))
    return Picture("comparison of methods", tuple(panels))


def comparison_html(tables: Tables) -> str:
    """What a notebook shows: the picture, where matplotlib is installed, and the tables."""
    parts = [as_html(comparison_picture(tables)) or ""]
    for table in tables.tables:
        rows = [HEADS, *(row_cells(table, row) for row in table.rows)]
        lines = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        parts.append(f"<p>{escape(table.title)}</p><table>{lines}</table>")
    return "".join(parts)


def render_page(report: ComparisonReport, earlier: Mapping[tuple[str, ...], float] | None = None) -> str:
    """``comparison.html``: one page that needs no network. Everything that comes from users is escaped."""
    environment = Environment(
        loader=PackageLoader("lowbit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    tables = report.tables
    groups: dict[tuple[str, str], list[Table]] = {}
    for table in tables.tables:
        groups.setdefault((table.subject, table.track), []).append(table)
    return environment.get_template("comparison.html.jinja").render(
        tables=[_page_table(table, earlier or {}) for table in tables.tables],
        heads=[*HEADS, *(["to earlier"] if earlier else [])],
        groups=[_page_group(subject, track, found) for (subject, track), found in groups.items()],
        remarks=remarks(tables),
        ordering_heads=ORDERING_HEADS,
        orderings=[ordering_cells(verdict) for verdict in report.verdicts],
        ordering_notes=notes(report.verdicts),
        results=sorted(tables.results, key=lambda r: (r.cell.subject, r.cell.bits, r.cell.label, r.cell.seed)),
        commands=report.commands,
        suite=report.suite,
        counts={status: tables.count(status) for status in ("done", "diverged", "failed", "skipped") if tables.count(status)},
        infos={info.name: info for info in method_infos(tables.results)},
        machines=sorted({", ".join(f"{key} {value}" for key, value in result.machine.items() if value) for result in tables.results}),
        shown=SHOWN,
        least=LEAST_SEEDS,
        confidence=f"{CONFIDENCE:.0%}",
        format_metric=format_metric,
        nothing=NOTHING,
    )


def _page_table(table: Table, earlier: Mapping[tuple[str, ...], float]) -> dict[str, Any]:
    rows = []
    for row in table.rows:
        spread = row.spread
        keys: list[object] = [
            row.label,
            row.rank,
            spread and spread.mean,
            spread and spread.deviation,
            spread and spread.least,
            spread and spread.greatest,
        ]
        keys += [spread and spread.count, row.difference and row.difference.mean, row.size_bytes, row.seconds]
        before = earlier.get(earlier_key(row)) if earlier else None
        keys += [None if before is None or spread is None else spread.mean - before] if earlier else []
        terms = {name: row.term(name) for name in SHOWN}
        rows.append(
            {
                "label": row.label,
                "method": row.results[0].cell.method,
                "cells": list(zip(row_cells(table, row, earlier), keys, strict=True)),
                "terms": terms,
                "row": row,
            }
        )
    return {"title": table.title, "note": table_note(table), "rows": rows, "unfinished": unfinished(table)}


def _page_group(subject: str, track: str, tables: Sequence[Table]) -> dict[str, Any]:
    """The plots of one network in one track."""
    unit, metric, higher = tables[0].unit, tables[0].metric, tables[0].higher_is_better
    rows = [(table, row) for table in tables for row in table.rows if row.spread is not None]
    plots: dict[str, Markup] = {}
    for title, name, format_value in (
        ("stored bytes", "size_bytes", format_bytes),
        ("milliseconds of one call (ONNX Runtime)", "latency_ms", lambda ms: f"{ms:.2f} ms"),
    ):
        points = [
            Point(f"{row.label} {table.bits}", cost, row.spread.mean, row.spread.least, row.spread.greatest, row.label)
            for table, row in rows
            if row.spread is not None and (cost := getattr(row, name)) is not None
        ]
        if points:
            plots[f"{metric} over {title}"] = scatter(
                points,
                higher_is_better=higher,
                x_label=title,
                y_label=metric,
                format_x=format_value,
                format_y=lambda value: format_metric(value, unit),
            )
    lines: dict[str, dict[str, float]] = {}
    for table, row in rows:
        if row.spread is not None and table.bits != MIXED:
            lines.setdefault(row.label, {})[table.bits] = row.spread.mean
    if len({bits for line in lines.values() for bits in line}) > 1:
        plots[f"{metric} over bits (weights/activations)"] = by_bits(
            lines, y_label=metric, format_value=lambda value: format_metric(value, unit)
        )
    return {"title": f"{subject}, {track}", "plots": plots}
