"""Tables of a comparison: rows that may stand beside each other, their statistics, and what is doubtful about them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lowbit.comparison.cells import Result, Status, Track, bits_order, digest_of
from lowbit.comparison.statistics import LEAST_SEEDS, Difference, Spread, paired_difference, shared_ranks, spread
from lowbit.comparison.terms import EQUAL, differing, grouped, term_of
from lowbit.registry import Kind


@dataclass(frozen=True)
class Row:
    """One method in one table.

    Attributes:
        label: What the method is called.
        values: The metric by seed, of the cells that are done.
        spread: Over these seeds; ``None`` where no cell is done.
        difference: To the baseline; ``None`` with fewer than three common seeds, and for the baseline itself.
        rank: From 1, shared where no difference is shown; ``None`` with fewer than three seeds.
        results: All results, done or not, by seed.
    """

    label: str
    values: Mapping[int, float]
    spread: Spread | None
    difference: Difference | None
    rank: int | None
    results: Sequence[Result]

    @property
    def unfinished(self) -> list[Result]:
        """Results that are not done."""
        return [result for result in self.results if result.status != "done"]

    @property
    def size_bytes(self) -> float | None:
        """Mean stored bytes over seeds."""
        return _mean(result.size_bytes for result in self.results)

    @property
    def latency_ms(self) -> float | None:
        """Mean measured time over seeds."""
        return _mean(result.latency_ms for result in self.results)

    @property
    def seconds(self) -> float | None:
        """Mean time of a cell over seeds."""
        return _mean(result.seconds for result in self.results)

    def term(self, name: str) -> object:
        """One of the terms, of the first cell that has it."""
        return next((value for result in self.results if (value := term_of(result, name)) is not None), None)


@dataclass(frozen=True)
class Table:
    """Methods on equal terms.

    Attributes:
        track, subject, bits, kind: What the rows have in common, beside all terms that must be equal.
        metric, unit, higher_is_better: What is compared.
        baseline: Label that differences are taken to.
        rows: Best mean first; methods without a finished cell last.
        float_value: The float network's own metric.
    """

    track: Track
    subject: str
    bits: str
    kind: Kind
    metric: str
    unit: str
    higher_is_better: bool
    baseline: str | None
    rows: Sequence[Row]
    float_value: float | None

    @property
    def title(self) -> str:
        """``digits, 4/4, training, aligned``."""
        return _title(self.rows[0].results[0])


@dataclass(frozen=True)
class Tables:
    """All tables of a store, and what to know before reading them.

    Attributes:
        tables: Rows are in one table only where everything that must be equal is.
        warnings: What is doubtful.
        separated: Why methods at the same bits stand in different tables.
        superseded: Older results of cells whose method, weights or data have changed; they are in no table.
    """

    tables: Sequence[Table]
    warnings: Sequence[str]
    separated: Sequence[str]
    superseded: int = 0
    results: Sequence[Result] = field(default=(), repr=False)

    def count(self, status: Status) -> int:
        """Number of cells with this outcome."""
        return sum(result.status == status for result in self.results)


def make_tables(
    results: Iterable[Result], *, baseline: str | None = None, equal: Sequence[str] = (), current: Iterable[str] = ()
) -> Tables:
    """Tables of ``results``.

    Args:
        results: Of any number of suites.
        baseline: Label that differences are taken to; where a table lacks it, its first label by name.
        equal: Terms that must be equal beside those of the track.
        current: Keys that count where a cell has several results, because its method has changed meanwhile.

    >>> make_tables([]).tables
    []
    """
    kept, superseded = _newest(results, set(current))
    tables, separated = [], []
    kept.sort(key=lambda result: (result.cell.track, result.cell.subject, bits_order(result.cell.bits), result.cell.kind))
    for group in _by(kept, lambda result: (result.cell.track, result.cell.subject, result.cell.bits, result.cell.kind)):
        names = [*EQUAL[group[0].cell.track], *equal]
        measured = [result for result in group if result.status == "done"]
        parts = grouped(measured, names) or [[]]
        if len(parts) > 1:
            separated.append(f"{_title(group[0])}: {_why(parts, names)}")
        homes = {result.cell.label: index for index, part in reversed(list(enumerate(parts))) for result in part}
        for result in group:
            if result.status != "done":
                parts[homes.get(result.cell.label, 0)].append(result)
        tables += [_table(part, baseline) for part in parts if part]
    return Tables(tables, _warnings(kept, tables), separated, superseded, kept)


def _title(result: Result) -> str:
    cell = result.cell
    return f"{cell.subject}, {cell.bits}, {cell.kind.replace('_', '-')}, {cell.track}"


def _newest(results: Iterable[Result], current: set[str]) -> tuple[list[Result], int]:
    """One result for each cell: that of ``current``, else the last one."""
    found: dict[str, Result] = {}
    count = 0
    for result in results:
        count += 1
        identity = result.cell.key({})
        if identity not in found or result.key in current or found[identity].key not in current:
            found[identity] = result
    return list(found.values()), count - len(found)


def _why(parts: Sequence[Sequence[Result]], names: Sequence[str]) -> str:
    told = []
    for name in differing([result for part in parts for result in part], names):
        if name == "settings":
            told.append(_settings(parts))
            continue
        values = "; ".join(f"{', '.join(dict.fromkeys(r.cell.label for r in part))}: {_short(term_of(part[0], name))}" for part in parts)
        told.append(f"{name.replace('_', ' ')} differs ({values})")
    return ", ".join(told)


def _settings(parts: Sequence[Sequence[Result]]) -> str:
    """The settings of suites that differ."""
    flat = [term_of(part[0], "settings") for part in parts]
    assert all(isinstance(one, dict) for one in flat)
    names = dict.fromkeys(name for one in flat for name in one)  # type: ignore[attr-defined]
    told = {name: list(dict.fromkeys(str(one.get(name)) for one in flat)) for name in names}  # type: ignore[attr-defined]
    return "settings differ (" + "; ".join(f"{name}: {', '.join(values)}" for name, values in told.items() if len(values) > 1) + ")"


def _table(results: Sequence[Result], baseline: str | None) -> Table:
    by_label = _rows(results)
    values = {label: {r.cell.seed: r.value for r in group if r.value is not None} for label, group in by_label.items()}
    done = [result for result in results if result.status == "done"]
    first = done[0] if done else results[0]
    higher = first.higher_is_better
    against = baseline if baseline in values else min((label for label, found in values.items() if found), default=None)
    ranks = shared_ranks(values, higher_is_better=higher)
    rows = [
        Row(
            label,
            values[label],
            spread(list(values[label].values())) if values[label] else None,
            None if against is None or label == against else paired_difference(values[label], values[against]),
            ranks[label],
            sorted(group, key=lambda result: result.cell.seed),
        )
        for label, group in by_label.items()
    ]
    rows.sort(key=lambda row: (row.spread is None, 0.0 if row.spread is None else (-1 if higher else 1) * row.spread.mean, row.label))
    cell = results[0].cell
    return Table(
        cell.track,
        cell.subject,
        cell.bits,
        cell.kind,
        first.metric,
        first.unit,
        higher,
        against,
        rows,
        first.float_metrics.get(first.metric),
    )


def _rows(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Results by label; one label that stands for methods with other options becomes several."""
    groups = _by(results, lambda result: (result.cell.label, digest_of([result.cell.method, result.cell.changes])))
    found: dict[str, list[Result]] = {}
    for group in groups:
        label = group[0].cell.label
        found[label if label not in found else f"{label} ({_options(group[0])})"] = group
    return found


