"""Bits as state: the current bits of each layer of a quantized network, and how to change them in place.

Nothing is prepared again: every quantizer changes its own bit-width and keeps what it learned (``Quantizer.set_bit_width``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from lowbit.errors import LayerError, SpecError
from lowbit.network import insert
from lowbit.network.layers import WEIGHT, WEIGHT_ONLY
from lowbit.network.record import QuantizationRecord, record_of
from lowbit.quantizers import Quantizer
from lowbit.registry import get_method
from lowbit.spec import BitPolicy, LayerBits, Position, Rule, matches

BitsLike = int | LayerBits | None
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
    return {name: quantizers.bits for name, quantizers in layer_quantizers(model).items()}


def asked_bits(model: nn.Module) -> dict[str, LayerBits]:
    """Bits that the policy in the network's record asks for each layer, whatever it has now; SpecError without a record."""
    record = _record(model)
    return _by_policy(record.policy, layer_quantizers(model), record.table.positions)


def set_bits(model: nn.Module, bits: BitsLike | Mapping[str, BitsLike] | BitPolicy) -> None:
    """Change the bits of a quantized network in place; nothing is changed if an error is raised.

    Layers keep what they learned at every width, so changing bits and changing them back has no effect. ``lowbit.summary`` and the
    network's record show the new bits.

    Args:
        model: A network from ``lowbit.prepare``, ``lowbit.train`` or ``lowbit.quantize``.
        bits: A number sets every existing quantizer except in layers that the network's policy excepts (the first and last one, and
            those named by a rule). ``LayerBits`` does the same, but raises an error if a layer lacks a requested quantizer. ``None``
            gives the float network. A mapping from name patterns (``"layer1.*"``) to any of these sets the layers that match; later
            patterns win. A ``BitPolicy`` sets every layer.

    Raises:
        SpecError: A width that the method or a quantizer does not support (the message lists those it does), a pattern that matches no
            layer, different bits for layers that share a quantizer, or a layer without a requested quantizer.
        LayerError: A network without quantizers.

    Example:
        >>> import torch, lowbit
        >>> float_model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
        >>> model = lowbit.prepare(float_model, method="lsq", sample=torch.randn(8, 4))
        >>> lowbit.set_bits(model, 3)
        >>> lowbit.set_bits(model, {"0": lowbit.LayerBits(weight=5, activation=6)})
        >>> [(bits.weight, bits.activation) for bits in lowbit.get_bits(model).values()]
        [(5, 6), (3, 3), (8, 8)]
    """
    layers = layer_quantizers(model)
    if not any(found.weight or found.activation or found.output for found in layers.values()):
        raise LayerError(f"{type(model).__name__} has no quantizers whose bits could be changed. Prepare or quantize it first.")
    asked = _asked(model, layers, bits)
    changes: dict[Quantizer, tuple[int | None, str]] = {}
    for name, wanted in asked.items():
        for part in get_args(Part):
            _note(changes, model, layers, name, part, getattr(wanted, part))
    weights = {f.weight: insert.float_weight(f.layer, f.parameter).detach() for f in layers.values() if f.weight is not None}
    for quantizer, (width, _) in changes.items():
        quantizer.set_bit_width(width, weights.get(quantizer))
    record = record_of(model)
    for row in [] if record is None else list(record.table):
        if record is not None and row.name in layers:
            now = layers[row.name].bits
            record.table.add(replace(row, weight_bits=now.weight, activation_bits=now.activation, output_bits=now.output))


def _note(
    changes: dict[Quantizer, tuple[int | None, str]],
    model: nn.Module,
    layers: Mapping[str, LayerQuantizers],
    name: str,
    part: Part,
    width: int | None,
) -> None:
    """Add one quantizer and its new width to ``changes``, checked."""
    quantizer: Quantizer | None = getattr(layers[name], part)
    if quantizer is None:
        return
    if width is not None:
        _check_method(model, name, part, width)
        try:
            quantizer.check_has(width)
        except SpecError as error:
            raise SpecError(f"layer {name!r}, {part}: {error}") from error
    before, other = changes.setdefault(quantizer, (width, name))
    if before != width:
        raise SpecError(
            f"layers {other!r} and {name!r} share one {part} quantizer, so they cannot have {before} and {width} bits. Give both the same."
        )


def _check_method(model: nn.Module, name: str, part: Part, width: int) -> None:
    """SpecError where the network's method has no such width in a layer that it quantizes itself."""
    record = record_of(model)
    if record is None or (record.policy.first_last is not None and name in record.table.positions):
        return
    info = get_method(record.method)
    widths = info.weight_bits if part == "weight" else info.activation_bits if part == "activation" else None
    if widths is not None and width not in widths:
        raise SpecError(f"layer {name!r}: {record.method} has {part} bits {', '.join(map(str, widths))}, got {width}. Choose one of them.")


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


def _by_policy(policy: BitPolicy, layers: Mapping[str, LayerQuantizers], positions: Mapping[str, Position]) -> dict[str, LayerBits]:
    return {name: policy_bits(policy, name, found.layer, positions.get(name, "inner")) for name, found in layers.items()}


def _by_pattern(
    bits: Mapping[str, BitsLike], layers: Mapping[str, LayerQuantizers], record: QuantizationRecord | None
) -> dict[str, LayerBits]:
    asked: dict[str, LayerBits] = {}
    for pattern, value in bits.items():
        matching = [name for name, found in layers.items() if name == pattern or matches(pattern, name, found.layer)]
        if not matching:
            raise SpecError(f"bits for {pattern!r}: no layer matches. The model has: {', '.join(layers)}.")
        chosen = dict.fromkeys(matching, _layer_bits(value))
        if isinstance(value, LayerBits):
            _require(chosen, layers, record)
        asked |= chosen
    return asked


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
