"""Bits as state: the current bits of each layer of a quantized network, and how to change them in place.

Nothing is prepared again: every quantizer changes its own bit-width and keeps what it learned (``Quantizer.set_bit_width``).
"""

from __future__ import annotations

import glob
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, cast, get_args, runtime_checkable

import torch
from torch import nn

from lowbit.errors import LayerError, SpecError
from lowbit.network import insert
from lowbit.network.layers import WEIGHT, WEIGHT_ONLY
from lowbit.network.record import QuantizationRecord, attach_record, record_of
from lowbit.network.table import LayerTable
from lowbit.quantizers import Quantizer
from lowbit.registry import list_methods
from lowbit.spec import BitPolicy, LayerBits, Position, Rule, matches, parse_bits, parse_width, switch_name

BitsLike = int | LayerBits | None
WidthLike = int | str | LayerBits | Mapping[str, BitsLike] | None  # of a network that has several
Part = Literal["weight", "activation", "output"]


@dataclass(frozen=True)
class LayerQuantizers:
    """The quantizers that decide the bits of one layer, or of one of its several weights.

    Attributes:
        layer: The layer.
        weight: Quantizer of its weight, or ``None``.
        activation: Quantizer of its input, wherever in the network it sits, or ``None``.
        output: Quantizer of its output, if the policy asked for one, or ``None``.
        parameter: The name of the weight's parameter.
    """

    layer: nn.Module
    weight: Quantizer | None
    activation: Quantizer | None
    output: Quantizer | None
    parameter: str = WEIGHT

    @property
    def bits(self) -> LayerBits:
        """Current bits of these quantizers."""
        return LayerBits(*(None if quantizer is None else quantizer.bits for quantizer in (self.weight, self.activation, self.output)))


@runtime_checkable
class FollowsBits(Protocol):
    """A module of a network that changes with the bits of its layers, as a norm does that has statistics for each width."""

    def choose(self, bits: Mapping[str, LayerBits], switch: LayerBits | None) -> str:
        """What to select for the bits of all layers, by name, and the switch that gives them, ``None`` where each layer has its own.

        Raises:
            SpecError: It has nothing for these bits.
        """

    def select(self, choice: str) -> None:
        """Compute with it from now on."""


@dataclass(frozen=True)
class LayerWidths:
    """Bits of one layer, or of one of its several weights, in a network that may switch.

    Attributes:
        bits: Current bits.
        at: Bits at each switch, in the order of the network's record; empty where the network has one width.
        layer: The layer, ``None`` in a loaded network, which has none.
    """

    bits: LayerBits
    at: tuple[LayerBits, ...] = ()
    layer: nn.Module | None = None

    def matches(self, pattern: str, name: str) -> bool:
        """Whether the pattern fits the layer, which is called ``name``."""
        return pattern == name or matches(pattern, name, self.layer or nn.Module())


@runtime_checkable
class HoldsWidths(Protocol):
    """A network without quantizers that may hold several widths all the same: one that was loaded from a file."""

    def layer_widths(self) -> Mapping[str, LayerWidths]:
        """The bits of every layer, by name, as far as its file records them."""

    def select_widths(self, bits: Mapping[str, LayerBits], switch: LayerBits | None) -> None:
        """Compute with these bits of all layers from now on; ``switch`` gives them, ``None`` where each layer has its own.

        Raises:
            SpecError: The file does not have this combination.
        """


def layer_quantizers(model: nn.Module) -> dict[str, LayerQuantizers]:
    """The quantizers of every weight by its site's name, in execution order if a record knows it, else as defined.

    A convolution, a linear layer or an embedding goes by its own name, the weights of others by those of their parameters.
    """
    record, weights, sites = record_of(model), insert.weight_sites(model), insert.sites(model)
    inputs, outputs = ({}, {}) if record is None else (record.table.inputs, record.table.outputs)
    recorded = [] if record is None else [row.name for row in record.table if row.name in weights]
    found = {}
    for name in dict.fromkeys([*recorded, *weights]):
        weight = weights[name]
        own = None if weight.is_weight_only else insert.input_quantizer(weight.layer)
        activation = sites.get(inputs.get(name, "")) if own is None else own
        found[name] = LayerQuantizers(weight.layer, weight.quantizer, activation, sites.get(outputs.get(name, "")), weight.parameter)
    return found


