"""Round to nearest: choose ranges, round, done. The baseline every other method must beat.

Source: Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference", section 3; Nagel et al. 2021,
"A White Paper on Neural Network Quantization", section 3.1 for the range setters.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.post_training.pipeline import PostTrainingMethod, PtqJob
from lowbit.registry import MethodInfo, register


@register(
    MethodInfo(
        name="round_to_nearest",
        title="Ranges from observers, rounding to nearest",
        paper="Krishnamoorthi 2018; Nagel et al. 2021",
        url="https://arxiv.org/abs/1806.08342",
        section="post_training",
        axes=("weight_quantizer", "activation_quantizer"),
        kind="post_training",
        weight_bits=range(1, 9),
        activation_bits=range(1, 9),
        needs=("calibration",),
        fidelity="baseline",
        summary="the baseline: ranges by any observer, no weight is moved",
    )
)
@dataclass
class RoundToNearest(PostTrainingMethod):
    """Ranges from observers, nothing else.

    Attributes:
        fold_batch_norm: Fold batch norms into the layers before them first.
    """

    fold_batch_norm: bool = True

    def quantize(self, job: PtqJob) -> None:
        if self.fold_batch_norm:
            job.fold()
        job.insert_weights(self.weight_quantizer)
        job.insert_activations(self)
        job.calibrate_activations()
