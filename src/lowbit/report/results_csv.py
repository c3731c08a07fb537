"""``results.csv``: the results of a comparison in long form, one row for each cell, as it is written and read."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit.comparison.cells import FLOAT, MIXED, Cell, Result
from lowbit.comparison.terms import SHOWN
from lowbit.errors import DataError
from lowbit.reading import check_readable

OF_CELL = ("subject", "track", "label", "method", "kind", "weight_bits", "activation_bits", "seed")
OF_FACTS = ("weights", "data")
OF_MACHINE = ("processor", "lowbit", "torch")
COLUMNS = (
    *OF_CELL, "search", "status", "reason", "metric", "unit", "higher_is_better", "value", "float_value", "size_bytes", "latency_ms",
    "float_latency_ms", "seconds", *SHOWN, *OF_FACTS, *OF_MACHINE, "key",
)  # fmt: skip
LARGEST = 2**27  # bytes


def results_csv(results: Sequence[Result]) -> str:
    """One row for each cell, done or not."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for result in sorted(results, key=lambda r: (r.cell.subject, r.cell.track, r.cell.bits, r.cell.label, r.cell.seed)):
        values: dict[str, object] = {name: getattr(result.cell, name) for name in OF_CELL}
        values["search"] = json.dumps(result.cell.search, sort_keys=True, default=str) if result.cell.search else ""
        values |= dict(zip(("weight_bits", "activation_bits"), result.cell.operand_bits, strict=True))
        values |= {name: getattr(result, name) for name in COLUMNS if hasattr(result, name)}
        values["float_value"] = result.float_metrics.get(result.metric)
        values |= {name: result.terms.get(name) for name in SHOWN}
        values |= {name: result.facts.get(name) for name in OF_FACTS}
        values |= {name: result.machine.get(name) for name in OF_MACHINE}
        writer.writerow(values)
    return text.getvalue()


def read_results(path: Path) -> list[Result]:
    """The results in a ``results.csv``, with what its columns say of them.

    Raises:
        DataError: There is no such file, or it is no ``results.csv`` of a comparison.
    """
    check_readable(path, max_bytes=LARGEST)
    try:
        return [_result(row) for row in csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))]
    except (KeyError, ValueError, TypeError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: no results.csv of a comparison ({error}). Name the file that 'lowbit compare' wrote.") from error


def _result(row: Mapping[str, Any]) -> Result:
    words = (row["weight_bits"], row["activation_bits"])
    weight, activation = (None if word in (FLOAT, MIXED) else int(word) for word in words)
    cell = Cell(
        row["subject"], row["label"], row["method"], row["kind"], weight, activation, int(row["seed"]), row["track"],
        mixtures=int(words == (MIXED, MIXED)), search=json.loads(row.get("search") or "{}"),
    )  # fmt: skip
    number = {
        name: float(row[name]) if row[name] else None for name in ("value", "float_value", "latency_ms", "float_latency_ms", "seconds")
    }
    return Result(
        row["key"],
        cell,
        {name: row[name] for name in OF_FACTS},
        row["status"],
        row["reason"],
        row["metric"],
        row["higher_is_better"] == "True",
        row["unit"],
        {} if number["value"] is None else {row["metric"]: number["value"]},
        {} if number["float_value"] is None else {row["metric"]: number["float_value"]},
        {name: row.get(name, "") for name in SHOWN},
        int(row["size_bytes"]) if row["size_bytes"] else None,
        number["latency_ms"],
        number["float_latency_ms"],
        number["seconds"],
        {name: row[name] for name in OF_MACHINE},
    )