def policy_bits(policy: BitPolicy, name: str, layer: nn.Module, position: Position = "inner") -> LayerBits:
    """Bits that ``policy`` asks for the weight ``name`` of ``layer``, and for input and output where the layer can have them quantized."""
    bits = policy.bits_for(name, layer, position=position)
    return LayerBits(bits.weight, None) if isinstance(layer, WEIGHT_ONLY) else bits


def check_policy(policy: BitPolicy, layers: Mapping[str, nn.Module]) -> None:
    """SpecError where a rule of ``policy`` matches none of ``layers``, or asks for inputs or outputs in few bits of weight-only layers alone."""
    policy.check(layers)
    for rule in policy.rules:
        matching = {name: layer for name, layer in layers.items() if rule.applies(name, layer)}
        refused = [name for name, layer in matching.items() if rule in unhonoured_rules(policy, name, layer)]
        if refused and all(isinstance(layer, WEIGHT_ONLY) for layer in matching.values()):
            kinds = ", ".join(dict.fromkeys(type(matching[name]).__name__ for name in refused))
            raise SpecError(
                f"policy: the rule with {rule} asks for bits of what {', '.join(map(repr, refused))} ({kinds}) reads or gives, which stays in "
                "float: of these layers only weights are quantized. Let the rule say weight bits alone."
            )


def unhonoured_rules(policy: BitPolicy, name: str, layer: nn.Module) -> list[Rule]:
    """The rules whose activation or output bits a weight-only layer cannot have; a default that counts for all layers asks for none."""
    if not isinstance(layer, WEIGHT_ONLY):
        return []
    ruling = policy.deciding_rules(name, layer)
    asking = (ruling[part] for part in ("activation", "output") if part in ruling and isinstance(getattr(ruling[part], part), int))
    return list(dict.fromkeys(asking))


def get_bits(model: nn.Module) -> dict[str, LayerBits]:
    """The current bits of every weight and of what its layer reads and gives, by the names of ``layer_quantizers``; ``None`` is float.

    Example:
        >>> import torch, lowbit
        >>> float_model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> model = lowbit.prepare(float_model, method="lsq", weight_bits=3, sample=torch.randn(8, 4))
        >>> lowbit.get_bits(model)["1"], lowbit.get_bits(model)["2"]
        (LayerBits(weight=3, activation=4, output=None), LayerBits(weight=8, activation=8, output=None))
    """
    if isinstance(model, HoldsWidths):
        return {name: widths.bits for name, widths in model.layer_widths().items()}
    return {name: quantizers.bits for name, quantizers in layer_quantizers(model).items()}


def layer_widths(model: nn.Module) -> Mapping[str, LayerWidths]:
    """The current bits of every layer, as ``get_bits`` gives them, and those at each switch of the network."""
    if isinstance(model, HoldsWidths):
        return model.layer_widths()
    record, layers = record_of(model), layer_quantizers(model)
    return (
        {name: LayerWidths(found.bits, layer=found.layer) for name, found in layers.items()} if record is None else _widths(record, layers)
    )


def switches_of(model: nn.Module) -> tuple[LayerBits, ...]:
    """The widths between which the network switches, from the highest on; empty where it was trained for one."""
    record = record_of(model)
    return () if record is None else record.switches


def current_switch(model: nn.Module) -> LayerBits | None:
    """The switch whose bits all layers have now; ``None`` where each has its own, or the network does not switch."""
    own = layer_widths(model).values()
    return next((s for place, s in enumerate(switches_of(model)) if all(found.bits == found.at[place] for found in own)), None)


@contextmanager
def bits_restored(model: nn.Module) -> Iterator[None]:
    """Within the context the bits of a network with several widths may be changed; behind it they are as before."""
    switch, bits = current_switch(model), get_bits(model)
    try:
        yield
    finally:
        set_bits(model, bits if switch is None else switch)


