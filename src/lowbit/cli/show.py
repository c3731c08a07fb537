"""How results of the public verbs are printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import typer
from rich.markup import escape

from lowbit.cli.console import errors, results, say, show_json, show_table
from lowbit.cli.flags import in_flags
from lowbit.provenance import provenance_from_json
from lowbit.qat.task import format_metric
from lowbit.report.formatting import (
    format_bytes,
    format_change,
    format_db,
    format_operand,
    format_percent,
    format_ratio,
)
from lowbit.report.results import Report
from lowbit.report.switches import one_file_words, width_columns, width_rows
from lowbit.workflows.deliver import Delivery
from lowbit.workflows.plan import PlannedLayer


def report_delivery(delivery: Delivery, *, quiet: bool, as_json: bool = False) -> None:
    """Print the delivery and where the report is; exits with 1 where a file could not be written."""
    if as_json:
        show_json({**delivery.report.to_dict(), "out": delivery.out, "not_written": delivery.problems})
    elif not quiet:
        show_delivery(delivery)
    for problem in delivery.problems:
        errors.print(f"[bold red]not written:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if not as_json:
        say(f"report: {delivery.out / 'report.html'}")
    if delivery.problems:
        raise typer.Exit(1)


def show_switches(report: Report) -> None:
    """Print what a network with several widths gives and costs at each."""
    show_table(width_columns(report.metric), width_rows(report))
    if words := one_file_words(report):
        say(words)


def show_layers(layers: list[PlannedLayer], title: str) -> None:
    """Print the bits that each layer would get."""
    rows = [
        (e.name, e.kind, *("float" if value is None else value for value in (e.bits.weight, e.bits.activation, e.bits.output)))
        for e in layers
    ]
    show_table(("layer", "kind", "weight bits", "activation bits", "output bits"), rows, title=title)


def show_layer_json(model: str, method: str, layers: list[PlannedLayer], out: Path, files: list[str]) -> None:
    """Print the same as JSON, with the files that would be written."""
    rows = [{"name": e.name, "kind": e.kind, **{f"{part}_bits": bits for part, bits in dataclasses.asdict(e.bits).items()}} for e in layers]
    show_json({"model": model, "method": method, "layers": rows, "would_write": [str(out / file) for file in files]})


def options_line(options: Mapping[str, object]) -> str:
    """The hyper-parameters that were given, in one line."""
    return f"\nhyper-parameters: {', '.join(f'{key}={value}' for key, value in options.items()) or 'the defaults of the method'}"


def show_delivery(delivery: Delivery) -> None:
    """Print what was gained and what it cost."""
    report = delivery.report
    done = sum(layer.status == "done" for layer in report.layers)
    results.print(
        f"[bold]{escape(report.model)}[/] with [bold]{report.method}[/]: {format_operand(report.weight_bits, 'weights')}, "
        f"{format_operand(report.activation_bits, 'activations')}, {done} of {len(report.layers)} layers",
        highlight=False,
    )
    say(str(provenance_from_json(report.provenance)))
    rows: list[tuple[str, object, object, object]] = [
        (name, format_metric(metric.float, metric.unit), format_metric(metric.quantized, metric.unit), format_change(metric))
        for name, metric in report.metrics.items()
    ] or [(report.metric, None, None, "not measured: name labelled data with --data")]
    if report.sqnr_db is not None and report.agreement is not None:
        rows.append(("same answer as float", None, format_percent(report.agreement), f"output SQNR {format_db(report.sqnr_db)}"))
    elif report.sqnr_db is not None:
        rows.append(("output SQNR", None, format_db(report.sqnr_db), ""))
    for label, size in (("stored, model.lowbit", report.size_packed), ("stored, model.onnx", report.size_onnx)):
        if size is not None:
            rows.append((label, format_bytes(report.size_float), format_bytes(size), f"{format_ratio(report.size_float, size)} smaller"))
    if report.latency_float_onnx is not None and report.latency_quantized_onnx is not None:
        before, after = report.latency_float_onnx, report.latency_quantized_onnx
        rows.append(("time per call, ONNX", f"{before:.3g} ms", f"{after:.3g} ms", f"{before / after:.2f}x as fast"))
    show_table(("", "float", "quantized", ""), rows)
    if report.switches:
        show_switches(report)
    for label, parity in (("model.lowbit", report.parity_packed), ("model.onnx", report.parity_onnx)):
        if parity.passed is not None:
            verdict = "computes" if parity.passed else "does NOT compute"
            agreement = "" if parity.top1_agreement is None else f", same answer {format_percent(parity.top1_agreement)}"
            ratio = "" if parity.sqnr_db is None else f", {format_db(parity.sqnr_db)}"
            samples = "" if parity.samples is None else f" on {parity.samples} samples"
            results.print(
                f"{label} {verdict} what the network computes: largest difference {parity.max_abs_error:.2g}{agreement}{ratio}{samples}",
                highlight=False,
            )
    problems = {f"not written: {problem}" for problem in delivery.problems}
    for note in report.notes:
        if note in problems:
            continue  # those go to standard error
        results.print(f"note: {in_flags(note)}", markup=False, highlight=False)
