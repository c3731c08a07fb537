"""What a request is: settings that are converted and checked when one is made, from Python, the command line or a YAML file alike."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from lowbit.errors import SpecError, unknown_name
from lowbit.options import Setting, check_settings, convert_option, settings_of
from lowbit.qat.recipe import UPSCALING_RECIPE, OptimizerSpec, PrecisionName, Recipe
from lowbit.reading import Lined, line_of, read_yaml, shorten
from lowbit.spec import BitPolicy, parse_bits

Bits = int | str | None
PAPER = "paper"  # in place of a policy or a recipe: that of the method's paper
RECIPES = {"super-resolution": UPSCALING_RECIPE}  # of tasks that the default does not fit


@dataclass(frozen=True)
class Request:
    """Base of all requests: values are converted and checked when one is made."""

    command: ClassVar[str] = ""  # the subcommand of the command line, for hints
    decides: ClassVar[bool] = True  # whether the settings of a group decide what is made, and so belong in a file

    def __post_init__(self) -> None:
        for name, setting in settings_of(type(self)).items():
            if not dataclasses.is_dataclass(setting.type):
                object.__setattr__(self, name, _converted(setting, getattr(self, name), ""))
        check_settings(self, where=self.command or type(self).__name__)

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Mapping[str, object] | None = None) -> Self:
        """The request in the file, with the values of ``overrides`` in place of its own.

        Raises:
            SpecError: It cannot be read, or holds a value that is not allowed.
            UnknownNameError: It holds an unknown name.
        """
        path = Path(path)
        if path.is_dir():
            raise SpecError(
                f"{path} is a folder, a recipe is a YAML file. To resume the run in it, pass out={str(path)!r} and resume=True."
            )
        content = read_yaml(path)
        if content is not None and not isinstance(content, dict):
            raise SpecError(f"{path}: expected names and values such as weight_bits: 4, got {shorten(content)}")
        known = [name for name, owner in fields_of(cls) if decides_result(owner)]
        cls()._changed(content or {}, str(path), known)
        overrides = overrides or {}
        cls().changed({name: value for name, value in overrides.items() if name != "recipe"})  # whose errors are not those of the file
        return cls()._changed(_merged(content or {}, overrides), str(path), [name for name, _ in fields_of(cls)])

    def changed(self, values: Mapping[Any, object], where: str = "") -> Self:
        """This request with some values replaced, named as in the file; ``where`` is for errors.

        >>> from lowbit.workflows.requests import TrainRequest
        >>> TrainRequest().changed({"epochs": "3", "optimizer": {"learning_rate": 0.1}}).recipe.epochs
        3
        """
        return self._changed(values, where, [name for name, _ in fields_of(type(self))])

    def _changed(self, values: Mapping[Any, object], where: str, known: list[str]) -> Self:
        own = settings_of(type(self))
        nested = {name: settings_of(own[name].type) for name in known if dataclasses.is_dataclass(own[name].type)}
        names = [*known, *(name for inner in nested.values() for name in inner)]
        changes: dict[str, Any] = {}
        if "recipe" in values and "recipe" in names:
            changes["recipe"] = self._whole_recipe(values, f"{where}{line_of(values, 'recipe')}")
        elif (fitting := recipe_for(self, values.get("task"))) is not None:
            changes["recipe"] = fitting
        for name, value in values.items():
            if name in changes:
                continue
            owner = next((owner for owner, inner in nested.items() if name in inner), None)
            if name not in names:
                raise unknown_name(f"entry of {where}{line_of(values, name)}" if where else "setting", str(name), names)
            place = f"{where}{line_of(values, name)}"
            if owner is None:
                changes[name] = _converted(own[name], value, place)
            else:
                group = changes.get(owner, getattr(self, owner))
                changes[owner] = replace(group, **{name: _nested(nested[owner][name], value, getattr(group, name), place)})
        return replace(self, **changes)

    def _whole_recipe(self, values: Mapping[Any, object], where: str) -> Recipe:
        """The recipe that ``values`` name as a whole: an object, or the paper's of the method that they, or this request, choose."""
        asked = values["recipe"]
        if isinstance(asked, Recipe):
            return asked
        if asked != PAPER:
            raise SpecError(
                f"{f'{where}: ' if where else ''}recipe must be {PAPER!r} or a Recipe, got {shorten(asked)}. Set its fields by name."
            )
        named = ("method", "options", "procedure", "procedure_options")
        chosen: Any = self.changed({name: values[name] for name in named if name in values})
        recipe: Recipe = chosen.paper_recipe()  # of a request to train
        return recipe

    def to_yaml(self) -> str:
        """The request as ``from_yaml`` reads it."""
        values: dict[str, object] = {}
        for name, owner in fields_of(type(self)):
            value = getattr(self, name)
            if dataclasses.is_dataclass(value):
                values |= {key: plain_value(part) for key, part in dataclasses.asdict(value).items()}  # type: ignore[arg-type]
            elif decides_result(owner):
                values[name] = plain_value(value)
        return yaml.safe_dump(values, sort_keys=False)


