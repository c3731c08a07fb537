"""What ``lowbit train`` is asked for: a YAML file, options that override it, and the effective recipe as YAML again."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lowbit.cli.request import make_policy
from lowbit.errors import SpecError, unknown_name
from lowbit.options import convert_option
from lowbit.qat.engine.feed import AugmentName
from lowbit.qat.engine.trainer import PrecisionName, Selection
from lowbit.qat.recipe import OptimizerSpec, Recipe
from lowbit.qat.tasks import Classification
from lowbit.registry import MethodInfo, find_method
from lowbit.spec import BitPolicy, LayerBits, parse_bits

DEFAULT_BITS = 4
MAPPINGS = ("model_options", "preprocess", "options", "teacher_options", "policy")
LISTS = ("keep", "only")
LAYER_BITS = ("weight_bits", "activation_bits", "first_last_bits")


@dataclass(frozen=True)
class TrainRecipe:
    """Everything that decides what ``lowbit train`` makes; what does not (folders, devices, workers) is not in it.

    Attributes:
        model, model_options, init: The network, its factory's arguments, and the weights to start from.
        data, test_data, preprocess: Training and test data, and how pictures become inputs.
        method, options, surrogate: The method with its hyper-parameters, and a gradient surrogate in place of its own.
        weight_bits, activation_bits, first_last_bits, keep, only, policy: Bits; ``policy`` replaces the others but ``keep``.
        merge_bits: Bits of residual sums and the like in place of what ``policy`` says, see ``lowbit.prepare``.
        teacher, teacher_options, teacher_weights: A network for soft targets.
        label_smoothing, temperature: See ``Classification``.
        recipe: Epochs, optimizer and so on; its fields stand beside the others in the file.
        augment, precision, select: See ``lowbit.train``.
    """

    model: str | None = None
    model_options: Mapping[str, object] = field(default_factory=dict)
    init: str | None = None
    data: str | None = None
    test_data: str | None = None
    preprocess: Mapping[str, object] = field(default_factory=dict)
    method: str = "lsq"
    options: Mapping[str, object] = field(default_factory=dict)
    surrogate: str | None = None
    weight_bits: int | str | None = None
    activation_bits: int | str | None = None
    first_last_bits: int | str | None = None
    merge_bits: int | str | None = None
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    policy: Mapping[str, object] | None = None
    teacher: str | None = None
    teacher_options: Mapping[str, object] = field(default_factory=dict)
    teacher_weights: str | None = None
    label_smoothing: float = 0.0
    temperature: float = 4.0
    recipe: Recipe = field(default_factory=Recipe)
    augment: AugmentName = "auto"
    precision: PrecisionName = "32"
    select: Selection = "last"

    @staticmethod
    def from_yaml(path: Path) -> TrainRecipe:
        """The recipe in the file.

        Raises:
            SpecError: It cannot be read, or holds a value that is not allowed.
            UnknownNameError: It holds an unknown name.
        """
        if path.is_dir():
            raise SpecError(f"{path} is a folder, a recipe is a YAML file. To go on with the run in it: lowbit train --out {path} --resume")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SpecError(f"{path}: cannot be read as a recipe ({error}). See 'lowbit train --print-config'.") from error
        if content is not None and not isinstance(content, dict):
            raise SpecError(f"{path}: expected names and values, as 'lowbit train --print-config' writes them, got {content!r}")
        return TrainRecipe().changed(content or {}, str(path))

    def changed(self, values: Mapping[Any, object], where: str) -> TrainRecipe:
        """This recipe with some values replaced, named as in the file; ``where`` is for errors."""
        own = typing.get_type_hints(TrainRecipe)
        del own["recipe"]
        recipe_hints = typing.get_type_hints(Recipe)
        changes: dict[str, Any] = {}
        recipe: dict[str, Any] = {}
        for name, value in values.items():
            if name in MAPPINGS:
                changes[name] = _mapping(value, name, where)
            elif name in LISTS:
                changes[name] = _list(value, name, where)
            elif name in (*LAYER_BITS, "merge_bits"):
                changes[name] = _bits(value, name, where)
            elif name in own:
                changes[name] = convert_option(where, name, str(value) if name == "precision" else value, own[name])
            elif name == "optimizer":
                recipe[name] = _optimizer(value, self.recipe.optimizer, where)
            elif name in recipe_hints:
                recipe[name] = convert_option(where, name, value, recipe_hints[name])
            else:
                raise unknown_name(f"entry of {where}", str(name), [*own, *recipe_hints])
        return replace(self, **changes, recipe=replace(self.recipe, **recipe))

    def to_yaml(self) -> str:
        """The recipe as ``from_yaml`` reads it."""
        values: dict[str, object] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name == "recipe":
                values |= {key: _plain(part) for key, part in dataclasses.asdict(value).items()}
            else:
                values[entry.name] = _plain(value)
        return yaml.safe_dump(values, sort_keys=False)

    @property
    def info(self) -> MethodInfo:
        """The method's facts; SpecError when it is no training method."""
        return find_method(self.method, "training")

    @property
    def task(self) -> Classification:
        """What the network is trained for."""
        return Classification(self.label_smoothing, self.temperature)

    def bit_policy(self) -> BitPolicy:
        """Bits for each layer.

        Bits that were not given are 4, or the nearest below or above that the method supports.
        """
        if self.policy is not None:
            given = [name for name in (*LAYER_BITS, "only") if getattr(self, name)]
            if given:
                raise SpecError(f"a policy says the bits of every layer; leave out {', '.join(given)}, or change the policy.")
            policy = BitPolicy.from_dict(self.policy)
            for pattern in self.keep:
                policy = policy.keep_float(pattern)
            return policy.with_merges(self.merge_bits)
        info = self.info
        activation = None if info.activation_bits is None else _nearest(info.activation_bits)
        weight, activations, ends = (None if value is None else str(value) for value in (getattr(self, name) for name in LAYER_BITS))
        default = LayerBits(_nearest(info.weight_bits), activation)
        policy = make_policy(None, weight, activations, first_last=ends, keep=list(self.keep), only=list(self.only) or None, default=default)
        return policy.with_merges(self.merge_bits)

    def resolved(self) -> TrainRecipe:
        """With the bits that are not given filled in."""
        if self.policy is not None:
            return self
        default = self.bit_policy().default if not self.only else None
        filled = {name: getattr(self, name) for name in LAYER_BITS}
        if default is not None:
            filled["weight_bits"], filled["activation_bits"] = default.weight or "float", default.activation or "float"
        return replace(self, **filled)


