"""Integer-arithmetic-only inference: affine codes, batch norms folded in training, ranges by moving averages.

Paper: Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko 2018, "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference". Section 2.1, Eq. 1 (codes); section 3.1, Eq. 12 (quantizers of training); section 3.2, Eq. 14
    (folding). ``lowbit.formats.fixed_point`` has the integer arithmetic of section 2.2 and the appendices.
Symbols: r -> x, q -> code, S -> scale, Z -> zero_point, [a; b] -> lo, hi, n -> number of codes.
Differs from the paper:
    - The moving averages of ranges follow the first batches more closely, ``min(smoothing, (1 + n) / (10 + n))`` after ``n`` of them, as
      TensorFlow's averages can; the first batch sets them. With the paper's smoothing alone, short runs would keep their first ranges.
    - They take a batch in after its step, so that passes without a step change nothing.
    - Activations stay in float for a share of the training rather than for 50 thousand to 2 million steps.
    - Batch norms are frozen towards the end, as TensorFlow does it; ``freeze_norms=1.0`` never freezes them.
    - Codes are rounded half to even, as in all formats of this library; TensorFlow rounds half up here.
    - Quantizers sit at the inputs of layers, so behind a fused activation, and at sums, concatenations and pools where the policy asks
      for them: ``policy="paper"`` does. Operands of a concatenation may differ in scale, and a runtime rescales them.
    - The paper trains. Its post-training form is that of TensorFlow Lite: calibrated ranges, and by default signed codes, those of
      weights symmetric with a scale for each output channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from lowbit.errors import GraphError
from lowbit.formats.fixed_point.parameters import choose_qparams, choose_qparams_gemmlowp, nudged_range, widened
from lowbit.network.slot import QuantizerFactory
from lowbit.network.surgery.fold import EXACT_NORMS
from lowbit.network.surgery.folded_norm import FoldedNorm, see_batches, take_norms
from lowbit.options import Interval
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.qat import QatJob, Slot, TrainingMethod
from lowbit.quantizers import QTensor, Quantizer, UniformQuantizer
from lowbit.quantizers.affine import affine_parameters, fake_quantize, qrange, quantize
from lowbit.quantizers.base import TableQuantizer
from lowbit.quantizers.grid import Grid, GridQuantizer
from lowbit.quantizers.ops import mark_affine
from lowbit.quantizers.qtensor import AffineDecoder, code_dtype
from lowbit.quantizers.ranges.observers import Observer, make_observer
from lowbit.registry import MethodInfo, register
from lowbit.spec import BitPolicy, Granularity, LayerBits
from lowbit.surrogates import Surrogate, bounded_straight_through

CodeType = Literal["uint8", "int8"]
ZeroPointRule = Literal["tensorflow_lite", "gemmlowp"]


class RangeWeight(GridQuantizer):
    """Weights on the range that they have: the smallest to the largest of those that share a scale.

    ``uint8``: codes ``1 .. 2**b - 1`` with a zero point, the nudged range of ``[min w, max w]``; ``int8``: codes ``+-(2**(b-1) - 1)`` with
    zero point 0 and ``scale = max|w| / (2**(b-1) - 1)``. The lowest code is left out so that products of two codes of 8 bits can be
    summed in pairs in 16 bits.
    Forward: ``(clamp(round(w / scale) + zero_point) - zero_point) * scale``. Backward: 1 inside the range, nothing through its ends.

    Args:
        bit_width: 2 to 8.
        code_type: ``uint8`` or ``int8``.
        granularity: Which weights share a range.

    Source: Jacob et al. 2018, section 3.1 and appendix B.
    """

    bit_widths = range(2, 9)

    def __init__(self, bit_width: int, *, code_type: CodeType = "uint8", granularity: Granularity | None = None) -> None:
        self.code_type = code_type
        super().__init__(bit_width, *self.code_range(bit_width), granularity=granularity)

    def code_range(self, bit_width: int) -> tuple[int, int]:
        return qrange(bit_width, signed=True, narrow=True) if self.code_type == "int8" else (1, 2**bit_width - 1)

    def initialize(self, x: Tensor) -> None:
        """Nothing to set."""

    def grid(self, x: Tensor) -> Grid:
        values = x.detach()
        if self.granularity.axes:
            shared = self.granularity.shared_axes(values)
            lo, hi = values.amin(shared, keepdim=True), values.amax(shared, keepdim=True)
        else:
            lo, hi = values.amin(), values.amax()
        if self.code_type == "int8":
            scale, zero_point = affine_parameters(lo, hi, self.qmin, self.qmax, symmetric=True)
        else:
            _, _, scale, zero_point = nudged_range(*widened(lo, hi), self.qmin, self.qmax)
        return Grid(-zero_point * scale, scale, scale, zero_point)


class FoldedWeight(RangeWeight):
    """``RangeWeight`` of the weight of a layer and the batch norm behind it together.

    Args:
        folded: The norm.
        freeze_norms: Share of the training from which on its statistics are the moving ones.
    """

    def __init__(self, bit_width: int, folded: FoldedNorm, *, freeze_norms: float, code_type: CodeType, granularity: Granularity) -> None:
        super().__init__(bit_width, code_type=code_type, granularity=granularity)
        self.folded, self.freeze_norms = folded, freeze_norms

    def __call__(self, x: Tensor) -> Tensor:
        return x if self.folded.is_passing else super().__call__(self.folded.weight(x))

    def encode(self, x: Tensor) -> QTensor:
        return super().encode(self.folded.weight(x))

    def folded_bias(self, bias: Tensor) -> Tensor:
        """The bias of layer and norm together; a runtime rounds it to 32 bits of the accumulator's scale."""
        return bias if self.folded.is_passing else self.folded.bias(bias)

    def set_progress(self, progress: float) -> None:
        """Freeze the norm where it is time for it."""
        self.folded.is_frozen = progress >= self.freeze_norms


