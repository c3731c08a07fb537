"""Where a network comes from: what later work with its files needs to know, written and read in one place."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import nn

from lowbit.data.images import Preprocessing
from lowbit.errors import FileFormatError, SpecError
from lowbit.reading import shorten

LONGEST_TEXT = 4096  # characters: what paths may have
MOST_CLASSES = 2**17
MOST_OPTIONS = 64
DIGEST = 64  # hexadecimal digits of SHA-256
SHOWN = 12  # of these, in messages
_ATTRIBUTE = "lowbit_provenance"


@dataclass(frozen=True)
class Provenance:
    """Where a network comes from and what its inputs and outputs mean. What is not known is ``None`` or empty.

    ``report.json``, ``model.lowbit`` and ``model.onnx`` hold it, and later commands take from it what the user does not name.

    Attributes:
        model: The network, as ``lowbit quantize --model`` takes it; paths are as the user gave them.
        model_options: Arguments of its factory.
        weights: File of the float network's weights; ``None`` for those that the factory returns.
        weights_sha256: SHA-256 of the float network's parameters and buffers; ``None`` also where training started from random ones.
        data: Labelled data.
        calibration: Samples to calibrate on, where they are not the training samples of the data.
        synthesis: What made the samples to calibrate on, where they are no data: the ``method``, its ``options``, the ``seed``, the number
            of ``samples`` and their ``shapes``.
        preprocessing: How a picture becomes an input.
        classes: Names of the classes in the order of the outputs.
        task: What the network is for, such as ``Classification``.

    Raises:
        SpecError: A value of another type, too long, or with characters that cannot be printed.

    Example:
        >>> import lowbit
        >>> from lowbit.data import Preprocessing
        >>> pictures = Preprocessing(size=32, mean=(0.5,), std=(0.5,), grey=True)
        >>> print(lowbit.Provenance(model="net.py:build", classes=("cat", "dog"), preprocessing=pictures))
        network net.py:build; inputs 32 x 32, grey, mean 0.5, std 0.5, crop fraction 0.875, bicubic; 2 classes: cat, dog
    """

    model: str | None = None
    model_options: Mapping[str, object] = field(default_factory=dict)
    weights: str | None = None
    weights_sha256: str | None = None
    data: str | None = None
    calibration: str | None = None
    preprocessing: Preprocessing | None = None
    classes: tuple[str, ...] = ()
    task: str | None = None
    synthesis: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("model", "weights", "weights_sha256", "data", "calibration", "task"):
            value = getattr(self, name)
            if value is not None and not _is_text(value):
                raise SpecError(f"provenance: {name} must be printable text of at most {LONGEST_TEXT} characters, got {shorten(value)}")
        digest = self.weights_sha256
        if digest is not None and not (len(digest) == DIGEST and set(digest) <= set("0123456789abcdef")):
            raise SpecError(f"provenance: weights_sha256 must be {DIGEST} hexadecimal digits, got {shorten(digest)}")
        if not (isinstance(self.classes, (tuple, list)) and len(self.classes) <= MOST_CLASSES and all(map(_is_text, self.classes))):
            raise SpecError(f"provenance: classes must be at most {MOST_CLASSES} printable names, got {shorten(self.classes)}")
        object.__setattr__(self, "classes", tuple(self.classes))
        for name in ("model_options", "synthesis"):
            options = getattr(self, name)
            if not (isinstance(options, Mapping) and len(options) <= MOST_OPTIONS and all(map(_is_text, options)) and _is_plain(options)):
                raise SpecError(f"provenance: {name} must be at most {MOST_OPTIONS} names with plain values, got {shorten(options)}")
        if not (self.preprocessing is None or isinstance(self.preprocessing, Preprocessing)):
            raise SpecError(f"provenance: preprocessing must be a Preprocessing, got {shorten(self.preprocessing)}")

    def __str__(self) -> str:
        weights = "" if self.weights is None else f" with {self.weights}"
        shown = ", ".join(self.classes[:10]) + (", ..." if len(self.classes) > 10 else "")
        parts = (
            self.model and f"network {self.model}{weights}",
            self.data and f"data {self.data}",
            self.calibration and f"calibration {self.calibration}{self._made}",
            self.preprocessing and f"inputs {self.preprocessing}",
            self.classes and f"{len(self.classes)} classes: {shown}",
        )
        return "; ".join(str(part) for part in parts if part)

    @property
    def _made(self) -> str:
        """What made the samples to calibrate on, in words."""
        if not self.synthesis:
            return ""
        method, seed, samples = (self.synthesis.get(name) for name in ("method", "seed", "samples"))
        count = "" if samples is None else f"{samples} "
        return f", no data: {count}samples made by {method} with seed {seed}"

    def to_json(self) -> dict[str, object]:
        """The facts that are known, as JSON holds them."""
        facts = {name: _listed(getattr(self, name)) for name in (f.name for f in dataclasses.fields(self)) if getattr(self, name)}
        if self.preprocessing is not None:
            facts["preprocessing"] = {key: _listed(value) for key, value in dataclasses.asdict(self.preprocessing).items()}
        return facts


def provenance_from_json(value: object) -> Provenance:
    """The inverse of ``Provenance.to_json``, for files that anybody may have written.

    Raises:
        FileFormatError: It holds an unknown name, or a value that is not allowed.
    """
    try:
        facts = _entries(value, Provenance, "provenance")
        if "preprocessing" in facts:
            facts["preprocessing"] = _preprocessing(facts["preprocessing"])
        return Provenance(**facts)  # type: ignore[arg-type]
    except SpecError as error:
        raise FileFormatError(f"where it comes from cannot be understood: {error}") from error


def attach_provenance(model: nn.Module, provenance: Provenance) -> None:
    """Let ``model`` carry ``provenance`` (copies and pickles keep it)."""
    setattr(model, _ATTRIBUTE, provenance)


def provenance_of(model: nn.Module) -> Provenance | None:
    """What ``model`` carries: attached to it, or read from its file; ``None`` where it is not known."""
    found = getattr(model, _ATTRIBUTE, None)
    return found if isinstance(found, Provenance) else None


def class_names_of(data: object) -> tuple[str, ...]:
    """The names of the classes that a data object knows: its ``classes`` or ``class_names``, or those of the data set within it.

    >>> from types import SimpleNamespace
    >>> class_names_of(SimpleNamespace(dataset=SimpleNamespace(classes=["cat", "dog"])))
    ('cat', 'dog')
    """
    for _ in range(4):  # a loader over a subset of a data set
        for name in ("classes", "class_names"):
            found = getattr(data, name, None)
            if isinstance(found, Sequence) and not isinstance(found, str) and found and all(isinstance(entry, str) for entry in found):
                return printable(found)
        data = getattr(data, "dataset", None)
    return ()


def printable(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` with what cannot be printed written as escapes."""
    return tuple(name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode() for name in names)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()


