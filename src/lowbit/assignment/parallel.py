"""Measurements of one network, each on its own: in this process or in several, with the same numbers.

What is measured is kept in ``problem.work_dir``, so that a killed search goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from lowbit.assignment.costs import Assignment
from lowbit.assignment.problem import SearchProblem
from lowbit.errors import DataError, LayerError, OutputError, SpecError
from lowbit.executors import Job, run_here, run_in_processes, run_on_ray
from lowbit.files import write_text
from lowbit.inputs import tensors_of
from lowbit.progress import Progress
from lowbit.reading import read_json
from lowbit.spec import LayerBits, switch_name
from lowbit.workfolder import tensors_digest, weights_digest

LossOf = Callable[[Assignment], float]  # the loss with these layers at these bits, all others in float
Measure = Callable[[Any], Any]  # what a job asks for, and what comes out, as JSON holds it
Prepare = Callable[["SearchProblem"], Measure]
_IMPORTABLE = "Define their classes at the top of a module that can be imported, or use workers=1."


def table(problem: SearchProblem, prepare: Prepare, *, name: str, facts: Mapping[str, object]) -> dict[str, dict[LayerBits, float]]:
    """The loss of each searched layer at each of its widths, all other layers in float; see ``losses`` for the arguments."""
    singles = [{layer: bits} for layer, widths in problem.choices.items() for bits in widths]
    found = iter(losses(problem, singles, prepare, name=name, facts=facts))
    return {layer: {bits: next(found) for bits in widths} for layer, widths in problem.choices.items()}


def losses(
    problem: SearchProblem, settings: Sequence[Assignment], prepare: Prepare, *, name: str, facts: Mapping[str, object]
) -> list[float]:
    """The loss of each of ``settings``: bits of some layers, all others in float.

    See ``measurements`` for the arguments and errors; ``prepare`` gives a function of bits.
    """
    keys = [_key(bits) for bits in settings]
    found = measurements(problem, dict(zip(keys, settings, strict=True)), prepare, name=name, facts=facts)
    return [float(found[key]) for key in keys]


def measurements(
    problem: SearchProblem, jobs: Mapping[str, object], prepare: Prepare, *, name: str, facts: Mapping[str, object]
) -> dict[str, Any]:
    """What comes out of each of ``jobs``, by its name.

    They are independent jobs for ``problem.workers`` processes of one thread each. Every job starts from a random state of its own, so that
    the numbers depend neither on the number of processes nor on the order.

    Args:
        problem: Network, samples and seed. ``prepare`` gets it without ``calibration``, ``progress`` and ``work_dir``.
        jobs: What each job asks for, by its name.
        prepare: Called once in each process; gives the function that measures. A function at the top of a module, or a
            ``functools.partial`` of one, with arguments that can be pickled.
        name: What the display calls the work, and the file in ``problem.work_dir`` is called; each kind of measurement has its own.
        facts: All else that the numbers depend on, as JSON holds it.

    Raises:
        LayerError: A measurement failed, or is no finite number; it names the job and the reason.
        SpecError: Several processes are asked for, and the network or the task cannot be sent to them.
    """
    kept = _Kept(problem, name, prepare, facts)
    missing = [Job(key, key, asked) for key, asked in jobs.items() if key not in kept.found]
    if kept.found and missing:
        problem.progress.say(f"{name}: {len(jobs) - len(missing)} of {len(jobs)} measurements are there already")
    shared = replace(problem, calibration=None, progress=Progress.silent(), work_dir=None, workers=1, ray=None)
    if problem.ray is not None and missing:
        runner = _Sent.of(shared, prepare, problem.workers)
        outcomes = run_on_ray(
            missing, runner, address=problem.ray, threads=1, memory_bytes=None, stage_name=name, progress=problem.progress
        )
    elif problem.workers > 1 and len(missing) > 1:
        runner = _Sent.of(shared, prepare, problem.workers)
        outcomes = run_in_processes(missing, runner, workers=problem.workers, threads=1, stage_name=name, progress=problem.progress)
    else:
        outcomes = run_here(missing, _Measure(shared, prepare), stage_name=name, progress=problem.progress)
    with _one_thread(), closing(outcomes):  # type: ignore[type-var]
        for outcome in outcomes:
            if outcome.answer is None:
                raise LayerError(f"{name} of {outcome.job.name}: {outcome.problem}")
            kept.keep(outcome.job.key, outcome.answer["found"])
    return {key: kept.found[key] for key in jobs}


def _key(bits: Assignment) -> str:
    """``layer1.conv1 2/8, layer1.conv2 2/8``."""
    return ", ".join(f"{name} {switch_name(width)}" for name, width in bits.items())


@contextmanager
def seeded(problem: SearchProblem, purpose: str) -> Iterator[None]:
    """Within the context a network that draws random numbers draws those of ``purpose``, wherever and in which order it runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(problem.generator(purpose).initial_seed())
        yield


