"""``report.html``: one self-contained page, without fonts, scripts or anything else from elsewhere."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lowbit.files import write_text
from lowbit.measure.cost import FLOAT_BITS
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
    format_seconds,
)
from lowbit.report.histograms import ActivationHistogram, WeightHistogram
from lowbit.report.pictures import Disagreement, PictureRow
from lowbit.report.results import ActivationResult, LayerResult, MetricResult, ParityResult, Report, StoredPart
from lowbit.report.switches import accuracy_along_path, accuracy_over_bits, bits_along_path, one_file_words, width_columns, width_rows

POOR_DB = 10.0  # below it a tenth of a layer's signal power is noise
NUMBERED = 5  # suspects numbered in the sensitivity plot
LONG_NAME = 24  # characters from which names lose what all of them begin with
POINT = 0.01  # the narrowest vertical axis of a metric in percent


@dataclass(frozen=True)
class Card:
    """One figure of the summary; ``state`` is ``good``, ``warn``, ``bad`` or nothing."""

    title: str
    value: str
    detail: str
    meaning: str
    state: str = ""


@dataclass(frozen=True)
class Bar:
    """One bar of a bar chart, made of segments ``(class, percent of the full width, what it is)``."""

    name: str
    value: str
    segments: tuple[tuple[str, float, str], ...]


@dataclass(frozen=True)
class Plot:
    """A drawing with its heading and a caption."""

    title: str
    drawing: Markup
    caption: str = ""


@dataclass(frozen=True)
class Cell:
    """One cell of a table; ``key`` is what it is sorted by, ``class_`` styles its text."""

    text: str
    key: str = ""
    detail: str = ""
    class_: str = ""
    applies: bool = True  # False for cells that have no meaning in their row


@dataclass(frozen=True)
class Column:
    """A column with a cell for each row."""

    title: str
    cells: tuple[Cell, ...]
    is_number: bool = False
    is_setting: bool = False  # a setting, not a measurement

    @property
    def is_empty(self) -> bool:
        """Whether every cell is empty."""
        return all(cell.text in ("", NOTHING) and not cell.detail for cell in self.cells)

    @property
    def constant(self) -> str | None:
        """The text that all rows share to which it applies, for settings."""
        texts = [f"{cell.text} {cell.detail}".strip() for cell in self.cells if cell.applies]
        return texts[0] if self.is_setting and len(texts) > 1 and len(set(texts)) == 1 else None


@dataclass(frozen=True)
class Table:
    """Rows by name; columns with the same text in every row are shown once above the table, empty ones not at all."""

    names: tuple[str, ...]
    columns: tuple[Column, ...]
    same: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def of(names: Iterable[str], columns: Iterable[Column]) -> Table:
        """The table without its constant and its empty columns."""
        filled = [column for column in columns if not column.is_empty]
        same = [(column.title, constant) for column in filled if (constant := column.constant) is not None]
        return Table(tuple(names), tuple(column for column in filled if column.constant is None), tuple(same))


@dataclass(frozen=True)
class Names:
    """How names of layers are shown: without ``prefix``, which all of them begin with."""

    prefix: str = ""

    @staticmethod
    def of(names: Sequence[str]) -> Names:
        """Long names lose the modules that all of them lie in."""
        if len(set(names)) < 2 or max(map(len, names)) <= LONG_NAME:
            return Names()
        parents = [name.split(".")[:-1] for name in names]
        shared = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False))
        return Names("".join(f"{parts[0]}." for parts in shared))

    def short(self, name: str) -> str:
        """The name as it is shown."""
        return name.removeprefix(self.prefix)


def write_html(
    report: Report,
    path: Path | str,
    *,
    histograms: Sequence[WeightHistogram] = (),
    activations: Sequence[ActivationHistogram] = (),
    pictures: Sequence[Disagreement] = (),
    examples: Sequence[PictureRow] = (),
    diagnosis: Diagnosis | None = None,
) -> None:
    """Write ``report.html``, completely or not at all; see ``render_html`` for the arguments.

    Raises:
        OutputError: The file cannot be written; one that was there is unchanged.
    """
    page = render_html(report, histograms=histograms, activations=activations, pictures=pictures, examples=examples, diagnosis=diagnosis)
    write_text(path, page)


def render_html(
    report: Report,
    *,
    histograms: Sequence[WeightHistogram] = (),
    activations: Sequence[ActivationHistogram] = (),
    pictures: Sequence[Disagreement] = (),
    examples: Sequence[PictureRow] = (),
    diagnosis: Diagnosis | None = None,
) -> str:
    """The page as text. Everything that comes from a model or a user is escaped.

    Args:
        report: The figures.
        histograms: Weights to draw with their levels or their errors.
        activations: Activations to draw with their clips.
        pictures: Samples that the two networks answer differently.
        examples: Samples that the task shows.
        diagnosis: What ``diagnose`` found, for a section of its own.
    """
    environment = Environment(
        loader=PackageLoader("lowbit.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"db": format_db, "bytes": format_bytes, "percent": format_percent, "bits": format_bits}
    environment.filters |= {"breakable": breakable, "unbroken": unbroken}
    parts = stored_parts(report)
    return environment.get_template("report.html.jinja").render(
        report=report,
        title=f"{report.model or 'network'}: {report.method}",
        names=Names.of([layer.name for layer in report.layers]),
        cards=cards(report),
        sizes=size_bars(report),
        storage=storage_bars(parts),
        stored_bytes=sum(part.total_bytes for part in parts),
        noise=noise_bars(report.layers),
        computed=computed_words(report.layers),
        operations=computed_bars(report.layers),
        times=time_bars(report),
        skipped=[layer for layer in report.layers if layer.status != "done"],
        remarks=[layer for layer in report.layers if layer.status == "done" and layer.reason],
        layers=layer_table(report),
        activations=activation_table(report.activations),
        activation_plots=[activation_plot(histogram) for histogram in activations],
        weight_plots=[weight_plot(histogram) for histogram in histograms],
        has_levels=any(not histogram.error_counts for histogram in histograms),
        has_errors=any(histogram.error_counts for histogram in histograms),
        pictures=pictures,
        examples=examples,
        diagnosis=diagnosis,
        learning=learning_plots(report),
        widths=width_plots(report),
        width_columns=width_columns(report.metric),
        width_rows=width_rows(report),
        one_file=one_file_words(report),
        path=Markup("") if report.selection is None else bits_along_path(report.selection),
        sensitivity=Markup("") if diagnosis is None else sensitivity_plot(diagnosis),
        facts=run_words(report.run),
        poor_db=POOR_DB,
        sort_key=_sort_key,
    )


def cards(report: Report) -> list[Card]:
    """The figures at the top of the page."""
    found = [_metric_card(name, metric, report.samples) for name, metric in report.metrics.items()]
    if not found:
        name = report.metric or "metrics"
        found = [Card(_title(name), NOTHING, "not measured", "There were no labels; pass labelled data to measure it.")]
    if report.agreement is not None or not report.metrics:
        same = "How often both networks predict the same; needs no labels."
        found.append(Card("Agreement", format_percent(report.agreement), "same first prediction as float", same))
    found += [
        Card(
            "Output SQNR",
            format_db(report.sqnr_db),
            f"largest difference {format_number(report.max_abs_error)}",
            "Signal to quantization noise of the outputs: 10 dB more is a tenth of the noise."
            + (" From about 20 dB predictions rarely change." if report.agreement is not None else ""),
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
            "warn" if is_slower(report) else "",
        ),
        _parity_card(report),
    ]
    return found


def is_slower(report: Report) -> bool:
    """Whether the quantized ONNX file takes at least as long as the float one."""
    before, after = report.latency_float_onnx, report.latency_quantized_onnx
    return before is not None and after is not None and after >= before


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
    return f"float {before:.2f} ms, {format_ratio(before, after)} " + ("as fast: not a gain" if is_slower(report) else "faster")


def _parity_card(report: Report) -> Card:
    checks = {"packed": report.parity_packed, "ONNX": report.parity_onnx}
    done = {name: parity for name, parity in checks.items() if parity.passed is not None}
    if not done:
        return Card("File check", NOTHING, "no file was checked", "Whether the files compute what the quantized network computes.")
    good = all(parity.passed for parity in done.values())
    return Card(
        "File check",
        "passed" if good else "failed",
        "\n".join(f"{name}: {parity_words(parity)}" for name, parity in done.items()),
        "A file's outputs against the quantized network's on the same inputs.",
        "good" if good else "bad",
    )


def parity_words(parity: ParityResult) -> str:
    """``same answer 100.00 %, SQNR 50.0 dB, largest difference 0.088``; ``exact`` where nothing differs."""
    same = [] if parity.top1_agreement is None else [f"same answer {format_percent(parity.top1_agreement)}"]
    noise = [] if parity.sqnr_db is None else [f"SQNR {format_db(parity.sqnr_db)}"]
    difference = ["exact"] if parity.max_abs_error == 0 else [*noise, f"largest difference {format_number(parity.max_abs_error)}"]
    counted = "" if parity.samples is None else f" on {parity.samples} samples"
    return ", ".join([*same, *difference]) + counted


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


def computed_bars(layers: Sequence[LayerResult]) -> list[Bar]:
    """Bit operations of one sample in float32 and as quantized, to scale; nothing where they were not counted."""
    words = computed_words(layers)
    if words is None:
        return []
    share = 100 * sum(layer.bops or 0 for layer in layers) / (sum(layer.macs or 0 for layer in layers) * FLOAT_BITS**2)
    fewer = f", {words['ratio']} fewer" if words["ratio"] else ""
    return [
        Bar("float32", words["float_bops"], (("muted", 100.0, f"{words['float_bops']} bit operations"),)),
        Bar("quantized", f"{words['bops']}{fewer}", (("main", share, f"{words['bops']} bit operations"),)),
    ]


def time_bars(report: Report) -> list[Bar]:
    """Measured time of one call of the float and of the quantized ONNX file, to scale; nothing where they were not timed."""
    before, after = report.latency_float_onnx, report.latency_quantized_onnx
    if not before or not after:
        return []
    most, words = max(before, after), _speed(report).partition(", ")[2]
    return [
        Bar("float ONNX file", f"{before:.2f} ms", (("muted", 100 * before / most, f"{before:.2f} ms"),)),
        Bar(
            "quantized ONNX file",
            f"{after:.2f} ms, {words}",
            (("warn" if is_slower(report) else "main", 100 * after / most, f"{after:.2f} ms"),),
        ),
    ]


def stored_parts(report: Report) -> list[StoredPart]:
    """The parts of the packed file; where none was written, what its layers would take by arithmetic."""
    if report.stored:
        return list(report.stored)
    known = [layer for layer in report.layers if layer.stored_bytes is not None and layer.float_bytes]
    parts = [StoredPart(layer.name, code_bytes=layer.stored_bytes or 0, float_bytes=layer.float_bytes) for layer in known]
    return sorted(parts, key=lambda part: -part.total_bytes)


def storage_bars(parts: Sequence[StoredPart]) -> list[Bar]:
    """Stored bytes of each part beside its size in float32, all to the same scale."""
    most = max((max(part.total_bytes, part.float_bytes or 0) for part in parts), default=0) or 1
    bars = []
    for part in parts:
        pieces = {
            "main": (part.code_bytes, "codes"),
            "second": (part.table_bytes, "scales and other tables"),
            "muted": (part.value_bytes, "not quantized"),
            "header": (part.header_bytes, "header"),
            "saved": (max(0, (part.float_bytes or 0) - part.total_bytes), "saved"),
        }
        segments = tuple((class_, 100 * size / most, f"{what}, {format_bytes(size)}") for class_, (size, what) in pieces.items() if size)
        of = f" of {format_bytes(part.float_bytes)}" if part.float_bytes else ""
        bars.append(Bar(part.name or "the network itself", f"{format_bytes(part.total_bytes)}{of}", segments))
    return bars


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
        "float_bops": format_count(macs * FLOAT_BITS**2),
        "ratio": format_ratio(macs * FLOAT_BITS**2, bops),
    }


def layer_table(report: Report) -> Table:
    """The layers, below them what is quantized between layers, and last what else holds parameters.

    Where a layer's output is quantized because a sum, a concatenation or pooling reads it, its row shows that.
    """
    layers, sites = report.layers, {f"{layer.name}.output" for layer in report.layers}
    merged = {activation.name: activation for activation in report.activations if activation.role == "merge"}
    merges = [activation for site, activation in merged.items() if site not in sites]
    between, outside = ((Cell("", applies=False),) * len(rows) for rows in (merges, report.others))
    rest = (*between, *outside)

    def setting(title: str, cell: Callable[[LayerResult], Cell], others: tuple[Cell, ...] = rest, *, is_number: bool = False) -> Column:
        return Column(title, (*map(cell, layers), *others), is_number, is_setting=True)

    def kind(layer: LayerResult) -> Cell:
        return Cell(layer.kind)

    def shape(layer: LayerResult) -> Cell:
        return Cell("\u00d7".join(map(str, layer.shape)))

    def stored(layer: LayerResult) -> Cell:
        return Cell(format_bytes(layer.stored_bytes), _sort_key(layer.stored_bytes))

    def status(layer: LayerResult) -> Cell:
        return Cell(layer.status, detail=layer.reason, class_=f"status {layer.status}")

    def output(layer: LayerResult) -> Cell:
        if layer.output_bits is not None:
            return _bits(layer.output_bits)
        merge = merged.get(f"{layer.name}.output")
        return Cell("") if merge is None else Cell(str(merge.bit_width), str(merge.bit_width), detail="merge")

    def number(title: str, value: Callable[[LayerResult], float | None], format_value: Callable[[float | None], str]) -> Column:
        cells = (Cell(format_value(value(layer)), _sort_key(value(layer))) for layer in layers)
        return Column(title, (*cells, *rest), is_number=True)

    columns = [
        setting("Kind", kind, (*(Cell("merge") for _ in merges), *map(kind, report.others))),
        Column("Weight", (*map(shape, layers), *between, *map(shape, report.others))),
        setting("Weight bits", lambda layer: _bits(layer.weight_bits), is_number=True),
        setting("Activation bits", lambda layer: _bits(layer.activation_bits), is_number=True),
        setting("Output bits", output, (*(_bits(merge.bit_width) for merge in merges), *outside), is_number=True),
        setting("Quantizer", lambda layer: Cell(layer.quantizer, detail=layer.granularity.replace("_", " "))),
        number("Output SQNR", lambda layer: layer.sqnr_db, format_db),
        number("Weight SQNR", lambda layer: layer.weight_sqnr_db, format_db),
        Column("Stored", (*map(stored, layers), *between, *map(stored, report.others)), is_number=True),
        number("MACs", lambda layer: layer.macs, format_count),
        number("Bit operations", lambda layer: layer.bops, format_count),
        setting("Status", status, (*between, *map(status, report.others))),
    ]
    return Table.of(
        (*(layer.name for layer in layers), *(merge.name for merge in merges), *(other.name for other in report.others)), columns
    )


def _bits(bits: int | None) -> Cell:
    return Cell(format_bits(bits), str(bits or FLOAT_BITS))


def activation_table(activations: Sequence[ActivationResult]) -> Table:
    """Activation quantizers with the ranges of their inputs."""

    def number(title: str, value: Callable[[ActivationResult], float], format_value: Callable[[float | None], str]) -> Column:
        return Column(title, tuple(Cell(format_value(value(a)), _sort_key(value(a))) for a in activations), is_number=True)

    columns = [
        Column("What it is", tuple(Cell(role_words(a)) for a in activations)),
        Column("Bits", tuple(_bits(a.bit_width) for a in activations), is_number=True, is_setting=True),
        number("Smallest", lambda a: a.low, format_number),
        number("Largest", lambda a: a.high, format_number),
        number("Clip from", lambda a: a.clip_low, format_number),
        number("Clip to", lambda a: a.clip_high, format_number),
        number("Clipped", lambda a: a.clipped, format_percent),
        number("SQNR", lambda a: a.sqnr_db, format_db),
    ]
    return Table.of((a.name for a in activations), columns)


def role_words(activation: ActivationResult) -> str:
    """``input of conv1, conv2``, ``output of conv1``, or what is quantized between layers."""
    if activation.role == "merge":
        return "merge: sum, concatenation or pooling"
    return f"{activation.role} of {', '.join(activation.layers)}"


def weight_plot(h: WeightHistogram) -> Plot:
    """Weights with their levels; at many bits their rounding errors."""
    words = f"{h.bit_width} bits, {level_words(h)}"
    if not h.error_counts:
        return Plot(h.name, svg.histogram(h.counts, h.low, h.high, h.levels, h.name, h.unit), words)
    what = f"Histogram of the rounding errors of the weights of {h.name}, in units of one {h.error_unit}"
    drawing = svg.histogram(h.error_counts, -h.error_span, h.error_span, (), h.name, h.error_unit, what=what)
    return Plot(h.name, drawing, f"{words}; errors in {'steps' if h.error_unit == 'step' else 'units of the weight'}")


def level_words(h: WeightHistogram) -> str:
    """How many of the grid's levels the weights of one scale use: ``6 to 8 of 8 levels per scale``."""
    (fewest, most), grid = h.used, 2**h.bit_width
    span = f"{most}" if fewest == most else f"{fewest} to {most}"
    few = f" of {h.per_scale} weights" if h.per_scale < grid else ""
    return f"{span} of {grid} levels per scale{few}" if most else f"{len(h.levels)} levels"


