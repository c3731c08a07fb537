"""The steps that post-training methods are made of, and the state that they share.

A method is the order in which it takes these steps, plus what it does between them::

    job.fold(); job.insert_weights(...); <round the weights>; job.insert_activations(...); job.calibrate_activations()
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.calibration import Calibration, Inputs
from lowbit.errors import CalibrationError, GraphError, LayerError, LowbitError, SpecError
from lowbit.network import insert
from lowbit.network.fold import fold_batch_norms
from lowbit.network.graph import Dataflow, capture
from lowbit.network.layers import evaluating, execution_order, layer_kind, output_channel_axis, quantizable_layers
from lowbit.network.placement import Placement, place_at_layers, place_at_tensors
from lowbit.network.table import LayerRecord, LayerTable
from lowbit.progress import Progress
from lowbit.quantizers import BinaryQuantizer, Quantizer, UniformQuantizer
from lowbit.quantizers.observers import make_observer
from lowbit.quantizers.uniform import affine_parameters
from lowbit.registry import MethodInfo
from lowbit.spec import BitPolicy, Granularity, LayerBits, Position

WeightFactory = Callable[[str, nn.Module, int], Quantizer]
ActivationFactory = Callable[[str, int], Quantizer]


@dataclass
class PostTrainingMethod(ABC):
    """Quantizes a trained network; the fields of a subclass are the paper's hyper-parameters.

    Attributes:
        weight_granularity: ``per_channel``, ``per_tensor`` or ``group:SIZE``.
        weight_observer: How the weight range is chosen.
        activation_observer: How activation ranges are chosen from calibration data.
        quantize_adds: Also put quantizers on the operands and results of residual adds and concatenations (8 bits), so that
            runtimes can compute them in integers.
    """

    info: ClassVar[MethodInfo]

    weight_granularity: str = "per_channel"
    weight_observer: str = "mse"
    activation_observer: str = "mse"
    quantize_adds: bool = True

    @abstractmethod
    def quantize(self, job: PtqJob) -> None:
        """Quantize ``job.model`` in place."""

    def weight_quantizer(self, name: str, layer: nn.Module, bit_width: int) -> Quantizer:
        """The default weight quantizer: symmetric and signed; two levels at 1 bit."""
        granularity = Granularity.parse(self.weight_granularity, output_channel_axis(layer))
        if bit_width == 1:
            return BinaryQuantizer(granularity=granularity)
        return UniformQuantizer(
            bit_width, signed=True, symmetric=True, granularity=granularity, observer=make_observer(self.weight_observer, granularity)
        )

    def activation_quantizer(self, name: str, bit_width: int) -> Quantizer:
        """The default activation quantizer: affine and unsigned, per tensor (zero point 0 after a ReLU)."""
        granularity = Granularity.tensor()
        return UniformQuantizer(
            bit_width, signed=False, symmetric=False, granularity=granularity, observer=make_observer(self.activation_observer, granularity)
        )


@dataclass
class PtqJob:
    """One network on its way from float to quantized.

    Attributes:
        model: The copy that is being quantized, in evaluation mode.
        policy: Bits for each layer.
        sample: Inputs of one call, used for shapes and the dataflow.
        calibration: Unlabelled data, or ``None``.
        reference: The float network that the quantized one must follow; batch norm folded once ``fold`` has run.
        graph: The dataflow, or ``None`` with ``graph_error`` saying why.
        layers: Layers that get quantized weights, in execution order.
        statistics: Mean and standard deviation of each output channel before the activation, from folded batch norms.
        table: What was done to each layer.
    """

    model: nn.Module
    policy: BitPolicy
    sample: Inputs
    calibration: Calibration | None
    seed: int = 0
    progress: Progress = field(default_factory=Progress.silent)
    work_dir: Path | None = None
    table: LayerTable = field(default_factory=LayerTable)
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        everything = quantizable_layers(self.model)
        if not everything:
            raise LayerError(f"{type(self.model).__name__} has no layer to quantize; lowbit quantizes convolutions and linear layers.")
        if insert.quantized_layers(self.model):
            raise LayerError(f"{type(self.model).__name__} is quantized already. Start from the float network.")
        self.policy.check(everything)
        self._called = _run_sample(self.model, self.sample)
        self._bits = self._assign_bits(everything)
        self.layers = {
            name: everything[name] for name in dict.fromkeys([*self._called, *everything]) if self._bits[name].weight is not None
        }
        if not self.layers:
            raise LayerError(f"the policy leaves every layer of {type(self.model).__name__} in float, so there is nothing to do.")
        for name, layer in self.layers.items():
            if not bool(torch.isfinite(layer.weight).all()):  # type: ignore[arg-type]
                raise LayerError(
                    f"layer {name!r} ({type(layer).__name__}): its weight holds NaN or infinite values. Check the weights file."
                )
        self.graph, self.graph_error = self._capture()
        self.reference = copy.deepcopy(self.model)
        self._all_layers = everything
        self._placements: list[Placement] = []

    def bits(self, name: str) -> LayerBits:
        """What the policy asks for the layer ``name``."""
        return self._bits[name]

    def generator(self) -> torch.Generator:
        """A random generator that starts at the job's seed."""
        return torch.Generator().manual_seed(self.seed)

    def need_calibration(self, why: str) -> Calibration:
        """The calibration data, or CalibrationError saying what needs it."""
        if self.calibration is None:
            raise CalibrationError(
                f"{why} needs calibration data: pass calibration= (a loader or tensor of unlabelled samples), or --calibration on the command line."
            )
        return self.calibration

    def need_graph(self, why: str) -> Dataflow:
        """The dataflow, or GraphError saying what needs it and what blocks."""
        if self.graph is None:
            raise GraphError(f"{why} needs the network's dataflow, which cannot be captured: {self.graph_error}")
        return self.graph

    def fold(self) -> None:
        """Fold batch norms into the layers before them; the float reference is the folded network."""
        if self.graph is None:
            self.table.note(f"batch norms were not folded: {self.graph_error}")
            return
        for folded in fold_batch_norms(self.model, self.graph):
            self.statistics[folded.layer] = (folded.out_mean, folded.out_std)
        self.update_reference()

    def update_reference(self) -> None:
        """Make the present float network the one to follow (after a step that keeps its function)."""
        self.reference = copy.deepcopy(self.model)

    def insert_weights(self, factory: WeightFactory) -> None:
        """Give every layer of ``layers`` the weight quantizer of ``factory(name, layer, bit_width)``, initialized from its weight."""
        with self.progress.stage("weight ranges", total=len(self.layers)) as stage:
            for name, layer in self.layers.items():
                bit_width = self._bits[name].weight
                assert bit_width is not None
                try:
                    quantizer = factory(name, layer, bit_width)
                    quantizer.initialize(layer.weight.detach())  # type: ignore[operator]
                except LowbitError as error:
                    raise LayerError(f"layer {name!r} ({type(layer).__name__}): {error}") from error
                insert.set_weight_quantizer(layer, quantizer)
                stage.advance(note=name)

    def insert_activations(self, factory: ActivationFactory, *, merges: bool = True) -> None:
        """Put activation quantizers of ``factory(name, bit_width)`` where the policy asks for them (see ``placement``)."""
        bits = {name: self._bits[name].activation for name in self._called}
        wanted = {name: value for name, value in bits.items() if value is not None}
        if not wanted:
            return
        if self.graph is None:
            self._placements = place_at_layers(wanted)
            self.table.note(f"residual adds and concatenations stay in float: {self.graph_error}")
        else:
            self._placements = place_at_tensors(self.graph, wanted, merges=merges)
        for placement in self._placements:
            quantizer = factory(placement.name, placement.bit_width)
            for site in placement.sites:
                module = self.model.get_submodule(site.module)
                (insert.set_input_quantizer if site.side == "input" else insert.set_output_quantizer)(module, quantizer)

    def set_activation_ranges(self, ranges: Callable[[Placement], tuple[Tensor, Tensor]]) -> None:
        """Give every activation quantizer the range, lower and upper end, that ``ranges`` finds for its placement without data."""
        for placement in self._placements:
            site = placement.sites[0]
            module = self.model.get_submodule(site.module)
            quantizer = insert.input_quantizer(module) if site.side == "input" else insert.output_quantizer(module)
            if isinstance(quantizer, UniformQuantizer):
                scale, zero_point = affine_parameters(*ranges(placement), quantizer.qmin, quantizer.qmax, symmetric=quantizer.symmetric)
                quantizer.set_parameters(scale.to(quantizer.scale.device), zero_point.to(quantizer.scale.device))

    def calibrate_activations(self) -> None:
        """Run the calibration data through the network and let every activation quantizer set its range from what it saw."""
        quantizers = {name: q for name, q in insert.activation_quantizers(self.model).items() if isinstance(q, UniformQuantizer)}
        if not quantizers:
            return
        calibration = self.need_calibration("setting activation ranges")
        for quantizer in quantizers.values():
            quantizer.start_calibration()
        with self.progress.stage("activation ranges", total=calibration.samples) as stage, parametrize.cached(), evaluating(self.model):
            for inputs in calibration:
                self.model(*inputs.args, **inputs.kwargs)
                stage.advance(inputs.batch_size)
        for name, quantizer in quantizers.items():
            try:
                quantizer.finish_calibration()
            except CalibrationError as error:
                raise CalibrationError(f"activation {name!r}: {error}") from error

    def finish(self) -> LayerTable:
        """Fill the table; LayerError when a layer did not get what the policy asked for."""
        fed = {name: placement.bit_width for placement in self._placements for name in placement.layers}
        for name in [*self._called, *(n for n in self._all_layers if n not in self._called)]:
            layer, asked = self._all_layers[name], self._bits[name]
            quantizer = insert.weight_quantizer(layer)
            weight_bits = None if quantizer is None else quantizer.bit_width
            if weight_bits != asked.weight:
                raise LayerError(f"layer {name!r}: asked for {asked.weight} weight bits, got {weight_bits}")
            reasons = []
            if asked.weight is None:
                reasons.append("the policy keeps its weight in float")
            if name not in self._called:
                reasons.append("the sample never calls this layer: its input is not quantized")
            elif asked.activation is not None and name not in fed:
                raise LayerError(f"layer {name!r}: asked for {asked.activation} activation bits, but its input could not be quantized")
            self.table.add(
                LayerRecord(
                    name, layer_kind(layer), weight_bits, fed.get(name), "skipped" if quantizer is None else "done", "; ".join(reasons)
                )
            )
        return self.table

    def _assign_bits(self, layers: dict[str, nn.Module]) -> dict[str, LayerBits]:
        positions: dict[str, Position] = {}
        if self._called:
            positions = {self._called[0]: "first", self._called[-1]: "last"}
        return {name: self.policy.bits_for(name, layer, position=positions.get(name, "inner")) for name, layer in layers.items()}

    def _capture(self) -> tuple[Dataflow | None, str]:
        try:
            return capture(self.model, self.sample), ""
        except GraphError as error:
            return None, str(error)


def run(model: nn.Module, inputs: Inputs) -> object:
    """One evaluation pass without gradients."""
    with evaluating(model):
        return model(*inputs.args, **inputs.kwargs)


def _run_sample(model: nn.Module, sample: Inputs) -> list[str]:
    try:
        return execution_order(model, sample)
    except LowbitError:
        raise
    except Exception as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in sample.tensors)
        raise CalibrationError(f"{type(model).__name__} fails on inputs of shape {shapes}: {type(error).__name__}: {error}") from error


def check_method_bits(info: MethodInfo, policy: BitPolicy, job: PtqJob) -> None:
    """SpecError when the policy asks for bits that the method does not support."""
    for name in job.layers:
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