def switching_layers(model: nn.Module) -> tuple[str, ...]:
    """The weights whose bits differ between the switches of the network, without those that are tied to another layer's."""
    record = record_of(model)
    return () if record is None else tuple(n for n, w in layer_widths(model).items() if n not in record.tied and len(set(w.at)) > 1)


def asked_bits(model: nn.Module) -> dict[str, LayerBits]:
    """Bits that the policy in the network's record asks for each layer, whatever it has now; SpecError without a record."""
    record = _record(model)
    return _by_policy(record.policy, layer_quantizers(model), record.table.positions)


def set_bits(model: nn.Module, bits: WidthLike | BitPolicy) -> None:
    """Change the bits of a quantized network in place; nothing is changed if an error is raised.

    Layers keep what they learned at every width, so changing bits and changing them back has no effect. ``lowbit.summary`` and the
    network's record show the new bits.

    Args:
        model: A network from ``lowbit.prepare``, ``lowbit.train`` or ``lowbit.quantize``, or one from ``lowbit.load`` or
            ``lowbit.compile_runtime`` that holds several widths.
        bits: A number (or text: ``"4"``, ``"4/8"`` for weights and inputs, ``"float"``) sets every existing quantizer except in layers that
            the network's policy excepts (the first and last one, and those named by a rule). ``LayerBits`` does the same, but raises an
            error if a layer lacks a requested quantizer. ``None`` gives the float network. A mapping from name patterns (``"layer1.*"``) to
            any of these sets the layers that match; later patterns win. A ``BitPolicy`` sets every layer. A network trained for several
            widths (``lowbit.prepare(bits=...)``) has those alone: it takes one of them, and only where its method mixes them a mapping,
            which leaves the first and the last layer alone unless it names them.

    Raises:
        SpecError: A width that the method or a quantizer does not support (the message lists those it does), a pattern that matches no
            layer, different bits for layers that share a quantizer, or a layer without a requested quantizer.
        LayerError: A network without quantizers, or a loaded one of a single width.

    Example:
        >>> import torch, lowbit
        >>> float_model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> model = lowbit.prepare(float_model, method="lsq", sample=torch.randn(8, 4))
        >>> lowbit.set_bits(model, 3)
        >>> lowbit.set_bits(model, {"0": lowbit.LayerBits(weight=5, activation=6)})
        >>> [(bits.weight, bits.activation) for bits in lowbit.get_bits(model).values()]
        [(5, 6), (3, 3), (8, 8)]
    """
    if torch.compiler.is_compiling():
        raise SpecError("set_bits changes a network, which a compiled graph cannot hold. Call it between calls of the compiled network.")
    bits = parse_width(bits, "bits") if isinstance(bits, str) else bits
    if isinstance(model, HoldsWidths):
        _select(model, bits)
    else:
        _change(model, bits, is_lowering=False)


def lower_bits(model: nn.Module, stage: LayerBits) -> None:
    """Bring a network that is trained at ever fewer bits to those of ``stage``, each layer to at least those that its policy asks for.

    Unlike ``set_bits`` a grid of fewer bits is derived from what was learned at more, and never one that was put aside earlier.

    Args:
        model: A network from ``lowbit.prepare``.
        stage: Bits of weights and inputs; ``None`` leaves them in float for now.

    Raises:
        SpecError: As ``set_bits``.

    Example:
        >>> import torch, lowbit
        >>> from lowbit.network.bits import lower_bits
        >>> model = lowbit.prepare(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), weight_bits=2, sample=torch.randn(8, 4))
        >>> for stage in (lowbit.LayerBits(8, None), lowbit.LayerBits(5, 5), lowbit.LayerBits(1, 1)):
        ...     lower_bits(model, stage)
        ...     print(lowbit.get_bits(model)["1"])
        LayerBits(weight=8, activation=None, output=None)
        LayerBits(weight=5, activation=5, output=None)
        LayerBits(weight=2, activation=4, output=None)
    """
    _change(model, {name: raised_bits(own, stage) for name, own in asked_bits(model).items()}, is_lowering=True)


