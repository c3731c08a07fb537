"""Time of each layer at each pair of widths: measured on a machine and kept in a file, or by a model of hardware."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lowbit.errors import SpecError
from lowbit.files import write_text
from lowbit.reading import read_json
from lowbit.spec import LayerBits, switch_name

FORMAT = "lowbit latency table"
LARGEST_FILE = 2**26  # bytes


@dataclass(frozen=True)
class LatencyTable:
    """Time of each layer at each pair of widths.

    Attributes:
        unit: Unit of the times: ``ms``, or ``cycles`` of a model of hardware.
        times: Time of each layer by its name and by ``switch_name`` of its bits, such as ``4/8``.
        kernels: What computes it there, by the same keys; empty where no kernel ran.
        facts: What it was measured on: machine, versions, batch size, threads.

    Example:
        >>> table = LatencyTable("ms", {"conv": {"4/8": 0.5, "8/8": 0.75}})
        >>> table.time("conv", LayerBits(4, 8))
        0.5
    """

    unit: str
    times: Mapping[str, Mapping[str, float]]
    kernels: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)

    def time(self, layer: str, bits: LayerBits) -> float:
        """Time of one layer; ``check`` says whether the table has it."""
        return self.times[layer][switch_name(bits)]

    def has(self, needed: Mapping[str, Sequence[LayerBits]]) -> bool:
        """Whether it has every layer at these widths."""
        return all(switch_name(bits) in self.times.get(name, {}) for name, widths in needed.items() for bits in widths)

    def check(self, needed: Mapping[str, Sequence[LayerBits]]) -> None:
        """SpecError that names the layers which the table lacks, or the widths that it lacks of them."""
        missing = [name for name in needed if name not in self.times]
        if missing:
            raise SpecError(
                f"the latency table does not fit the network: it has no layer {', '.join(map(repr, missing))}; it has {', '.join(self.times) or 'none'}. "
                "Make one of this network with 'lowbit latency-table'."
            )
        for name, widths in needed.items():
            lacking = list(dict.fromkeys(switch_name(bits) for bits in widths if switch_name(bits) not in self.times[name]))
            if lacking:
                raise SpecError(
                    f"the latency table has no time of layer {name!r} at {', '.join(lacking)} bits; it has {', '.join(self.times[name])}."
                )

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        content = {"format": FORMAT, "unit": self.unit, "facts": self.facts, "times": self.times, "kernels": self.kernels}
        write_text(Path(path), json.dumps(content, indent=1) + "\n")

    @staticmethod
    def load(path: Path | str) -> LatencyTable:
        """Read what ``save`` wrote; SpecError naming the file when it is no latency table."""
        try:
            content = read_json(path, max_bytes=LARGEST_FILE)
        except ValueError as error:
            raise SpecError(f"latency table {path}: it is no JSON ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise SpecError(f"{path} is no latency table; 'lowbit latency-table' writes one.")
        times = content.get("times")
        if not isinstance(times, dict) or not all(isinstance(t, dict) and all(_is_time(v) for v in t.values()) for t in times.values()):
            raise SpecError(f"latency table {path}: times must hold a number above 0 for each layer and each pair of widths")
        if not all(isinstance(content.get(name, {}), dict) for name in ("kernels", "facts")):
            raise SpecError(f"latency table {path}: kernels and facts must hold names and values")
        return LatencyTable(str(content.get("unit", "")), times, content.get("kernels") or {}, content.get("facts") or {})


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
