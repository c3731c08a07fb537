"""Settings declared once, as fields of a dataclass: name, type, default, range, and meaning.

A field's type may carry its range, ``share: Annotated[float, Interval(0, 1, closed="left")] = 0.5``; what it means stands in the ``Attributes``
section of the class's docstring. The command line, recipe files, ``lowbit methods show`` and the check of values all read this one place.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from lowbit.errors import SpecError, UnknownNameError, unknown_name
from lowbit.registry import Kind, MethodInfo, find_method, list_methods
from lowbit.spec import BitPolicy, LayerBits


@dataclass(frozen=True)
class Interval:
    """The numbers from ``low`` to ``high``; NaN lies in none, and infinity only where it is a closed end.

    Attributes:
        low, high: The ends.
        closed: Which ends belong to it.

    >>> Interval(0, 1, closed="left").contains(1.0), str(Interval(0, 1, closed="left"))
    (False, 'from 0 to below 1')
    """

    low: float = -math.inf
    high: float = math.inf
    closed: Literal["both", "left", "right", "neither"] = "both"

    def contains(self, value: float) -> bool:
        """Whether ``value`` lies in it."""
        above = value >= self.low if self.closed in ("both", "left") else value > self.low
        below = value <= self.high if self.closed in ("both", "right") else value < self.high
        return above and below

    def __str__(self) -> str:
        has_low, has_high = self.closed in ("both", "left"), self.closed in ("both", "right")
        if math.isfinite(self.high):
            end = f"{'to' if has_high else 'to below'} {self.high:g}"
            return f"{'from' if has_low else 'above'} {self.low:g} {end}" if math.isfinite(self.low) else f"up {end}"
        return (f"{self.low:g} or more" if has_low else f"above {self.low:g}") + (", or inf" if has_high else "")


class Finite(Interval):
    """Any finite number."""

    def __init__(self) -> None:
        super().__init__(closed="neither")

    def __str__(self) -> str:
        return "finite"


class AtLeast(Interval):
    """Finite numbers from ``low`` on."""

    def __init__(self, low: float) -> None:
        super().__init__(low, closed="left")


class Above(Interval):
    """Finite numbers greater than ``low``."""

    def __init__(self, low: float) -> None:
        super().__init__(low, closed="neither")


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass of settings.

    Attributes:
        name: What users type.
        type: Its type, without its range.
        default: Its default; ``dataclasses.MISSING`` if it has none.
        interval: Range of its numbers; ``None`` if it declares none.
        meaning: Its meaning, from the ``Attributes`` section.
    """

    name: str
    type: Any
    default: Any
    interval: Interval | None
    meaning: str

    @property
    def allowed(self) -> str:
        """The range in words, with the choices beside it: ``above 0 or 'glorot'``; empty where there is no range."""
        return "" if self.interval is None else " or ".join([str(self.interval), *map(repr, choices_of(self.type))])


def settings_of(cls: type) -> dict[str, Setting]:
    """The settings that the dataclass ``cls`` and its bases declare, by name."""
    hints = typing.get_type_hints(cls, include_extras=True)
    meanings = field_meanings(cls)
    found = {}
    for field in dataclasses.fields(cls):
        kind, *facts = typing.get_args(hints[field.name]) if typing.get_origin(hints[field.name]) is Annotated else [hints[field.name]]
        interval = next((fact for fact in facts if isinstance(fact, Interval)), None)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        found[field.name] = Setting(field.name, kind, default, interval, meanings.get(field.name, ""))
    return found


def field_meanings(cls: type) -> dict[str, str]:
    """What each field means, read from the ``Attributes`` sections of the class's and its bases' docstrings."""
    meanings: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, section = (inspect.cleandoc(base.__doc__ or "")).partition("Attributes:\n")
        for names, text in re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", section, flags=re.MULTILINE):
            meanings |= {name.strip(): " ".join(text.replace("`", "").split()) for name in names.split(",")}
    return meanings


class CheckedSettings:
    """Base of dataclasses whose values are checked against their declared ranges and choices when an object is created."""

    def __post_init__(self) -> None:
        check_settings(self)


