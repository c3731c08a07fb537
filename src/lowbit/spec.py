"""Specifications of a quantization: bit-widths per layer, granularity, budgets. Plain frozen dataclasses."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import yaml

from lowbit.errors import SpecError
from lowbit.reading import line_of, read_yaml, shorten

if TYPE_CHECKING:
    from torch import Tensor, nn

Position = Literal["first", "last", "inner"]


def check_bit_width(bit_width: int, where: str) -> int:
    """``bit_width`` if it is a whole number from 1 to 8, else SpecError naming ``where``."""
    if isinstance(bit_width, bool) or not isinstance(bit_width, int) or not 1 <= bit_width <= 8:
        raise SpecError(
            f"{where}: bit_width must be a whole number from 1 to 8, got {shorten(bit_width)}. Use 32 or 'float' to leave it in float."
        )
    return bit_width


@dataclass(frozen=True)
class Granularity:
    """Which elements of a tensor share a scale: those with the same index in each of ``axes``, or runs of ``group_size`` among them.

    No axis is one scale for the whole tensor, one axis a scale for each channel, ``(0, 1)`` a scale for each sample and channel.
    ``broadcast(x)`` is a view of ``x`` on which a scale of shape ``scale_shape(x)`` broadcasts, so that all of these are one code path.

    Example:
        >>> import torch, lowbit
        >>> weight = torch.zeros(8, 3, 3, 3)
        >>> [lowbit.Granularity.parse(text).scale_shape(weight) for text in ("per_tensor", "per_channel", "group:9")]
        [(), (8, 1, 1, 1), (8, 3, 1)]
    """

    axes: tuple[int, ...] = ()
    group_size: int = 0

    def __post_init__(self) -> None:
        if self.group_size and len(self.axes) != 1:
            raise SpecError(f"groups lie within the indices of one axis, got axes {self.axes}")
        if len(set(self.axes)) != len(self.axes):
            raise SpecError(f"granularity: axes must differ, got {self.axes}")

    @staticmethod
    def tensor() -> Granularity:
        """One scale for the whole tensor, shape ``()``."""
        return Granularity()

    @staticmethod
    def channel(axis: int = 0) -> Granularity:
        """One scale for each index of ``axis``."""
        return Granularity((axis,))

    @staticmethod
    def over(*axes: int) -> Granularity:
        """One scale for each combination of indices of ``axes``.

        >>> import torch
        >>> Granularity.over(0, 1).scale_shape(torch.zeros(2, 3, 4, 4))
        (2, 3, 1, 1)
        """
        return Granularity(axes)

    @staticmethod
    def group(size: int, axis: int = 0) -> Granularity:
        """One scale for each run of ``size`` elements within an index of ``axis`` (shape ``[channels, groups, 1]``)."""
        if size < 1:
            raise SpecError(f"group size must be at least 1, got {size}")
        return Granularity((axis,), size)

    @staticmethod
    def parse(text: str, axis: int = 0) -> Granularity:
        """``per_tensor``, ``per_channel`` (of ``axis``), ``group:64`` or ``axes:0,1``; the inverse of ``str``."""
        if text == "per_tensor":
            return Granularity.tensor()
        if text == "per_channel":
            return Granularity.channel(axis)
        prefix, _, rest = text.partition(":")
        if prefix in ("group", "per_group") and rest.isdigit():
            return Granularity.group(int(rest), axis)
        if prefix == "axes" and all(part.strip().removeprefix("-").isdigit() for part in rest.split(",")):
            return Granularity.over(*map(int, rest.split(",")))
        raise SpecError(
            f"unknown granularity {text!r}. Allowed: per_tensor, per_channel, group:SIZE (for example group:64), "
            "axes:AXIS,AXIS (for example axes:0,1, each sample and channel)."
        )

    def __str__(self) -> str:
        if self.kind == "per_axes":
            return f"axes:{','.join(map(str, self.axes))}"
        return f"group:{self.group_size}" if self.group_size else self.kind

    @property
    def kind(self) -> Literal["per_tensor", "per_channel", "per_group", "per_axes"]:
        """The name of the case."""
        if self.group_size:
            return "per_group"
        return "per_tensor" if not self.axes else "per_channel" if len(self.axes) == 1 else "per_axes"

    @property
    def axis(self) -> int:
        """The first axis; 0 where there is none."""
        return self.axes[0] if self.axes else 0

    def counted_from_zero(self, dim: int) -> Granularity:
        """The same for tensors of ``dim`` axes, without negative axes."""
        return Granularity(tuple(axis % max(dim, 1) for axis in self.axes), self.group_size)

    def scale_shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of a scale that broadcasts with ``broadcast(x)``."""
        if self.group_size:
            return (x.shape[self.axis], self._groups(x), 1)
        kept = self._kept(x.dim())
        return tuple(size if axis in kept else 1 for axis, size in enumerate(x.shape)) if kept else ()

    def broadcast(self, x: Tensor) -> Tensor:
        """``x`` itself, or for groups its view ``[channels, groups, group_size]``."""
        if not self.group_size:
            return x
        return x.movedim(self.axis, 0).reshape(x.shape[self.axis], self._groups(x), self.group_size)

    def restore(self, view: Tensor, shape: Iterable[int]) -> Tensor:
        """Undo ``broadcast`` for a tensor whose shape was ``shape``."""
        if not self.group_size:
            return view
        moved = list(shape)
        moved.insert(0, moved.pop(self.axis))
        return view.reshape(moved).movedim(0, self.axis)

    def flatten(self, x: Tensor) -> Tensor:
        """``[scales, elements]``: one row for each scale, in the order of the flattened scale."""
        if self.group_size:
            return self.broadcast(x).flatten(0, 1)
        moved, kept = _permuted(x, self._order(x.dim())), len(self.axes)
        return moved.reshape(moved.shape[:kept].numel(), moved.shape[kept:].numel())

    def unflatten(self, rows: Tensor, shape: Iterable[int]) -> Tensor:
        """Undo ``flatten`` for a tensor whose shape was ``shape``."""
        sizes = list(shape)
        order = self._order(len(sizes))
        return _permuted(rows.reshape([sizes[axis] for axis in order]), sorted(range(len(order)), key=order.__getitem__))

    def shared_axes(self, x: Tensor) -> tuple[int, ...]:
        """The axes of ``broadcast(x)`` along which elements share a scale."""
        return (2,) if self.group_size else tuple(self._order(x.dim())[len(self.axes) :])

    def _kept(self, dim: int) -> list[int]:
        return sorted(axis % dim for axis in self.axes)

    def _order(self, dim: int) -> list[int]:
        """All axes, those with a scale of their own first."""
        kept = self._kept(dim)
        return [*kept, *(axis for axis in range(dim) if axis not in kept)]

    def _groups(self, x: Tensor) -> int:
        elements = x[(slice(None),) * (self.axis % x.dim()) + (0,)].numel()
        if elements % self.group_size:
            raise SpecError(
                f"group size {self.group_size} does not divide the {elements} weights of one output channel (weight shape {tuple(x.shape)}). "
                "Choose a divisor, or leave this layer per_channel."
            )
        return elements // self.group_size