def quantize_only(model: nn.Module, names: Collection[str]) -> None:
    """Give the layers ``names`` the bits that the policy asks for, and leave all others in float for now.

    A quantizer that several layers share is in use where one of them is among ``names``.

    Args:
        model: A network from ``lowbit.prepare``.
        names: Weights, by the names of their sites.

    Example:
        >>> import torch, lowbit
        >>> from lowbit.network.bits import quantize_only
        >>> model = lowbit.prepare(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), weight_bits=2, sample=torch.randn(8, 4))
        >>> quantize_only(model, ["1"])
        >>> [bits.weight for bits in lowbit.get_bits(model).values()]
        [None, 2, None]
    """
    layers = layer_quantizers(model)
    used = {getattr(layers[name], part) for name in names for part in get_args(Part)}

    def bits(name: str, asked: LayerBits) -> LayerBits:
        return LayerBits(**{part: getattr(asked, part) if getattr(layers[name], part) in used else None for part in get_args(Part)})

    _change(model, {name: bits(name, asked) for name, asked in asked_bits(model).items()}, is_lowering=False)


def keep_bits(model: nn.Module) -> None:
    """Let the record of ``model`` ask for the weight bits that its layers have: for methods that choose bits in training.

    The policy gets a rule for each layer whose bits are not those that it asks for anyway; the table says them. A network without a record is
    left as it is.

    Example:
        >>> import torch, lowbit
        >>> from lowbit.network.bits import keep_bits
        >>> model = lowbit.prepare(torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3))), weight_bits=4, sample=torch.randn(8, 4))
        >>> lowbit.set_bits(model, {"1": lowbit.LayerBits(weight=2, activation=4)})
        >>> keep_bits(model)
        >>> model.lowbit_record.policy.rules
        (Rule(match='1', type=None, weight=2, activation=None, output=None),)
    """
    record, layers = record_of(model), layer_quantizers(model)
    if record is None:
        return
    own = {name: Rule(glob.escape(name), weight=found.bits.weight or "float") for name, found in layers.items() if found.weight is not None}
    named = {rule.match for rule in own.values()}
    said = tuple(rule for rule in record.policy.rules if rule.match not in named or rule != Rule(rule.match, weight=rule.weight))
    asked = _by_policy(replace(record.policy, rules=said), layers, record.table.positions)
    chosen = (rule for name, rule in own.items() if asked[name].weight != layers[name].bits.weight)
    attach_record(model, replace(record, policy=replace(record.policy, rules=(*said, *chosen))))
    _update_table(record.table, layers)


def raised_bits(own: LayerBits, stage: LayerBits) -> LayerBits:
    """Bits of a layer at a stage of lowering: its own, or those of the stage where these are more; ``None`` there is float.

    >>> raised_bits(LayerBits(2, 4), LayerBits(3, None))
    LayerBits(weight=3, activation=None, output=None)
    """

    def wider(asked: int | None, bits: int | None) -> int | None:
        return None if asked is None or bits is None else max(asked, bits)

    return LayerBits(wider(own.weight, stage.weight), wider(own.activation, stage.activation), own.output)


def _select(model: nn.Module, bits: BitsLike | Mapping[str, BitsLike] | BitPolicy) -> None:
    """Change the bits of a loaded network."""
    assert isinstance(model, HoldsWidths)
    record, widths = record_of(model), model.layer_widths()
    if record is not None and not record.switches and isinstance(bits, (int, LayerBits)) and _is_default(record, bits):
        return  # the width that it has
    if record is None or not record.switches:
        raise LayerError(
            f"{type(model).__name__} holds one width, {_held(widths)}, as its file does. Load a file that holds several: one that "
            "lowbit.export wrote, without bits=, from a network trained for them (lowbit.prepare(bits=[8, 4, 2]))."
        )
    asked, switch = _switched(record, widths, bits)
    model.select_widths({**{name: own.bits for name, own in widths.items()}, **asked}, switch)


