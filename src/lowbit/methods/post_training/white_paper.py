"""The white paper's pipeline: equalization, ranges, then learned rounding or bias correction, depending on the available data.

Paper: Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort 2021, "A White Paper on Neural Network Quantization",
    section 3.4 (post-training pipeline).
Differs from the paper:
    - No range is chosen by cross entropy, because the outputs of the network are not quantized.
    - Layers of 8 weight bits are rounded to nearest; learned rounding starts below 8 bits, where the paper finds it indispensable.
    - Learned rounding takes as many steps as a layer's size asks for and ends once the roundings are decided; the paper takes 10,000 in
      every layer.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal

from lowbit.methods.post_training.adaround import PAPER_ITERATIONS, Adaround
from lowbit.methods.post_training.dfq import check_input_range, correct_biases, equalize_layers, input_moments, ranges_from_statistics
from lowbit.options import Above, AtLeast, Finite, Interval
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.post_training.reconstruction.objective import Objective, rounding_learning_rate
from lowbit.post_training.reconstruction.unit_data import CacheKind
from lowbit.registry import MethodInfo, register

WIDE = 8  # weight bits at which rounding to nearest is enough
STEPS_PER_SIDE, FEWEST_STEPS, MOST_STEPS = 20, 500, 2000
TRAVEL = 20_000  # steps at a rate of 0.001 that move the logits as far as a run does


def steps_by_size(weights: int) -> int:
    """Steps of learned rounding for a layer of so many weights: 20 for each side of a square of them, from 500 to 2,000.

    >>> [steps_by_size(weights) for weights in (144, 2304, 1_000_000)]
    [500, 960, 2000]
    """
    return min(max(STEPS_PER_SIDE * math.isqrt(weights), FEWEST_STEPS), MOST_STEPS)


@register(
    MethodInfo(
        name="white_paper",
        title="A White Paper on Neural Network Quantization: post-training pipeline",
        paper="Nagel, Fournarakis, Amjad, Bondarenko, van Baalen, Blankevoort, 2021",
        url="https://arxiv.org/abs/2106.08295",
        section="post_training",
        axes=("reconstruction",),
        kind="post_training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=(),
        fidelity="equations",
        summary="the default: equalization, ranges of least error, and learned rounding (with data) or bias correction (without)",
        evidence="its parts are checked against their authors' code",
        margin_db=0.2,
    )
)
@dataclass
class WhitePaper(PostTrainingMethod):
    """The pipeline with each step where it helps; the report notes which steps were taken and which could not be.

    A layer of ``n`` weights learns its rounding in at most ``20 sqrt(n)`` steps, no fewer than 500 and no more than 2,000. The learning rate
    is ``20 / steps``, at most 0.03, so that a short run moves the logits as far as a long one. After the warm start, every 25 steps, the
    loss counts as settled when at most ``settled`` of the roundings are still between up and down (more than 0.01 away from both):
    what remains would hardly move a weight, and the layer is finished.

    Source: section 3.4.

    Attributes:
        equalize: Equalize ranges across layers first: ``auto`` (if weights have one scale per tensor, which needs it), ``always``
            or ``never``. It turns ReLU6 into ReLU.
        rounding: ``auto`` learns rounding (AdaRound) where there is calibration data and a layer below 8 weight bits, else rounds to
            nearest; ``adaround`` or ``nearest``.
        bias_correction: Correct biases from the statistics of batch norms where there is no calibration data.
        n_sigma: Width of activation ranges without calibration data, in standard deviations around the means of batch norms.
        input_range: Lower and upper end of the network's input, if there is no data.
        iterations: Steps of learned rounding for each layer; default: by the layer's size.
        settled: Share of undecided roundings at which a layer is finished before all its steps are taken; ``None`` takes them all.
        batch_size: Calibration samples per step of learned rounding.
        learning_rate: Learning rate of learned rounding; default: ``20 / steps``, or as in ``adaround`` if ``iterations`` is given.
        precision: Precision of learned rounding: ``fp32``, or ``bf16`` for autocast.
        cache: Storage of a layer's inputs and targets during learned rounding: ``ram`` or ``disk``.
    """

    equalize: Literal["auto", "always", "never"] = "auto"
    rounding: Literal["auto", "adaround", "nearest"] = "auto"
    bias_correction: bool = True
    n_sigma: Annotated[float, Above(0)] = 6.0
    input_range: Annotated[tuple[float, ...] | None, Finite()] = None
    iterations: Annotated[int | None, AtLeast(0)] = None
    settled: Annotated[float | None, Interval(0, 1)] = 0.001
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
            settings = asdict(self) | {"pace": (STEPS_PER_SIDE, FEWEST_STEPS, MOST_STEPS, TRAVEL)}
            self._adaround(PAPER_ITERATIONS).round_weights(job, by_size=self._objective, facts=settings)
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

    def _objective(self, weights: int) -> Objective:
        """What a layer of so many weights is asked to minimise, and in how many steps."""
        iterations, travel = self.iterations, PAPER_ITERATIONS
        if iterations is None:
            iterations, travel = steps_by_size(weights), TRAVEL
        rate = rounding_learning_rate(self.learning_rate, iterations, travel)
        return replace(self._adaround(iterations).objective(), learning_rate=rate, settled=self.settled)

    def _adaround(self, iterations: int) -> Adaround:
        return Adaround(
            iterations=iterations,
            batch_size=self.batch_size,
            precision=self.precision,
            cache=self.cache,
        )
