"""Budgets of a search: how many bits, bytes, bit operations or how much time a network may take."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Literal

from lowbit.errors import SpecError, unknown_name

CostKind = Literal["average", "size", "bops", "latency"]
# Units of each kind, as multiples of the one without a prefix.
_UNITS: dict[CostKind, dict[str, float]] = {
    "average": {"": 1, "bits": 1},
    "size": {"": 1, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bops": {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12},
    "latency": {"": 1, "ms": 1, "us": 1e-3, "s": 1e3, "cycles": 1},
}
REFERENCES: dict[CostKind, str] = {
    "average": "", "size": "the float network", "bops": "the float network", "latency": "the network with 8-bit weights and activations",
}  # fmt: skip
_NUMBER = re.compile(r"([+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|[+-]?\.\d+)\s*(%|[A-Za-z]*)")


@dataclass(frozen=True)
class Limit:
    """The most that a network may cost.

    Attributes:
        kind: ``average`` (bits of weights, each weight counting once), ``size`` (bytes), ``bops`` (bit operations of one sample) or
            ``latency`` (in the unit of the latency table).
        value: The most of it; of a share 0.1 is 10 %.
        is_share: Whether ``value`` is a share of what ``REFERENCES[kind]`` costs.
    """

    kind: CostKind
    value: float
    is_share: bool = False

    def __str__(self) -> str:
        return f"{self.kind}={100 * self.value:g}%" if self.is_share else f"{self.kind}={self.value:g}"


@dataclass(frozen=True)
class Budget:
    """What a network may cost; all limits that are given hold together.

    Numbers are bits, bytes, bit operations and the latency table's unit; text may carry a unit or be a share in percent. Bytes are those of
    codes, tables, biases and norms (``lowbit.measure.model_size``), shares of size and bit operations those of the float network, of latency
    that of 8-bit weights and activations.

    Attributes:
        average: Bits of weights on average over the layers that are searched: ``4``.
        size: Stored size: ``2_500_000``, ``"2.5MB"`` or ``"10%"``.
        bops: Bit operations (MACs x weight bits x activation bits) of one sample: ``1.2e9``, ``"1.2G"`` or ``"8%"``.
        latency: Time of one sample by a latency table: ``3.5``, ``"3.5ms"`` or ``"60%"``.

    Raises:
        SpecError: A value that is not above 0, an unknown unit, or a share of what has none.

    Example:
        >>> import lowbit
        >>> lowbit.Budget(size="2.5MB", bops="8%").limits
        (Limit(kind='size', value=2500000.0, is_share=False), Limit(kind='bops', value=0.08, is_share=True))
    """

    average: float | str | None = None
    size: float | str | None = None
    bops: float | str | None = None
    latency: float | str | None = None

    def __post_init__(self) -> None:
        _ = self.limits  # checks every value

    @property
    def limits(self) -> tuple[Limit, ...]:
        """Each limit that is given."""
        values = ((entry.name, getattr(self, entry.name)) for entry in fields(self))
        return tuple(_limit(name, value) for name, value in values if value is not None)  # type: ignore[arg-type]

    @staticmethod
    def of(given: object) -> Budget:
        """The budget that a user gave: a ``Budget``, text such as ``"size=10%"``, or a list of such texts.

        >>> Budget.of(["average=4", "bops=1.2G"])
        Budget(average='4', size=None, bops='1.2G', latency=None)
        """
        if isinstance(given, Budget):
            return given
        texts = given.split(",") if isinstance(given, str) else given
        if not isinstance(texts, Iterable):
            raise SpecError(f"budget must be a Budget or text such as 'size=10%', got {given!r}")
        known, values = [entry.name for entry in fields(Budget)], dict[str, str]()
        for text in texts:
            name, equals, value = str(text).partition("=")
            name = name.strip()
            if not equals:
                raise SpecError(
                    f"budget {text!r}: expected a name and a value, such as 'average=4', 'size=2.5MB', 'size=10%', 'bops=8%' or 'latency=60%'"
                )
            if name not in known:
                raise unknown_name("budget", name, known)
            if name in values:
                raise SpecError(f"budget: {name} is given twice, {values[name]} and {value.strip()}. Give it once.")
            values[name] = value.strip()
        return Budget(**values)

    def __str__(self) -> str:
        return ", ".join(map(str, self.limits)) or "no limit"


def _limit(kind: CostKind, value: object) -> Limit:
    units = _UNITS[kind]
    number, unit = value, ""
    if isinstance(value, str):
        found = _NUMBER.fullmatch(value.strip())
        if found is None:
            raise SpecError(f"budget {kind}={value!r}: expected a number{_allowed(kind)}")
        number, unit = float(found[1]), found[2]
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise SpecError(f"budget {kind}={value!r}: expected a number{_allowed(kind)}")
    if unit == "%":
        if not REFERENCES[kind]:
            raise SpecError(f"budget {kind}={value!r}: there is nothing that it is a share of. Give a number of bits, such as {kind}=4.")
    elif unit not in units:
        raise SpecError(f"budget {kind}={value!r}: unknown unit {unit!r}; expected a number{_allowed(kind)}")
    if not 0 < number < float("inf"):
        raise SpecError(f"budget {kind}={value!r}: it must be above 0 and finite")
    return Limit(kind, number / 100, is_share=True) if unit == "%" else Limit(kind, number * units[unit])


def _allowed(kind: CostKind) -> str:
    names = ", ".join(unit for unit in _UNITS[kind] if unit)
    return f", alone or with {names}" + (f", or a share in % of {REFERENCES[kind]}" if REFERENCES[kind] else "")
