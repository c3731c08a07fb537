"""Putting trained quantizers into a network: one for each weight and one at each layer's input, initialized from one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lowbit.errors import CalibrationError, LayerError, LowbitError
from lowbit.network import insert
from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.job import NetworkJob
from lowbit.network.layers import evaluating, output_channel_axis
from lowbit.network.placement import Site, place_at_layers, place_at_tensors
from lowbit.quantizers import LearnedScaleQuantizer, Quantizer
from lowbit.spec import Granularity, Position


@dataclass(frozen=True)
class Slot:
    """A place for a quantizer.

    Attributes:
        name: Of the layer.
        layer: The layer itself.
        bit_width: What the policy asks for.
        is_signed: Whether the values can be negative (weights: always).
        position: Whether the layer is the first or the last one to run.
    """

    name: str
    layer: nn.Module
    bit_width: int
    is_signed: bool
    position: Position

    @property
    def channel_axis(self) -> int:
        """The axis of the weight that counts output channels."""
        return output_channel_axis(self.layer)


QuantizerFactory = Callable[[Slot], Quantizer]


@dataclass
class QatJob(NetworkJob):
    """A network that is made ready for training.

    Layers to which the policy's exception for the first and last one applies get learned-scale quantizers, whatever the method.

    Attributes:
        inserted: The quantizers that ``insert`` put in, each with the name of its layer.
    """

    allows_float_weights = True
    inserted: list[tuple[str, Quantizer]] = field(default_factory=list)

    def insert(self, weights: QuantizerFactory, activations: QuantizerFactory) -> None:
        """Give every layer the quantizers of these factories; they are not initialized yet."""
        signs = self._signs()
        for name, layer in self.layers.items():
            bit_width = self.bits(name).weight
            assert bit_width is not None
            slot = Slot(name, layer, bit_width, True, self.positions.get(name, "inner"))
            quantizer = self._made(slot, self._weight, weights)
            insert.set_weight_quantizer(layer, quantizer)
            self.inserted.append((name, quantizer))
        for placement in place_at_layers(self.activation_bits):
            name = placement.layers[0]
            layer = self.model.get_submodule(name)
            slot = Slot(name, layer, placement.bit_width, signs[name], self.positions.get(name, "inner"))
            quantizer = self._made(slot, self._activation, activations)
            self.place(placement, quantizer)
            self.inserted.append((name, quantizer))

    def initialize(self, initialize_layer: Callable[[nn.Module, Tensor], None]) -> None:
        """Run the sample in training mode and let ``initialize_layer(layer, input)`` set each layer up just before its first call.

        Layers are set up in execution order, so each sees what the quantized layers before it give. Running statistics are
        restored afterwards; layers that never run are initialized from their weight alone.
        """
        pending = dict(self.layers)
        for name in self.activation_bits:
            pending.setdefault(name, self.model.get_submodule(name))
        by_module = {id(layer): name for name, layer in pending.items()}

        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            name = by_module[id(layer)]
            if pending.pop(name, None) is not None:
                try:
                    initialize_layer(layer, _input_of(args, kwargs, is_quantized=name in self.activation_bits))
                except LowbitError as error:
                    raise _named(name, layer, error) from error

        handles = [layer.register_forward_pre_hook(before, prepend=True, with_kwargs=True) for layer in pending.values()]
        self._run_in_training_mode(handles)
        for layer in pending.values():
            quantizer = insert.weight_quantizer(layer)
            if quantizer is not None:
                quantizer.initialize(insert.float_weight(layer).detach())

    def quantize_merges(self, dataflow: Dataflow, bit_width: int) -> None:
        """Quantize what meets in sums and concatenations, their results, and what is pooled, on learned-scale grids.

        A runtime computes a layer in integers only where its result is quantized; with quantizers at the inputs of layers alone, those
        that end in a residual sum are computed in float. Initialized from the sample, each seeing what those before it give.

        Args:
            dataflow: Of the network before quantizers were inserted.
            bit_width: Of all these tensors.
        """
        modules = dict(self.model.named_modules())
        placements = [p for p in place_at_tensors(dataflow, {}) if all(site.module in modules for site in p.sites)]
        for placement in placements:
            self.place(
                replace(placement, bit_width=bit_width), LearnedScaleQuantizer(bit_width, signed=False, learn_offset=True, is_batched=True)
            )
        pending = {id(site): site for placement in placements for site in placement.sites}
        initialized: set[Quantizer] = set()

        def setting_up(site: Site) -> Callable[..., None]:
            def set_up(module: nn.Module, args: tuple[Any, ...], output: object = None) -> None:
                quantizer = insert.input_quantizer(module) if site.side == "input" else insert.output_quantizer(module)
                value = next((x for x in args if isinstance(x, Tensor)), None) if site.side == "input" else output
                if quantizer is not None and quantizer not in initialized and isinstance(value, Tensor):
                    initialized.add(quantizer)
                    quantizer.initialize(value)

            return set_up

        handles = [
            modules[site.module].register_forward_pre_hook(setting_up(site), prepend=True)
            if site.side == "input"
            else modules[site.module].register_forward_hook(setting_up(site), prepend=True)
            for site in pending.values()
        ]
        self._run_in_training_mode(handles)
        self.table.note(f"sums, concatenations and what is pooled: {bit_width} bits at {len(placements)} places")

    def _run_in_training_mode(self, handles: Sequence[RemovableHandle]) -> None:
        """Run the sample once with hooks, which are removed; training flags and the statistics of norms are as before."""
        saved = {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}
        was_training = {module: module.training for module in self.model.modules()}
        try:
            self.model.train()
            with torch.no_grad():
                self.model(*self.sample.args, **self.sample.kwargs)
        except ValueError as error:  # it has run in evaluation mode already
            if isinstance(error, LowbitError):
                raise
            shapes = ", ".join(str(tuple(t.shape)) for t in self.sample.tensors)
            raise CalibrationError(
                f"{type(self.model).__name__} fails in training mode on the sample of shape {shapes}: {error}. "
                "Norms over a batch need a sample of several inputs."
            ) from error
        finally:
            for handle in handles:
                handle.remove()
            for module, flag in was_training.items():
                module.training = flag
        norms = {name for name, module in self.model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)}
        for name, buffer in self.model.named_buffers():
            if name.rpartition(".")[0] in norms:
                buffer.copy_(saved[name])

    def is_excepted(self, name: str) -> bool:
        """Whether the policy's exception for the first and the last layer applies to it."""
        return self.policy.first_last is not None and name in self.positions

    def _weight(self, slot: Slot, factory: QuantizerFactory) -> Quantizer:
        if not self.is_excepted(slot.name):
            return factory(slot)
        return LearnedScaleQuantizer(slot.bit_width, signed=True, granularity=Granularity.channel(slot.channel_axis))

    def _activation(self, slot: Slot, factory: QuantizerFactory) -> Quantizer:
        if not self.is_excepted(slot.name):
            return factory(slot)
        return LearnedScaleQuantizer(slot.bit_width, signed=False, learn_offset=slot.is_signed, is_batched=True)

    @staticmethod
    def _made(slot: Slot, make: Callable[[Slot, QuantizerFactory], Quantizer], factory: QuantizerFactory) -> Quantizer:
        try:
            return make(slot, factory)
        except LowbitError as error:
            raise _named(slot.name, slot.layer, error) from error

    def _signs(self) -> dict[str, bool]:
        """Whether each layer's input holds negative values for the sample."""
        signs: dict[str, bool] = {}

        def noting(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
            def note(_layer: nn.Module, args: tuple[Any, ...]) -> None:
                value = next((value for value in args if isinstance(value, Tensor) and value.is_floating_point()), None)
                signs[name] = signs.get(name, False) or (value is not None and bool((value < 0).any()))

            return note

        handles = [self.model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in self.activation_bits]
        try:
            with evaluating(self.model):
                self.model(*self.sample.args, **self.sample.kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return signs


def _named(name: str, layer: nn.Module, error: LowbitError) -> LayerError:
    return LayerError(f"layer {name!r} ({type(layer).__name__.removeprefix('Parametrized')}): {error}")


def _input_of(args: tuple[Any, ...], kwargs: dict[str, Any], *, is_quantized: bool) -> Tensor:
    """The input of a layer in a call: the first floating-point tensor."""
    found = next((value for value in args if isinstance(value, Tensor) and value.is_floating_point()), None)
    if found is None and is_quantized:
        raise LayerError("its input is passed by keyword, where it cannot be quantized. Call it as layer(x), or leave its input in float.")
    if found is None:
        found = next((value for value in kwargs.values() if isinstance(value, Tensor)), None)
    if found is None:
        raise LayerError("it is called without a floating-point input")
    return found