def _options(result: Result) -> str:
    return ", ".join(f"{name}={value}" for name, value in result.cell.changes.items()) or "as in its paper"


def _warnings(results: Sequence[Result], tables: Sequence[Table]) -> list[str]:
    done = [result for result in results if result.status == "done"]
    told = []
    for group in _by(done, lambda result: result.cell.subject):
        for name in ("weights", "data"):
            if found := differing(group, (name,)):
                told.append(f"{group[0].cell.subject}: results are from different {name} ({', '.join(map(_short, found[name]))})")
    for name, meaning in (("images", "training images seen"), ("calibration_images", "calibration images")):
        for group in _by(done, lambda result: (result.cell.track, result.cell.subject, result.cell.kind)):
            if found := differing(group, (name,)):
                told.append(f"{group[0].cell.subject}, {group[0].cell.track}: {meaning} differ ({', '.join(map(_short, found[name]))})")
    told += _inversions(tables)
    machines = {str(result.machine.get("processor")) for result in done}
    if len(machines) > 1:
        told.append(f"times are from different machines and are not to be compared: {', '.join(sorted(machines))}")
    versions = {str(result.machine.get("lowbit")) for result in done}
    if len(versions) > 1:
        told.append(f"results are from different versions of lowbit: {', '.join(sorted(versions))}")
    if few := [table.title for table in tables if any(row.spread is not None and not row.spread.is_sound for row in table.rows)]:
        told.append(f"fewer than {LEAST_SEEDS} seeds, so that no difference can be shown: {'; '.join(few)}")
    return told


def _inversions(tables: Sequence[Table]) -> list[str]:
    """Methods whose fewer bits are better than more bits, by more than both spreads."""
    told = []
    rows = [(table, row) for table in tables for row in table.rows if row.spread is not None]
    for table, row in rows:
        for other, more in rows:
            is_pair = (table.track, table.subject, table.kind, row.label) == (other.track, other.subject, other.kind, more.label)
            if not is_pair or not _is_fewer(row, more) or row.spread is None or more.spread is None:
                continue
            gain = (row.spread.mean - more.spread.mean) * (1 if table.higher_is_better else -1)
            if gain > (row.spread.deviation or 0) + (more.spread.deviation or 0):
                told.append(
                    f"{row.label} on {table.subject}: {table.bits} is better than {other.bits} "
                    f"({row.spread.mean:.4g} and {more.spread.mean:.4g}), beyond the spread over seeds"
                )
    return told


def _is_fewer(row: Row, more: Row) -> bool:
    first, second = (row.results[0].cell, more.results[0].cell)
    if first.mixtures or second.mixtures:
        return False
    pairs = [(first.weight_bits or 32, second.weight_bits or 32), (first.activation_bits or 32, second.activation_bits or 32)]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _by(results: Iterable[Result], key: object) -> list[list[Result]]:
    groups: dict[object, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)  # type: ignore[operator]
    return list(groups.values())


def _mean(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None


def _short(value: object) -> str:
    text = str(value)
    return text[:10] if len(text) == 64 else text