def _is_plain(value: object, depth: int = 0) -> bool:
    """Whether JSON holds the value as it is: numbers, text, and lists and dicts of a few of them."""
    if isinstance(value, float):
        return math.isfinite(value)
    if value is None or isinstance(value, (bool, int)):
        return True
    if isinstance(value, str):
        return not value or _is_text(value)
    if depth > 4 or not isinstance(value, (list, tuple, Mapping)) or len(value) > MOST_OPTIONS:
        return False
    if isinstance(value, Mapping):
        return all(map(_is_text, value)) and all(_is_plain(entry, depth + 1) for entry in value.values())
    return all(_is_plain(entry, depth + 1) for entry in value)


def _listed(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def _entries(value: object, kind: type, what: str) -> dict[str, object]:
    known = [entry.name for entry in dataclasses.fields(kind)]
    if not isinstance(value, Mapping) or not all(name in known for name in value):
        raise SpecError(f"{what} must hold some of {', '.join(known)}, got {shorten(value)}")
    return dict(value)


def _preprocessing(value: object) -> Preprocessing:
    facts = _entries(value, Preprocessing, "preprocessing")
    hints = typing.get_type_hints(Preprocessing)
    for name, given in facts.items():
        if not _fits(given, hints[name]):
            raise SpecError(f"preprocessing: {name} cannot be {shorten(given)}")
        facts[name] = tuple(given) if isinstance(given, list) else given
    return Preprocessing(**cast("dict[str, typing.Any]", facts))


def _fits(value: object, hint: object) -> bool:
    """Whether a value read from JSON is of the declared type."""
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint == tuple[float, ...]:
        return isinstance(value, list) and all(_fits(entry, float) for entry in value)
    if hint in (int, bool):
        return type(value) is hint
    return isinstance(value, str) and value in typing.get_args(hint)
