"""``report.html``: one page that needs nothing else, no network, no fonts, no scripts from elsewhere."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowbit.files import write_text
from lowbit.measure.diagnosis import Diagnosis
from lowbit.qat.task import format_metric
from lowbit.report import svg
from lowbit.report.formatting import (
    NOTHING,
    format_bits,
    format_bytes,
    format_change,
    format_count,
    format_db,
    format_number,
    format_percent,
    format_ratio,
)
from lowbit.report.histograms import WeightHistogram
from lowbit.report.results import LayerResult, MetricResult, ParityResult, Report

POOR_DB = 10.0  # below it a tenth of a layer's signal power is noise
NUMBERED = 5  # suspects numbered in the sensitivity plot


@dataclass(frozen=True)
class Card:
    """One figure of the summary."""

    title: str
    value: str
    detail: str
    meaning: str
    state: str = ""  # "good", "bad" or nothing


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart, made of segments ``(class, percent of the full width, what it is)``."""

    name: str
    value: str
    segments: tuple[tuple[str, float, str], ...]


def write_html(report: Report, path: Path | str, *, histograms: Sequence[WeightHistogram] = (), diagnosis: Diagnosis | None = None) -> None:
    """Write ``report.html``, completely or not at all.

    Raises:
        OutputError: The file cannot be written; one that was there is unchanged.
    """
    write_text(path, render_html(report, histograms=histograms, diagnosis=diagnosis))