class Method(CheckedSettings):
    """Base of every method: its fields are the paper's hyper-parameters with the paper's defaults."""

    info: ClassVar[MethodInfo]
    ends: ClassVar[Literal["wide", "float", "same"]] = "wide"  # the paper's first and last layer: 8 bits or more, float, or as all others
    is_procedure: ClassVar[bool] = False  # whether the quantizers of other methods can go through it

    @classmethod
    def hyper_parameters(cls) -> dict[str, Setting]:
        """What users can set, by name."""
        return settings_of(cls)

    @classmethod
    def with_hyper_parameters(cls, values: Mapping[str, Any]) -> Self:
        """The method with these values, and the defaults of all others."""
        return cls(**values)

    def hyper_parameter_values(self) -> dict[str, object]:
        """The value of each of ``hyper_parameters``, as records keep it."""
        return {name: getattr(self, name) for name in self.hyper_parameters()}

    def default_policy(self, bits: LayerBits) -> BitPolicy:
        """The bits of each layer as the paper has them, where inner layers have ``bits``; users get it with ``policy="paper"``."""
        if self.ends == "wide":
            return BitPolicy.uniform(bits.weight, bits.activation, bits.output)
        return BitPolicy(bits, LayerBits(None, None) if self.ends == "float" else None)


def choose_policy(method: Method, policy: BitPolicy | Literal["paper"] | None, bits: LayerBits) -> BitPolicy:
    """The policy that was asked for: a policy, ``"paper"`` for the method's own, or ``None``: ``bits``, at least 8 at both ends."""
    if isinstance(policy, str):
        if policy != "paper":
            raise SpecError(f"policy must be a BitPolicy or 'paper', got {policy!r}. To read a file: BitPolicy.from_yaml(path).")
        return method.default_policy(bits)
    return policy or BitPolicy.uniform(bits.weight, bits.activation, bits.output)


def check_settings(settings: object, where: str | None = None) -> None:
    """SpecError when a number of ``settings`` lies outside of its declared range, or a text is none of the declared choices.

    Args:
        settings: An object of a dataclass.
        where: What the error calls it; default: the method's name, or the class's.
    """
    info = getattr(settings, "info", None)
    where = where or getattr(info, "name", None) or type(settings).__name__
    for setting in settings_of(type(settings)).values():
        value = getattr(settings, setting.name)
        choices = choices_of(setting.type)
        if value in choices:
            continue
        if isinstance(value, str) and choices:
            raise SpecError(f"{where}: {setting.name} must be {setting.allowed or _described(setting.type)}, got {value!r}")
        for number in value if isinstance(value, (tuple, list)) else (value,):
            is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
            if is_number and setting.interval is not None and not setting.interval.contains(number):
                raise SpecError(f"{where}: {setting.name} must be {setting.allowed}, got {value}")


def choices_of(hint: object) -> tuple[object, ...]:
    """What the ``Literal`` in a type allows; empty where there is none, or where other text is allowed beside it."""
    kinds = _alternatives(hint)
    return () if str in kinds else tuple(choice for kind in kinds if typing.get_origin(kind) is Literal for choice in typing.get_args(kind))


def make_method(method: object, kind: Kind, options: Mapping[str, object], elsewhere: Mapping[str, str] | None = None) -> Method:
    """The method that a user asks for, with its hyper-parameters.

    Args:
        method: What ``find_method`` takes; an object is used as it is.
        kind: Kind that the method must have.
        options: Hyper-parameters by name, each checked and converted to its field's type.
        elsewhere: What the caller takes besides by name, each with the way to give it, for the error about an unknown option.

    Raises:
        UnknownNameError: No such method, class or option.
        SpecError: A method of another kind, a value that is not allowed, or options beside an object.
    """
    info = find_method(method, kind)
    if isinstance(method, Method):
        for name in options:
            _check_option(info, name, elsewhere or {})
        if options:
            raise SpecError(f"method is an object of {info.name} with hyper-parameters of its own: set {', '.join(options)} there.")
        return method
    made = build_method(info, options, elsewhere)
    if not isinstance(made, Method):
        raise SpecError(f"method {info.name!r}: {type(made).__name__} derives from no base class of lowbit's methods.")
    return made


def build_method(info: MethodInfo, options: Mapping[str, object], elsewhere: Mapping[str, str] | None = None) -> object:
    """The method with ``options`` set, each checked and converted to its field's type; ``elsewhere`` as ``make_method`` takes it."""
    if info.method is None or not dataclasses.is_dataclass(info.method):
        raise SpecError(
            f"method {info.name!r}: {getattr(info.method, '__name__', None)} is no dataclass. Put @dataclass below @register(...)."
        )
    known = hyper_parameters_of(info)
    for name in options:
        _check_option(info, name, elsewhere or {})
    converted: dict[str, Any] = {name: convert_option(info.name, name, value, known[name].type) for name, value in options.items()}
    return info.method.with_hyper_parameters(converted) if issubclass(info.method, Method) else info.method(**converted)


