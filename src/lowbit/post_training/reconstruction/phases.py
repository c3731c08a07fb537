"""What is learned in each unit of a network: the rounding of its weights, or the scales of its activation quantizers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lowbit.errors import LayerError
from lowbit.network.insert import activation_quantizers, float_weight, set_weight_quantizer, weight_quantizer
from lowbit.post_training.pipeline import PtqJob
from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.post_training.reconstruction.objective import (
    Objective,
    UnitReport,
    is_decided,
    mean_loss,
    rounding_loss,
    undecided_share,
    unit_loss,
)
from lowbit.post_training.reconstruction.rounding import AdaptiveRounding
from lowbit.post_training.reconstruction.unit_data import UnitData
from lowbit.post_training.reconstruction.units import PlannedUnit
from lowbit.quantizers import UniformQuantizer
from lowbit.quantizers.qtensor import AffineDecoder

SMALLEST_SHARE = 1e-3  # a learned activation scale never shrinks below this share of where it started

Loss = Callable[[Tensor], Tensor]
Run = Callable[[ResumableAdam, Loss, Callable[[], bool]], None]


def store_weight(layer: nn.Module, values: Tensor) -> None:
    """Replace the float weight behind the quantizer; a weight that two layers share is taken apart."""
    old = float_weight(layer)
    layer.parametrizations.weight.original = nn.Parameter(values.to(old).contiguous(), requires_grad=old.requires_grad)  # type: ignore[union-attr]


class Phase(ABC):
    """A phase of reconstruction: what is learned in each unit (roundings or activation scales)."""

    name: str

    def __init__(self, job: PtqJob, objective: Objective, *, is_symmetric: bool) -> None:
        """``is_symmetric``: whether inputs come from the float network instead of the part that is quantized already."""
        self.job, self.objective, self.is_symmetric = job, objective, is_symmetric

    def objective_for(self, unit: PlannedUnit) -> Objective:
        """What ``unit`` is asked to minimise, and in how many iterations."""
        return self.objective

    @abstractmethod
    def has_work(self, unit: PlannedUnit) -> bool:
        """Whether the unit holds anything to learn."""

    @abstractmethod
    def learn(self, unit: PlannedUnit, data: UnitData, run: Run, seed: int) -> tuple[dict[str, Tensor], UnitReport]:
        """Learn by ``run(adam, loss, is_settled)`` and put the result in place; returns what ``restore`` needs."""

    @abstractmethod
    def restore(self, unit: PlannedUnit, result: Mapping[str, Tensor]) -> None:
        """Put an earlier result in place."""


class RoundWeights(Phase):
    """The rounding of all weights of a unit together."""

    name = "weights"

    def __init__(self, job: PtqJob, objective: Objective, *, is_symmetric: bool, by_size: Callable[[int], Objective] | None = None) -> None:
        """``by_size`` gives the objective of a unit by its number of weights; ``objective`` holds for every unit where it is left out."""
        super().__init__(job, objective, is_symmetric=is_symmetric)
        job.remark_others("rounded to nearest, as only convolutions and linear layers are reconstructed")
        self._by_size = by_size

    def objective_for(self, unit: PlannedUnit) -> Objective:
        if self._by_size is None:
            return self.objective
        return self._by_size(sum(float_weight(self.job.layers[name]).numel() for name in unit.layers))

    def has_work(self, unit: PlannedUnit) -> bool:
        return bool(unit.layers)

    def learn(self, unit: PlannedUnit, data: UnitData, run: Run, seed: int) -> tuple[dict[str, Tensor], UnitReport]:
        module, objective = self.job.model.get_submodule(unit.name), self.objective_for(unit)
        before = mean_loss(unit, module, data, objective)
        grids = {name: self._grid(name) for name in unit.layers}
        nearest = {name: grid.encode(float_weight(self.job.layers[name])).codes for name, grid in grids.items()}
        roundings = {name: AdaptiveRounding(grid) for name, grid in grids.items()}
        try:
            for name, rounding in roundings.items():
                rounding.initialize(float_weight(self.job.layers[name]))
                set_weight_quantizer(self.job.layers[name], rounding)
            adam = ResumableAdam(
                {name: rounding.logits for name, rounding in roundings.items()}, learning_rate=objective.learning_rate, iterations=objective.iterations,
                samples=data.target.samples, batch_size=objective.batch_size, seed=seed, is_annealed=objective.is_annealed,
            )  # fmt: skip

            def loss(index: Tensor) -> Tensor:
                return rounding_loss(unit, module, data, index, objective, roundings.values(), adam.iteration)

            def is_settled() -> bool:
                return is_decided(objective, roundings.values(), adam.iteration)

            run(adam, loss, is_settled)
            for rounding in roundings.values():
                rounding.is_soft = False
            after = mean_loss(unit, module, data, objective)
            learned = {name: rounding.encode(float_weight(self.job.layers[name])).codes for name, rounding in roundings.items()}
        finally:
            for name, grid in grids.items():
                set_weight_quantizer(self.job.layers[name], grid)
        is_kept = not after < before
        codes = nearest if is_kept else learned
        self.restore(unit, codes)
        undecided = undecided_share(roundings.values())
        return codes, UnitReport(unit.name, before, before if is_kept else after, undecided, is_kept)

    def restore(self, unit: PlannedUnit, result: Mapping[str, Tensor]) -> None:
        for name in unit.layers:
            grid, codes = self._grid(name), result[name]
            weight = AffineDecoder(grid.scale, grid.zero_point, grid.granularity).decode(codes.to(grid.scale.device))
            if not torch.equal(grid.encode(weight).codes.cpu(), codes.cpu()):
                raise LayerError(
                    f"layer {name!r}: its grid is too far from zero for float32 to tell neighbouring codes apart. Use a symmetric grid."
                )
            store_weight(self.job.layers[name], weight)

    def _grid(self, name: str) -> UniformQuantizer:
        grid = weight_quantizer(self.job.layers[name])
        if not isinstance(grid, UniformQuantizer):
            raise LayerError(f"layer {name!r}: learned rounding needs a uniform grid, got {type(grid).__name__}. Use 2 to 8 weight bits.")
        return grid


class LearnScales(Phase):
    """The scales of a unit's activation quantizers; weights stay as they are, targets come from the float network.

    ``y = (clamp(round(x / d) + z, 0, n - 1) - z) d`` gives ``d`` the gradient ``round(x / d) - x / d`` inside, ``-z`` below and
    ``n - 1 - z`` above, without a gradient scale; the zero point is constant. ``d`` stays positive.

    Source: Li et al. 2021, section 3.3; Esser et al. 2020 (LSQ) for the gradient.
    """

    name = "activations"

    def __init__(self, job: PtqJob, objective: Objective, units: Sequence[PlannedUnit], *, is_symmetric: bool = True) -> None:
        super().__init__(job, objective, is_symmetric=is_symmetric)
        names = {id(quantizer): name for name, quantizer in activation_quantizers(job.model).items()}
        self._owned: dict[str, dict[str, UniformQuantizer]] = {}
        for unit in units:  # one that several units share is learned in the first
            inside = activation_quantizers(job.model.get_submodule(unit.name)).values()
            self._owned[unit.name] = {names.pop(id(q)): q for q in inside if isinstance(q, UniformQuantizer) and id(q) in names}

    def has_work(self, unit: PlannedUnit) -> bool:
        return bool(self._owned[unit.name])

    def learn(self, unit: PlannedUnit, data: UnitData, run: Run, seed: int) -> tuple[dict[str, Tensor], UnitReport]:
        module, objective, quantizers = self.job.model.get_submodule(unit.name), self.objective, self._owned[unit.name]
        start = {name: quantizer.scale.detach().clone() for name, quantizer in quantizers.items()}
        before = mean_loss(unit, module, data, objective)
        scales = {}
        for name, quantizer in quantizers.items():
            quantizer.learn_scale()
            assert isinstance(quantizer.scale, nn.Parameter)
            scales[name] = quantizer.scale
        try:
            adam = ResumableAdam(
                scales, learning_rate=objective.learning_rate, iterations=objective.iterations, samples=data.target.samples,
                batch_size=objective.batch_size, seed=seed, is_annealed=objective.is_annealed,
            )  # fmt: skip

            def loss(index: Tensor) -> Tensor:
                with torch.no_grad():
                    for name, scale in scales.items():
                        scale.copy_(torch.maximum(scale, start[name] * SMALLEST_SHARE))
                return unit_loss(unit, module, data, index, objective)

            run(adam, loss, lambda: False)
            learned = {name: torch.maximum(scale.detach(), start[name] * SMALLEST_SHARE) for name, scale in scales.items()}
        finally:
            for name, quantizer in quantizers.items():
                fix_scale(quantizer, start[name])
        self.restore(unit, learned)
        after = mean_loss(unit, module, data, objective)
        is_kept = not after < before
        if is_kept:
            self.restore(unit, start)
        return (start if is_kept else learned), UnitReport(unit.name, before, before if is_kept else after, 0.0, is_kept)

    def restore(self, unit: PlannedUnit, result: Mapping[str, Tensor]) -> None:
        for name, quantizer in self._owned[unit.name].items():
            quantizer.set_parameters(result[name], quantizer.zero_point)


def fix_scale(quantizer: UniformQuantizer, scale: Tensor) -> None:
    """Make a learned scale a buffer again, holding ``scale``."""
    zero_point = quantizer.zero_point
    del quantizer.scale
    quantizer.register_buffer("scale", scale.clone())
    quantizer.set_parameters(scale, zero_point)