def _permuted(x: Tensor, order: list[int]) -> Tensor:
    return x if order == sorted(order) else x.permute(order)


OPERANDS = ("weight", "activation", "output")  # the fields of LayerBits


@dataclass(frozen=True)
class LayerBits:
    """Bit-widths of one layer: its weight, its input activation and its output. ``None`` means float.

    The output is what the layer itself computes, before any activation function that follows.

    Example:
        >>> import lowbit
        >>> lowbit.LayerBits(weight=2, activation=None)
        LayerBits(weight=2, activation=None, output=None)
    """

    weight: int | None
    activation: int | None
    output: int | None = None

    def __post_init__(self) -> None:
        for name in OPERANDS:
            value = getattr(self, name)
            if value is not None:
                check_bit_width(value, f"{name} bits")


def parse_bits(value: object, where: str) -> int | None:
    """A bit-width from user input: 1 to 8, or 32 / ``float`` / ``None`` for float."""
    if value is None or (isinstance(value, (int, float, str)) and value in (32, "32", "float")):
        return None
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 4:
        value = int(value)
    return check_bit_width(cast(int, value), where)


def switch_name(switch: LayerBits) -> str:
    """``4/4``, ``1/float``: bits of weights and inputs.

    >>> switch_name(LayerBits(1, None))
    '1/float'
    """
    return "/".join("float" if bits is None else str(bits) for bits in (switch.weight, switch.activation))