def hyper_parameters_of(info: MethodInfo) -> dict[str, Setting]:
    """What users can set of a registered method, by name; nothing where its class is no dataclass."""
    cls = info.method
    if cls is None or not dataclasses.is_dataclass(cls):
        return {}
    return cls.hyper_parameters() if issubclass(cls, Method) else settings_of(cls)


def _check_option(info: MethodInfo, name: str, elsewhere: Mapping[str, str]) -> None:
    """UnknownNameError where the method has no hyper-parameter ``name``; it says who has it, or what the caller takes in another way."""
    own = hyper_parameters_of(info)
    if name in own:
        return
    near = name if name in elsewhere else next(iter(difflib.get_close_matches(name, [*own, *elsewhere], n=1)), "")
    if near in elsewhere:
        suggestion = "" if near == name else f" Did you mean {near!r}?"
        raise UnknownNameError(f"unknown option of {info.name} {name!r}.{suggestion} {elsewhere[near]}")
    others = [other.name for other in list_methods(kind=info.kind) if name in hyper_parameters_of(other)]
    hint = f"Methods that have it: {', '.join(others)}." if others else f"See 'lowbit methods show {info.name}'."
    raise unknown_name(f"option of {info.name}", name, own, hint)


def convert_option(method: str, name: str, value: object, hint: object) -> object:
    """``value`` as the type that the field ``name`` of ``method`` declares; text from the command line is parsed."""
    place = f"{method}: " if method else ""
    allowed = _alternatives(hint)
    is_choice = any("none" in typing.get_args(kind) for kind in allowed if typing.get_origin(kind) is typing.Literal)
    if value is None or (isinstance(value, str) and value.lower() == "none" and not is_choice):
        if type(None) in allowed:
            return None
        raise SpecError(f"{place}option {name} must not be None")
    for kind in allowed:
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else None
        if choices is not None:
            if value in choices:
                return value
        elif kind is bool:
            if isinstance(value, bool):
                return value
            if isinstance(value, str) and value.lower() in ("true", "yes", "on", "1", "false", "no", "off", "0"):
                return value.lower() in ("true", "yes", "on", "1")
        elif kind in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            try:
                number = float(value)
            except ValueError:
                continue
            if kind is float or number.is_integer():
                return kind(number)
        elif typing.get_origin(kind) is tuple:
            parts = value.replace("(", "").replace(")", "").split(",") if isinstance(value, str) else value
            inner = typing.get_args(kind)[0]
            if isinstance(parts, (list, tuple)):
                return tuple(convert_option(method, name, part, inner) for part in parts if part != "")
        elif isinstance(kind, type) and isinstance(value, kind) and not isinstance(value, bool):
            return value
    names = " or ".join(_described(kind) for kind in allowed)
    raise SpecError(f"{place}option {name} must be {names}, got {value!r}")


def _alternatives(hint: object) -> tuple[object, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _described(kind: object) -> str:
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return f"one of {', '.join(map(repr, choices))}" if choices else getattr(kind, "__name__", str(kind))


def type_word(hint: object) -> str:
    """What a value may be: ``int``, ``mse | fisher_diag``, ``float | none``, ``text, text, ...``."""
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(type_word, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        inner = type_word(typing.get_args(hint)[0])
        return f"{inner}, {inner}, ..."
    return {str: "text", bool: "true | false", type(None): "none"}.get(hint, getattr(hint, "__name__", str(hint)))  # type: ignore[call-overload, no-any-return]


def value_word(value: object) -> str:
    """A default as users would type it."""
    if isinstance(value, tuple):
        return ",".join(map(value_word, value))
    if dataclasses.is_dataclass(value) and hasattr(value, "name"):
        return str(value.name)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def option_rows(info: MethodInfo) -> list[tuple[str, str, str, str, str]]:
    """Name, type, range, default and meaning of each hyper-parameter of a method."""
    known = hyper_parameters_of(info).values()
    return [(s.name, type_word(s.type), str(s.interval or ""), value_word(s.default), s.meaning) for s in known]
