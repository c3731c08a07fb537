"""The steps that post-training methods consist of, and the state that they share.

A method is the order of these steps, plus what it does between them::

    job.fold(); job.insert_weights(...); <round the weights>; job.insert_activations(...); job.calibrate_activations()
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn
from torch.nn.utils import parametrize

from lowbit.errors import CalibrationError, GraphError
from lowbit.inputs import Calibration, Inputs
from lowbit.network import insert
from lowbit.network.graph.dataflow import Dataflow, capture
from lowbit.network.job import NetworkJob, made_for
from lowbit.network.layers import CONVOLUTIONS, evaluating
from lowbit.network.placement import Placement, before_functions, place_at_layers, place_at_tensors
from lowbit.network.slot import Slot
from lowbit.network.surgery.fold import EXACT_NORMS, fold_batch_norms
from lowbit.network.surgery.gates import separate_activations, split_gates
from lowbit.options import Method
from lowbit.quantizers import BinaryQuantizer, Quantizer, UniformQuantizer
from lowbit.quantizers.affine import affine_parameters
from lowbit.quantizers.ranges.observers import make_observer
from lowbit.quantizers.uniform import observing
from lowbit.spec import Granularity

MERGE_BIT_WIDTH = 8  # of what only takes part in sums, concatenations, pooling and gating, where the policy says nothing
FUNCTION_BIT_WIDTH = 8  # of convolutions' outputs before activation functions, where the policy says nothing


@dataclass
class PostTrainingMethod(Method, ABC):
    """Quantizes a trained network; the fields of a subclass are the paper's hyper-parameters.

    Attributes:
        weight_granularity: ``per_channel``, ``per_tensor`` or ``group:SIZE``.
        weight_observer: How the weight range is chosen.
        activation_observer: How activation ranges are chosen from calibration data.

    Example:
        >>> import torch, lowbit
        >>> info = lowbit.MethodInfo(
        ...     name="weights_first", title="Weights, then activations", paper="none", section="other", axes=("procedure",),
        ...     kind="post_training", weight_bits=range(1, 9), activation_bits=range(1, 9), needs=("calibration",), fidelity="unverified",
        ...     summary="rounds weights before it calibrates activations",
        ... )
        >>> @lowbit.register(info)
        ... class WeightsFirst(lowbit.PostTrainingMethod):
        ...     def quantize(self, job):
        ...         job.insert_weights(self.weight_quantizer)
        ...         job.insert_activations(self)
        ...         job.calibrate_activations()
        >>> quantized = lowbit.quantize(torch.nn.Linear(4, 2), method=WeightsFirst, weight_bits=8, calibration=torch.rand(8, 4))
        >>> lowbit.summary(quantized).method
        'weights_first'
    """

    weight_granularity: str = "per_channel"
    weight_observer: str = "mse"
    activation_observer: str = "mse"

    @abstractmethod
    def quantize(self, job: PtqJob) -> None:
        """Quantize ``job.model`` in place."""

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of a weight: symmetric and signed; two levels at 1 bit."""
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        if slot.bit_width == 1:
            return BinaryQuantizer(granularity=granularity)
        return UniformQuantizer(
            slot.bit_width, signed=True, symmetric=True, granularity=granularity, observer=make_observer(self.weight_observer, granularity)
        )

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of what layers read: affine and unsigned, per tensor (zero point 0 after a ReLU)."""
        granularity = Granularity.tensor()
        return UniformQuantizer(
            slot.bit_width,
            signed=False,
            symmetric=False,
            granularity=granularity,
            observer=make_observer(self.activation_observer, granularity),
        )

    def output_quantizer(self, slot: Slot) -> Quantizer:
        """The quantizer of a layer's output, where the policy asks for one."""
        return self.activation_quantizer(slot)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        """The quantizer of a tensor that meets others in a sum or a concatenation, comes from one, is pooled or is a gate; ``None``: it stays float."""
        return self.activation_quantizer(slot)


