"""The state of a run's objects as plain values and tensors, and how to put it back into new objects of the same kind.

Nothing is pickled. A snapshot is a tree of values that JSON can say, with tensors beside it under names. The rule:

- **Saved**: numbers, strings, tensors, random generators, optimizers, networks (every parameter and buffer, kept in ``state_dict`` or not,
  and all other attributes of every module), enums and dtypes, and lists, tuples, sets, dictionaries and dataclasses of these.
- **No state**: functions, classes, devices, handles of hooks, loggers, weak references, and the attributes that an object's
  ``__getstate__`` leaves out or replaces by ``None``. They belong to the new object.
- **Constants**: any other object, compared by its content (``lowbit.qat.engine.constants``). It has to be as it was when it was first seen, and
  in a new run again. One that changes, or whose content cannot be looked at, is a ``StateError``.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import FileFormatError
from lowbit.qat.engine.constants import Constants, digest, has_no_state, parts_of

Tree = dict[str, Any] | list[Any] | str | int | float | bool | None
_MODULE_FIELDS = set(vars(nn.Module())) - {"training"}
_LEFT_OUT = {"left_out": True}
_PLAIN = (bool, int, str, float)


class Snapshot:
    """Takes apart several objects that may share parts; ``tensors`` grows with every ``take``.

    Args:
        ignoring: Objects that are left out wherever they are met.
        constants: What is known of constants; without it they are left out, as is right within one process.
    """

    def __init__(self, ignoring: Iterable[object] = (), constants: Constants | None = None) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._ignored = list(ignoring)  # kept alive: their ids are what counts
        self._seen: dict[int, str | None] = {id(value): None for value in self._ignored}
        self._constants = constants
        self._parts_of_networks: set[int] = set()
        self._owner: object = None  # the module whose attributes are being taken

    def take(self, value: object, name: str) -> Tree:
        """The tree of ``value``; ``name`` tells its tensors apart."""
        if value is None or type(value) in (bool, int, str):
            return value  # type: ignore[return-value]
        if isinstance(value, float):
            return float(value) if math.isfinite(value) else {"float": str(float(value))}
        if has_no_state(value):
            return _LEFT_OUT
        if not isinstance(value, tuple) and id(value) in self._seen:
            place = self._seen[id(value)]
            return _LEFT_OUT if place is None else {"same": place}
        if not isinstance(value, tuple):
            self._seen[id(value)] = name
            self._ignored.append(value)  # an id must not be given to another object meanwhile
        tree = self._parts(value, name)
        return self._constant(value, name) if tree is None else tree

    def _parts(self, value: object, name: str) -> Tree:
        """The tree of an object that is saved, else ``None``."""
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, torch.Generator):
            self.tensors[name] = value.get_state()
            return {"generator": name, "device": str(value.device)}
        if isinstance(value, nn.Module):
            modules = dict(value.named_modules())
            self._parts_of_networks |= parts_of(value)
            self._seen |= {id(module): None for path, module in modules.items() if path}  # lists of them need no state of their own
            return {"module": {path: self._module(module, f"{name}.{path}" if path else name) for path, module in modules.items()}}
        if isinstance(value, torch.optim.Optimizer):
            return self._optimizer(value, name)
        if isinstance(value, dict) and all(_is_key(key) for key in value):
            return {"items": [[_key_tree(key), self.take(entry, f"{name}.{key}")] for key, entry in value.items()]}
        if type(value) in (list, tuple, torch.Size):
            entries: Iterable[object] = value  # type: ignore[assignment]
            return {type(value).__name__.lower(): [self.take(entry, f"{name}.{index}") for index, entry in enumerate(entries)]}
        if isinstance(value, (set, frozenset)) and all(_is_key(entry) for entry in value):
            return {"set": [_key_tree(entry) for entry in sorted(value, key=repr)], "is_frozen": isinstance(value, frozenset)}
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, enum.Enum) and _class_called(*_class_name(type(value))) is type(value):
            return {"enum": value.name, "class": _class_name(type(value))}
        if dataclasses.is_dataclass(value):
            return {
                "fields": {key: self.take(entry, f"{name}.{key}") for key, entry in _attributes(value).items()},
                "class": _class_name(type(value)),
            }
        return None

    def _constant(self, value: object, name: str) -> Tree:
        if self._constants is None:
            return _LEFT_OUT
        return {"constant": self._constants.check(value, name, self._owner, self._parts_of_networks)}

    def _tensor(self, value: Tensor, name: str) -> Tree:
        self.tensors[name] = value.detach()
        return {"tensor": name, "is_parameter": isinstance(value, nn.Parameter)}

    def _module(self, module: nn.Module, name: str) -> Tree:
        held, before = {**module._parameters, **module._buffers}, self._owner
        attributes = {key: value for key, value in _attributes(module).items() if key not in _MODULE_FIELDS}
        self._owner = module
        tree: Tree = {
            "held": {key: self.take(value, f"{name}.{key}") for key, value in held.items()},
            "attributes": {key: self.take(value, f"{name}.{key}") for key, value in attributes.items()},
        }
        self._owner = before
        return tree

    def _optimizer(self, optimizer: torch.optim.Optimizer, name: str) -> Tree:
        state = optimizer.state_dict()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
        return {"optimizer": self.take(state["state"], f"{name}.state"), "groups": self.take(groups, f"{name}.groups")}

    def owned(self) -> dict[str, Tensor]:
        """Copies of the tensors, which do not change when the objects do."""
        return {name: tensor.clone() for name, tensor in self.tensors.items()}


class Restoration:
    """Puts trees back into objects of a new run.

    Args:
        tensors: Those of the snapshot.
        strict: Whether it is an error that a network has other modules than the one that was taken; otherwise these are left alone.
    """

    def __init__(self, tensors: dict[str, Tensor], *, strict: bool = True) -> None:
        self._tensors, self._strict = tensors, strict
        self._restored: dict[str, object] = {}
        self._parts_of_networks: set[int] = set()

    def put(self, tree: Tree, live: object, name: str) -> Any:
        """The value that ``tree`` describes: ``live`` itself with everything put back where that is possible, else a new object."""
        if not isinstance(tree, dict):
            return tree
        if tree == _LEFT_OUT:
            return live
        if "same" in tree:
            return self._restored.get(tree["same"], live)
        if "float" in tree:
            return float(tree["float"])
        value = self._value(tree, live, name)
        self._restored[name] = value
        return value

    def _value(self, tree: dict[str, Any], live: object, name: str) -> Any:
        if "tensor" in tree:
            return self._tensor(self._tensors[tree["tensor"]], tree["is_parameter"], live)
        if "generator" in tree:
            generator = live if isinstance(live, torch.Generator) else torch.Generator(tree["device"])
            generator.set_state(self._tensors[tree["generator"]])
            return generator
        if "module" in tree:
            return self._module(tree["module"], live, name)
        if "optimizer" in tree:
            return self._optimizer(tree, live, name)
        if "constant" in tree:
            if self._strict and self._digest(live) != tree["constant"]:
                raise FileFormatError(
                    f"{name} ({type(live).__name__}) is not what it was in the saved run, and is not saved with it. Make it as it was, or start over."
                )
            return live
        if "dtype" in tree:
            return getattr(torch, tree["dtype"])
        if "enum" in tree:
            return _class_called(*tree["class"])[tree["enum"]]
        if "fields" in tree:
            return self._dataclass(tree, live, name)
        if "items" in tree:
            before = live if isinstance(live, dict) else {}
            keys = [(_key_of(key), entry) for key, entry in tree["items"]]
            entries = {key: self.put(entry, before.get(key), f"{name}.{key}") for key, entry in keys}
            before.clear()
            before.update(entries)
            return before
        if "set" in tree:
            members = map(_key_of, tree["set"])
            return frozenset(members) if tree["is_frozen"] else set(members)
        kind = next(kind for kind in ("list", "tuple", "size") if kind in tree)
        old = live if isinstance(live, (list, tuple)) else []
        parts = [self.put(entry, old[index] if index < len(old) else None, f"{name}.{index}") for index, entry in enumerate(tree[kind])]
        if kind == "list" and isinstance(live, list):
            live[:] = parts
            return live
        return parts if kind == "list" else tuple(parts) if kind == "tuple" else torch.Size(parts)

    def _digest(self, live: object) -> str | None:
        try:
            return digest(live, self._parts_of_networks)
        except TypeError:
            return None

    def _dataclass(self, tree: dict[str, Any], live: object, name: str) -> Any:
        """``live`` where it is of the same class and may be changed, else a new object; no code of the class runs."""
        cls = type(live) if [*_class_name(type(live))] == [*tree["class"]] else _class_called(*tree["class"])
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            raise FileFormatError(f"{name}: the saved run has a {tree['class'][1]}, a dataclass that is not there any more. Start over.")
        is_same = type(live) is cls
        values = {
            key: self.put(entry, getattr(live, key, None) if is_same else None, f"{name}.{key}") for key, entry in tree["fields"].items()
        }
        if is_same and all(hasattr(live, key) and _are_equal(getattr(live, key), value) for key, value in values.items()):
            return live
        is_frozen = cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
        value = live if is_same and not is_frozen else object.__new__(cls)
        for key, entry in values.items():
            object.__setattr__(value, key, entry)
        return value

    @staticmethod
    def _tensor(saved: Tensor, is_parameter: bool, live: object) -> Tensor:
        is_same_kind = isinstance(live, Tensor) and live.shape == saved.shape and live.dtype == saved.dtype
        if is_same_kind and isinstance(live, nn.Parameter) == is_parameter:
            assert isinstance(live, Tensor)
            with torch.no_grad():
                live.data.copy_(saved)  # in place: others may hold it
            return live
        value = saved.clone() if not isinstance(live, Tensor) else saved.to(live.device, copy=True)
        return nn.Parameter(value, requires_grad=value.is_floating_point()) if is_parameter else value

    def _module(self, trees: dict[str, Any], live: object, name: str) -> Any:
        if not isinstance(live, nn.Module):
            return live
        modules = dict(live.named_modules())
        self._parts_of_networks |= parts_of(live)
        if self._strict and set(modules) != set(trees):
            lacking, added = sorted(set(trees) - set(modules)), sorted(set(modules) - set(trees))
            raise FileFormatError(
                f"the saved state is of another network: modules missing here: {', '.join(lacking[:3]) or 'none'}; "
                f"modules not in it: {', '.join(added[:3]) or 'none'}. Start over with resume=False."
            )
        for path, tree in trees.items():
            if path in modules:
                self._held(modules[path], tree, f"{name}.{path}" if path else name)
        return live

    def _held(self, module: nn.Module, tree: dict[str, Any], name: str) -> None:
        for table in (module._parameters, module._buffers):
            for key in [key for key in table if key not in tree["held"]]:
                del table[key]
        for key, entry in tree["held"].items():
            before = module._parameters.get(key, module._buffers.get(key))
            value = self.put(entry, before, f"{name}.{key}")
            if value is before and (key in module._parameters or key in module._buffers):
                continue
            module._parameters.pop(key, None)
            is_persistent = key not in module._non_persistent_buffers_set
            module._buffers.pop(key, None)
            if isinstance(value, nn.Parameter):
                module.register_parameter(key, value)
            else:
                module.register_buffer(key, value, persistent=is_persistent)
        for key, entry in tree["attributes"].items():
            before = vars(module).get(key)
            value = self.put(entry, before, f"{name}.{key}")
            if value is not before:
                vars(module)[key] = value

    def _optimizer(self, tree: dict[str, Any], live: object, name: str) -> Any:
        if not isinstance(live, torch.optim.Optimizer):
            return live
        present = live.state_dict()["param_groups"]
        saved = self.put(tree["groups"], None, f"{name}.groups")
        if len(present) != len(saved):
            raise FileFormatError(f"the saved state has {len(saved)} groups of parameters, the optimizer {len(present)}. Start over.")
        groups = [
            {**group, **{key: value for key, value in old.items() if value is not None or key not in group}}
            for group, old in zip(present, saved, strict=True)
        ]
        live.load_state_dict({"state": self.put(tree["optimizer"], None, f"{name}.state"), "param_groups": groups})
        return live


def _attributes(value: object) -> dict[str, object]:
    """What an object holds by name, without what its ``__getstate__`` leaves out or replaces by ``None``."""
    names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    held = vars(value) if hasattr(value, "__dict__") else {name: getattr(value, name) for name in names if hasattr(value, name)}
    is_parametrized = isinstance(value, nn.Module) and parametrize.is_parametrized(value)
    cls: Any = type(value).__mro__[1] if is_parametrized else type(value)  # torch gives it a class of its own, which refuses
    if cls.__getstate__ is object.__getstate__:
        return dict(held)
    kept = cls.__getstate__(value)
    if not isinstance(kept, dict):
        return dict(held)
    return {key: entry for key, entry in held.items() if entry is None or kept.get(key) is not None}


def _is_key(key: object) -> bool:
    return key is None or type(key) in _PLAIN or (type(key) is tuple and all(map(_is_key, key)))


def _key_tree(key: Any) -> Tree:
    return [_key_tree(part) for part in key] if isinstance(key, tuple) else key


def _key_of(tree: Any) -> Any:
    return tuple(map(_key_of, tree)) if isinstance(tree, list) else tree


def _are_equal(a: object, b: object) -> bool:
    if type(a) is tuple and type(b) is tuple:
        return len(a) == len(b) and all(map(_are_equal, a, b))
    return a is b or (type(a) is type(b) and isinstance(a, _PLAIN) and a == b)


def _class_name(cls: type) -> tuple[str, str]:
    return cls.__module__, cls.__qualname__


def _class_called(module: str, qualified: str) -> Any:
    """A class of a module that is loaded; ``None`` where there is none of that name."""
    found: Any = sys.modules.get(module)
    for part in qualified.split("."):
        found = getattr(found, part, None)
    return found
