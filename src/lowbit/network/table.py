"""What was done to each layer, or the reason why nothing was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from rich.table import Table as RichTable

from lowbit.spec import Position

Status = Literal["done", "skipped"]


@dataclass(frozen=True)
class LayerRecord:
    """One layer, or one of its several weights: its bits (``None`` = float), whether it was quantized, and the reason where it was not (or not fully).

    ``output_bits`` are those of the output that the policy asks for, not of a quantizer that later layers or sums bring about.
    """

    name: str
    kind: str
    weight_bits: int | None
    activation_bits: int | None
    status: Status
    reason: str = ""
    output_bits: int | None = None


@dataclass(eq=False)
class LayerTable:
    """Layer records by name, in execution order.

    Attributes:
        notes: Remarks about the whole network.
        others: What holds parameters that are no weights of layers (norms, single parameters), and why each stays in float.
        inputs: Site of the quantizer of each layer's input, such as ``block.relu.output``, by layer; not saved in files.
        outputs: Site of the quantizer that the policy asks for at a layer's output, by layer; not saved in files.
        positions: The weights of the first and the last layer to run, by the names of the rows; not in a file.
    """

    _records: dict[str, LayerRecord] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    others: list[LayerRecord] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    positions: dict[str, Position] = field(default_factory=dict)

    def add(self, record: LayerRecord) -> None:
        """Add or replace the record of ``record.name``."""
        self._records[record.name] = record

    def note(self, text: str) -> None:
        """A remark about the whole network, once."""
        if text not in self.notes:
            self.notes.append(text)

    def __iter__(self) -> Iterator[LayerRecord]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, name: str) -> LayerRecord:
        return self._records[name]

    @property
    def done(self) -> list[LayerRecord]:
        """Layers that were quantized."""
        return [record for record in self if record.status == "done"]

    def __rich__(self) -> RichTable:
        table = RichTable(title="layers")
        for column in ("layer", "kind", "weight bits", "activation bits", "output bits", "status", "reason"):
            table.add_column(column)
        for record in (*self, *self.others):
            held = (record.weight_bits, record.activation_bits, record.output_bits)
            bits = ("float" if value is None else str(value) for value in held)
            table.add_row(record.name, record.kind, *bits, record.status, record.reason)
        return table