def render_html(report: Report, *, histograms: Sequence[WeightHistogram] = (), diagnosis: Diagnosis | None = None) -> str:
    """The page as text. Everything that comes from a model or a user is escaped.

    Args:
        report: The figures.
        histograms: Weights to draw with their levels.
        diagnosis: What ``diagnose`` found, for a section of its own.
    """
    environment = Environment(
        loader=PackageLoader("lowbit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"db": format_db, "bytes": format_bytes, "count": format_count, "percent": format_percent, "bits": format_bits}
    environment.filters["breakable"] = breakable
    return environment.get_template("report.html.jinja").render(
        report=report,
        title=f"{report.model or 'network'}: {report.method}",
        cards=cards(report),
        sizes=size_bars(report),
        storage=storage_bars(report.layers),
        noise=noise_bars(report.layers),
        computed=computed_words(report.layers),
        skipped=[layer for layer in report.layers if layer.status != "done"],
        remarks=[layer for layer in report.layers if layer.status == "done" and layer.reason],
        histograms=[(h, svg.histogram(h.counts, h.low, h.high, h.levels, h.name, h.unit)) for h in histograms],
        diagnosis=diagnosis,
        learning=learning_plots(report),
        sensitivity=Markup("") if diagnosis is None else sensitivity_plot(diagnosis),
        poor_db=POOR_DB,
        sort_key=_sort_key,
    )


def cards(report: Report) -> list[Card]:
    """The figures at the top of the page."""
    found = [_metric_card(name, metric, report.samples) for name, metric in report.metrics.items()]
    if not found:
        name = report.metric or "metrics"
        found = [Card(_title(name), NOTHING, "not measured", "There were no labels; pass labelled data to measure it.")]
    found += [
        Card(
            "Agreement",
            format_percent(report.agreement),
            "same first prediction as float",
            "How often both networks predict the same; needs no labels.",
        ),
        Card(
            "Output SQNR",
            format_db(report.sqnr_db),
            f"largest difference {format_number(report.max_abs_error)}",
            "Signal to quantization noise of the logits: 10 dB more is a tenth of the noise. From about 20 dB predictions rarely change.",
        ),
        Card(
            "Stored",
            format_bytes(report.size_packed),
            f"float {format_bytes(report.size_float)}{_times_smaller(report.size_float, report.size_packed)}",
            "Bytes of the packed file on disk.",
        ),
        Card(
            "Measured time",
            NOTHING if report.latency_quantized_onnx is None else f"{report.latency_quantized_onnx:.2f} ms",
            _speed(report),
            f"Median time of one call of the ONNX file. {report.latency_setting}".strip(),
        ),
        _parity_card(report),
    ]
    return found


def _metric_card(name: str, metric: MetricResult, samples: int | None) -> Card:
    before = "" if metric.float is None else f"float {format_metric(metric.float, metric.unit)}, {format_change(metric)}"
    counted = f"Measured on {samples} labelled samples." if samples else ""
    return Card(_title(name), format_metric(metric.quantized, metric.unit), before, f"{metric.meaning} {counted}".strip())


def _title(name: str) -> str:
    return name[:1].upper() + name[1:]


def _times_smaller(before: float | None, after: float | None) -> str:
    ratio = format_ratio(before, after)
    return f", {ratio} smaller" if ratio else ""


def _speed(report: Report) -> str:
    before, after = report.latency_float_onnx, report.latency_quantized_onnx
    if before is None or not after:
        return "not measured"
    return f"float {before:.2f} ms, {format_ratio(before, after)} " + ("faster" if after < before else "as fast: not a gain")


def _parity_card(report: Report) -> Card:
    checks = {"packed": report.parity_packed, "ONNX": report.parity_onnx}
    done = {name: parity for name, parity in checks.items() if parity.passed is not None}
    if not done:
        return Card("File check", NOTHING, "no file was checked", "Whether the files compute what the quantized network computes.")
    good = all(parity.passed for parity in done.values())
    return Card(
        "File check",
        "passed" if good else "failed",
        ", ".join(f"{name} {_parity_word(parity)}" for name, parity in done.items()),
        "Largest difference between a file's outputs and the quantized network's, on the same inputs.",
        "good" if good else "bad",
    )


def _parity_word(parity: ParityResult) -> str:
    return "exact" if parity.max_abs_error == 0 else format_number(parity.max_abs_error)


def size_bars(report: Report) -> list[Bar]:
    """Bytes on disk, to scale."""
    sizes = {"float parameters": report.size_float, "packed file": report.size_packed, "ONNX file": report.size_onnx}
    known = {name: size for name, size in sizes.items() if size}
    most = max(known.values(), default=1)
    bars = []
    for name, size in known.items():
        saving = _times_smaller(report.size_float, size) if size < (report.size_float or 0) else ""
        colour = "muted" if name == "float parameters" else "main"
        bars.append(Bar(name, f"{format_bytes(size)}{saving}", ((colour, 100 * size / most, format_bytes(size)),)))
    return bars


def storage_bars(layers: Sequence[LayerResult]) -> list[Bar]:
    """Stored bytes of each layer beside what it takes in float32, both to the scale of the largest layer."""
    known = [layer for layer in layers if layer.stored_bytes is not None and layer.float_bytes]
    most = max((layer.float_bytes or 0 for layer in known), default=1)
    return [
        Bar(
            layer.name,
            f"{format_bytes(layer.stored_bytes)} of {format_bytes(layer.float_bytes)}",
            (
                ("main", 100 * (layer.stored_bytes or 0) / most, "stored"),
                ("saved", 100 * max(0, (layer.float_bytes or 0) - (layer.stored_bytes or 0)) / most, "saved"),
            ),
        )
        for layer in known
    ]


def noise_bars(layers: Sequence[LayerResult]) -> list[Bar]:
    """SQNR of each layer's output; exact layers fill the width."""
    known = [(layer, layer.sqnr_db) for layer in layers if layer.sqnr_db is not None and not math.isnan(layer.sqnr_db)]
    most = max((db for _, db in known if 0 < db < math.inf), default=1.0)
    return [
        Bar(
            layer.name,
            format_db(db),
            (("poor" if db < POOR_DB else "main", 100.0 if db == math.inf else 100 * min(1.0, max(0.0, db / most)), format_db(db)),),
        )
        for layer, db in known
    ]


def computed_words(layers: Sequence[LayerResult]) -> dict[str, str] | None:
    """Multiply-accumulates and bit operations of the network against float, or ``None`` where they were not counted."""
    macs = sum(layer.macs or 0 for layer in layers)
    bops = sum(layer.bops or 0 for layer in layers)
    if not macs or not bops:
        return None
    return {
        "macs": format_count(macs),
        "bops": format_count(bops),
        "float_bops": format_count(macs * 32 * 32),
        "ratio": format_ratio(macs * 32 * 32, bops),
    }


def sensitivity_plot(diagnosis: Diagnosis) -> Markup:
    """Output SQNR with one quantizer on, and with all but one, in execution order."""
    everything = diagnosis.setting("all").sqnr_db
    order = sorted(diagnosis.suspects, key=lambda suspect: suspect.place)
    return svg.curves(
        [
            svg.Series("only this one on", "main", [s.only_on_db for s in order]),
            svg.Series("all but this one on", "second", [s.only_off_db for s in order]),
        ],
        [f"{s.name} ({s.kind})" for s in order],
        everything if math.isfinite(everything) else None,
        [order.index(s) for s in diagnosis.suspects[:NUMBERED]],
    )


def learning_plots(report: Report) -> list[tuple[str, Markup]]:
    """Training loss and the metric on the test data over the epochs, each with a heading; nothing for a network that was not trained."""
    if report.training is None:
        return []
    curve, metric = cast(Sequence[Mapping[str, Any]], report.training["curve"]), str(report.training["metric"])
    names = [f"epoch {result['epoch']} ({result['phase']})" for result in curve]
    plots = []
    for title, colour, found in (
        ("Training loss", "second", [result["loss"] for result in curve]),
        (f"Test {metric}", "main", [result["metrics"].get(metric) for result in curve]),
    ):
        values = [float(value) if isinstance(value, (int, float)) else None for value in found]
        shown = [v for v in values if v is not None and math.isfinite(v)]
        if not shown:
            continue
        room = 0.05 * (max(shown) - min(shown)) or 0.05 * abs(shown[0]) or 1.0
        span = (min(shown) - room, max(shown) + room) if colour == "main" else (0.0, max(*shown, 1e-12) * 1.05)
        series = [svg.Series(title.lower(), colour, values)]
        plots.append((title, svg.curves(series, names, None, unit="", tell=format_number, span=span, title=f"{title} after each epoch")))
    return plots


def breakable(name: str) -> Markup:
    """A layer's name that may break into lines behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


def _sort_key(value: object) -> str:
    """What the table sorts a cell by: a number, or nothing for what was not measured."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
