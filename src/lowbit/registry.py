"""Facts about every method. The command line, the documentation, the laws and the comparison read them from here."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

from lowbit.errors import CalibrationError, DataError, GraphError, LayerError, LowbitError, SpecError, unknown_name
from lowbit.plugins import class_in_file, is_in_file, load_entry_points

Kind = Literal["post_training", "training", "search", "synthesis"]
Section = Literal[
    "quantization_aware", "quantizer_design", "training", "adaptive", "gradients", "binary", "mixed_precision", "post_training",
    "zero_shot", "super_resolution", "fixed_point", "other",
]  # fmt: skip
Axis = Literal[
    "weight_quantizer", "activation_quantizer", "surrogate", "procedure", "surgery", "assignment", "reconstruction", "data", "arithmetic",
]  # fmt: skip
Need = Literal["labels", "teacher", "calibration", "graph", "batch_norm", "pretrained"]
Fidelity = Literal["exact", "equations", "partial", "baseline", "unverified"]
T = TypeVar("T")

GROUP = "lowbit.methods"  # entry points of packages that bring methods
_methods: dict[tuple[str, Kind], MethodInfo] = {}
_is_private = False  # whether what is registered now stays out of the registry
_PURPOSES: dict[Kind, str] = {
    "post_training": "To quantize without training",
    "training": "To train",
    "search": "To search for bits",
    "synthesis": "To make samples",
}


@dataclass(frozen=True)
class MethodInfo:
    """Facts about one method, no behaviour. ``register`` refuses what is not in the sets given here.

    Attributes:
        name: What users type.
        title: Title of the paper, or what the method is.
        paper: Authors, venue and year, as ``Lee, Kim, Ham, CVPR 2021``.
        section: Section of the reading list; ``other`` for what is on no list.
        axes: The questions the method answers (weight_quantizer, activation_quantizer, surrogate, procedure, surgery,
            assignment, reconstruction, data, arithmetic); all others take the defaults.
        kind: What it does: ``post_training``, ``training``, ``search`` or ``synthesis``.
        weight_bits: Weight bit-widths it supports.
        activation_bits: Activation bit-widths it supports; ``None`` when it leaves activations alone.
        needs: What it works with: ``calibration``, ``labels``, ``graph`` and ``batch_norm`` (an error without them); ``teacher`` and
            ``pretrained`` (a note without them).
        fidelity: How close it is to the paper: ``exact``; ``equations`` (the paper's, as the authors published no code);
            ``partial`` (something is left out or changed); ``baseline`` (there is no paper to follow); ``unverified``.
        summary: One line.
        evidence: What it was checked against, and what is missing.
        url: Address of the paper: at arXiv, or its DOI.
        margin_db: Logit SQNR in dB by which it beats round_to_nearest at 3 bits on a tiny task (a law holds it).
        margin_points: Points of accuracy by which a training method beats round_to_nearest after a short run at 2 bits of weights and
            4 of activations, or the nearest it has, on a tiny task (a law holds it).
        method: The class; its fields are the paper's hyper-parameters with the paper's defaults.

    Example:
        >>> import lowbit
        >>> info = lowbit.get_method("lsq")
        >>> info.kind, info.weight_bits, info.needs
        ('training', range(1, 9), ('labels',))
    """

    name: str
    title: str
    paper: str
    section: Section
    axes: tuple[Axis, ...]
    kind: Kind
    weight_bits: range
    activation_bits: range | None
    needs: tuple[Need, ...]
    fidelity: Fidelity
    summary: str
    evidence: str = ""
    url: str = ""
    margin_db: float = 0.0
    margin_points: float = 0.0
    method: type | None = None

    @property
    def is_procedure(self) -> bool:
        """Whether the quantizers of any training method can go through it: ``procedure="qkd"``."""
        return bool(getattr(self.method, "is_procedure", False))


def register(info: MethodInfo) -> Callable[[type[T]], type[T]]:
    """Class decorator: make the method known under its name and kind.

    A paper that works in several ways, for example one that synthesizes data and searches bits, has a class for each kind.

    Raises:
        SpecError: A fact outside of its closed set, or bits outside of 1 to 8.
        ValueError: The name is taken in this kind.

    Example:
        >>> import lowbit
        >>> info = lowbit.get_method("lsq")
        >>> @lowbit.register(info)
        ... class Lsq(lowbit.TrainingMethod):
        ...     pass
        Traceback (most recent call last):
            ...
        ValueError: a training method called 'lsq' is registered already: <class 'lowbit.methods.quantizer_design.lsq.Lsq'>
    """
    _check_facts(info)

    def add(cls: type[T]) -> type[T]:
        if "info" in vars(cls):
            raise ValueError(f"{cls.__name__} is registered already. Give each kind of method a class of its own.")
        known = replace(info, method=cls)
        if not _is_private:
            if not cls.__module__.startswith("lowbit."):
                _import_own()  # so that a clash raises at the new method
            key = (info.name, info.kind)
            if key in _methods:
                raise ValueError(f"a {info.kind} method called {info.name!r} is registered already: {_methods[key].method}")
            _methods[key] = known
        cls.info = known  # type: ignore[attr-defined]
        return cls

    return add


def get_method(name: str, kind: Kind | None = None) -> MethodInfo:
    """The facts of the method ``name``.

    Args:
        name: A name of ``list_methods``.
        kind: Kind of the method, if methods of several kinds have this name.

    Raises:
        UnknownNameError: No method has this name.
        SpecError: It has several kinds and ``kind`` is left out, or it is not of this kind.

    >>> get_method("ewgs").weight_bits
    range(1, 9)
    """
    _import_all()
    found = {info.kind: info for (known, _), info in _methods.items() if known == name}
    if not found:
        raise unknown_name("method", name, {known for known, _ in _methods}, "See 'lowbit methods list'.")
    if kind is None:
        if len(found) > 1:
            kinds = " and ".join(sorted(found))
            raise SpecError(
                f"{name!r} is a method of several kinds ({kinds}). Say which: kind={min(found)!r} in Python, kind: {min(found)} in a suite."
            )
        return next(iter(found.values()))
    return _of_kind(found, name, kind)


def find_method(method: object, kind: Kind | None = None) -> MethodInfo:
    """The facts of what a user gave as ``method``.

    Args:
        method: The name of a registered method, ``path/to/file.py:Class``, a class, or an object of one. A class has the facts of its
            ``@register`` or of the class it derives from; in a file of its own its name may be taken.
        kind: Kind that the method must have; default: any.

    Raises:
        UnknownNameError: No such method, or no such class in the file.
        SpecError: A method of another kind, a file that cannot be run, or a class without facts.
    """
    if isinstance(method, str) and not is_in_file(method):
        return get_method(method, kind)
    _import_all()  # a file may import methods of lowbit, which are not to be registered privately
    found = class_in_file(method, _privately) if isinstance(method, str) else method
    cls = found if isinstance(found, type) else type(found)
    info = getattr(found, "info", None)  # an object may know more than its class: whose quantizers go through a procedure
    if not isinstance(info, MethodInfo):
        raise SpecError(
            f"method {cls.__qualname__}: it has no facts. Put @lowbit.register(lowbit.MethodInfo(...)) above the class, or derive it from "
            f"a method that has them. Or give a name: {', '.join(other.name for other in list_methods(kind=kind))}."
        )
    own = info if info.method is cls else replace(info, name=cls.__name__, method=cls)
    return _of_kind({own.kind: own}, own.name, own.kind if kind is None else kind)


def list_methods(
    pattern: str = "*", *, kind: Kind | None = None, axis: Axis | None = None, section: Section | None = None
) -> list[MethodInfo]:
    """Methods whose name matches the shell ``pattern``, by name; optionally of one kind, axis or section.

    >>> [info.name for info in list_methods("*_net", axis="surgery")]
    ['bi_real_net', 'react_net']
    """
    _import_all()
    return [
        info
        for (name, _), info in sorted(_methods.items())
        if fnmatch.fnmatchcase(name, pattern)
        and (kind is None or info.kind == kind)
        and (axis is None or axis in info.axes)
        and (section is None or info.section == section)
    ]


def find_procedure(procedure: object) -> MethodInfo:
    """The facts of what a user gave as ``procedure``: the name of a procedure, ``path/to/file.py:Class``, a class, or an object of one.

    Raises:
        UnknownNameError: No such method.
        SpecError: A method whose procedure belongs to its own quantizers, or that has none.

    >>> find_procedure("qkd").is_procedure
    True
    """
    info = find_method(procedure, "training")
    if not info.is_procedure:
        known = ", ".join(other.name for other in list_methods(kind="training") if other.is_procedure)
        raise SpecError(f"{info.name!r} is no procedure that the quantizers of other methods can go through. Those are: {known}.")
    return info


def check_needs(
    info: MethodInfo,
    *,
    labels: bool | None = None,
    teacher: bool | None = None,
    calibration: bool | None = None,
    graph: bool | str | None = None,
    batch_norm: bool | None = None,
    pretrained: bool | None = None,
) -> list[str]:
    """Check the method's needs against what is available, before anything runs.

    Args:
        info: The method.
        labels, teacher, calibration, graph, batch_norm, pretrained: Whether it is available; ``None`` if unknown. ``graph`` may be a
            string that says why the dataflow cannot be captured.

    Returns:
        Notes for the user about unmet needs that the method can do without.

    Raises:
        CalibrationError, DataError, GraphError, LayerError: An unmet need that the method cannot do without.

    >>> check_needs(get_method("ewgs"), labels=True, pretrained=False)
    ["'ewgs' is made for trained weights, and training starts from random ones: train the float network first"]
    """
    given: dict[Need, bool | str | None] = {
        "labels": labels, "teacher": teacher, "calibration": calibration, "graph": graph, "batch_norm": batch_norm,
        "pretrained": pretrained,
    }  # fmt: skip
    notes = []
    for need in info.needs:
        there = given[need]
        if there is None or there is True:
            continue
        error, text = _UNMET[need]
        message = f"{info.name!r} {text}" + (f" ({there})" if there else "")
        if error is not None:
            raise error(message)
        notes.append(message)
    return notes


def bits_span(bits: range | None) -> str:
    """``2-8``, or ``float`` where the method leaves them alone."""
    if bits is None:
        return "float"
    return f"{bits.start}-{bits.stop - 1}" if len(bits) > 1 else str(bits.start)


_UNMET: dict[Need, tuple[type[LowbitError] | None, str]] = {
    "calibration": (CalibrationError, "needs calibration data: pass calibration= (a loader or tensor of unlabelled samples)"),
    "labels": (DataError, "trains on labels, and the data hold none: pass pairs of inputs and labels"),
    "graph": (GraphError, "needs the network's dataflow, which cannot be captured"),
    "batch_norm": (LayerError, "reads the statistics of batch norms, and the network has none: choose a method that takes samples"),
    "teacher": (None, "learns from a teacher, and none was given: it learns from labels alone"),
    "pretrained": (None, "is made for trained weights, and training starts from random ones: train the float network first"),
}


_SETS = {
    "section": get_args(Section),
    "axes": get_args(Axis),
    "kind": get_args(Kind),
    "needs": get_args(Need),
    "fidelity": get_args(Fidelity),
}


def _of_kind(found: dict[Kind, MethodInfo], name: str, kind: Kind) -> MethodInfo:
    if kind not in found:
        fitting = ", ".join(other.name for other in list_methods(kind=kind))
        raise SpecError(f"{name!r} is a {' and '.join(sorted(found))} method. {_PURPOSES[kind]} use one of: {fitting}.")
    return found[kind]


def _check_facts(info: MethodInfo) -> None:
    for names, allowed in _SETS.items():
        value = getattr(info, names)
        if names in ("axes", "needs") and not isinstance(value, tuple):
            raise SpecError(f"method {info.name!r}: {names} must be a tuple such as ({allowed[0]!r},), got {value!r}")
        for one in value if isinstance(value, tuple) else (value,):
            if one not in allowed:
                raise SpecError(f"method {info.name!r}: {names} may hold {', '.join(allowed)}; got {one!r}")
    for name in ("weight_bits", "activation_bits"):
        bits = getattr(info, name)
        if bits is not None and not (len(bits) and min(bits) >= 1 and max(bits) <= 8):
            raise SpecError(f"method {info.name!r}: {name} must lie within range(1, 9); got {bits}")


@contextmanager
def _privately() -> Iterator[None]:
    """Classes that are registered meanwhile get their facts but no place in the registry, so that their names may be taken."""
    global _is_private
    before, _is_private = _is_private, True
    try:
        yield
    finally:
        _is_private = before


@functools.cache
def _import_own() -> None:
    """Methods register when their file is imported; import every file of the methods package."""
    package = importlib.import_module("lowbit.methods")
    for module in pkgutil.walk_packages(package.__path__, "lowbit.methods."):
        importlib.import_module(module.name)


@functools.cache
def _import_all() -> None:
    _import_own()
    load_entry_points(GROUP)
