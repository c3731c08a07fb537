"""One cell of a comparison: a method with its bits on a network, for one seed; and what came out of it."""

from __future__ import annotations

import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from lowbit.reading import shorten
from lowbit.registry import Kind

Track = Literal["aligned", "published"]
Status = Literal["done", "diverged", "failed", "skipped"]
LARGEST_NUMBER = 2**63  # of whole numbers in results
FLOAT = "float"  # bits that are not quantized, and the label of the float network
MIXED = "mixed"  # bits of a network whose layers have different ones


@dataclass(frozen=True)
class Cell:
    """What is run, in plain values.

    Attributes:
        subject: Name of the network with its data and task.
        label: What tables call the method.
        method: Its name, or ``file.py:Class``.
        kind: Kind of the method.
        weight_bits, activation_bits: ``None`` is float.
        seed: Decides the order of data, augmentation and the draw of calibration samples, and seeds the method's own noise.
        track: ``aligned`` or ``published``; they are never compared.
        options: Hyper-parameters of the method that differ from its defaults.
        surrogate: Gradient surrogate in place of the method's.
        procedure, procedure_options: Procedure in place of the method's, with its hyper-parameters.
        terms: Everything else that is asked for: recipe, policy, number of calibration samples.
        widths: Bits between which the network switches, ``("8/8", "2/2")``; this cell is about one of them, or about mixtures.
        mixtures: Number of networks with widths drawn for each layer whose metrics are averaged; 0: all layers have those of the cell.
        search: How the layers get their own bits, at the cost of the network whose layers all have those of the cell; empty: they all have those.
        calibration, calibration_options: What makes samples in place of the network's own data, with its hyper-parameters; ``None``: nothing.
    """

    subject: str
    label: str
    method: str
    kind: Kind
    weight_bits: int | None
    activation_bits: int | None
    seed: int
    track: Track = "aligned"
    options: Mapping[str, object] = field(default_factory=dict)
    surrogate: str | None = None
    terms: Mapping[str, object] = field(default_factory=dict)
    procedure: str | None = None
    procedure_options: Mapping[str, object] = field(default_factory=dict)
    widths: tuple[str, ...] = ()
    mixtures: int = 0
    search: Mapping[str, object] = field(default_factory=dict)
    calibration: str | None = None
    calibration_options: Mapping[str, object] = field(default_factory=dict)

    @property
    def bits(self) -> str:
        """Bits of weights and activations: ``4/8``, ``2/float``; ``mixed``."""
        return MIXED if self.mixtures else "/".join(self.operand_bits)

    @property
    def operand_bits(self) -> tuple[str, str]:
        """Bits of weights and of activations as words."""
        if self.mixtures:
            return MIXED, MIXED
        weight, activation = (FLOAT if bits is None else str(bits) for bits in (self.weight_bits, self.activation_bits))
        return weight, activation

    @property
    def name(self) -> str:
        """What people call the cell: ``lsq 4/4 on digits, seed 0``."""
        return f"{self.label} {self.bits} on {self.subject}, seed {self.seed}"

    def key(self, facts: Mapping[str, object]) -> str:
        """SHA-256, shortened to 20 digits, of the cell and of ``facts`` about what it runs on: weights, data, sources."""
        cell = asdict(self)
        for name in (
            "procedure",
            "procedure_options",
            "widths",
            "mixtures",
            "search",
            "calibration",
            "calibration_options",
        ):  # cells that have none are called as before there were any
            if not cell[name]:
                del cell[name]
        return digest_of({"cell": cell, "facts": facts})

    @property
    def trained(self) -> Cell:
        """What is run for this cell: one training for all cells that differ in the width at which its network is measured."""
        return replace(self, weight_bits=None, activation_bits=None, mixtures=0) if self.widths else self

    @property
    def changes(self) -> dict[str, object]:
        """What differs from the method as its paper has it."""
        own = {"surrogate": self.surrogate, "procedure": self.procedure}
        prefixed = {f"procedure.{name}": value for name, value in self.procedure_options.items()}
        own["widths"] = ", ".join(self.widths)
        prefixed |= {f"search.{name}": value for name, value in self.search.items()}
        own["calibration"] = self.calibration
        prefixed |= {f"calibration.{name}": value for name, value in self.calibration_options.items()}
        return {**self.options, **{name: value for name, value in own.items() if value}, **prefixed}


