"""One network on its way from float to quantized: the requested bits, the inserted quantizers, the result for each layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, overload

import torch
from torch import nn

from lowbit.errors import CalibrationError, LayerError, LowbitError, SpecError
from lowbit.inputs import Inputs
from lowbit.network import insert
from lowbit.network.layers import execution_order, layer_kind, quantizable_layers
from lowbit.network.placement import Placement
from lowbit.network.slot import MergeFactory, QuantizerFactory, Slot
from lowbit.network.surgery.merge import merge_reparametrized
from lowbit.network.table import LayerRecord, LayerTable, Status
from lowbit.network.usage import WeightsUsed
from lowbit.progress import Progress
from lowbit.quantizers import Quantizer
from lowbit.registry import MethodInfo
from lowbit.spec import BitPolicy, LayerBits, Position


@dataclass
class NetworkJob:
    """A network, the bits asked for each of its layers, and the quantizers put in so far.

    Attributes:
        model: The copy that is being quantized.
        policy: Bits for each layer.
        sample: Inputs of one call, used for shapes and the order of layers.
        seed: Seed of everything random.
        table: What was done to each layer.
        layers: Layers that get quantized weights, in execution order.
        positions: The first and the last layer to run, by name.
        placements: Where activation quantizers were put.

    Raises:
        LayerError: Nothing to quantize, a network that is quantized already, or a weight that is not finite.
        SpecError: A policy that does not fit the network.
        CalibrationError: The sample does not fit the network.
    """

    allows_float_weights: ClassVar[bool] = False  # whether quantizing inputs or outputs alone is something to do

    model: nn.Module
    policy: BitPolicy
    sample: Inputs
    seed: int = 0
    progress: Progress = field(default_factory=Progress.silent)
    table: LayerTable = field(default_factory=LayerTable)

    def __post_init__(self) -> None:
        everything = quantizable_layers(self.model)
        if not everything:
            raise LayerError(f"{type(self.model).__name__} has no layer to quantize; lowbit quantizes convolutions and linear layers.")
        if insert.quantized_layers(self.model):
            raise LayerError(f"{type(self.model).__name__} is quantized already. Start from the float network.")
        self.policy.check(everything)
        self._note_merged(merge_reparametrized(self.model))
        self._check_weights(everything)
        self._called, self._used = _run_sample(self.model, self.sample)
        self.positions: dict[str, Position] = {self._called[0]: "first", self._called[-1]: "last"} if self._called else {}
        self._bits = {
            name: self.policy.bits_for(name, layer, position=self.positions.get(name, "inner")) for name, layer in everything.items()
        }
        self.layers = {
            name: everything[name] for name in dict.fromkeys([*self._called, *everything]) if self._bits[name].weight is not None
        }
        if not self.layers and not (self.allows_float_weights and (self.activation_bits or self.output_bits)):
            raise LayerError(f"the policy leaves every layer of {type(self.model).__name__} in float, so there is nothing to do.")
        for name, layer in self.layers.items():
            if not bool(torch.isfinite(layer.weight).all()):  # type: ignore[arg-type]
                raise LayerError(
                    f"layer {name!r} ({type(layer).__name__}): its weight holds NaN or infinite values. Check the weights file."
                )
        self._all_layers = everything
        self.placements: list[Placement] = []
        self._kept: dict[str, str] = {}

    def _note_merged(self, merged: dict[str, str]) -> None:
        by_kind: dict[str, list[str]] = {}
        for name, kind in merged.items():
            by_kind.setdefault(kind, []).append(name)
        for kind, names in by_kind.items():
            self.table.note(f"{kind} was merged into plain parameters: {', '.join(names)}")

    @staticmethod
    def _check_weights(layers: dict[str, nn.Module]) -> None:
        for name, layer in layers.items():
            if not isinstance(layer._parameters.get("weight"), nn.Parameter):
                raise LayerError(
                    f"layer {name!r} ({type(layer).__name__}): its weight is no parameter but computed by a hook of its own. "
                    "Make the weight a parameter, or compute it by torch.nn.utils.parametrize."
                )

    def bits(self, name: str) -> LayerBits:
        """What the policy asks for the layer ``name``."""
        return self._bits[name]

    def keep_float(self, name: str, reason: str) -> None:
        """Leave the layer ``name`` in float, whatever the policy asks; before quantizers are inserted."""
        self._bits[name] = LayerBits(None, None)
        self.layers.pop(name, None)
        self._kept[name] = reason

    def is_excepted(self, name: str) -> bool:
        """Whether the layer ``name`` gets other quantizers than the method's."""
        return False

    @property
    def activation_bits(self) -> dict[str, int]:
        """The layers that run and whose input is to be quantized, in execution order, with its bits."""
        bits = ((name, self._bits[name].activation) for name in self._called)
        return {name: value for name, value in bits if value is not None}

    @property
    def output_bits(self) -> dict[str, int]:
        """The layers that run and whose output is to be quantized, in execution order, with its bits."""
        bits = ((name, self._bits[name].output) for name in self._called)
        return {name: value for name, value in bits if value is not None}

    @property
    def merge_bits(self) -> int | None:
        """Bits of what takes part in sums, concatenations and pooling; ``None`` is float, also where the policy says nothing."""
        return self.policy.merges if isinstance(self.policy.merges, int) else None

    def generator(self) -> torch.Generator:
        """A random generator that starts at the job's seed."""
        return torch.Generator().manual_seed(self.seed)

    def weight_slot(self, name: str) -> Slot:
        """The place of the weight quantizer of the layer ``name``."""
        bit_width = self._bits[name].weight
        assert bit_width is not None
        return Slot(name, self.layers[name], bit_width, position=self.positions.get(name, "inner"))

    def slot(self, placement: Placement, *, is_signed: bool = True) -> Slot:
        """The place of an activation quantizer as a method sees it."""
        name = placement.name if placement.layer is None else placement.layer
        return Slot(
            name,
            self.model.get_submodule(placement.sites[0].module if placement.layer is None else name),
            placement.bit_width,
            is_signed,
            self.positions.get(name, "inner"),
            placement.purpose,
            placement.operand_of,
            placement.result_of,
        )

    def insert_weights(self, factory: QuantizerFactory) -> None:
        """Give every layer of ``layers`` the weight quantizer of ``factory(slot)``, initialized from its weight."""
        with self.progress.stage("weight ranges", total=len(self.layers)) as stage:
            for name, layer in self.layers.items():
                slot = self.weight_slot(name)
                quantizer = made_for(slot, factory)
                try:
                    quantizer.initialize(layer.weight.detach())  # type: ignore[operator]
                except LowbitError as error:
                    raise LayerError(f"{slot}: {error}") from error
                insert.set_weight_quantizer(layer, quantizer)
                stage.advance(note=name)

    def place(self, placement: Placement, quantizer: Quantizer) -> None:
        """Hook ``quantizer`` at every site of ``placement``."""
        self.placements.append(placement)
        for site in placement.sites:
            module = self.model.get_submodule(site.module)
            (insert.set_input_quantizer if site.side == "input" else insert.set_output_quantizer)(module, quantizer)

    def finish(self) -> LayerTable:
        """Fill the table; LayerError when a layer did not get what the policy asked for."""
        self.table.positions = dict(self.positions)
        self.table.inputs = {name: placement.name for placement in self.placements for name in placement.layers}
        self.table.outputs = {p.output_of: p.name for p in self.placements if p.output_of is not None}
        fed = {name: placement.bit_width for placement in self.placements for name in placement.layers}
        given = {placement.output_of: placement.bit_width for placement in self.placements}
        for name in [*self._called, *(n for n in self._all_layers if n not in self._called)]:
            layer, asked = self._all_layers[name], self._bits[name]
            quantizer = insert.weight_quantizer(layer)
            weight_bits = None if quantizer is None else quantizer.bit_width
            if weight_bits != asked.weight:
                raise LayerError(f"layer {name!r}: asked for {asked.weight} weight bits, got {weight_bits}")
            reasons = []
            if asked.weight is None:
                reasons.append(self._kept.get(name, "the policy keeps its weight in float"))
            if name in self._used:
                reasons.append("its weight is used without calling the layer; its input stays in float")
            elif name not in self._called:
                reasons.append("the sample never calls this layer: its input and output are not quantized")
            elif asked.activation is not None and name not in fed:
                raise LayerError(f"layer {name!r}: asked for {asked.activation} activation bits, but its input could not be quantized")
            elif asked.output is not None and name not in given:
                raise LayerError(f"layer {name!r}: asked for {asked.output} output bits, but its output could not be quantized")
            status: Status = "skipped" if quantizer is None else "done"
            self.table.add(LayerRecord(name, layer_kind(layer), weight_bits, fed.get(name), status, "; ".join(reasons), given.get(name)))
        return self.table


