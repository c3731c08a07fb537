"""Formatting of numbers for people."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lowbit.report.results import MetricResult

NOTHING = "\N{EN DASH}"


def format_bits(bits: int | None) -> str:
    """``4`` or ``float``."""
    return "float" if bits is None else str(bits)


def format_operand(bits: int | None, operand: str) -> str:
    """``4-bit weights`` or ``float weights``."""
    return f"float {operand}" if bits is None else f"{bits}-bit {operand}"


def format_number(value: float | None) -> str:
    """``0.0123``, three digits; a dash for what is missing or NaN."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.3g}"


def format_bytes(count: float | None) -> str:
    """``512 B``, ``4.1 kB``, ``12.3 MB`` (powers of 1000)."""
    if count is None:
        return NOTHING
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def format_count(count: float | None) -> str:
    """``1.2 M``, ``3.4 G``: a large number with a unit prefix."""
    if count is None:
        return NOTHING
    for prefix in ("", "k", "M", "G", "T"):
        if abs(count) < 1000:
            return f"{count:.3g} {prefix}".strip()
        count /= 1000
    return f"{count:.3g} P"


def format_seconds(seconds: float) -> str:
    """``16.7 s``, ``3 min 12 s``, ``1 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def format_db(value: float | None) -> str:
    """``21.3 dB``, ``exact`` for infinity."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "exact" if value > 0 else "no signal"
    return f"{round(value, 1) + 0.0:.1f} dB"  # never -0.0


def format_percent(fraction: float | None, digits: int = 2) -> str:
    """``97.25 %``."""
    return NOTHING if fraction is None or math.isnan(fraction) else f"{100 * fraction:.{digits}f} %"


def format_change(metric: MetricResult) -> str:
    """The change due to quantization: ``-1.00 points`` where the metric is in percent, else ``+0.012``; empty if either value was not measured."""
    if metric.float is None or metric.quantized is None or math.isnan(metric.float) or math.isnan(metric.quantized):
        return ""
    from lowbit.qat.task import format_metric  # brings torch, which the command line's help does not need

    change = metric.quantized - metric.float
    if metric.unit == "%":
        return f"{100 * change:+.2f} points"
    return f"{'+' if change >= 0 else ''}{format_metric(change, metric.unit)}"


def format_ratio(before: float | None, after: float | None) -> str:
    """``3.4x``; empty where one of the two is missing, zero or NaN."""
    if not before or not after or math.isnan(before) or math.isnan(after):
        return ""
    ratio = before / after
    return f"{ratio:.2g}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"