@dataclass(frozen=True)
class Result:
    """What came out of one cell; one JSON file of the store.

    Attributes:
        key: Name of the file, made of everything that determines the result.
        cell: What was run.
        facts: What it ran on: digests of weights, data and the method's source.
        status: ``done``; ``diverged`` (the loss or the metric is not finite); ``failed``; ``skipped``.
        reason: Why it is not done.
        metric: Name of the metric that counts.
        higher_is_better: Whether large values of it are better.
        unit: Its unit; ``%`` for fractions that are shown in percent.
        metrics: All metrics by name.
        float_metrics: Those of the float network.
        terms: What must be equal, measured on the quantized network, see ``terms.equal_terms``.
        size_bytes: Stored bytes.
        latency_ms, float_latency_ms: Time of one call of the ONNX file, where it was measured.
        seconds: Time of the whole cell.
        machine: Where it ran: processor, threads, versions.
    """

    key: str
    cell: Cell
    facts: Mapping[str, object]
    status: Status
    reason: str = ""
    metric: str = ""
    higher_is_better: bool = True
    unit: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    float_metrics: Mapping[str, float] = field(default_factory=dict)
    terms: Mapping[str, object] = field(default_factory=dict)
    size_bytes: int | None = None
    latency_ms: float | None = None
    float_latency_ms: float | None = None
    seconds: float | None = None
    machine: Mapping[str, object] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The metric that counts, where the cell is done."""
        return self.metrics.get(self.metric) if self.status == "done" else None

    def to_dict(self) -> dict[str, object]:
        """Plain values, as JSON holds them."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Result:
        """The inverse of ``to_dict``.

        Raises:
            TypeError, KeyError: Entries are missing, unknown, or of another type.
        """
        _check_types(values["cell"], Cell)
        _check_types({name: value for name, value in values.items() if name != "cell"}, Result)
        cell = Cell(**values["cell"])
        return Result(**{**values, "cell": replace(cell, widths=tuple(cell.widths))})


def _check_types(values: Mapping[str, Any], kind: type) -> None:
    """TypeError where an entry is not of the type that the dataclass ``kind`` declares for it, in JSON."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{kind.__name__} must be names and values, got {type(values).__name__}")
    hints = typing.get_type_hints(kind)
    for name, value in values.items():
        if name in hints and not _is_of(value, hints[name]):
            raise TypeError(f"{name} is {shorten(value)}")


def _is_of(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of(value, part) for part in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is Mapping:
        return isinstance(value, dict) and (arguments[1] is object or all(_is_of(entry, arguments[1]) for entry in value.values()))
    if origin is tuple:
        return isinstance(value, (list, tuple)) and all(_is_of(entry, arguments[0]) for entry in value)
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool) and (isinstance(value, float) or abs(value) < LARGEST_NUMBER)
    return isinstance(value, hint)


def bits_order(bits: str) -> tuple[float, ...]:
    """Sorts widths such as ``4/8``: fewest bits of weights first, float behind all numbers, mixed ones last.

    >>> sorted(["mixed", "8/8", "2/float", "2/2", "10/4"], key=bits_order)
    ['2/2', '2/float', '8/8', '10/4', 'mixed']
    """
    return tuple(math.inf if part in ("float", MIXED) else float(part) for part in bits.split("/"))


def digest_of(value: object) -> str:
    """SHA-256, shortened to 20 digits, of plain values.

    >>> digest_of({"b": 1, "a": (2, 3)}) == digest_of({"a": [2, 3], "b": 1})
    True
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:20]