def parse_switches(value: object, where: str = "bits") -> tuple[LayerBits, ...]:
    """The widths that one network is to have, from the highest to the lowest, as a user lists them.

    Args:
        value: ``[8, 4, 2]`` or ``"8,4,2"``; each a number for weights and inputs, or both as ``"1/32"`` (32 or ``float``: not quantized), or
            ``LayerBits``.
        where: For errors.

    Raises:
        SpecError: Nothing, a width twice, or one that is above the one before it.

    >>> [switch_name(switch) for switch in parse_switches("32/32,4/4,1/1")]
    ['float/float', '4/4', '1/1']
    """
    parts = value.split(",") if isinstance(value, str) else list(value) if isinstance(value, Iterable) else [value]
    switches = tuple(_parse_switch(part, where) for part in parts)
    if not switches:
        raise SpecError(f"{where}: there is no width. List some from the highest to the lowest, such as 8,4,2.")
    for switch in switches:
        if switches.count(switch) > 1:
            raise SpecError(f"{where}: {switch_name(switch)} stands there twice. List each width once.")
    for before, after in pairwise(switches):
        if any(_rank(b) > _rank(a) for a, b in ((before.weight, after.weight), (before.activation, after.activation))):
            raise SpecError(
                f"{where}: {switch_name(after)} is above {switch_name(before)}, which stands before it. List widths from the highest to the lowest."
            )
    return switches


def widest(switches: Sequence[LayerBits]) -> LayerBits:
    """The most bits of weights and of inputs among ``switches``, those in float apart: what quantizers are made for.

    >>> widest(parse_switches("32/32,4/4,1/1"))
    LayerBits(weight=4, activation=4, output=None)
    """
    weights = [switch.weight for switch in switches if switch.weight is not None]
    activations = [switch.activation for switch in switches if switch.activation is not None]
    return LayerBits(max(weights, default=None), max(activations, default=None))


def parse_width(text: str, where: str) -> int | LayerBits:
    """One of the widths of a network, as ``lowbit.set_bits`` takes it: ``4``, ``4/8`` (weights and inputs) or ``float``.

    >>> parse_width("4", "bits"), parse_width("1/32", "bits")
    (4, LayerBits(weight=1, activation=None, output=None))
    """
    return _parse_switch(text, where) if "/" in text or parse_bits(text.strip(), where) is None else int(text)


def _parse_switch(part: object, where: str) -> LayerBits:
    if isinstance(part, LayerBits):
        return part
    widths = part.split("/") if isinstance(part, str) else [part]
    if len(widths) > 2:
        raise SpecError(f"{where}: expected a width such as 4, or WEIGHTS/ACTIVATIONS such as 1/32, got {shorten(part)}")
    bits = [parse_bits(width.strip() if isinstance(width, str) else width, where) for width in widths]
    return LayerBits(bits[0], bits[-1])


def _rank(bits: int | None) -> int:
    return 32 if bits is None else bits


_SEVERAL_WEIGHTS = frozenset({"RNNBase", "RNNCellBase", "MultiheadAttention"})  # classes, whose weights go by the names of parameters


def matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether the shell pattern fits the name of a weight; the name of a layer with several weights fits each of them.

    >>> from torch import nn
    >>> matches("lstm", "lstm.weight_ih_l0", nn.LSTM(2, 2)), matches("lstm.weight_hh_*", "lstm.weight_ih_l0", nn.LSTM(2, 2))
    (True, False)
    """
    is_one_of_several = any(base.__name__ in _SEVERAL_WEIGHTS for base in type(module).__mro__)
    names = (name, name.rpartition(".")[0]) if is_one_of_several else (name,)
    return any(fnmatch.fnmatchcase(candidate, pattern) for candidate in names)


_FLOAT: Literal["float"] = "float"
Bits = int | Literal["float"] | None  # None: nothing is said, so that what was said before, or the default, holds


def parse_said_bits(value: object, where: str) -> Bits:
    """Bits from user input where ``None`` says nothing: 1 to 8, or ``"float"`` for 32 and ``float``."""
    return None if value is None else parse_bits(value, where) or _FLOAT


@dataclass(frozen=True)
class Rule:
    """Bits for the layers whose name matches ``match`` (shell pattern) or whose class is called ``type``.

    ``match`` may also name one of a layer's several weights, such as ``lstm.weight_ih_l0``.
    A field that is ``None`` keeps the bits of earlier rules; ``"float"`` disables quantization.
    """

    match: str | None = None
    type: str | None = None
    weight: Bits = None
    activation: Bits = None
    output: Bits = None

    def applies(self, name: str, module: nn.Module) -> bool:
        if self.match is not None and not matches(self.match, name, module):
            return False
        return self.type is None or any(base.__name__ == self.type for base in type(module).__mro__)

    def __str__(self) -> str:
        return f"match {self.match!r}" if self.match is not None else f"type {self.type!r}"


_BETWEEN = ("merges", "before_functions")  # the fields of BitPolicy for tensors that no layer reads


@dataclass(frozen=True)
class BitPolicy:
    """Which layer gets how many bits: a default, the first and last layer, then ordered rules (later ones win).

    Attributes:
        default: Bits of layers without an exception.
        first_last: Bits of the first and the last layer to run; ``None``: no exception.
        rules: Further exceptions; later ones win.
        merges: Bits of the tensors between layers that take part in a merge: those that meet in residual sums and concatenations, their
            results, those that are pooled, and gates (of squeeze-and-excitation, and after training of SiLU). ``None``: the default, which
            is 8 after training (where activations are quantized) and float in training, as in the papers.
        before_functions: Bits of convolutions' outputs before an activation function that integer kernels do not take in (SiLU,
            Hardswish, GELU, LeakyReLU and the like), where nothing is said of the layer's output. ``None``: the default, which is 8
            after training (where activations are quantized), so that runtimes compute the convolutions in integers, and float in training.
        order: Layers in the order in which a procedure that quantizes one after the other takes them, as ``lowbit search`` found it; empty where
            nothing is said of it.
        network: Provenance of the network that the policy was found for, as JSON holds it; empty where it is for any. It says nothing of bits,
            and policies that differ in it alone are equal.

    Example:
        >>> print(BitPolicy.uniform(4, 8, merge_bits=8, first_last=None).with_rule(match="head", output=8))
        default:
          weight: 4
          activation: 8
        first_last: null
        rules:
        - match: head
          output: 8
        merges: 8
        <BLANKLINE>
    """

    default: LayerBits = field(default_factory=lambda: LayerBits(8, 8))
    first_last: LayerBits | None = None
    rules: tuple[Rule, ...] = ()
    merges: Bits = None
    before_functions: Bits = None
    order: tuple[str, ...] = ()
    network: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def uniform(
        weight_bits: int | None,
        activation_bits: int | None,
        output_bits: int | None = None,
        *,
        merge_bits: Bits = None,
        before_functions: Bits = None,
        first_last: int | None = 8,
    ) -> BitPolicy:
        """The same bits everywhere, but at least ``first_last`` in the first and last layer (``None``: no exception)."""
        default = LayerBits(
            parse_bits(weight_bits, "weight_bits"), parse_bits(activation_bits, "activation_bits"), parse_bits(output_bits, "output_bits")
        )
        ends = None
        if first_last is not None:
            floor = check_bit_width(first_last, "first_last")
            ends = LayerBits(*(None if bits is None else max(bits, floor) for bits in (getattr(default, name) for name in OPERANDS)))
        return BitPolicy(default, ends, before_functions=parse_said_bits(before_functions, "before_functions")).with_merges(merge_bits)

    def with_merges(self, merge_bits: int | str | None) -> BitPolicy:
        """This policy with other bits for sums, concatenations and pooled tensors; ``None`` leaves what it says."""
        return self if merge_bits is None else replace(self, merges=parse_said_bits(merge_bits, "merge_bits"))

    def with_rule(
        self, *, match: str | None = None, type: str | None = None, weight: Bits = None, activation: Bits = None, output: Bits = None
    ) -> BitPolicy:
        """This policy with one more rule, which wins over the earlier ones."""
        if (match is None) == (type is None):
            raise SpecError(f"a rule takes either a name pattern (match) or a layer type (type), got match={match!r}, type={type!r}")
        for key, pattern in (("match", match), ("type", type)):
            if pattern is not None and not isinstance(pattern, str):
                raise SpecError(f"a rule's {key} must be text, such as 'layer1.*', got {shorten(pattern)}")
        said = {"weight": weight, "activation": activation, "output": output}
        bits = {name: parse_said_bits(value, f"rule for {match or type}: {name}") for name, value in said.items()}
        return replace(self, rules=(*self.rules, Rule(match, type, **bits)))

    def keep_float(self, pattern: str) -> BitPolicy:
        """This policy with the layers matching ``pattern`` left in float."""
        return self.with_rule(match=pattern, weight=_FLOAT, activation=_FLOAT, output=_FLOAT)

    def bits_for(self, name: str, module: nn.Module, *, position: Position = "inner") -> LayerBits:
        """Bits of the layer ``name``; ``position`` says whether it is the first or last one to run."""
        bits = self.first_last if self.first_last is not None and position != "inner" else self.default
        asked = {operand: getattr(bits, operand) for operand in OPERANDS}
        ruled = {operand: getattr(rule, operand) for operand, rule in self.deciding_rules(name, module).items()}
        return LayerBits(**asked | {operand: None if value == _FLOAT else value for operand, value in ruled.items()})

    def deciding_rules(self, name: str, module: nn.Module) -> dict[str, Rule]:
        """The rule that decides the bits of each of ``weight``, ``activation`` and ``output`` of a layer, where one says something of it."""
        applying = [rule for rule in self.rules if rule.applies(name, module)]
        return {operand: rule for rule in applying for operand in OPERANDS if getattr(rule, operand) is not None}

    def check(self, layers: Mapping[str, nn.Module]) -> None:
        """SpecError when a rule applies to none of ``layers``."""
        for rule in self.rules:
            if not any(rule.applies(name, module) for name, module in layers.items()):
                raise SpecError(f"policy: the rule with {rule} matches no layer. The model has: {', '.join(layers) or 'none'}.")
        for name in self.order:
            if name not in layers:
                raise SpecError(f"policy: its order names {name!r}, which is no layer. The model has: {', '.join(layers) or 'none'}.")

    def to_dict(self) -> dict[str, object]:
        """Plain values, as in the YAML file."""

        def plain(bits: LayerBits) -> dict[str, object]:
            said = {name: getattr(bits, name) or _FLOAT for name in OPERANDS}
            return {name: value for name, value in said.items() if name != "output" or value != _FLOAT}  # outputs stay float by default

        rules = [{key: value for key, value in vars(rule).items() if value is not None} for rule in self.rules]
        first_last = None if self.first_last is None else plain(self.first_last)
        between = {name: getattr(self, name) for name in _BETWEEN if getattr(self, name) is not None}
        order = {"order": list(self.order)} if self.order else {}
        network = {"network": dict(self.network)} if self.network else {}
        return {"default": plain(self.default), "first_last": first_last, "rules": rules, **between, **order, **network}

    @staticmethod
    def from_dict(data: object, where: str = "policy") -> BitPolicy:
        """The inverse of ``to_dict``; SpecError on anything unknown."""
        if not isinstance(data, dict) or not set(data) <= {"default", "first_last", "rules", *_BETWEEN, "order", "network"}:
            got = shorten(sorted(map(str, data)) if isinstance(data, dict) else data)
            raise SpecError(f"{where}: expected the keys default, first_last, rules, {', '.join(_BETWEEN)}, order and network, got {got}")

        def layer_bits(value: object, name: str) -> LayerBits:
            if not isinstance(value, dict) or not set(value) <= set(OPERANDS):
                raise SpecError(f"{where}: {name} must be a mapping with weight, activation and output, got {shorten(value)}")
            said = {"weight": 8, "activation": 8, "output": None, **value}
            return LayerBits(**{operand: parse_bits(bits, f"{where}{line_of(value)}: {name}.{operand}") for operand, bits in said.items()})

        order = data.get("order") or []
        if not isinstance(order, list) or not all(isinstance(name, str) for name in order) or len(set(order)) < len(order):
            raise SpecError(f"{where}: order must be a list of names of layers, each once, got {shorten(order)}")
        network = data.get("network") or {}
        if not isinstance(network, dict):
            raise SpecError(f"{where}: network must hold names and values, got {shorten(network)}")
        policy = BitPolicy(
            layer_bits(data.get("default", {}), "default"),
            None if data.get("first_last") is None else layer_bits(data["first_last"], "first_last"),
            merges=parse_said_bits(data.get("merges"), f"{where}: merges"),
            before_functions=parse_said_bits(data.get("before_functions"), f"{where}: before_functions"),
            order=tuple(order),
            network=json.loads(json.dumps(network, default=str)),  # without the lines of the file
        )
        rules = data.get("rules") or []
        if not isinstance(rules, list):
            raise SpecError(f"{where}: rules must be a list, got {shorten(rules)}")
        for rule in rules:
            if not isinstance(rule, dict) or not set(rule) <= {"match", "type", *OPERANDS}:
                raise SpecError(
                    f"{where}{line_of(rule)}: a rule has the keys match or type, weight, activation, output; got {shorten(rule)}"
                )
            try:
                policy = policy.with_rule(**rule)
            except SpecError as error:
                raise SpecError(f"{where}{line_of(rule)}: {error}") from error
        return policy

    def to_yaml(self, path: Path | str) -> None:
        """Write the policy as YAML."""
        Path(path).write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))

    @staticmethod
    def from_yaml(path: Path | str) -> BitPolicy:
        """Read a policy; SpecError naming the file when it cannot be read or understood."""
        return BitPolicy.from_dict(read_yaml(path), where=f"policy file {path}")

    def __str__(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)
