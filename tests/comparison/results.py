"""Results as a comparison stores them, without running anything."""

from __future__ import annotations

from typing import Any

from lowbit.comparison.cells import Cell, Result

FACTS = {"weights": "w" * 64, "data": "d" * 64, "split": "train 10, test 5", "threads": 1, "configurations": 1, "selection": "last epoch"}
TERMS = {
    "first_layer": "8/8", "last_layer": "8/8", "inner_layers": "4/4", "merges": None, "float_share": 0.0, "images": 50,
    "granularity": "per_tensor / per_tensor",
}  # fmt: skip


def cell(label: str = "lsq", bits: tuple[int | None, int | None] = (4, 4), seed: int = 0, **changes: Any) -> Cell:
    return Cell("digits", label, changes.pop("method", label), "training", *bits, seed, **changes)


def result(
    value: float | None = 0.9,
    label: str = "lsq",
    bits: tuple[int | None, int | None] = (4, 4),
    seed: int = 0,
    *,
    facts: dict[str, Any] | None = None,
    terms: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> Result:
    ran = cell(label, bits, seed, terms=settings or {}, options=changes.pop("options", {}), track=changes.pop("track", "aligned"))
    known = {**FACTS, **(facts or {})}
    status = changes.pop("status", "done" if value is not None else "failed")
    return Result(
        ran.key(known), ran, known, status, metric="accuracy", unit="%", metrics={} if value is None else {"accuracy": value},
        float_metrics={"accuracy": 0.95}, terms={**TERMS, **(terms or {})}, size_bytes=1000, seconds=2.0,
        machine=changes.pop("machine", {"processor": "p", "lowbit": "1"}), **changes,
    )  # fmt: skip


def seeds(values: list[float], label: str = "lsq", bits: tuple[int | None, int | None] = (4, 4), **changes: Any) -> list[Result]:
    return [result(value, label, bits, seed, **changes) for seed, value in enumerate(values)]