class AffineActivation(UniformQuantizer):
    """Activations on a range from an observer, its scale and zero point chosen as TensorFlow Lite or gemmlowp does.

    Args:
        bit_width: 1 to 8.
        code_type: ``uint8`` (codes ``0 .. 2**b - 1``) or ``int8`` (half of them negative); both have the same levels.
        zero_point_rule: ``tensorflow_lite`` (``choose_qparams``) or ``gemmlowp`` (``choose_qparams_gemmlowp``).
        observer: Finds the range.
    """

    def __init__(
        self,
        bit_width: int,
        *,
        code_type: CodeType = "uint8",
        zero_point_rule: ZeroPointRule = "tensorflow_lite",
        observer: Observer | None = None,
    ) -> None:
        super().__init__(bit_width, signed=code_type == "int8", symmetric=False, observer=observer)
        self.zero_point_rule = zero_point_rule

    def take_observed(self, shape: tuple[int, ...] | None = None) -> None:
        lo, hi = (end.reshape(()) for end in self.observer.range(self.qmin, self.qmax))
        choose = choose_qparams if self.zero_point_rule == "tensorflow_lite" else choose_qparams_gemmlowp
        scale, zero_point = choose(*widened(lo, hi), self.qmin, self.qmax)
        self.set_parameters(torch.where(scale > 0, scale, 1.0).float(), zero_point.float())