@overload
def made_for(slot: Slot, factory: QuantizerFactory) -> Quantizer: ...


@overload
def made_for(slot: Slot, factory: MergeFactory) -> Quantizer | None: ...


def made_for(slot: Slot, factory: MergeFactory) -> Quantizer | None:
    """What ``factory`` makes for ``slot``; its errors name the place."""
    try:
        return factory(slot)
    except LowbitError as error:
        raise LayerError(f"{slot}: {error}") from error


def _run_sample(model: nn.Module, sample: Inputs) -> tuple[list[str], set[str]]:
    """The layers that the sample calls, in order, and those that it does not call but whose weight it uses."""
    try:
        with WeightsUsed(quantizable_layers(model)) as used:
            called = execution_order(model, sample)
        return called, used.names.difference(called)
    except LowbitError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in sample.tensors)
        raise CalibrationError(
            f"{type(model).__name__} fails on inputs of shape {shapes}: {type(error).__name__}: {error}. Give samples of the shape that it takes."
        ) from error


def check_method_bits(info: MethodInfo, policy: BitPolicy, job: NetworkJob) -> None:
    """SpecError when the policy asks for bits that the method does not support in a layer that it quantizes itself."""
    for name in dict.fromkeys([*job.layers, *job.activation_bits]):
        if job.is_excepted(name):
            continue
        bits = job.bits(name)
        if bits.weight is not None and bits.weight not in info.weight_bits:
            raise SpecError(
                f"layer {name!r}: {info.name} supports {_span(info.weight_bits)} weight bits, got {bits.weight}. Choose other bits or another method."
            )
        if bits.activation is not None and info.activation_bits is not None and bits.activation not in info.activation_bits:
            raise SpecError(
                f"layer {name!r}: {info.name} supports {_span(info.activation_bits)} activation bits, got {bits.activation}. Choose other bits or another method."
            )


def _span(bits: range) -> str:
    return f"{bits.start} to {bits.stop - 1}"