def activation_plot(h: ActivationHistogram) -> Plot:
    """Activations with the ends of their grid; heights are square roots, so that zeros do not hide all else."""
    found = h.result
    drawing = svg.histogram(
        [math.sqrt(count) for count in h.counts], h.low, h.high, (), found.name, "", clips=(found.clip_low, found.clip_high),
        what=f"Histogram of the values at {found.name}, clipped at {format_number(found.clip_low)} and {format_number(found.clip_high)}",
    )  # fmt: skip
    clips = f"clips {format_number(found.clip_low)} to {format_number(found.clip_high)}"
    return Plot(found.name, drawing, f"{found.bit_width} bits, {clips}, {format_percent(found.clipped)} beyond")


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


def learning_plots(report: Report) -> list[Plot]:
    """Training loss and every metric on the test data over the epochs; nothing for a network that was not trained."""
    if report.training is None or not report.training["curve"]:
        return []
    curve = cast(Sequence[Mapping[str, Any]], report.training["curve"])
    selecting = str(report.training["metric"])
    metrics = dict.fromkeys([selecting, *(name for result in curve for name in result["metrics"])])
    found = [_learning_plot("Training loss", "second", curve, [result["loss"] for result in curve])]
    for name in metrics:
        known = report.metrics.get(name, MetricResult(None, None))
        values = [result["metrics"].get(name) for result in curve]
        found.append(_learning_plot(f"Test {name}", "main", curve, values, known.unit, known.float))
    measured = cast(Mapping[str, Mapping[str, float]], report.training.get("measured", {}))
    found += [_layer_plot(name, values) for name, values in measured.items()]
    return [plot for plot in found if plot.drawing]


