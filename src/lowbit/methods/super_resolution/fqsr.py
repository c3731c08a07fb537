"""FQSR: every layer's input, weight and output and both operands of every shortcut in few bits, with learned intervals and a loss that calibrates them.

Paper: Wang, Chen, Zhuang, Shen 2021, "Fully Quantized Image Super-Resolution Networks", ACM Multimedia, arXiv 2011.14265.
    Fully quantized blocks (Eq. 7, figure 3), interval adaptation, self-supervised quantization-aware calibration loss (SQCL).
Symbols: I -> interval, n -> levels - 1, stable -> warm_up, alpha -> calibration_weight, sc -> skip_bits.
Differs from the paper:
    - The range from 0 on serves inputs that are never negative for the sample; the authors name layers in files of their own.
    - The warm-up counts passes of training alone, and in evaluation values are always quantized; the authors' program counts all passes and leaves
      values as they are until the warm-up is over.
    - Batch norms stay between the quantized outputs of layers and what follows, as in the authors' SRResNet. ``norms="fold"`` folds them first, so
      that all outputs are quantized as the paper has it; nothing normalizes in training then, which needs small learning rates.
    - Codes at an exact tie go up, as the authors' do at 0.
    - Where a sum is no module of the class ``Sum`` what it reads is quantized where it is made, for all of its readers.
    - First and last layer have the bits that the policy asks for; ``policy="paper"`` has the same everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from lowbit.errors import GraphError
from lowbit.network.graph.dataflow import Dataflow
from lowbit.network.placement import MERGES, Placement, Site, place_at_layers, place_at_tensors
from lowbit.network.surgery.constant_padding import pad_first
from lowbit.network.surgery.fold import fold_batch_norms
from lowbit.network.surgery.sums import sums_of
from lowbit.options import AtLeast, Interval
from lowbit.qat import OptimizerSpec, QatJob, Recipe, Slot, TrainingMethod, TrainRun
from lowbit.quantizers import Quantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.registry import MethodInfo, register
from lowbit.surrogates import pass_gradient, round_straight_through, scale_gradient

SMALLEST = 1e-8
GRADIENT_SHARE = 0.5  # of the interval, where it is scaled by the number of elements


class FqsrQuantizer(GridQuantizer):
    """``2**k`` even levels from 0 to ``interval``, or from ``-interval`` to ``interval`` without one at 0.

    Forward, with ``I = |interval|`` and ``n = 2**k - 1``: ``I round(clamp(x / I, 0, 1) n) / n``, full range
    ``I (2 round((clamp(x / I, -1, 1) + 1) n / 2) / n - 1)``; a tie of the full range at 0 goes up.
    Backward: 1 to ``x`` inside the range, else 0; to ``interval`` its sign times the sum of the gradients times ``(y - x) / I`` inside, 1
    above, and below -1, or 0 where the range begins with 0.
    In the first ``warm_up`` passes of training values pass unchanged, and the interval is the mean of their largest magnitudes.
    Passes that gradient checkpointing computes again count for the warm-up; reentrant checkpointing leaves the penalty out.

    ``penalty`` is ``calibration_weight`` times the mean of ``|x - y|`` of the passes since it was last asked for.

    Source: interval adaptation and its warm-up; the penalty is the self-supervised quantization-aware calibration loss (SQCL).

    Args:
        bit_width: 1 to 8.
        is_half: Whether the range begins with 0.
        warm_up: Passes in which the interval follows the values.
        calibration_weight: Factor of the penalty.
        scale_clamp_gradient: Multiply the gradient through the clamp by ``sqrt(elements / elements inside)``, where that is 2 or more.
        scale_interval_gradient: Multiply the gradient of the interval by ``0.5 / sqrt(samples * channels)``.

    Attributes:
        calls: Passes of training so far.
    """

    tables = ("interval",)
    bit_widths = range(1, 9)

    def __init__(
        self,
        bit_width: int,
        *,
        is_half: bool,
        warm_up: int = 20,
        calibration_weight: float = 0.3,
        scale_clamp_gradient: bool = False,
        scale_interval_gradient: bool = False,
    ) -> None:
        super().__init__(bit_width, 0, 2**bit_width - 1)
        del self._buffers["interval"]
        self.interval = nn.Parameter(torch.tensor(float("nan")))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.calls: Tensor
        self.is_half, self.warm_up, self.calibration_weight = is_half, warm_up, calibration_weight
        self.scale_clamp_gradient, self.scale_interval_gradient = scale_clamp_gradient, scale_interval_gradient
        self._distances: list[Tensor] = []
        self._was_asked = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_distances": []}  # they belong to one step

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return 0, 2**bit_width - 1

    @property
    def is_warming_up(self) -> bool:
        """Whether the next pass leaves values as they are."""
        return self.training and int(self.calls) < self.warm_up

    @property
    def is_resting(self) -> bool:
        return super().is_resting or self.is_warming_up

    def initialize(self, x: Tensor) -> None:
        """Set the interval to the largest magnitude."""
        self._set_table("interval", x.detach().float().abs().amax().clamp(min=SMALLEST))
        self.calls.zero_()

    def restart(self) -> None:
        """Begin the warm-up again."""
        self.calls.zero_()

    def forget(self) -> None:
        """Drop the distances of passes since the penalty was last asked for."""
        self._distances = []

    def grid(self, x: Tensor) -> Grid:
        size = self.interval.abs().clamp(min=SMALLEST)
        if self.scale_interval_gradient:
            factor = GRADIENT_SHARE / max(x.shape[:2].numel(), 1) ** 0.5
            size = size if 1 <= factor < 2 else scale_gradient(size, factor)
        levels, zero = self.qmax, torch.zeros_like(size)
        if self.is_half:
            step = size / levels
            return Grid(zero, step, step, zero, (zero, size))
        step = 2 * size / levels
        nudge = levels * 2**-21  # more than the rounding of what is 0 in units of the step, so that its tie goes up on every machine
        return Grid(-size - nudge * step, step, step, torch.full_like(size, levels / 2), (-size, size))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if self.is_warming_up:
            with torch.no_grad():
                self.calls += 1
                largest = x.detach().float().abs().amax()
                self.interval.copy_(largest if int(self.calls) == 1 else self.interval + (largest - self.interval) / self.calls)
            return x
        self.calls += 1
        values = x.float()
        y = self._with_scaled_clamp(values) if self.scale_clamp_gradient else super().forward(values)
        if torch.is_grad_enabled() and self.calibration_weight:
            if self._was_asked:
                self.forget()
                self._was_asked = False
            self._distances.append((values - y).abs().mean())
        return y.to(x.dtype)

    def _with_scaled_clamp(self, x: Tensor) -> Tensor:
        """The same values, with the optional factor between clamp and rounding."""
        size, low = self.interval.abs().clamp(min=SMALLEST), 0.0 if self.is_half else -1.0
        u = x / size
        inside = ((u >= low) & (u <= 1)).float().mean().clamp(min=SMALLEST)
        factor = float(inside.rsqrt())
        clamped = u.clamp(low, 1)
        if not 1 <= factor < 2:
            clamped = scale_gradient(clamped, factor)
        codes = round_straight_through((clamped - low) * (self.qmax / (1 - low)))
        expression = size * (codes * ((1 - low) / self.qmax) + low)
        return pass_gradient(expression, super().forward(x.detach()).detach())

    def penalty(self) -> Tensor:
        self._was_asked = True
        if not self._distances:
            return super().penalty()
        return self.calibration_weight * torch.stack(self._distances).sum()


@register(
    MethodInfo(
        name="fqsr",
        title="Fully Quantized Image Super-Resolution Networks",
        paper="Wang, Chen, Zhuang, Shen, ACM Multimedia 2021",
        url="https://arxiv.org/abs/2011.14265",
        section="super_resolution",
        axes=("weight_quantizer", "activation_quantizer", "surgery"),
        kind="training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("labels", "pretrained"),
        fidelity="exact",
        summary="inputs, weights and outputs of all layers and operands of all sums, with learned intervals and a loss that calibrates them",
        evidence="quantizers, convolution, sum and steps of training checked against the authors' code",
        margin_points=55,
    )
)
@dataclass
class Fqsr(TrainingMethod):
    """Fully quantized networks.

    Attributes:
        skip_bits: Bits of layers' outputs and of the operands of sums, where the policy says nothing of them; ``None``: float.
        warm_up: Passes of training in which intervals follow the largest magnitudes, and values are not quantized.
        calibration_weight: Weight of the mean distance between values and their quantized ones, of every quantizer.
        quantize_input: Quantize the input of the first layer too; a picture has 8 bits already.
        pad_first: Let convolutions pad before their input is quantized, so that what they pad lies on the grid, which has no level at 0 where
            inputs can be negative; else they pad with 0.
        norms: ``keep`` batch norms behind layers' outputs, or ``fold`` them into their layers before quantizers are inserted.
        scale_clamp_gradient: Multiply the gradient through the clamp by ``sqrt(elements / elements inside)``; off in the paper.
        scale_interval_gradient: Multiply gradients of intervals by ``0.5 / sqrt(samples * channels)``; off in the paper.
    """

    ends = "same"

    skip_bits: Annotated[int | None, Interval(1, 8)] = 8
    warm_up: Annotated[int, AtLeast(0)] = 20
    calibration_weight: Annotated[float, AtLeast(0)] = 0.3
    quantize_input: bool = False
    pad_first: bool = True
    norms: Literal["keep", "fold"] = "keep"
    scale_clamp_gradient: bool = False
    scale_interval_gradient: bool = False

    def default_recipe(self) -> Recipe:
        """EDSR on DIV2K, with 1,000 steps in an epoch; SRResNet has a learning rate of 1e-3."""
        return Recipe(300, 16, OptimizerSpec("adam", 5e-5, weight_decay=0.0))

    def make(self, slot: Slot, *, is_half: bool = False) -> FqsrQuantizer:
        """A quantizer of the paper."""
        return FqsrQuantizer(
            slot.bit_width,
            is_half=is_half,
            warm_up=self.warm_up,
            calibration_weight=self.calibration_weight,
            scale_clamp_gradient=self.scale_clamp_gradient,
            scale_interval_gradient=self.scale_interval_gradient,
        )

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return self.make(slot)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return self.make(slot, is_half=not slot.is_signed)

    def output_quantizer(self, slot: Slot) -> Quantizer:
        return self.make(slot)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        return self.make(slot)

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        return self.make(slot, is_half=slot.purpose == "input" and not slot.is_signed)

    def attach(self, job: QatJob) -> None:
        flow = self._flow(job)
        if flow is not None and self.norms == "fold":
            folded = fold_batch_norms(job.model, flow)
            job.table.note(f"{len(folded)} batch norms were folded into their layers")
        self._ask_bits(job)
        for name in job.activation_bits if self.pad_first else ():
            pad_first(job.model.get_submodule(name))
        shared: dict[str, Quantizer] = {}

        def activation(slot: Slot) -> Quantizer:
            if slot.purpose == "input":
                return self.activation_quantizer(slot)
            known = [shared[merge] for merge in slot.operand_of if merge in shared]
            quantizer = known[0] if known else self.output_quantizer(slot)
            for merge in slot.operand_of:
                shared.setdefault(merge, quantizer)
            return quantizer

        operands = [] if flow is None else self._operands(job, flow)
        job.insert(self.weight_quantizer, activation, [*place_at_layers(job.activation_bits), *operands])
        job.initialize(self.initialize_layer)

    @staticmethod
    def _flow(job: QatJob) -> Dataflow | None:
        try:
            return job.dataflow()
        except GraphError as error:
            job.table.note(f"sums stay in float and batch norms where they are, because the dataflow is not known: {error}")
            return None

    def _ask_bits(self, job: QatJob) -> None:
        """Bits of the first input and of outputs, as the paper has them."""
        ends = {position: name for name, position in job.positions.items()}
        first = ends.get("first", "")
        if not self.quantize_input and first in job.activation_bits:
            job.keep_input_float(first)
            job.remark(first, "its input is the network's and stays as it is")
        for name in job.layers:
            if self.skip_bits is not None and job.bits(name).output is None and name != ends.get("last") and job.runs(name):
                job.ask_output(name, self.skip_bits)

    def _operands(self, job: QatJob, flow: Dataflow) -> Sequence[Placement]:
        """Where outputs of layers and operands of sums are quantized. Source: Eq. 7 and figure 3: both operands of a shortcut."""
        bits = self.skip_bits if job.policy.merges is None else job.merge_bits
        if bits is None:
            return ()
        own = sums_of(flow, job.model)
        rest = {node.name for node in flow.nodes if node.op in MERGES and node.owner not in own}
        found = []
        for placement in place_at_tensors(flow, {}, job.output_bits, merge_bits=bits):
            merges = tuple(merge for merge in placement.operand_of if merge in rest)
            if merges or placement.purpose == "output":
                found.append(replace(placement, operand_of=merges, sites=job.free_sites(placement.sites)))
        found += [
            Placement((Site(f"{name}.{side}", "output"),), bits, purpose="sum", operand_of=(name,))
            for name in own
            for side in ("left", "right")
        ]
        found = [placement for placement in found if placement.sites]
        job.leave_merges_float(f"operands of sums and concatenations: {bits} bits at {sum(bool(p.operand_of) for p in found)} places")
        return found

    def start_phase(self, run: TrainRun) -> None:
        """The warm-up begins with the run."""
        for quantizer in self.intervals(run) if run.phase_index == 0 else ():
            quantizer.restart()

    def before_step(self, run: TrainRun) -> None:
        for quantizer in self.intervals(run):
            quantizer.forget()

    def after_step(self, run: TrainRun) -> None:
        """Processes go on from the mean of their intervals, which each has warmed up by its own samples."""
        for quantizer in self.intervals(run):
            if int(quantizer.calls) <= quantizer.warm_up:
                run.reduce_mean(quantizer.interval.data)

    @staticmethod
    def intervals(run: TrainRun) -> list[FqsrQuantizer]:
        """The quantizers with an interval, each once."""
        return [quantizer for quantizer in run.quantizers() if isinstance(quantizer, FqsrQuantizer)]
