"""Hyper-parameters of a method from what a user gave: names checked, text converted to the type of the field."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from lowbit.errors import SpecError, unknown_name
from lowbit.registry import MethodInfo, list_methods


def build_method(info: MethodInfo, options: dict[str, object]) -> object:
    """The method with ``options`` set, each checked and converted to its field's type."""
    assert info.method is not None and dataclasses.is_dataclass(info.method)
    fields = {f.name for f in dataclasses.fields(info.method)}
    hints = typing.get_type_hints(info.method)
    for name in options:
        if name not in fields:
            others = [
                other.name
                for other in list_methods(kind=info.kind)
                if other.method and dataclasses.is_dataclass(other.method) and name in {f.name for f in dataclasses.fields(other.method)}
            ]
            hint = f"Methods that have it: {', '.join(others)}." if others else f"See 'lowbit methods show {info.name}'."
            raise unknown_name(f"option of {info.name}", name, fields, hint)
    converted: dict[str, Any] = {name: convert_option(info.name, name, value, hints[name]) for name, value in options.items()}
    return info.method(**converted)


def convert_option(method: str, name: str, value: object, hint: object) -> object:
    """``value`` as the type that the field ``name`` declares; text from the command line is parsed."""
    allowed = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    is_choice = any("none" in typing.get_args(kind) for kind in allowed if typing.get_origin(kind) is typing.Literal)
    if value is None or (isinstance(value, str) and value.lower() == "none" and not is_choice):
        if type(None) in allowed:
            return None
        raise SpecError(f"{method}: option {name} must not be None")
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
    raise SpecError(f"{method}: option {name} must be {names}, got {value!r}")


def _described(kind: object) -> str:
    choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
    return f"one of {', '.join(map(repr, choices))}" if choices else getattr(kind, "__name__", str(kind))