class MovingAverageActivation(TableQuantizer):
    """Activations on the moving average of the ranges of batches, nudged so that 0 is a code.

    Training: after each step ``lo = m lo + (1 - m) min(0, min x)``, ``hi`` alike; evaluation leaves them as they are.
    Forward: ``(clamp(round(x / scale) + zero_point) - zero_point) * scale``; in training ``x`` itself until ``delay``.
    Backward: 1 inside the range, else 0; nothing to the range.

    Args:
        bit_width: 1 to 8.
        code_type: ``uint8`` or ``int8``.
        smoothing: ``m`` after many batches.
        delay: Share of the training during which values pass.

    Source: Jacob et al. 2018, section 3.1.
    """

    tables = ("lo", "hi", "batches")
    bit_widths = range(1, 9)

    def __init__(self, bit_width: int, *, code_type: CodeType = "uint8", smoothing: float = 0.999, delay: float = 0.0) -> None:
        super().__init__(bit_width, Granularity.tensor())
        self.lo: Tensor
        self.hi: Tensor
        self.batches: Tensor
        self.code_type, self.smoothing, self.delay = code_type, smoothing, delay
        self.is_waiting = False
        self.seen: tuple[Tensor, Tensor] | None = None
        self.surrogate: Surrogate = bounded_straight_through
        self.resize()

    def resize(self) -> None:
        self.qmin, self.qmax = qrange(self.bit_width, signed=self.code_type == "int8")

    def set_progress(self, progress: float) -> None:
        """Start quantizing where it is time for it."""
        self.is_waiting = progress < self.delay

    def initialize(self, x: Tensor) -> None:
        """Take the range of ``x`` as that of the first batch."""
        observer = make_observer("min_max")
        observer.observe(x)
        lo, hi = (end.reshape(()) for end in observer.extremes())
        for name, value in zip(self.tables, (*widened(lo, hi), torch.ones_like(lo)), strict=True):
            self._set_table(name, value)

    def parameters_of_grid(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the current range, float32, ``()``."""
        # from the ends in every pass: averages of zero points, over processes or steps, would be no zero points
        _, _, scale, zero_point = nudged_range(self.lo, self.hi, self.qmin, self.qmax)
        return scale, zero_point

    @torch.no_grad()
    def see(self, x: Tensor) -> None:
        """Remember the range of a batch until ``project``; those of several passes within one step are joined."""
        ends = widened(x.detach().float().amin(), x.detach().float().amax())
        lo, hi = self.seen or ends
        self.seen = torch.minimum(lo, ends[0]), torch.maximum(hi, ends[1])

    @torch.no_grad()
    def project(self) -> None:
        """Let the averages follow the range that was seen in the step."""
        if self.seen is None:
            return
        keep = ((1 + self.batches) / (10 + self.batches)).clamp(max=self.smoothing)
        for average, end in zip((self.lo, self.hi), self.seen, strict=True):
            average.copy_(torch.lerp(end, average, keep))
        self.batches += 1
        self.seen = None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.numel():
            self.see(x)
            if self.is_waiting:
                return x
        scale, zero_point = self.parameters_of_grid()
        if torch.compiler.is_exporting():
            y: Tensor = mark_affine(x.float(), scale, zero_point, self.qmin, self.qmax)
        else:
            y = fake_quantize(x.float(), scale, zero_point, self.qmin, self.qmax, self.surrogate)
        return y.to(x.dtype)

    def encode(self, x: Tensor) -> QTensor:
        scale, zero_point = self.parameters_of_grid()
        codes = quantize(x.detach().float(), scale, zero_point, self.qmin, self.qmax).to(code_dtype(self.qmin))
        return QTensor(codes, AffineDecoder(scale, zero_point, self.granularity), self.bit_width)

    def extra_repr(self) -> str:
        return f"bit_width={self.bit_width}, codes {self.qmin}..{self.qmax}, affine, smoothing={self.smoothing}"


@register(
    MethodInfo(
        name="integer_only",
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        paper="Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko, CVPR 2018",
        url="https://arxiv.org/abs/1712.05877",
        section="fixed_point",
        axes=("weight_quantizer", "activation_quantizer", "surgery", "arithmetic"),
        kind="training",
        weight_bits=range(4, 9),  # as in the paper; whole ranges leave fewer codes too little
        activation_bits=range(1, 9),
        needs=("labels",),
        fidelity="equations",
        summary="trains for integer arithmetic alone: affine codes, batch norms folded in training, ranges by moving averages",
        evidence="integer arithmetic checked against gemmlowp, TensorFlow Lite, HAWQ-V3 and ONNX Runtime; training by the paper's equations",
        margin_points=40,
    )
)
@dataclass
class IntegerOnly(TrainingMethod):
    """Training with the rounding of integer inference.

    Attributes:
        codes: ``uint8`` as in the paper: affine, those of weights without the lowest one; or ``int8`` as in TensorFlow Lite since:
            symmetric weights, affine activations.
        weight_granularity: ``per_tensor`` as in the paper, ``per_channel`` (TensorFlow Lite) or ``group:SIZE``.
        smoothing: Smoothing of the moving averages of activation ranges.
        activation_delay: Share of the training during which activations stay in float.
        fold_norms: Fold batch norms into the layers before them while training.
        freeze_norms: Share of the training after which folded norms use their moving statistics.
    """

    ends = "same"
    allows_procedure = False  # procedures compare and replace weights by their codes, which are those of folded weights here

    codes: CodeType = "uint8"
    weight_granularity: str = "per_tensor"
    smoothing: Annotated[float, Interval(0, 1, closed="left")] = 0.999
    activation_delay: Annotated[float, Interval(0, 1, closed="left")] = 0.1
    fold_norms: bool = True
    freeze_norms: Annotated[float, Interval(0, 1)] = 0.75

    def default_policy(self, bits: LayerBits) -> BitPolicy:
        """All layers alike, and sums, concatenations and pools in the bits of activations."""
        return super().default_policy(bits).with_merges(bits.activation)

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        return RangeWeight(slot.bit_width, code_type=self.codes, granularity=self._granularity(slot))

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        return MovingAverageActivation(slot.bit_width, code_type=self.codes, smoothing=self.smoothing, delay=self.activation_delay)

    def output_quantizer(self, slot: Slot) -> Quantizer:
        return self.activation_quantizer(slot)

    def merge_quantizer(self, slot: Slot) -> Quantizer | None:
        return self.activation_quantizer(slot)

    def edge_quantizer(self, slot: Slot) -> Quantizer:
        return self.weight_quantizer(slot) if slot.purpose == "weight" else self.activation_quantizer(slot)

    def attach(self, job: QatJob) -> None:
        self._quantize_merges(job)
        norms = self._take_norms(job)

        def folding(factory: QuantizerFactory) -> QuantizerFactory:
            def make(slot: Slot) -> Quantizer:
                folded = norms.get(slot.name) if slot.purpose == "weight" else None
                return factory(slot) if folded is None else self.folded_weight_quantizer(slot, folded)

            return make

        job.edges = folding(job.edges)
        job.insert(folding(self.weight_quantizer), self.activation_quantizer)
        for name, folded in norms.items():
            see_batches(job.layers[name], folded)
        job.initialize(self.initialize_layer)

    def folded_weight_quantizer(self, slot: Slot, folded: FoldedNorm) -> Quantizer:
        """The quantizer of the weight of a layer with a batch norm behind it."""
        granularity = self._granularity(slot)
        return FoldedWeight(slot.bit_width, folded, freeze_norms=self.freeze_norms, code_type=self.codes, granularity=granularity)

    def _granularity(self, slot: Slot) -> Granularity:
        return Granularity.parse(self.weight_granularity, slot.channel_axis)

    def _quantize_merges(self, job: QatJob) -> None:
        """Sums, concatenations and what is pooled get the bits of activations where the policy says nothing of them, as integers need."""
        if job.policy.merges is not None or not job.activation_bits:
            return
        bits = job.policy.default.activation or max(job.activation_bits.values())
        try:
            job.dataflow()
        except GraphError as error:
            job.table.note(f"sums, concatenations and what is pooled stay in float, so that the network is none of integers: {error}")
            return
        job.policy = job.policy.with_merges(bits)

    def _take_norms(self, job: QatJob) -> dict[str, FoldedNorm]:
        """The norms to fold, taken out of the network; the table notes how many there are, or why there are none."""
        if not self.fold_norms or not any(isinstance(module, EXACT_NORMS) for module in job.model.modules()):
            return {}
        try:
            dataflow = job.dataflow()
        except GraphError as error:
            job.table.note(f"batch norms were not folded: {error}")
            return {}
        norms = take_norms(job.model, dataflow, job.layers)
        job.table.note(f"batch norms folded into the layers before them: {len(norms)}")
        return norms


@register(
    MethodInfo(
        name="integer_only",
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference: after training",
        paper="Jacob, Kligys, Chen, Zhu, Tang, Howard, Adam, Kalenichenko, CVPR 2018",
        url="https://arxiv.org/abs/1712.05877",
        section="fixed_point",
        axes=("weight_quantizer", "activation_quantizer", "surgery", "arithmetic"),
        kind="post_training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="exact",
        summary="codes for integer arithmetic alone, as TensorFlow Lite calibrates them: whole ranges, symmetric weights per channel",
        evidence="parameters, codes and integer arithmetic checked against gemmlowp and TensorFlow Lite",
        margin_db=-1.0,  # whole ranges, where the baseline takes those of least error
    )
)
@dataclass
class IntegerOnlyPostTraining(PostTrainingMethod):
    """Ranges of weights and of calibrated activations, batch norms folded, nothing trained.

    Attributes:
        weight_granularity: ``per_channel``, ``per_tensor`` (as the paper trains) or ``group:SIZE``.
        weight_observer: Weights take the whole range that they have; ``min_max`` alone.
        activation_observer: How activation ranges are chosen from calibration data; TensorFlow Lite takes ``min_max``.
        codes: ``int8`` (symmetric weights) or ``uint8`` (affine weights, as in the paper).
        zero_point_rule: Which program's zero points activations get: that of ``tensorflow_lite``, or of the paper's ``gemmlowp``.
    """

    weight_observer: Literal["min_max"] = "min_max"
    activation_observer: str = "min_max"
    codes: CodeType = "int8"
    zero_point_rule: ZeroPointRule = "tensorflow_lite"

    def quantize(self, job: PtqJob) -> None:
        job.fold()
        job.insert_weights(self.weight_quantizer)
        job.insert_activations(self)
        job.calibrate_activations()

    def weight_quantizer(self, slot: Slot) -> Quantizer:
        granularity = Granularity.parse(self.weight_granularity, slot.channel_axis)
        return RangeWeight(slot.bit_width, code_type=self.codes, granularity=granularity)

    def activation_quantizer(self, slot: Slot) -> Quantizer:
        observer = make_observer(self.activation_observer)
        return AffineActivation(slot.bit_width, code_type=self.codes, zero_point_rule=self.zero_point_rule, observer=observer)