def _is_default(record: QuantizationRecord, bits: int | LayerBits) -> bool:
    asked, own = _layer_bits(bits), record.policy.default
    return asked.weight == own.weight and asked.activation in ((own.activation,) if isinstance(bits, LayerBits) else (own.activation, bits))


def _held(widths: Mapping[str, LayerWidths]) -> str:
    """The bits of the layers, in words: the first and the last one often differ from the others."""
    return " and ".join(dict.fromkeys(switch_name(own.bits) for own in widths.values())) or "which it does not say"


def _change(model: nn.Module, bits: BitsLike | Mapping[str, BitsLike] | BitPolicy, *, is_lowering: bool) -> None:
    layers, record, switch = layer_quantizers(model), record_of(model), None
    if not any(found.weight or found.activation or found.output for found in layers.values()):
        raise LayerError(f"{type(model).__name__} has no quantizers whose bits could be changed. Prepare or quantize it first.")
    if record is None or not record.switches:
        asked = _asked(model, layers, bits)
    else:
        asked, switch = _switched(record, _widths(record, layers), bits)
    changes = _changes(layers, asked, record)
    followers = [module for module in model.modules() if isinstance(module, FollowsBits)]
    after = {**{name: found.bits for name, found in layers.items()}, **asked} if followers else {}
    choices = [follower.choose(after, switch) for follower in followers]
    weights = {f.weight: insert.float_weight(f.layer, f.parameter).detach() for f in layers.values() if f.weight is not None}
    for quantizer, width in changes.items():
        if is_lowering and width is not None and width < quantizer.bit_width:
            quantizer.forget_grid_for(width)
            quantizer.set_bit_width(width)
        else:
            quantizer.set_bit_width(width, weights.get(quantizer))
    for follower, choice in zip(followers, choices, strict=True):
        follower.select(choice)
    if record is not None:
        _update_table(record.table, layers)


def _update_table(table: LayerTable, layers: Mapping[str, LayerQuantizers]) -> None:
    """Let the rows say the bits that the layers have now."""
    for row in list(table):
        if row.name in layers:
            now = layers[row.name].bits
            table.add(replace(row, weight_bits=now.weight, activation_bits=now.activation, output_bits=now.output))


def _changes(
    layers: Mapping[str, LayerQuantizers], asked: Mapping[str, LayerBits], record: QuantizationRecord | None
) -> dict[Quantizer, int | None]:
    """The new width of each quantizer, checked."""
    changes: dict[Quantizer, int | None] = {}
    names: dict[Quantizer, str] = {}
    supported = _method_widths(record)
    for name, wanted in asked.items():
        for part in get_args(Part):
            quantizer, width = getattr(layers[name], part), getattr(wanted, part)
            if quantizer is None:
                continue
            if width is not None:
                _check_width(quantizer, name, part, width, record, supported.get(part))
            other = names.setdefault(quantizer, name)
            if changes.setdefault(quantizer, width) != width:
                raise SpecError(
                    f"layers {other!r} and {name!r} share one {part} quantizer, so they cannot have {changes[quantizer]} and {width} bits. "
                    "Give both the same."
                )
    return changes


def _method_widths(record: QuantizationRecord | None) -> dict[Part, range]:
    """The widths that the network's method has, as far as it is registered: one of a file leaves them to its quantizers."""
    info = None if record is None else next((known for known in list_methods() if known.name == record.method), None)
    if info is None:
        return {}
    return {"weight": info.weight_bits, **({} if info.activation_bits is None else {"activation": info.activation_bits})}


def _check_width(
    quantizer: Quantizer, name: str, part: Part, width: int, record: QuantizationRecord | None, supported: range | None
) -> None:
    """SpecError where the quantizer has no such width, or the network's method in a layer that it quantizes itself."""
    is_excepted = record is not None and record.policy.first_last is not None and name in record.table.positions
    if record is not None and supported is not None and width not in supported and not is_excepted:
        raise SpecError(
            f"layer {name!r}: {record.method} has {part} bits {', '.join(map(str, supported))}, got {width}. Choose one of them."
        )
    try:
        quantizer.check_has(width)
    except SpecError as error:
        raise SpecError(f"layer {name!r}, {part}: {error}") from error