@dataclass
class PtqJob(NetworkJob):
    """One network on its way from float to quantized after training.

    Attributes:
        calibration: Unlabelled data, or ``None``.
        reference: The float network that the quantized one must follow; batch norm folded once ``fold`` has run.
        graph: The dataflow, or ``None`` with ``graph_error`` saying why.
        statistics: Mean and standard deviation of each output channel before the activation, from folded batch norms.

    Example:
        >>> import torch, lowbit
        >>> from lowbit.inputs import Inputs
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()).eval()
        >>> job = lowbit.PtqJob(model, lowbit.BitPolicy.uniform(4, 8), Inputs.of(torch.rand(8, 1, 8, 8), model))
        >>> job.fold()
        >>> type(job.model[1]).__name__, list(job.statistics)
        ('Identity', ['0'])
    """

    calibration: Calibration | None = None
    work_dir: Path | None = None
    statistics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        separate_activations(self.model)
        self.graph, self.graph_error = self._capture()
        self.reference = copy.deepcopy(self.model)

    def need_calibration(self, why: str) -> Calibration:
        """The calibration data, or CalibrationError saying what needs it."""
        if self.calibration is None:
            raise CalibrationError(f"{why} needs calibration data: pass calibration= (a loader or tensor of unlabelled samples).")
        return self.calibration

    def need_graph(self, why: str) -> Dataflow:
        """The dataflow, or GraphError saying what needs it and what blocks."""
        if self.graph is None:
            raise GraphError(f"{why} needs the network's dataflow, which cannot be captured: {self.graph_error}")
        return self.graph

    def fold(self) -> None:
        """Fold batch norms into the layers before them; the float reference is the folded network."""
        if self.graph is None:
            if any(isinstance(module, EXACT_NORMS) for module in self.model.modules()):
                self.table.note(f"batch norms were not folded: {self.graph_error}")
            return
        for folded in fold_batch_norms(self.model, self.graph):
            self.statistics[folded.layer] = (folded.out_mean, folded.out_std)
        self.update_reference()

    def update_reference(self) -> None:
        """Make the current float network the one to follow (after a step that keeps its function)."""
        self.reference = copy.deepcopy(self.model)

    @property
    def merge_bits(self) -> int | None:
        """As the policy says; where it says nothing 8 bits, if activations are quantized, so that runtimes compute sums in integers."""
        return MERGE_BIT_WIDTH if self.policy.merges is None and self.activation_bits else super().merge_bits

    def insert_activations(self, method: PostTrainingMethod) -> None:
        """Put the activation quantizers of ``method`` where the policy asks for them (see ``placement``)."""
        inputs, outputs, merge_bits = self.activation_bits, self.output_bits, self.merge_bits
        if self.policy.merges is not None and merge_bits is not None:
            self.need_graph("quantizing sums and concatenations")
        if self.graph is None:
            placements = place_at_layers(inputs, outputs)
            if merge_bits is not None:
                self.table.note(f"residual adds and concatenations stay in float: {self.graph_error}")
        else:
            before = self.outputs_before_functions(self.graph)
            if merge_bits is not None:
                split_gates(self.model, self.graph, before)
            placements = place_at_tensors(self.graph, inputs, before | outputs, merge_bits=merge_bits)
        for placement in placements:
            purpose = placement.purpose
            factory = {"input": method.activation_quantizer, "output": method.output_quantizer}.get(purpose, method.merge_quantizer)
            quantizer = made_for(self.slot(placement), factory)
            if quantizer is not None:
                self.place(placement, quantizer)

    def outputs_before_functions(self, graph: Dataflow) -> dict[str, int]:
        """Convolutions whose output is quantized so that runtimes compute them in integers, with its bits: see ``BitPolicy.before_functions``.

        A convolution that stays in float, or reads floats, gains nothing.
        """
        asked = self.policy.before_functions
        width = FUNCTION_BIT_WIDTH if asked is None else asked
        if not isinstance(width, int):
            return {}
        layers = [name for name, layer in self.layers.items() if isinstance(layer, CONVOLUTIONS) and name in self.activation_bits]
        said = {
            name for name in layers if any(rule.output is not None and rule.applies(name, self.layers[name]) for rule in self.policy.rules)
        }
        return dict.fromkeys(before_functions(graph, [name for name in layers if name not in said]), width)

    def set_activation_ranges(self, ranges: Callable[[Placement], tuple[Tensor, Tensor]]) -> None:
        """Give every activation quantizer the range, lower and upper end, that ``ranges`` finds for its placement without data."""
        for placement in self.placements:
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
        stage_of = self.progress.stage("activation ranges", total=calibration.samples)
        with stage_of as stage, observing(quantizers), parametrize.cached(), evaluating(self.model):
            for inputs in calibration:
                self.model(*inputs.args, **inputs.kwargs)
                stage.advance(inputs.batch_size)
        for name, quantizer in quantizers.items():
            try:
                quantizer.take_observed(())
            except CalibrationError as error:
                raise CalibrationError(f"activation {name!r}: {error}") from error

    def _capture(self) -> tuple[Dataflow | None, str]:
        try:
            return capture(self.model, self.sample), ""
        except GraphError as error:
            return None, str(error)


def run(model: nn.Module, inputs: Inputs) -> object:
    """One evaluation pass without gradients."""
    with evaluating(model):
        return model(*inputs.args, **inputs.kwargs)
