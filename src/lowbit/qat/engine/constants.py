"""Objects that checkpoints cannot save, and that may therefore not change in a run."""

from __future__ import annotations

import enum
import functools
import hashlib
import logging
import pickle
import types
import typing
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit.errors import StateError

_NO_STATE = (
    type, types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, torch.device, RemovableHandle, logging.Logger,
    weakref.ref,
)  # fmt: skip


def has_no_state(value: object) -> bool:
    """Whether ``value`` is a piece of the program, or of its surroundings, rather than of a run."""
    return isinstance(value, _NO_STATE)


class Constants:
    """Contents of the constants of a run, as they were when each was first seen.

    One that lies in another module than before, at the same place, counts as a new one: the start of a phase may replace modules.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[object, str]] = {}

    def check(self, value: object, name: str, owner: object, saved: Collection[int] = ()) -> str:
        """The digest of ``value``, which lies at ``name`` in the module ``owner``; ``saved`` as for ``digest``.

        Raises:
            StateError: Its content cannot be looked at, or is not what it was.
        """
        try:
            found = digest(value, saved)
        except TypeError as error:
            raise _unsavable(value, name, f"and holds {error}, so that nobody can tell whether it changes") from error
        before = self._known.get(name)
        if before is not None and before[0] is owner and before[1] != found:
            raise _unsavable(value, name, "and has changed in the course of the run")
        self._known[name] = owner, found
        return found


def _unsavable(value: object, name: str, what: str) -> StateError:
    return StateError(
        f"{_place(name)} is a {type(value).__module__}.{type(value).__qualname__}, which checkpoints cannot save, {what}: a stopped run could not be "
        "resumed. Saved are numbers, strings, tensors, random generators, networks, and lists, tuples, sets, dictionaries (with plain keys) and "
        "dataclasses of these. Keep it in a buffer or in plain values, or, if each step or start_phase creates it again, leave it out of __getstate__."
    )


def _place(name: str) -> str:
    kind, _, path = name.partition(".")
    if kind == "networks":
        companion, _, path = path.partition(".")
        return f"{path!r} of the companion {companion!r}"
    return {"model": f"{path!r} of the network", "method": f"the method's field {path!r}"}.get(kind, repr(name))


def parts_of(network: nn.Module) -> set[int]:
    """The ids of what is saved with ``network``, so that a constant may refer to it: its modules, parameters and buffers."""
    return {id(part) for parts in (network.modules(), network.parameters(), network.buffers()) for part in parts}


def digest(value: object, saved: Collection[int] = ()) -> str:
    """A text that two values share only if they hold the same; the same in every process.

    Args:
        value: Any object.
        saved: Ids of objects that are saved by themselves, of which only the type counts.

    Raises:
        TypeError: Something in ``value`` cannot be looked at; the message says of which type it is.
    """
    return hashlib.blake2b(repr(_content(value, saved, ())).encode(), digest_size=16).hexdigest()


def _content(value: Any, saved: Collection[int], above: tuple[int, ...]) -> object:
    """``value`` as nested tuples of plain values; ``above`` are the ids of the objects that it lies in."""
    kind = type(value).__module__, type(value).__qualname__
    if id(value) in saved:
        return kind
    if isinstance(value, enum.Enum):
        return kind, value.name
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes)) or typing.get_origin(value) is not None:
        return kind, repr(value)
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType, types.MethodType)):
        return value.__module__, value.__qualname__
    if has_no_state(value):
        return kind
    if id(value) in above:
        return "above", len(above) - above.index(id(value))
    if isinstance(value, Tensor):
        flat = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        return kind, str(value.dtype), tuple(value.shape), bytes(flat.tolist())
    if isinstance(value, (nn.Module, torch.optim.Optimizer, torch.Generator)):
        raise TypeError(f"a {kind[1]}")

    def inside(entry: object) -> object:
        return _content(entry, saved, (*above, id(value)))

    if isinstance(value, functools.partial):
        return kind, inside(value.func), tuple(map(inside, value.args)), inside(value.keywords)
    if isinstance(value, (set, frozenset)):
        return kind, tuple(sorted(repr(inside(entry)) for entry in value))
    parts: list[object] = []
    if isinstance(value, dict):
        parts += [(inside(key), inside(entry)) for key, entry in value.items()]
    elif isinstance(value, (list, tuple)):
        parts += map(inside, value)
    slots = {slot for cls in type(value).__mro__ for slot in _slots(cls) if hasattr(value, slot)}
    attributes = {**getattr(value, "__dict__", {}), **{slot: getattr(value, slot) for slot in slots}}
    parts += [(name, inside(entry)) for name, entry in sorted(attributes.items())]
    return (kind, tuple(parts)) if parts or isinstance(value, (dict, list, tuple)) else (kind, _pickled(value))


def _slots(cls: type) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return tuple(slot for slot in ((slots,) if isinstance(slots, str) else slots) if slot not in ("__dict__", "__weakref__"))


def _pickled(value: object) -> bytes:
    """Written, never read: objects of extensions say what they hold in no other way."""
    try:
        return pickle.dumps(value, protocol=4)
    except Exception as error:
        raise TypeError(f"a {type(value).__qualname__}") from error
