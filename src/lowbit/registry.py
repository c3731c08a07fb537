"""Facts about every method. The command line, the documentation, the laws and the comparison read them from here."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

from lowbit.errors import SpecError, unknown_name

Kind = Literal["post_training", "training", "search", "synthesis"]
T = TypeVar("T")

_methods: dict[str, MethodInfo] = {}
_PURPOSES: dict[Kind, str] = {
    "post_training": "To quantize without training",
    "training": "To train",
    "search": "To search for bits",
    "synthesis": "To make samples",
}


@dataclass(frozen=True)
class MethodInfo:
    """Facts about one method, no behaviour.

    Attributes:
        name: What users type.
        title: Title of the paper, or what the method is.
        paper: Authors, venue and year.
        section: Section of the reading list.
        axes: The questions the method answers (weight_quantizer, activation_quantizer, surrogate, procedure, surgery,
            assignment, reconstruction, data); all others take the defaults.
        kind: When it works.
        weight_bits: Weight bit-widths it supports.
        activation_bits: Activation bit-widths it supports; ``None`` when it leaves activations alone.
        needs: What it cannot work without ("calibration", "labels", "batch_norm", "graph").
        fidelity: How close it is to the paper and held against what.
        summary: One line.
        margin_db: Logit SQNR in dB by which it beats round_to_nearest at 2 to 4 bits on a tiny task (a test holds it).
        margin_points: Points of accuracy by which a training method beats round_to_nearest after a short run at 2 bits of weights and
            4 of activations, or the nearest it has, on a tiny task (a test holds it).
        method: The class; its fields are the paper's hyper-parameters with the paper's defaults.
    """

    name: str
    title: str
    paper: str
    section: str
    axes: tuple[str, ...]
    kind: Kind
    weight_bits: range
    activation_bits: range | None
    needs: tuple[str, ...]
    fidelity: str
    summary: str
    margin_db: float = 0.0
    margin_points: float = 0.0
    method: type | None = None


def register(info: MethodInfo) -> Callable[[type[T]], type[T]]:
    """Class decorator: make the method known under ``info.name``. A second registration under one name raises ValueError."""

    def add(cls: type[T]) -> type[T]:
        if info.name in _methods:
            raise ValueError(f"a method called {info.name!r} is registered already: {_methods[info.name].method}")
        _methods[info.name] = replace(info, method=cls)
        cls.info = _methods[info.name]  # type: ignore[attr-defined]
        return cls

    return add


def get_method(name: str) -> MethodInfo:
    """The facts of the method ``name``; UnknownNameError with the nearest name otherwise."""
    _import_all()
    if name not in _methods:
        raise unknown_name("method", name, _methods, "See 'lowbit methods list'.")
    return _methods[name]


def method_of_kind(name: str, kind: Kind) -> MethodInfo:
    """The facts of the method ``name``; SpecError naming those of the right kind where it is of another, UnknownNameError for none."""
    info = get_method(name)
    if info.kind != kind:
        fitting = ", ".join(other.name for other in list_methods(kind=kind))
        raise SpecError(f"{name!r} is a {info.kind} method. {_PURPOSES[kind]} use one of: {fitting}.")
    return info


def list_methods(pattern: str = "*", *, kind: Kind | None = None, axis: str | None = None, section: str | None = None) -> list[MethodInfo]:
    """Methods whose name matches the shell ``pattern``, by name; optionally of one kind, axis or section."""
    _import_all()
    return [
        info
        for name, info in sorted(_methods.items())
        if fnmatch.fnmatchcase(name, pattern)
        and (kind is None or info.kind == kind)
        and (axis is None or axis in info.axes)
        and (section is None or info.section == section)
    ]


def _import_all() -> None:
    """Methods register when their file is imported; import every file of the methods package."""
    package = importlib.import_module("lowbit.methods")
    for module in pkgutil.walk_packages(package.__path__, "lowbit.methods."):
        importlib.import_module(module.name)