def width_plots(report: Report) -> list[Plot]:
    """The selecting metric over the widths of the network, and along the greedy path of its layers; nothing for a network of one width."""
    metric = report.metrics.get(report.metric, MetricResult(None, None))
    float_words = "" if metric.float is None else f"dashed: the float network, {format_metric(metric.float, metric.unit)}"
    over_bits = accuracy_over_bits(report.switches, report.metric, metric.unit, metric.float)
    found = [Plot(f"{_title(report.metric)} over bits", over_bits, float_words)]
    if report.selection is not None:
        drawing = accuracy_along_path(report.selection, report.metric, metric.unit)
        words = f"on {report.selection.samples} labelled samples; layers give up bits one at a time, that which costs least first"
        found.append(Plot(f"{_title(report.metric)} over average bits", drawing, words))
    return [plot for plot in found if plot.drawing]


def _layer_plot(measure: str, values: Mapping[str, float]) -> Plot:
    """What the method measured of each layer in training, in the order of the layers."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not finite:
        return Plot(measure, Markup(""))
    drawing = svg.curves(
        [svg.Series(measure, "second", list(finite.values()))],
        list(finite),
        None,
        unit="",
        format_value=format_number,
        span=(0.0, max(*finite.values(), 1e-12) * 1.05),
        size=svg.NARROW,
        title=f"{measure} of each layer",
    )
    largest = max(finite, key=lambda name: finite[name])
    return Plot(f"{measure} by layer", drawing, f"largest at {largest}: {format_number(finite[largest])}")


def _learning_plot(
    title: str, colour: str, curve: Sequence[Mapping[str, Any]], found: Sequence[object], unit: str = "", baseline: float | None = None
) -> Plot:
    values = [float(value) if isinstance(value, (int, float)) else None for value in found]
    shown = [v for v in (*values, baseline) if v is not None and math.isfinite(v)]
    if not shown or all(value is None for value in values):
        return Plot(title, Markup(""))
    room = 0.08 * (max(shown) - min(shown))
    room = max(room, POINT / 2) if unit == "%" else room or 0.05 * abs(shown[0]) or 1.0
    span = (min(shown) - room, max(shown) + room) if colour == "main" else (0.0, max(*shown, 1e-12) * 1.05)
    if unit == "%" and max(shown) <= 1:
        span = (span[0], min(span[1], 1 + 0.05 * (1 - span[0])))  # no room for ticks above 100 %
    factor = 100 if unit == "%" else 1

    def scaled(value: float | None) -> float | None:
        return None if value is None else factor * value

    def format_value(value: float) -> str:
        return format_metric(value / factor, unit) if colour == "main" else format_number(value)

    drawing = svg.curves(
        [svg.Series(title.lower(), colour, [scaled(value) for value in values])],
        [f"epoch {result['epoch']} ({result['phase']})" for result in curve],
        scaled(baseline),
        unit=unit,
        format_value=format_value,
        span=(factor * span[0], factor * span[1]),
        across=[result["epoch"] for result in curve],
        across_unit="epoch",
        size=svg.NARROW,
        title=f"{title} after each epoch",
    )
    last = next((value for value in reversed(values) if value is not None), None)
    words = f"last epoch {format_metric(last, unit)}" if colour == "main" else f"last epoch {format_number(last)}"
    return Plot(title, drawing, words if baseline is None else f"{words}; dashed: the float network, {format_metric(baseline, unit)}")


def run_words(run: Mapping[str, Any]) -> dict[str, str]:
    """Facts of a run by their headings."""
    if not run:
        return {}
    machine = run["machine"]
    parts = [machine["processor"], f"{machine['cores']} cores, {machine['threads']} threads", machine["accelerator"], machine["system"]]
    found = {
        "Command": run["command"],
        "Started": str(run["started"]).replace("T", " ").replace("+00:00", " UTC"),
        "Duration": format_seconds(run["seconds"]),
        "Machine": ", ".join(part for part in parts if part),
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version),
        **{f"{_title(use)} data": words for use, words in run["data"].items()},
    }
    return {name: str(words) for name, words in found.items() if words}


def breakable(name: str) -> Markup:
    """A layer's name that may break into lines behind its dots."""
    return Markup(".<wbr>").join(name.split("."))


def unbroken(text: str) -> str:
    """``text`` whose units stay on the line of their number."""
    return text.replace(" %", "\u00a0%").replace(" dB", "\u00a0dB")


def _sort_key(value: object) -> str:
    """The key that a cell is sorted by: a number, or nothing for what was not measured."""
    return "" if value is None or (isinstance(value, float) and math.isnan(value)) else str(value)
