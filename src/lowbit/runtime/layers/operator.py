"""Functions that take dataclasses, registered as torch operators, so that exported and compiled programs contain them.

A torch schema allows tensors, numbers and lists of numbers only. So arguments that are dataclasses are flattened into their fields here,
and rebuilt from them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import typing
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

from lowbit.quantizers.ops import define_operator

P = ParamSpec("P")


class Operator(Generic[P]):
    """A registered operator, called through torch so that exported and compiled programs contain it.

    Attributes:
        name: Name of the operator in graphs.
        function: The plain function, for calls that skip torch's dispatcher, which takes longer than a small layer.
        signature: The flat parameters, those without a default first.
    """

    def __init__(self, function: Callable[P, Tensor]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.name = function, f"lowbit.{function.__name__}.default"
        self._parameters = inspect.signature(function)
        self._parts: list[tuple[str, type | None, tuple[str, ...]]] = []  # name, its class and fields
        flat: list[inspect.Parameter] = []
        hints = typing.get_type_hints(function)
        for name, parameter in self._parameters.parameters.items():
            part = typing.get_origin(hints[name]) or hints[name]
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                fields = _fields_of(part)
                flat += fields
                self._parts.append((name, part, tuple(field.name for field in fields)))
            else:
                flat.append(parameter.replace(annotation=hints[name]))
                self._parts.append((name, None, (name,)))
        self.signature = inspect.Signature(sorted(flat, key=lambda p: p.default is not p.empty), return_annotation=Tensor)
        self._names = tuple(self.signature.parameters)

    def __call__(self, *arguments: P.args, **options: P.kwargs) -> Tensor:
        return self.overload(**self.flatten(*arguments, **options))

    @property
    def overload(self) -> Callable[..., Tensor]:
        """The torch operator, which takes flat arguments."""
        found: Callable[..., Tensor] = getattr(torch.ops.lowbit, self.function.__name__).default
        return found

    def flatten(self, *arguments: object, **options: object) -> dict[str, object]:
        """The flat arguments by name, without those that equal their default.

        Anything may take the place of a tensor, such as a reference within a graph.
        """
        given = self._parameters.bind(*arguments, **options).arguments
        flat: dict[str, object] = {}
        for name, part, fields in self._parts:
            if name in given:
                flat.update({field: given[name] if part is None else getattr(given[name], field) for field in fields})
        return {name: value for name, value in flat.items() if not _is_default(value, self.signature.parameters[name].default)}

    def rebuild(self, *arguments: object, **options: object) -> list[Any]:
        """The arguments of ``function``, rebuilt from flat ones."""
        if arguments:
            options.update(zip(self._names, arguments, strict=False))
        return [
            part(**{name: options[name] for name in fields if name in options}) if part is not None else options[fields[0]]
            for _, part, fields in self._parts
            if part is not None or fields[0] in options
        ]

    def flat(self, *arguments: object, **options: object) -> Tensor:
        """Call ``function`` with flat arguments."""
        function: Callable[..., Tensor] = self.function
        return function(*self.rebuild(*arguments, **options))


class LayerCall:
    """An operator as one layer of a graph calls it: arguments are rebuilt only when they differ from those of the previous call.

    Args:
        operator: The operator.
    """

    def __init__(self, operator: Operator[...]) -> None:
        self._operator = operator
        self._known: tuple[tuple[object, ...], list[Any]] = (), []  # arguments of the last call and their parts

    def __call__(self, x: Tensor, *, residual: Tensor | None = None, **options: object) -> Tensor:
        given, parts = self._known
        if len(given) != len(options) or any(map(operator.is_not, given, options.values())):
            parts = self._operator.rebuild(x, **options)[1:]
            self._known = tuple(options.values()), parts
        if residual is not None:
            parts = [*parts[:-1], parts[-1].with_residual(residual)]
        function: Callable[..., Tensor] = self._operator.function
        return function(x, *parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _call_of, (self._operator.name,)


def _call_of(name: str) -> LayerCall:
    return LayerCall(_operators[name])


_operators: dict[str, Operator[...]] = {}


def register_operator(fake: Callable[P, Tensor]) -> Callable[[Callable[P, Tensor]], Operator[P]]:
    """Register a torch operator in ``lowbit::``, which exported and compiled programs can contain; ``fake`` computes an empty output."""

    def register(function: Callable[P, Tensor]) -> Operator[P]:
        registered = Operator(function)
        _operators[registered.name] = registered

        def flat(*arguments: object, **options: object) -> Tensor:
            return registered.flat(*arguments, **options)

        def flat_fake(*arguments: object, **options: object) -> Tensor:
            looks_like: Callable[..., Tensor] = fake
            return looks_like(*registered.rebuild(*arguments, **options))

        flat.__signature__ = registered.signature  # type: ignore[attr-defined]
        define_operator(function.__name__, flat, flat_fake)
        return registered

    return register


def _fields_of(part: type) -> list[inspect.Parameter]:
    """The fields of a dataclass as parameters, without defaults that a schema cannot express."""
    hints = typing.get_type_hints(part)
    return [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=field.default if field.default is None or isinstance(field.default, (bool, int)) else inspect.Parameter.empty,
            annotation=_with_tensors(hints[field.name]),
        )
        for field in dataclasses.fields(part)
    ]


def _with_tensors(hint: Any) -> Any:
    """``hint`` with ``Tensor`` for its type variable."""
    if isinstance(hint, TypeVar):
        return Tensor
    return hint[Tensor] if getattr(hint, "__parameters__", ()) else hint


def _is_default(value: object, default: object) -> bool:
    return value is default or (isinstance(default, (bool, int)) and type(value) is type(default) and value == default)
