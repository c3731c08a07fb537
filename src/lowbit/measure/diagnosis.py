"""The findings of ``diagnose`` as data and as a printable table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from rich.console import Group
from rich.table import Table as RichTable
from rich.text import Text

from lowbit.measure.ranges import Range


@dataclass(frozen=True)
class Setting:
    """The network with some of its quantizers enabled, compared with the float one; ``score`` is what ``evaluate`` returned."""

    name: str
    sqnr_db: float
    agreement: float | None
    score: float | None = None


@dataclass(frozen=True)
class Suspect:
    """One quantizer and what it does to the network's output.

    Attributes:
        name: Layer for a weight, site (``layer1.0.output``) for an activation.
        kind: ``weight`` or ``activation``.
        layers: Layers that read it, by direct observation.
        bit_width: Its bits.
        granularity: Which elements share a scale.
        place: Its position in execution order.
        only_on_db: SQNR of the output with this quantizer alone.
        only_off_db: SQNR of the output with all quantizers but this one.
        gain_db: Gain over the network with all quantizers.
        share: Its share of the summed noise power of all quantizers taken one by one, 0 to 1.
        range: The values it saw; ``None`` for one that the data never reaches.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    bit_width: int
    granularity: str
    place: int
    only_on_db: float
    only_off_db: float
    gain_db: float
    share: float
    range: Range | None


@dataclass(frozen=True)
class Remedy:
    """Something to try for ``suspect`` (the name of a quantizer, or ``whole network``).

    Attributes:
        action: What to do, in words.
        gain_db: How much the SQNR of the quantized network's output rose when it was tried.
        rule: The rule of a bit policy that does it, where one does.
    """

    suspect: str
    action: str
    gain_db: float
    rule: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Result of ``diagnose``; ``suspects`` are sorted worst first, ``output_db`` is the SQNR of each layer's output."""

    samples: int
    settings: tuple[Setting, ...]
    suspects: tuple[Suspect, ...]
    output_db: Mapping[str, float]
    output_mse: Mapping[str, float]
    remedies: tuple[Remedy, ...]
    findings: tuple[str, ...] = ()

    def setting(self, name: str) -> Setting:
        """The setting called ``off``, ``weights``, ``activations`` or ``all``."""
        return next(setting for setting in self.settings if setting.name == name)

    def to_dict(self) -> dict[str, object]:
        """Plain values, as in ``report.json``."""
        return asdict(self)

    def __rich__(self) -> Group:
        table = RichTable(title="quantizers, worst first", title_justify="left")
        for column in ("quantizer", "kind", "bits", "noise share", "only this on", "all but this", "own SQNR", "outliers", "channels"):
            table.add_column(column, justify="left" if column in ("quantizer", "kind") else "right")
        for s in self.suspects:
            own = [f"{s.range.sqnr_db:.1f} dB", f"{s.range.outlier_ratio:.1f}x"] if s.range else ["-", "-"]
            channels = f"{s.range.channel_ratio:.1f}x" if s.range and s.range.channel_ratio is not None else "-"
            row = (s.name, s.kind, str(s.bit_width), f"{s.share:.1%}", f"{s.only_on_db:.1f} dB", f"{s.only_off_db:.1f} dB", *own, channels)
            table.add_row(*(Text(cell) for cell in row))
        return Group(table, *(Text(f"- {finding}") for finding in self.findings))