def _asked(
    model: nn.Module, layers: Mapping[str, LayerQuantizers], bits: BitsLike | Mapping[str, BitsLike] | BitPolicy
) -> dict[str, LayerBits]:
    """The bits of each layer that is to change."""
    record = record_of(model)
    positions: Mapping[str, Position] = {} if record is None else record.table.positions
    if isinstance(bits, BitPolicy):
        check_policy(bits, {name: found.layer for name, found in layers.items()})
        asked = _by_policy(bits, layers, positions)
        _require(asked, layers, record)
        return asked
    if isinstance(bits, Mapping):
        return _by_pattern(bits, layers, record)
    if bits is None or record is None:
        asked = dict.fromkeys(layers, _layer_bits(bits))
    else:
        asked = _by_policy(replace(record.policy, default=_layer_bits(bits)), layers, positions)
    if isinstance(bits, LayerBits):
        _require(asked, layers, record)
    return asked


def _switched(
    record: QuantizationRecord, widths: Mapping[str, LayerWidths], bits: BitsLike | Mapping[str, BitsLike] | BitPolicy
) -> tuple[dict[str, LayerBits], LayerBits | None]:
    """The bits of each layer of a network of several widths, and the switch that gives them, where it is one."""
    if not isinstance(bits, (Mapping, BitPolicy)):
        switch = _switch(record, bits)
        place = record.switches.index(switch)
        return {name: own.at[place] for name, own in widths.items()}, switch
    if isinstance(bits, Mapping):
        asked = _mixed(record, widths, bits)
        for place, switch in enumerate(record.switches):
            if all(asked.get(name, own.bits) == own.at[place] for name, own in widths.items()):
                return asked, switch
        if record.switching == "layer":
            return asked, None
    advice = "Give a mapping of patterns" if record.switching == "layer" else f"Give one of {_listed(record)}"
    raise SpecError(f"this network, trained by {record.method}, switches each {record.switching} between its widths. {advice}.")


def _widths(record: QuantizationRecord, layers: Mapping[str, LayerQuantizers]) -> dict[str, LayerWidths]:
    """The bits of every layer now and at every switch, as far as it has quantizers."""
    at_switches = [_by_policy(replace(record.policy, default=switch), layers, record.table.positions) for switch in record.switches]

    def existing(found: LayerQuantizers, wanted: LayerBits) -> LayerBits:
        return LayerBits(*(None if getattr(found, part) is None else getattr(wanted, part) for part in get_args(Part)))

    return {
        name: LayerWidths(found.bits, tuple(existing(found, at[name]) for at in at_switches), found.layer) for name, found in layers.items()
    }


def _mixed(record: QuantizationRecord, widths: Mapping[str, LayerWidths], bits: Mapping[str, BitsLike]) -> dict[str, LayerBits]:
    """Bits by patterns; layers of one width have it at every switch, so that patterns pass them over."""
    fixed = {name for name, own in widths.items() if len(set(own.at)) == 1}
    if len(record.switches) == 1:  # all have one width; those that do not have that of the switch are the exceptions
        fixed = {name for name in fixed if not _is_part(widths[name].at[0], record.switches[0])}
    asked: dict[str, LayerBits] = {}
    said: dict[str, str] = {}
    for pattern, value in bits.items():
        matching = _matching(pattern, widths)
        said |= dict.fromkeys(matching, pattern)
        for name in matching:
            own = widths[name]
            is_own = value in own.at  # what get_bits says of the layer
            if name not in fixed:
                asked[name] = cast(LayerBits, value) if is_own else own.at[record.switches.index(_switch(record, value))]
            elif name == pattern and not is_own and switch_name(_layer_bits(value)) != switch_name(own.bits):
                raise SpecError(f"layer {name!r}: the network was trained with {switch_name(own.bits)} there alone. Leave it out.")
    for name, main in record.tied.items():
        wanted = asked.get(main, widths[main].bits)
        if asked.get(name, wanted) != wanted and not widths[main].matches(said[name], main):
            raise SpecError(
                f"layer {name!r} always has the bits of {main!r}, the last layer on the other side of its sum: {switch_name(wanted)}, got "
                f"{switch_name(asked[name])}. Give both the same, or leave {name!r} out."
            )
        if main in asked:
            asked[name] = wanted
        else:
            asked.pop(name, None)
    return asked


