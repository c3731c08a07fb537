"""What a run's objects hold, as plain values and tensors, and how it is put back into new objects of the same kind.

Nothing is pickled. A snapshot is a tree of values that JSON can say, with tensors beside it under names. It holds networks (every
parameter and buffer, kept in ``state_dict`` or not, and the plain attributes of every module, such as ``bit_width``),
optimizers, random generators, and lists, dictionaries and dataclasses of all these. Anything else (functions, frozen dataclasses, other
objects) is taken to be made anew by whoever makes the object, and is left as it is there.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import FileFormatError

Tree = dict[str, Any] | list[Any] | str | int | float | bool | None
_MODULE_FIELDS = set(vars(nn.Module())) - {"training"}
_LEFT_OUT = {"left_out": True}


class Snapshot:
    """Takes apart several objects that may share parts; ``tensors`` grows with every ``take``."""

    def __init__(self, ignoring: Iterable[object] = ()) -> None:
        """Objects among ``ignoring`` are left out wherever they are met."""
        self.tensors: dict[str, Tensor] = {}
        self._ignored = list(ignoring)  # kept alive: their ids are what counts
        self._seen: dict[int, str | None] = {id(value): None for value in self._ignored}

    def take(self, value: object, name: str) -> Tree:
        """The tree of ``value``; ``name`` tells its tensors apart."""
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if not isinstance(value, tuple) and id(value) in self._seen:
            place = self._seen[id(value)]
            return _LEFT_OUT if place is None else {"same": place}
        if not isinstance(value, tuple):
            self._seen[id(value)] = name
            self._ignored.append(value)  # an id must not be given to another object meanwhile
        return self._parts(value, name)

    def _parts(self, value: object, name: str) -> Tree:
        if isinstance(value, Tensor):
            return self._tensor(value, name)
        if isinstance(value, torch.Generator):
            self.tensors[name] = value.get_state()
            return {"generator": name, "device": str(value.device)}
        if isinstance(value, nn.Module):
            modules = dict(value.named_modules())
            self._seen |= {id(module): None for path, module in modules.items() if path}  # lists of them need no state of their own
            return {"module": {path: self._module(module, f"{name}.{path}") for path, module in modules.items()}}
        if isinstance(value, torch.optim.Optimizer):
            return self._optimizer(value, name)
        if isinstance(value, dict):
            if not all(isinstance(key, (str, int)) for key in value):
                return _LEFT_OUT
            return {"items": [[key, self.take(entry, f"{name}.{key}")] for key, entry in value.items()]}
        if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
            return {type(value).__name__: [self.take(entry, f"{name}.{index}") for index, entry in enumerate(value)]}
        if isinstance(value, (set, frozenset)) and all(isinstance(entry, (str, int)) for entry in value):
            return {"set": sorted(value, key=str), "is_frozen": isinstance(value, frozenset)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type) and not type(value).__dataclass_params__.frozen:  # type: ignore[attr-defined]
            return {"fields": {key: self.take(entry, f"{name}.{key}") for key, entry in vars(value).items()}}
        return _LEFT_OUT

    def _tensor(self, value: Tensor, name: str) -> Tree:
        self.tensors[name] = value.detach()
        return {"tensor": name, "is_parameter": isinstance(value, nn.Parameter)}

    def _module(self, module: nn.Module, name: str) -> Tree:
        held = {**module._parameters, **module._buffers}
        attributes = {key: value for key, value in vars(module).items() if key not in _MODULE_FIELDS}
        return {
            "held": {key: self.take(value, f"{name}.{key}") for key, value in held.items()},
            "attributes": {key: self.take(value, f"{name}.{key}") for key, value in attributes.items()},
        }

    def _optimizer(self, optimizer: torch.optim.Optimizer, name: str) -> Tree:
        state = optimizer.state_dict()
        groups = [{key: value for key, value in group.items() if key != "params"} for group in state["param_groups"]]
        return {"optimizer": self.take(state["state"], f"{name}.state"), "groups": self.take(groups, f"{name}.groups")}

    def owned(self) -> dict[str, Tensor]:
        """Copies of the tensors, which stay as they are when the objects go on changing."""
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
        if "fields" in tree:
            for key, entry in tree["fields"].items():
                if live is not None:
                    setattr(live, key, self.put(entry, getattr(live, key, None), f"{name}.{key}"))
            return live
        if "items" in tree:
            before = live if isinstance(live, dict) else {}
            entries = {key: self.put(entry, before.get(key), f"{name}.{key}") for key, entry in tree["items"]}
            before.clear()
            before.update(entries)
            return before
        if "set" in tree:
            return frozenset(tree["set"]) if tree["is_frozen"] else set(tree["set"])
        kind = "list" if "list" in tree else "tuple"
        old = live if isinstance(live, (list, tuple)) else []
        parts = [self.put(entry, old[index] if index < len(old) else None, f"{name}.{index}") for index, entry in enumerate(tree[kind])]
        if kind == "list" and isinstance(live, list):
            live[:] = parts
            return live
        return parts if kind == "list" else tuple(parts)

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
        if self._strict and set(modules) != set(trees):
            lacking, added = sorted(set(trees) - set(modules)), sorted(set(modules) - set(trees))
            raise FileFormatError(
                f"the saved state is of another network: modules missing here: {', '.join(lacking[:3]) or 'none'}; "
                f"modules not in it: {', '.join(added[:3]) or 'none'}. Start over with --fresh."
            )
        for path, tree in trees.items():
            if path in modules:
                self._held(modules[path], tree, f"{name}.{path}")
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
