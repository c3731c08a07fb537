"""The engine behind adaround and brecq: units of a network learn, one after the other, to reproduce the float network's outputs.

The inputs of a unit (a layer or a block) come from the part of the network that is quantized already; its target is the float
network's output. If a unit's input is exactly the output of the previous unit, cached samples are carried forward through that unit;
otherwise the network runs up to the unit.

Source: Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3; Li et al. 2021, "BRECQ", section 3.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from torch import Tensor
from torch.nn.utils import parametrize

from lowbit.errors import SpecError
from lowbit.measure.outputs import pieces
from lowbit.network.layers import evaluating
from lowbit.post_training.pipeline import PtqJob
from lowbit.post_training.reconstruction.adam import ResumableAdam
from lowbit.post_training.reconstruction.objective import UnitReport, fisher_gradient, released_weight
from lowbit.post_training.reconstruction.phases import Loss, Phase
from lowbit.post_training.reconstruction.resume import Facts, RunState, fingerprint
from lowbit.post_training.reconstruction.unit_data import (
    CacheKind,
    CacheSpace,
    CallCache,
    TensorCache,
    UnitData,
    batches,
    call_of,
    growing,
    resized,
)
from lowbit.post_training.reconstruction.units import PlannedUnit
from lowbit.progress import Stage

STEP_NOTES = 25  # iterations between two updates of the progress bar, and between two looks at whether the unit has settled
OVERHEAD = 2e5  # an iteration of the smallest unit takes as long as so many multiply-accumulates for each sample


class Reconstruction:
    """Runs phases over planned units with bounded caches and state on disk.

    At any time the caches hold the inputs and targets of one unit, or of two while samples are carried forward: at most
    ``space.peak`` bytes, in memory or in mapped files.

    Args:
        job: The job; its weights are quantized already.
        units: Units from ``plan_units``.
        facts: The method and its options, for the fingerprint of the run.
        cache: ``ram`` or ``disk`` (under ``job.work_dir``, else a temporary folder).
        save_every: Iterations between saved states within a unit, if the job has a ``work_dir``.
    """

    def __init__(
        self, job: PtqJob, units: Sequence[PlannedUnit], facts: Mapping[str, object], *, cache: CacheKind = "ram", save_every: int = 500
    ) -> None:
        if save_every < 1:
            raise SpecError(f"save_every must be at least 1, got {save_every}")
        self.job, self.units, self.save_every = job, list(units), save_every
        self.calibration = job.need_calibration("reconstruction")
        self._facts = dict(facts)
        self._folder = None if job.work_dir is None else job.work_dir / "reconstruction"
        self.space = CacheSpace(cache, self._folder)
        self.state = RunState(None, "")

    def run(self, phase: Phase) -> list[UnitReport]:
        """Learn every unit, or take it from an earlier run of the same job; reports in execution order."""
        self.state = self._state(phase)
        units = [unit for unit in self.units if phase.has_work(unit)]
        keys = [f"{phase.name}-{index:03d}" for index in range(len(units))]
        has_samples_first = self.calibration.sample.batch_dim == 0
        is_carried = [
            unit.is_carried and has_samples_first and index > 0 and self._follows(units[index - 1], unit)
            for index, unit in enumerate(units)
        ]
        is_done = [self.state.has(key) for key in keys]
        unfinished = is_done.index(False) if False in is_done else len(units)
        chain_start = max((index for index in range(min(unfinished, len(units) - 1) + 1) if not is_carried[index]), default=0)
        if unfinished:
            self.job.progress.say(f"{phase.name}: {unfinished} of {len(units)} units taken from the earlier run in {self.state.folder}")
        costs = self._costs(units, [phase.objective_for(unit).iterations for unit in units])
        reports: list[UnitReport] = []
        data: UnitData | None = None
        with self.job.progress.stage(f"reconstructing {phase.name}", total=sum(costs)) as stage:
            for index, (unit, key, cost) in enumerate(zip(units, keys, costs, strict=True)):
                if chain_start <= index and unfinished < len(units):
                    stage.advance(0, note=f"{unit.name}: caching")
                    data = (
                        self._carry(phase, units[index - 1], unit, data)
                        if is_carried[index] and data is not None
                        else self._collect(phase, unit, data)
                    )
                saved = self.state.load(key)
                if saved is not None:
                    phase.restore(unit, saved[0])
                    reports.append(_report(saved[1]))
                    stage.advance(cost, note=unit.name)
                else:
                    assert data is not None
                    start = time.monotonic()
                    reports.append(self._learn(phase, unit, key, data, stage, cost))
                    if index == unfinished:
                        self._say_estimate(phase, time.monotonic() - start, sum(costs[index + 1 :]) / cost)
        if data is not None:
            data.release()
        return reports

    def close(self) -> None:
        """Report how much the caches took, and remove temporary files."""
        if self.space.peak:
            where = "memory" if self.space.kind == "ram" else "files"
            self.job.progress.say(f"reconstruction cached at most {self.space.peak / 1e6:.1f} MB of activations in {where}")
        self.space.close()

    def _say_estimate(self, phase: Phase, seconds: float, ratio: float) -> None:
        """Say how long the units that remain, ``ratio`` times the work of the first, will take."""
        if ratio:
            left = seconds * ratio
            self.job.progress.say(f"{phase.name}: about {f'{left / 60:.0f} minutes' if left >= 120 else f'{left:.0f} s'} left")

    def _learn(self, phase: Phase, unit: PlannedUnit, key: str, data: UnitData, stage: Stage, cost: float) -> UnitReport:
        part = f"{key}-part"

        def run(adam: ResumableAdam, loss: Loss, is_settled: Callable[[], bool]) -> None:
            saved = self.state.load(part)
            if saved is not None:
                adam.load(saved[0], int(saved[1]["iteration"]))
                stage.advance(cost * adam.iteration / adam.iterations)
                self.job.progress.say(f"{unit.name}: resuming at iteration {adam.iteration} of {adam.iterations}")
            shown = adam.iteration
            while not adam.is_finished:
                adam.step(loss)
                if adam.iteration % STEP_NOTES == 0:
                    adam.is_settled = is_settled()
                if adam.iteration % self.save_every == 0 and not adam.is_finished:
                    self.state.save(part, adam.state(), {"iteration": adam.iteration})
                if adam.iteration % STEP_NOTES == 0 or adam.is_finished:
                    stage.advance(cost * (adam.iteration - shown) / adam.iterations, note=unit.name)
                    shown = adam.iteration
            if adam.is_settled:
                stage.advance(cost * (adam.iterations - shown) / max(adam.iterations, 1))

        result, report = phase.learn(unit, data, run, zlib.crc32(f"{self.job.seed} {phase.name} {unit.name}".encode()))
        self.state.save(key, result, {**asdict(report)})
        self.state.drop(part)
        self.job.progress.say(str(report))
        return report

    def _collect(self, phase: Phase, unit: PlannedUnit, old: UnitData | None) -> UnitData:
        """Cache a unit's data by running the network up to it; ``old`` is released first."""
        if old is not None:
            old.release()
        model, reference, samples = self.job.model, self.job.reference, self.calibration.samples
        module = reference.get_submodule(unit.name)
        calls: CallCache | None = None
        target: TensorCache | None = None
        start = dim = 0
        with parametrize.cached():
            for inputs in self.calibration:
                size = inputs.batch_size
                float_call = call_of(reference, unit.name, inputs)
                call = float_call if phase.is_symmetric else call_of(model, unit.name, inputs)
                with evaluating(reference):
                    output = unit.call(module, *float_call)
                if calls is None:
                    other = call_of(reference, unit.name, resized(inputs))
                    calls = CallCache(call, growing(call, other), size, samples, self.space)
                    with evaluating(reference):
                        dim = 0 if inputs.batch_dim == 0 else growing(output, unit.call(module, *other))[0] or 0
                calls.write(start, size, call)
                target = _write(target, output, start, size, samples, self.space, dim)
                start += size
        assert calls is not None and target is not None
        return UnitData(calls, target, self._gradients(phase, unit, target.dim))

    def _carry(self, phase: Phase, before: PlannedUnit, unit: PlannedUnit, old: UnitData) -> UnitData:
        """Cache a unit's data from the data of the unit whose output it reads; ``old`` is released."""
        samples, size = old.target.samples, phase.objective.batch_size
        calls: TensorCache | None = None
        target: TensorCache | None = None
        module, quantized = self.job.reference.get_submodule(unit.name), self.job.model.get_submodule(before.name)
        with evaluating(self.job.reference), parametrize.cached():
            start = 0
            for index in batches(samples, size):
                if not phase.is_symmetric:
                    calls = _write(calls, before.call(quantized, *old.inputs.read(index)), start, len(index), samples, self.space)
                target = _write(target, unit.call(module, (old.target.read(index),), {}), start, len(index), samples, self.space)
                start += len(index)
        assert target is not None
        old.inputs.release()
        if old.gradient is not None:
            old.gradient.release()
        if calls is not None:
            old.target.release()
        return UnitData(CallCache.of(calls or old.target), target, self._gradients(phase, unit))

    def _gradients(self, phase: Phase, unit: PlannedUnit, dim: int = 0) -> TensorCache | None:
        """The weights of the Fisher losses, with samples in dimension ``dim``; see ``Objective.fisher``."""
        objective, cache, start = phase.objective, None, 0
        if objective.loss == "mse":
            return None
        names = list(self.job.layers)
        layers = [self.job.layers[name] for name in names[: max(names.index(name) for name in unit.layers) + 1]]
        squares = 0.0
        for inputs in self.calibration:
            for piece in pieces(inputs, objective.batch_size):
                gradient = fisher_gradient(self.job.model, self.job.reference, unit.name, layers, piece)
                squares += float(gradient.double().square().mean()) * piece.batch_size
                weight = released_weight(gradient) if objective.fisher == "released" else gradient
                cache = _write(cache, weight, start, piece.batch_size, self.calibration.samples, self.space, dim)
                start += piece.batch_size
        assert cache is not None
        if objective.fisher == "paper":
            cache.scale((squares / start) ** -0.5 if squares else 1.0)
        return cache

    def _follows(self, before: PlannedUnit, unit: PlannedUnit) -> bool:
        return self.units.index(unit) == self.units.index(before) + 1

    def _costs(self, units: Sequence[PlannedUnit], iterations: Sequence[int]) -> list[float]:
        """Each unit's share of the work in the unit of the progress bar, iterations of an average unit."""
        work = [((unit.cost or 0.0) + OVERHEAD) * max(count, 1) for unit, count in zip(units, iterations, strict=True)]
        return [sum(max(count, 1) for count in iterations) * share / sum(work) for share in work]

    def _state(self, phase: Phase) -> RunState:
        """The phase's own state: the network that a later phase starts from is made by the earlier ones."""
        if self._folder is None:
            return RunState(None, "")
        state = RunState(self._folder / phase.name, self._fingerprint())
        if state.is_stale:
            self.job.progress.say(
                f"{state.folder} holds the state of another run (network, calibration data, options or seed differ): starting over"
            )
        return state

    def _fingerprint(self) -> str:
        job = self.job

        def tensors() -> Iterator[tuple[str, Tensor]]:
            yield from job.model.state_dict().items()
            for number, inputs in enumerate(self.calibration):
                yield from ((f"calibration {number} {position}", tensor) for position, tensor in enumerate(inputs.tensors))

        bits = {name: str(job.bits(name)) for name in job.layers}
        units = [(unit.name, unit.layers, unit.is_carried) for unit in self.units]
        return fingerprint(tensors(), {"facts": self._facts, "seed": job.seed, "bits": bits, "units": units, "model": repr(job.model)})


def _write(cache: TensorCache | None, x: Tensor, start: int, size: int, samples: int, space: CacheSpace, dim: int = 0) -> TensorCache:
    """Write samples, which lie in dimension ``dim``, into the cache, which is created for the first ones."""
    cache = cache or TensorCache(x, size, samples, space, dim)
    cache.write(start, size, x)
    return cache


def _report(facts: Facts) -> UnitReport:
    return UnitReport(str(facts["unit"]), float(facts["before"]), float(facts["after"]), float(facts["undecided"]), bool(facts["is_kept"]))
