"""AdaRound: whether each weight is rounded up or down is learned, layer by layer, from the error at the layer's output.

Paper: Nagel, Amjad, van Baalen, Louizos, Blankevoort 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML.
    Section 3.2 (relaxation, regularizer), section 3.3 (asymmetric reconstruction, activation function), section 4 (experiments).
Symbols: V -> logits, h(V) -> share, s -> scale, lambda -> regularization, beta -> beta.
Differs from the paper:
    - Scales are per output channel by default, which is more accurate; ``weight_granularity=per_tensor`` selects the paper's.
    - A layer whose learned rounding is worse than rounding to nearest on the calibration data keeps the latter, so that no layer gets worse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Literal

from lowbit.options import Above, AtLeast, Interval
from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.post_training.reconstruction.engine import Reconstruction
from lowbit.post_training.reconstruction.objective import Objective, rounding_learning_rate
from lowbit.post_training.reconstruction.phases import Phase, RoundWeights
from lowbit.post_training.reconstruction.rounding import BetaSchedule
from lowbit.post_training.reconstruction.unit_data import CacheKind
from lowbit.post_training.reconstruction.units import PlannedUnit, layer_units, plan_units
from lowbit.registry import MethodInfo, register

PAPER_ITERATIONS = 10_000


@register(
    MethodInfo(
        name="adaround",
        title="Up or Down? Adaptive Rounding for Post-Training Quantization",
        paper="Nagel, Amjad, van Baalen, Louizos, Blankevoort, ICML 2020",
        url="https://arxiv.org/abs/2004.10568",
        section="post_training",
        axes=("reconstruction",),
        kind="post_training",
        weight_bits=range(2, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="exact",
        summary="learns to round each weight up or down, layer by layer, so that the layer's output stays",
        evidence="checked against the authors' company's toolkit (AIMET)",
        margin_db=0.2,
    )
)
@dataclass
class Adaround(PostTrainingMethod):
    """Learned rounding, layer by layer.

    Attributes:
        iterations: Steps of Adam for each layer.
        batch_size: Calibration samples per step, drawn at random.
        learning_rate: Adam learning rate of the rounding logits. Default: the paper's 0.001 for its 10000 iterations, and proportionally
            more for fewer, at most 0.03.
        regularization: Weight of the regularizer (lambda); it belongs to a loss that is summed over channels.
        warm_start: Share of the iterations without the regularizer.
        beta_start: The regularizer's exponent after the warm start.
        beta_end: The regularizer's exponent at the end.
        schedule: How the exponent falls: ``cosine`` or ``linear``.
        asymmetric: Learn from the outputs of the layers quantized so far instead of the float network's.
        use_activation: Include the activation function that directly follows a layer in its loss.
        precision: ``fp32``, or ``bf16`` for autocast: faster where the processor supports it, slightly less exact.
        cache: Storage of a layer's inputs and targets: ``ram``, or ``disk`` for memory-mapped files.
        save_every: Iterations between saves of a layer's state, from which a killed run resumes.
    """

    ends = "same"

    iterations: Annotated[int, AtLeast(0)] = PAPER_ITERATIONS
    batch_size: Annotated[int, AtLeast(1)] = 32
    learning_rate: Annotated[float | None, Above(0)] = None
    regularization: Annotated[float, AtLeast(0)] = 0.01
    warm_start: Annotated[float, Interval(0, 1)] = 0.2
    beta_start: Annotated[float, Above(0)] = 20.0
    beta_end: Annotated[float, Above(0)] = 2.0
    schedule: Literal["cosine", "linear"] = "cosine"
    asymmetric: bool = True
    use_activation: bool = True
    precision: Literal["fp32", "bf16"] = "fp32"
    cache: CacheKind = "ram"
    save_every: Annotated[int, AtLeast(1)] = 500

    def quantize(self, job: PtqJob) -> None:
        job.fold()
        job.insert_weights(self.weight_quantizer)
        self.round_weights(job)
        job.insert_activations(self)
        job.calibrate_activations()

    def round_weights(
        self, job: PtqJob, *, by_size: Callable[[int], Objective] | None = None, facts: Mapping[str, object] | None = None
    ) -> None:
        """Learn the rounding of every layer of a job with quantized weights and still float activations.

        ``by_size`` gives the objective of a layer by its number of weights, in place of ``objective()``; ``facts`` are the settings that it
        depends on: the state of a run with other ones is not resumed.
        """
        units = plan_units(job, layer_units(job), use_activations=self.use_activation)
        phase = RoundWeights(job, self.objective(), is_symmetric=not self.asymmetric, by_size=by_size)
        settings = {"method": type(self).__name__, **asdict(self), **(facts or {})}
        reconstruct(job, units, phase, settings, cache=self.cache, save_every=self.save_every)

    def objective(self) -> Objective:
        """Objective that each layer minimises."""
        rate = rounding_learning_rate(self.learning_rate, self.iterations, PAPER_ITERATIONS)
        beta = BetaSchedule(self.schedule, self.iterations, self.warm_start, self.beta_start, self.beta_end)
        return Objective(
            self.iterations, rate, self.batch_size, schedule=beta, regularization=self.regularization, precision=self.precision
        )


def reconstruct(
    job: PtqJob, units: Sequence[PlannedUnit], phase: Phase, facts: dict[str, object], *, cache: CacheKind, save_every: int
) -> None:
    """Run one phase over ``units`` and note in the table which units stayed unchanged."""
    engine = Reconstruction(job, units, facts, cache=cache, save_every=save_every)
    try:
        kept = [report.unit for report in engine.run(phase) if report.is_kept]
    finally:
        engine.close()
    if kept:
        job.table.note(f"{phase.name}: learning did not improve {', '.join(kept)}, which stayed unchanged")
