"""DSG: diverse samples, by statistics that are free within a margin and an emphasis of its own for each sample.

Paper: Zhang, Qin, Ding, Gong, Yan, Tao, Li, Yu, Liu 2021, "Diversifying Sample Generation for Accurate Data-Free Quantization", CVPR.
    Section 3.2 (slack distribution alignment, Eq. 5-7), Section 3.3 (layerwise sample enhancement, Eq. 8-10). The image prior is that of the
    journal version (arXiv 2109.00212).
Symbols: delta_i, gamma_i -> slack; epsilon -> quantile; X = I + 1 1^T -> emphasis.
Differs from the paper:
    - The quantile of the gaps is taken over all samples and channels of a layer together, as the released program has one number for each.
    - With another number of samples than norms, sample ``j`` emphasizes norm ``j mod N``.
    - The released program emphasizes residuals before it squares them, and takes the number of norms to be 20: ``enhance_on_residual``.
    - Its correlation between samples and its cross-entropy with random labels, of the journal version, are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from lowbit.inputs import Inputs
from lowbit.methods.zero_shot.zeroq import ZeroqSamples
from lowbit.options import AtLeast, Interval
from lowbit.quantizers.running_range import quantile
from lowbit.registry import MethodInfo, register
from lowbit.synthesis.problem import SynthesisProblem, Synthesized, normal

ENHANCED = 2.0  # weight of the norm that a sample emphasizes; on residuals their factor


class Slack(NamedTuple):
    """How far a norm's means and deviations may be off without a loss."""

    mean: float
    std: float


def slack_distance(target: Tensor, statistic: Tensor, slack: float, weights: Tensor | None = None) -> Tensor:
    """``(1/B) sum_bc w_b max(|target_c - statistic_bc| - slack, 0)^2``; its gradient is zero within the slack.

    Args:
        target: ``[C]``.
        statistic: ``[B, C]``.
        slack: 0 or more, in the unit of the statistic.
        weights: ``[B]``; default: 1.

    Source: Eq. 6 and 10.

    >>> float(slack_distance(torch.tensor([1.0]), torch.tensor([[1.5], [4.0]]), 1.0))
    2.0
    """
    squares = ((target - statistic).abs() - slack).clamp(min=0).square()
    return (squares if weights is None else weights[:, None] * squares).sum() / len(statistic)


