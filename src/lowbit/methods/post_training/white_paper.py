"""The white paper's pipeline: equalization, ranges, then learned rounding or bias correction, depending on the available data.

Paper: Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort 2021, "A White Paper on Neural Network Quantization",
    section 3.4 (post-training pipeline).
Differs from the paper:
    - No range is chosen by cross entropy, because the outputs of the network are not quantized.
    - Layers of 8 weight bits are rounded to nearest; learned rounding starts below 8 bits, where the paper finds it indispensable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from lowbit.methods.post_training.adaround import PAPER_ITERATIONS, Adaround
from lowbit.methods.post_training.dfq import check_input_range, correct_biases, equalize_layers, input_moments, ranges_from_statistics
from lowbit.options import Above, AtLeast, Finite
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.post_training.reconstruction.unit_data import CacheKind
from lowbit.registry import MethodInfo, register

WIDE = 8  # weight bits at which rounding to nearest is enough


@register(
    MethodInfo(
        name="white_paper",
        title="A White Paper on Neural Network Quantization: post-training pipeline",
        paper="Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort, 2021",
        section="post_training",
        axes=("reconstruction",),
        kind="post_training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=(),
        fidelity="equations",
        summary="the default: equalization, ranges of least error, and learned rounding (with data) or bias correction (without)",
        evidence="its parts are checked against their authors' code",
        margin_db=0.5,
    )
)
@dataclass
class WhitePaper(PostTrainingMethod):
    """The pipeline with each step where it helps; the report notes which steps were taken and which could not be.

    Attributes:
        equalize: Equalize ranges across layers first: ``auto`` (if weights have one scale per tensor, which needs it), ``always``
            or ``never``. It turns ReLU6 into ReLU.
        rounding: ``auto`` learns rounding (AdaRound) where there is calibration data and a layer below 8 weight bits, else rounds to
            nearest; ``adaround`` or ``nearest``.
        bias_correction: Correct biases from the statistics of batch norms where there is no calibration data.
        n_sigma: Width of activation ranges without calibration data, in standard deviations around the means of batch norms.
        input_range: Lower and upper end of the network's input, if there is no data.
        iterations: Steps of learned rounding for each layer.
        batch_size: Calibration samples per step of learned rounding.
        learning_rate: Learning rate of learned rounding; default: as in ``adaround``.
        precision: Precision of learned rounding: ``fp32``, or ``bf16`` for autocast.
        cache: Storage of a layer's inputs and targets during learned rounding: ``ram`` or ``disk``.
    """

    equalize: Literal["auto", "always", "never"] = "auto"
    rounding: Literal["auto", "adaround", "nearest"] = "auto"
    bias_correction: bool = True
    n_sigma: Annotated[float, Above(0)] = 6.0
    input_range: Annotated[tuple[float, ...] | None, Finite()] = None
    iterations: Annotated[int, AtLeast(0)] = PAPER_ITERATIONS
    batch_size: Annotated[int, AtLeast(1)] = 32
    learning_rate: Annotated[float | None, Above(0)] = None
    precision: Literal["fp32", "bf16"] = "fp32"
    cache: CacheKind = "ram"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_input_range("white_paper", self.input_range)

    def quantize(self, job: PtqJob) -> None:
        has_data = job.calibration is not None
        if self.rounding == "adaround":
            job.need_calibration("learned rounding")
        job.fold()
        if self.equalize == "always" or (self.equalize == "auto" and self.weight_granularity == "per_tensor"):
            self._equalize(job)
        job.insert_weights(self.weight_quantizer)
        if self._learns_rounding(job):
            self._adaround().round_weights(job)
        inputs = None if has_data or job.graph is None else input_moments(job, self.input_range)
        if inputs is not None and self.bias_correction:
            correct_biases(job, inputs, n_sigma=self.n_sigma)
        job.insert_activations(self)
        if inputs is None:
            job.calibrate_activations()
        else:
            ranges_from_statistics(job, inputs, n_sigma=self.n_sigma)

    def _equalize(self, job: PtqJob) -> None:
        if job.graph is None and self.equalize == "auto":
            job.table.note(f"layers were not equalized: {job.graph_error}")
        else:
            equalize_layers(job)

    def _learns_rounding(self, job: PtqJob) -> bool:
        is_narrow = any((job.bits(name).weight or WIDE) < WIDE for name in job.layers)
        return self.rounding == "adaround" or (self.rounding == "auto" and job.calibration is not None and is_narrow)

    def _adaround(self) -> Adaround:
        return Adaround(
            iterations=self.iterations,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            precision=self.precision,
            cache=self.cache,
        )