class _Measure:
    """Runs jobs: measures the bits that are a job's payload."""

    def __init__(self, problem: SearchProblem, prepare: Prepare) -> None:
        self._problem, self._prepare = problem, prepare

    @cached_property
    def _measure(self) -> Measure:
        with seeded(self._problem, "prepare"):
            return self._prepare(self._problem)

    def __call__(self, job: Job, _progress: Progress) -> Mapping[str, object]:
        with seeded(self._problem, job.key):
            found = self._measure(job.payload)
        if isinstance(found, float) and not math.isfinite(found):
            raise LayerError(f"the loss is {found}. Leave out this width.")
        return {"found": found}


class _Sent:
    """``_Measure`` on its way to other processes: as bytes, because tensors of their own would be passed in shared memory, which is scarce."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    @staticmethod
    def of(problem: SearchProblem, prepare: Prepare, workers: int) -> _Sent:
        """Everything packed once."""
        buffer = io.BytesIO()
        try:
            torch.save(_Measure(problem, prepare), buffer)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            what = f"{type(problem.model).__name__}, its samples or its task"
            raise SpecError(f"workers={workers}: {what} cannot be sent to other processes ({error}). {_IMPORTABLE}") from error
        return _Sent(buffer.getvalue())

    @cached_property
    def _measure(self) -> _Measure:
        try:
            measure = torch.load(io.BytesIO(self.content), weights_only=False)  # what the process that started this one has packed
        except (AttributeError, ImportError) as error:
            raise SpecError(f"the network, its samples or its task cannot be read in another process ({error}). {_IMPORTABLE}") from error
        assert isinstance(measure, _Measure)
        return measure

    def __call__(self, job: Job, progress: Progress) -> Mapping[str, object]:
        return self._measure(job, progress)


class _Kept:
    """What was measured by key, that of an earlier search included where it measured the same."""

    def __init__(self, problem: SearchProblem, name: str, prepare: Prepare, facts: Mapping[str, object]) -> None:
        self.found: dict[str, Any] = {}
        self._path: Path | None = None
        if problem.work_dir is None:
            return
        try:
            problem.work_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make the folder {problem.work_dir}: {error.strerror}. Name another work_dir.") from error
        self._run = _fingerprint(problem, prepare, facts)
        self._path = problem.work_dir / f"{name.replace(' ', '_')}-{self._run[:12]}.json"  # measurements of another search stay
        try:
            found: Any = read_json(self._path)
            self.found = dict(found["found"]) if found["run"] == self._run else {}
        except (DataError, ValueError, KeyError, TypeError):
            self.found = {}  # none is there yet, or none that can be read: everything is measured

    def keep(self, key: str, value: object) -> None:
        """Add what was measured, on disk too."""
        self.found[key] = value
        if self._path is not None:
            write_text(self._path, json.dumps({"run": self._run, "found": self.found}, indent=1))


def _fingerprint(problem: SearchProblem, prepare: Prepare, facts: Mapping[str, object]) -> str:
    """A hash of everything that the measurements depend on."""
    function = prepare.func if isinstance(prepare, partial) else prepare
    named = {
        "function": f"{function.__module__}.{function.__qualname__}",
        "facts": dict(facts),
        "seed": problem.seed,
        "weights": weights_digest(problem.model),
        "samples": tensors_digest(tensors_of(problem.batches)),
        "task": problem.task.facts(),
    }
    return hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def _one_thread() -> Iterator[None]:
    """Sums over several threads come to other last digits than those over one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