def total_variation(images: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours in four directions ``d``: ``sum_d mean |d|`` and ``sum_d ||d||_2`` (the norm over the whole batch).

    Args:
        images: ``[B, C, H, W]``.

    Source: the released program, ``get_image_prior_losses``; journal version.
    """
    directions = (
        images[..., :, 1:] - images[..., :, :-1],
        images[..., 1:, :] - images[..., :-1, :],
        images[..., 1:, 1:] - images[..., :-1, :-1],
        images[..., 1:, :-1] - images[..., :-1, 1:],
    )
    l1 = torch.stack([difference.abs().mean() for difference in directions]).sum()
    return l1, torch.stack([difference.norm() for difference in directions]).sum()


@register(
    MethodInfo(
        name="dsg",
        title="Diversifying Sample Generation for Accurate Data-Free Quantization",
        paper="Zhang, Qin, Ding, Gong, Yan, Tao, Li, Yu, Liu, CVPR 2021",
        url="https://arxiv.org/abs/2103.01049",
        section="zero_shot",
        axes=("data",),
        kind="synthesis",
        weight_bits=range(1, 9),
        activation_bits=None,
        needs=("batch_norm",),
        fidelity="equations",
        summary="zeroq's samples made diverse: statistics are free within a margin, each sample emphasizes one norm",
        evidence="with enhance_on_residual the loss and its gradient equal the authors' program, which is that of the journal version",
    )
)
@dataclass
class Dsg(ZeroqSamples):
    """Descent on ``(1/B) sum_j [ sum_i l_i^(j) + l_j^(j) ]`` plus zeroq's term of the inputs.

    ``l_i^(j) = |max(|m_i - mu_i| - delta_i, 0)|^2 + |max(|s_i - sigma_i| - gamma_i, 0)|^2`` for sample ``j`` and norm ``i``; ``delta_i`` and
    ``gamma_i`` are quantiles of the same gaps of normal noise.

    Attributes:
        quantile: Quantile of the noise's gaps that is free; 0: no slack, as in zeroq; 1: noise itself has no loss.
        noise_samples: Samples of noise that the slack is taken from.
        enhance: Whether each sample emphasizes one norm, with twice its weight.
        enhance_on_residual: Whether residuals are doubled before they are squared, of the first layer_num samples alone, as in the released
            program.
        layer_num: Number of norms that the released program counts.
        image_prior: Smoothness of pictures: l1 or l2 of differences between neighbours; none in the paper, l2 in the journal version.
        image_prior_weight: Its weight.
    """

    trial = MappingProxyType({"iterations": 60, "noise_samples": 64})

    start: Literal["uniform", "gaussian"] = "gaussian"
    quantile: Annotated[float, Interval(0, 1)] = 0.9
    noise_samples: Annotated[int, AtLeast(2)] = 1024
    enhance: bool = True
    enhance_on_residual: bool = False
    layer_num: Annotated[int, AtLeast(1)] = 20
    image_prior: Literal["none", "l1", "l2"] = "none"
    image_prior_weight: Annotated[float, AtLeast(0)] = 0.01

    def default_count(self, norms: int) -> int:
        return norms

    def synthesize(self, problem: SynthesisProblem) -> Synthesized:
        slack = self._kept_slack(problem)
        made = self.descend(problem, partial(self.loss, problem, slack=slack), self.first_inputs(problem))
        return replace(made, facts={"slack": {name: one._asdict() for name, one in zip(problem.norms, slack, strict=True)}})

    def _kept_slack(self, problem: SynthesisProblem) -> list[Slack]:
        """``slack``, computed once for what a killed synthesis goes on with."""
        state = problem.state({"slack": (self.quantile, self.noise_samples, self.batch_size)})
        kept = state.load("slack")
        if kept is not None:
            return [Slack(*row) for row in kept[0]["slack"].tolist()]
        found = self.slack(problem)
        state.save("slack", {"slack": torch.tensor(found, dtype=torch.float64)}, {})
        return found

    @torch.no_grad()
    def slack(self, problem: SynthesisProblem) -> list[Slack]:
        """``delta_i`` and ``gamma_i`` of each norm."""
        if self.quantile == 0:
            return [Slack(0.0, 0.0)] * len(problem.norms)
        noise = problem.with_count(self.noise_samples)
        gaps: list[tuple[list[Tensor], list[Tensor]]] = [([], []) for _ in problem.norms]
        with problem.progress.stage("slack of noise", total=self.noise_samples) as stage:
            for places, inputs in noise.batches(noise.draw(normal, "slack"), self.batch_size):
                for (means, stds), one in zip(gaps, noise.statistics(inputs), strict=True):
                    means.append((one.mean - one.kept.mean).abs().flatten().cpu())
                    stds.append((one.std - one.kept.std).abs().flatten().cpu())
                stage.advance(len(places))
        return [Slack(*(float(quantile(torch.cat(parts), self.quantile)) for parts in both)) for both in gaps]

    def loss(self, problem: SynthesisProblem, inputs: Inputs, places: range, slack: Sequence[Slack] = ()) -> Tensor:
        terms = [*self.norm_terms(problem, inputs, places, slack), *self.input_terms(problem, inputs)]
        return torch.stack(terms).sum()

    def norm_terms(self, problem: SynthesisProblem, inputs: Inputs, places: range, slack: Sequence[Slack] = ()) -> list[Tensor]:
        """For each norm in turn the distances of means and of deviations beyond its slack."""
        free = slack or [Slack(0.0, 0.0)] * len(problem.norms)
        terms = []
        for layer, (one, margin) in enumerate(zip(problem.statistics(inputs), free, strict=True)):
            terms.append(self.distance(one.kept.mean, one.mean, margin.mean, layer, places, len(problem.norms)))
            terms.append(self.distance(one.kept.std, one.std, margin.std, layer, places, len(problem.norms)))
        return terms

    def distance(self, target: Tensor, statistic: Tensor, slack: float, layer: int, places: range, norms: int) -> Tensor:
        """``slack_distance`` with the emphasis of the samples at ``places`` on one of ``norms`` norms; without rows for samples there is none."""
        weights = self.emphasis(layer, places, norms).to(statistic) if self.enhance and len(statistic) == len(places) else None
        return slack_distance(target, statistic, slack, weights)

    def emphasis(self, layer: int, places: range, norms: int) -> Tensor:
        """Weights of the samples at ``places`` in the loss of norm ``layer``: a column of ``X = I + 1 1^T``."""
        period = self.layer_num if self.enhance_on_residual else norms
        factor = ENHANCED**2 if self.enhance_on_residual else ENHANCED
        last = self.layer_num if self.enhance_on_residual else max(places.stop, 1)
        return torch.tensor([factor if place < last and place % period == layer else 1.0 for place in places])

    def input_terms(self, problem: SynthesisProblem, inputs: Inputs) -> list[Tensor]:
        """Those of zeroq, and the smoothness of pictures where it is asked for."""
        terms = super().input_terms(problem, inputs)
        if self.image_prior != "none":
            pictures = [t for t, is_free in zip(inputs.tensors, problem.is_free(inputs), strict=True) if is_free and t.dim() == 4]
            terms += [self.image_prior_weight * total_variation(picture)[self.image_prior == "l2"] for picture in pictures]
        return terms
