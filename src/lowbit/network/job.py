"""One network on its way from float to quantized: the requested bits, the inserted quantizers, the result for each layer."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, overload

import torch
from torch import Tensor, nn

from lowbit.errors import CalibrationError, LayerError, LowbitError, SpecError
from lowbit.inputs import Inputs
from lowbit.network import insert
from lowbit.network.bits import check_policy, policy_bits, unhonoured_rules
from lowbit.network.calls import on_input
from lowbit.network.insert import WeightSite, weight_sites
from lowbit.network.layers import NORMS, WEIGHT, evaluating, execution_order, is_random, layer_kind, shuffled_layers, weights_of
from lowbit.network.placement import Placement, Site
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
        weights: Weights that get quantized by the names of their sites, in execution order: those of ``layers``, and those of embeddings,
            recurrent layers and attention, which are only stored in few bits and computed with in float.
        layers: Convolutions and linear layers that get quantized weights, in execution order.
        positions: The weights of the first and the last layer to run, by the names of their sites.
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
        if insert.quantized_weights(self.model):
            raise LayerError(f"{type(self.model).__name__} is quantized already. Start from the float network.")
        self._note_merged(merge_reparametrized(self.model))
        everything = weight_sites(self.model)
        if not everything:
            raise LayerError(
                f"{type(self.model).__name__} has no layer to quantize; lowbit quantizes convolutions, linear layers, embeddings, recurrent "
                "layers and attention."
            )
        check_policy(self.policy, {name: site.layer for name, site in everything.items()})
        self._check_weights(everything)
        order, self._used = _run_sample(self.model, self.sample, everything)
        self._note_random()
        self._called = [name for name in order if not everything[name].is_weight_only]
        self.positions = positions_of(order, everything, shuffled_layers(self.model, self.sample))
        self._everything, self._order, self._others = everything, order, _others(self.model)
        self.placements: list[Placement] = []
        self._kept: dict[str, str] = {}
        self._remarks: dict[str, list[str]] = {}
        self.set_policy(self.policy)

    def set_policy(self, policy: BitPolicy) -> None:
        """Ask for the bits of ``policy`` from now on; before quantizers are inserted. Layers that were kept in float stay so.

        Raises:
            LayerError: It leaves every layer in float, or a weight to quantize is not finite.
        """
        self.policy = policy
        self._bits = {
            name: policy_bits(policy, name, site.layer, self.positions.get(name, "inner")) for name, site in self._everything.items()
        }
        in_turn = dict.fromkeys([*self._order, *self._everything])
        self.weights = {name: self._everything[name] for name in in_turn if self._bits[name].weight is not None}
        self.layers = {name: site.layer for name, site in self.weights.items() if not site.is_weight_only}
        if not self.weights and not (self.allows_float_weights and (self.activation_bits or self.output_bits)):
            raise LayerError(f"the policy leaves every layer of {type(self.model).__name__} in float, so there is nothing to do.")
        for name, site in self.weights.items():
            if not bool(torch.isfinite(site.original).all()):
                raise LayerError(
                    f"layer {name!r} ({type(site.layer).__name__}): its weight holds NaN or infinite values. Check the weights file."
                )
        self._leave_what_changes_itself()
        for name, reason in list(self._kept.items()):
            self.keep_float(name, reason)

    def _note_merged(self, merged: dict[str, str]) -> None:
        by_kind: dict[str, list[str]] = {}
        for name, kind in merged.items():
            by_kind.setdefault(kind, []).append(name)
        for kind, names in by_kind.items():
            self.table.note(f"{kind} was merged into plain parameters: {', '.join(names)}")

    def _note_random(self) -> None:
        """Say so where two calls with the same inputs differ; two samples are enough to see that."""
        try:
            random = is_random(self.model, self.sample.take(0, 2))
        except Exception:  # it may take no other batch size
            return
        if random:
            self.table.note(
                "the network is random: two calls in evaluation mode with the same inputs give different outputs, so it cannot be exported, "
                "and figures vary. Look for dropout that is always on (training=True, or p= without self.training) and for torch.rand"
            )

    @staticmethod
    def _check_weights(sites: dict[str, WeightSite]) -> None:
        for name, site in sites.items():
            if not isinstance(site.layer._parameters.get(site.parameter), nn.Parameter):
                raise LayerError(
                    f"layer {name!r} ({type(site.layer).__name__}): its weight is no parameter but computed by a hook of its own. "
                    "Make the weight a parameter, or compute it by torch.nn.utils.parametrize."
                )

    def _leave_what_changes_itself(self) -> None:
        """Embeddings with ``max_norm`` shrink rows of their weight in place in every call, which a quantized weight forgets."""
        for name, site in list(self.weights.items()):
            if getattr(site.layer, "max_norm", None) is not None:
                self.keep_float(name, "max_norm changes its weight in every call")

    def bits(self, name: str) -> LayerBits:
        """What the policy asks for the weight ``name`` and its layer."""
        return self._bits[name]

    def keep_float(self, name: str, reason: str) -> None:
        """Leave the layer ``name`` in float, whatever the policy asks; before quantizers are inserted."""
        self._bits[name] = LayerBits(None, None)
        self.layers.pop(name, None)
        self.weights.pop(name, None)
        self._kept[name] = reason

    def keep_outside_float(self, layers: Collection[str], where: str) -> None:
        """Leave everything but ``layers`` in float, which lie in ``where``; before quantizers are inserted.

        Raises:
            SpecError: None of ``layers`` is to be quantized.
        """
        if not any(name in self.weights for name in layers):
            raise SpecError(
                f"{type(self.model).__name__} has no {where} with layers to quantize. Leave blocks_only out to quantize all layers."
            )
        for name in [name for name in self.weights if name not in layers]:
            self.keep_float(name, f"it lies outside of {where}")

    def keep_input_float(self, name: str) -> None:
        """Leave the input of the layer ``name`` in float; before quantizers are inserted."""
        self._bits[name] = replace(self._bits[name], activation=None)

    def ask_output(self, name: str, bits: int) -> None:
        """Ask for these bits of the output of the layer ``name``; before quantizers are inserted."""
        self._bits[name] = replace(self._bits[name], output=bits)

    def runs(self, name: str) -> bool:
        """Whether the sample calls the layer ``name``."""
        return name in self._called

    def remark(self, name: str, text: str) -> None:
        """What the table says of the weight ``name``, which is quantized, besides."""
        self._remarks.setdefault(name, []).append(text)

    def remark_others(self, text: str) -> None:
        """What the table says of all weights outside ``layers``: what the method does to convolutions and linear layers alone."""
        for name in self.weights:
            if name not in self.layers:
                self.remark(name, text)

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
        """The place of the quantizer of the weight ``name``."""
        bit_width, site = self._bits[name].weight, self.weights[name]
        assert bit_width is not None
        return Slot(name, site.layer, bit_width, position=self.positions.get(name, "inner"), parameter=site.parameter)

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

    def signs(self, placements: Iterable[Placement]) -> dict[str, bool]:
        """Whether the tensors of these placements, by their names, hold negative values for the sample in evaluation mode."""
        names = {site: placement.name for placement in placements for site in placement.sites}
        signs = dict.fromkeys(names.values(), False)

        def note(site: Site, x: object) -> None:
            signs[names[site]] |= isinstance(x, Tensor) and bool((x < 0).any())

        handles = []
        for site in names:  # behind the transforms of a layer
            module = self.model.get_submodule(site.module)
            if site.side == "input":
                handles.append(on_input(module, partial(note, site)))
            else:
                handles.append(module.register_forward_hook(lambda _module, _args, output, site=site: note(site, output)))
        try:
            with evaluating(self.model):
                self.model(*self.sample.args, **self.sample.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return signs

    def insert_weights(self, factory: QuantizerFactory) -> None:
        """Give every weight of ``weights`` the quantizer of ``factory(slot)``, initialized from it."""
        with self.progress.stage("weight ranges", total=len(self.weights)) as stage:
            for name, site in self.weights.items():
                slot = self.weight_slot(name)
                quantizer = made_for(slot, factory)
                try:
                    quantizer.initialize(site.original.detach())
                except LowbitError as error:
                    raise LayerError(f"{slot}: {error}") from error
                self.set_weight(site, quantizer)
                stage.advance(note=name)

    def set_weight(self, site: WeightSite, quantizer: Quantizer) -> None:
        """Quantize the weight at ``site`` by ``quantizer``."""
        insert.set_weight_quantizer(site.layer, quantizer, site.parameter)
        if getattr(site.layer, "sparse", False):  # a scale depends on all rows
            site.layer.sparse = False  # type: ignore[assignment]
            self.remark(site.name, "its gradient is dense")

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
        for name in dict.fromkeys([*self._order, *self._everything]):
            site, asked = self._everything[name], self._bits[name]
            quantizer = site.quantizer
            weight_bits = None if quantizer is None else quantizer.bit_width
            if weight_bits != asked.weight:
                raise LayerError(f"layer {name!r}: asked for {asked.weight} weight bits, got {weight_bits}")
            reasons = []
            if asked.weight is None:
                reasons.append(self._kept.get(name, "the policy keeps its weight in float"))
            reasons += self._remarks.get(name, [])
            if site.is_weight_only:
                if asked.weight is not None:
                    reasons.append("what is computed with it stays in float")
                for rule in unhonoured_rules(self.policy, name, site.layer):
                    reasons.append(f"activation bits of the rule with {rule} are not honoured")
                if name not in self._order and name not in self._used:
                    reasons.append("the sample never uses this weight")
            elif name in self._used:
                reasons.append("its weight is used without calling the layer; its input stays in float")
            elif name not in self._called:
                reasons.append("the sample never calls this layer: its input and output are not quantized")
            elif asked.activation is not None and name not in fed:
                raise LayerError(f"layer {name!r}: asked for {asked.activation} activation bits, but its input could not be quantized")
            elif asked.output is not None and name not in given:
                raise LayerError(f"layer {name!r}: asked for {asked.output} output bits, but its output could not be quantized")
            status: Status = "skipped" if quantizer is None else "done"
            row = LayerRecord(name, layer_kind(site.layer), weight_bits, fed.get(name), status, "; ".join(reasons), given.get(name))
            self.table.add(row)
        held = {name for name, module in self.model.named_modules() if module._parameters} | {n for n, _ in self.model.named_parameters()}
        self.table.others = [row for row in self._others if row.name in held]  # folding a norm removes its parameters
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


def positions_of(order: list[str], sites: Mapping[str, WeightSite], shuffled: Sequence[str] = ()) -> dict[str, Position]:
    """The weights of the first and the last layer to run, for weights in the order in which they run.

    Layers of ``shuffled``, whose outputs are rearranged to the pixels of a larger picture, and all behind the first of them are last ones too:
    what they read is what the picture is made of.
    """
    if not order:
        return {}
    names = [sites[name].layer_name for name in order]
    start = min((names.index(layer) for layer in shuffled if layer in names[1:]), default=len(names) - 1)
    ends: dict[str, Position] = {names[0]: "first", **dict.fromkeys(names[start:], "last")}
    return {name: ends[sites[name].layer_name] for name in order if sites[name].layer_name in ends}


def in_order(layers: Sequence[str], sites: Mapping[str, WeightSite]) -> list[str]:
    """The weights of ``layers``, by the names of their sites."""
    by_layer: dict[str, list[str]] = {}
    for name, site in sites.items():
        by_layer.setdefault(site.layer_name, []).append(name)
    return [name for layer in layers for name in by_layer.get(layer, ())]


def _others(model: nn.Module) -> list[LayerRecord]:
    """What holds parameters besides the layers with weights, and why it stays in float: norms by their name, single parameters by theirs."""
    found, known = [], {site.path for site in weight_sites(model).values()}
    for name, module in model.named_modules():
        held = [key for key, parameter in module._parameters.items() if parameter is not None]
        kind = type(module).__name__
        if isinstance(module, NORMS) and held:
            found.append(LayerRecord(name, kind, None, None, "skipped", "norms stay in float"))
            continue
        for parameter in held:
            path = f"{name}.{parameter}" if name else parameter
            if weights_of(module) and (path in known or not parameter.startswith(WEIGHT)):
                continue  # the biases of layers
            reason = f"{kind} computes its weight from it" if weights_of(module) else f"lowbit does not know what {kind} computes with it"
            found.append(LayerRecord(path, "parameter", None, None, "skipped", reason))
    return found


def _run_sample(model: nn.Module, sample: Inputs, sites: Mapping[str, WeightSite]) -> tuple[list[str], set[str]]:
    """The weights whose layers the sample calls, in order, and those that it uses without calling their layers."""
    try:
        with WeightsUsed(sites) as used:
            called = in_order(execution_order(model, sample), sites)
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
    for name in dict.fromkeys([*job.weights, *job.activation_bits]):
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