def _is_part(bits: LayerBits, switch: LayerBits) -> bool:
    """Whether a layer that may lack some quantizers has the bits of the switch."""
    return bits.weight in (None, switch.weight) and bits.activation in (None, switch.activation)


def _switch(record: QuantizationRecord, bits: BitsLike) -> LayerBits:
    """The switch that ``bits`` names; a number is that of the weights."""
    if isinstance(bits, LayerBits):
        fitting = [s for s in record.switches if (s.weight, s.activation) == (bits.weight, bits.activation)]
    else:
        width = parse_bits(bits, "bits")
        fitting = [s for s in record.switches if s.weight == width]
        fitting = [s for s in fitting if s.activation == width] or fitting
    if len(fitting) != 1:
        given = switch_name(bits) if isinstance(bits, LayerBits) else bits
        raise SpecError(f"this network was trained for the widths {_listed(record)}, got {given}. Choose one of them.")
    return fitting[0]


def _listed(record: QuantizationRecord) -> str:
    return ", ".join(map(switch_name, record.switches))


def _by_policy(policy: BitPolicy, layers: Mapping[str, LayerQuantizers], positions: Mapping[str, Position]) -> dict[str, LayerBits]:
    return {name: policy_bits(policy, name, found.layer, positions.get(name, "inner")) for name, found in layers.items()}


def _by_pattern(
    bits: Mapping[str, BitsLike], layers: Mapping[str, LayerQuantizers], record: QuantizationRecord | None
) -> dict[str, LayerBits]:
    asked: dict[str, LayerBits] = {}
    for pattern, value in bits.items():
        matching = _matching(pattern, {name: LayerWidths(found.bits, layer=found.layer) for name, found in layers.items()})
        chosen = dict.fromkeys(matching, _layer_bits(value))
        if isinstance(value, LayerBits):
            _require(chosen, layers, record)
        asked |= chosen
    return asked


def _matching(pattern: str, layers: Mapping[str, LayerWidths]) -> list[str]:
    """The layers that the pattern fits; SpecError where there is none."""
    found = [name for name, layer in layers.items() if layer.matches(pattern, name)]
    if not found:
        raise SpecError(f"bits for {pattern!r}: no layer matches. The model has: {', '.join(layers)}.")
    return found


def _require(asked: Mapping[str, LayerBits], layers: Mapping[str, LayerQuantizers], record: QuantizationRecord | None) -> None:
    """SpecError where bits are asked for what has no quantizer; inputs and outputs of layers that the sample never reached have none."""
    promised = {} if record is None else _by_policy(record.policy, layers, record.table.positions)
    for name, wanted in asked.items():
        if wanted.weight is not None and layers[name].weight is None:
            raise SpecError(
                f"layer {name!r}: its weight is in float and has no quantizer, asked for {wanted.weight} bits. Leave it at None."
            )
        for part, where in (("activation", "input"), ("output", "output")):
            width, is_unreached = getattr(wanted, part), getattr(promised.get(name), part, None) is not None
            if width is not None and getattr(layers[name], part) is None and not is_unreached:
                raise SpecError(f"layer {name!r}: its {where} is in float and has no quantizer, asked for {width} bits. Leave it at None.")


def _layer_bits(bits: BitsLike) -> LayerBits:
    return bits if isinstance(bits, LayerBits) else LayerBits(bits, bits, bits)


def _record(model: nn.Module) -> QuantizationRecord:
    record = record_of(model)
    if record is None:
        raise SpecError(
            f"{type(model).__name__} does not say how it was quantized. Use the network that lowbit.prepare or quantize returned."
        )
    return record