def _nearest(bits: range) -> int:
    return min(bits, key=lambda value: (abs(value - DEFAULT_BITS), value))


def _mapping(value: object, name: str, where: str) -> dict[str, object] | None:
    if value is None:
        return None if name == "policy" else {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise SpecError(f"{where}: {name} must hold names and values, got {value!r}")
    return dict(value)


def _list(value: object, name: str, where: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(entry, str) for entry in value):
        raise SpecError(f"{where}: {name} must be a list of patterns, got {value!r}")
    return tuple(value)


def _bits(value: object, name: str, where: str) -> int | str | None:
    if value is None or (name == "first_last_bits" and value == "same"):
        return value
    bits = parse_bits(value, f"{where}: {name}")
    return "float" if bits is None else bits


def _optimizer(value: object, before: OptimizerSpec, where: str) -> OptimizerSpec:
    if not isinstance(value, Mapping):
        raise SpecError(f"{where}: optimizer must hold names and values such as learning_rate: 0.02, got {value!r}")
    hints = typing.get_type_hints(OptimizerSpec)
    changes: dict[str, Any] = {}
    for name, entry in value.items():
        if name not in hints:
            raise unknown_name(f"entry of optimizer in {where}", str(name), hints)
        changes[name] = convert_option(where, f"optimizer.{name}", entry, hints[name])
    return replace(before, **changes)


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, (tuple, list)) else value