def recipe_for(request: Request, task: object) -> Recipe | None:
    """The recipe that fits the task, with the epochs of the request; ``None`` where its own does, or is not the default."""
    own = next((entry for entry in dataclasses.fields(request) if entry.name == "recipe"), None)
    if own is None or str(task) not in RECIPES or not callable(own.default_factory):
        return None
    default: Recipe = own.default_factory()
    return replace(RECIPES[str(task)], epochs=default.epochs) if getattr(request, "recipe", default) == default else None


def fields_of(cls: type) -> Iterator[tuple[str, type]]:
    """Each field of a request with the group that declares it, group by group as the class names them."""
    names = {entry.name for entry in dataclasses.fields(cls)}
    owners = {name: base for base in cls.__mro__ for name in inspect.get_annotations(base) if name in names}
    for base in (*cls.__mro__[1:], cls):
        yield from ((name, base) for name in inspect.get_annotations(base) if owners.get(name) is base)


def decides_result(group: type) -> bool:
    """Whether the settings that ``group`` declares decide what is made; those that do not, such as folders, are in no file."""
    return bool(vars(group).get("decides", True))


def _converted(setting: Setting, value: object, where: str) -> object:
    name, place = setting.name, f"{where}: " if where else ""
    if setting.type == Bits:
        return _bits(value, name, f"{place}{name}")
    if setting.type == tuple[str, ...]:
        return _list(value, f"{place}{name}")
    if typing.get_origin(setting.type) is tuple and hasattr(typing.get_args(setting.type)[0], "parse"):
        entries = value.split(",") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
        file = where.partition(", line ")[0]  # entries know their own lines
        return tuple(
            typing.get_args(setting.type)[0].parse(entry, f"{file}: {name}" if file and isinstance(entry, Lined) else f"{place}{name}")
            for entry in entries
        )
    if name == "policy":
        return _policy(value, place)
    if typing.get_origin(setting.type) is Mapping:
        return _mapping(value, name, place)
    text = isinstance(value, Path) or setting.type is PrecisionName
    return convert_option(where, name, str(value) if text else value, setting.type)


def _nested(setting: Setting, value: object, before: object, where: str) -> object:
    if setting.type is not OptimizerSpec:
        return convert_option(where, setting.name, value, setting.type)
    if not isinstance(value, Mapping):
        raise SpecError(f"{where}: optimizer must hold names and values such as learning_rate: 0.02, got {value!r}")
    known = settings_of(OptimizerSpec)
    changes: dict[str, Any] = {}
    for name, entry in value.items():
        if name not in known:
            raise unknown_name(f"entry of optimizer in {where}", str(name), known)
        changes[name] = convert_option(where, f"optimizer.{name}", entry, known[name].type)
    return replace(typing.cast(OptimizerSpec, before), **changes)


def _merged(content: Mapping[Any, Any], overrides: Mapping[str, Any]) -> dict[Any, Any]:
    """``content`` with ``overrides`` in place of what it says; the optimizer's entry by entry."""
    optimizer = {**(content.get("optimizer") or {}), **overrides.get("optimizer", {})}
    return {**content, **overrides, **({"optimizer": optimizer} if optimizer else {})}


def _policy(value: object, place: str) -> dict[str, object] | str | None:
    if value is None or value == PAPER:
        return value
    if isinstance(value, (str, Path)):
        return BitPolicy.from_yaml(value).to_dict()
    return value.to_dict() if isinstance(value, BitPolicy) else _mapping(value, "policy", place)


def _mapping(value: object, name: str, place: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{place}{name} must hold names and values, got {value!r}")
    return dict(value)


def _list(value: object, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise SpecError(f"{where} must be a list of patterns, got {value!r}")
    return tuple(value)


def _bits(value: object, name: str, where: str) -> int | str | None:
    if value is None or (name == "first_last_bits" and value == "same"):
        return value
    bits = parse_bits(value, where)
    return "float" if bits is None else bits


def plain_value(value: object) -> object:
    """``value`` as YAML and JSON hold it; of dataclasses what differs from their defaults."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if type(value).__str__ is not object.__str__:
            return str(value)
        pairs = ((f, getattr(value, f.name)) for f in dataclasses.fields(value))
        return {f.name: plain_value(entry) for f, entry in pairs if entry != f.default and entry not in ({}, ())}
    if isinstance(value, Mapping):
        return {key: plain_value(entry) for key, entry in value.items()}
    return [plain_value(entry) for entry in value] if isinstance(value, (tuple, list)) else value
