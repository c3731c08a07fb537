"""``lowbit.compare``: methods on equal terms, cell by cell, resumable, with tables whose rows are comparable."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import math
import os
import platform
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from lowbit.comparison.cells import MIXED, Cell, Result, Status
from lowbit.comparison.store import Store
from lowbit.comparison.tables import Tables, make_tables
from lowbit.comparison.terms import equal_terms
from lowbit.comparison.verdicts import Verdict, judge
from lowbit.errors import DivergedError, LowbitError, SpecError
from lowbit.executors import Job, Outcome, run_here, run_in_processes, run_on_ray
from lowbit.inputs import Inputs
from lowbit.measure.cost import model_size
from lowbit.network.bits import set_bits, switches_of, switching_layers
from lowbit.options import make_method
from lowbit.post_training.pipeline import PostTrainingMethod
from lowbit.progress import Progress, Stage
from lowbit.qat.engine.curve import versions
from lowbit.qat.procedure import training_method
from lowbit.qat.recipe import Recipe
from lowbit.qat.tasks import as_task
from lowbit.registry import find_method, find_procedure
from lowbit.report.comparison import ComparisonReport, comparison_html, comparison_picture, write_comparison
from lowbit.report.facts import processor_name
from lowbit.spec import LayerBits
from lowbit.surrogates import make_surrogate
from lowbit.workflows.cell_policy import calibration_of_cell, policy_of_cell, samples_of_cell
from lowbit.workflows.evaluate import evaluate
from lowbit.workflows.export import export
from lowbit.workflows.output import prepare_folder
from lowbit.workflows.quantize import run_job
from lowbit.workflows.requests import TrainSettings
from lowbit.workflows.samples import CACHE, NOISE, Making, training_data_of
from lowbit.workflows.subjects import Subject, open_subject, sample_total, training_data
from lowbit.workflows.suite import OWN_DATA, SubjectSettings, Suite
from lowbit.workflows.train import TrainingJob, train_network, trainer_for
from lowbit.workfolder import exclusive_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COMPARISON = "comparison"  # name of the stage that shows all cells
CELL_BYTES = 5_000  # of a stored result, about


@dataclass(frozen=True)
class Comparison:
    """The result of ``lowbit.compare``.

    Attributes:
        suite: What was asked for.
        tables: Rows that may stand beside each other, warnings, and every result.
        verdicts: What the results say about the suite's orderings.
        folder: The store; ``cells/`` holds a JSON file for each cell.
        files: Files that were written beside it.

    Example:
        >>> import lowbit, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     suite = lowbit.Suite(methods=("round_to_nearest", "bi_real_net"), bits=("8/8",), seeds=1, workers=0, out=folder)
        ...     comparison = lowbit.compare(suite)
        >>> [(result.cell.name, result.status, result.reason) for result in comparison.tables.results if result.status != "done"]
        [('bi_real_net 8/8 on digits, seed 0', 'skipped', 'bi_real_net has weight bits 1, not 8')]
    """

    suite: Suite
    tables: Tables
    verdicts: Sequence[Verdict]
    folder: Path
    files: Sequence[Path]

    def plot(self) -> Figure:
        """Every method's metric in each table, seed by seed, as a matplotlib figure; MissingExtraError without matplotlib."""
        return comparison_picture(self.tables).figure()

    def _repr_html_(self) -> str:
        return comparison_html(self.tables)


@dataclass(frozen=True)
class CellTask:
    """Everything that a worker needs for one run: the cells that it answers by their keys, several where one network has several widths."""

    cells: Mapping[str, Cell]
    suite: Suite
    subject: Subject | SubjectSettings
    work: Path
    float_metrics: Mapping[str, float]


@dataclass(frozen=True)
class PlannedCell:
    """A cell before it is run.

    Attributes:
        cell: The cell.
        key: Name of its result.
        facts: What it runs on.
        reason: Why it is skipped; empty where it is not.
        is_stored: Whether its result is in the store.
        seconds: Estimated time, where it was measured.
    """

    cell: Cell
    key: str
    facts: Mapping[str, object]
    reason: str
    is_stored: bool
    seconds: float | None = None


def compare(
    suite: Suite | None = None,
    *,
    subjects: Sequence[Subject] = (),
    progress: bool | Progress | None = None,
) -> Comparison:
    """Compare methods on equal terms.

    Every cell (a method with its bits on a network, for one seed) is stored as soon as it is done, under a name made of everything that
    determines it. So a comparison that was killed resumes where it was, the running cell included, and changing a method runs its own
    cells again only. Cells that fail are tried again by the next call.

    Args:
        suite: What to compare, on which terms, and where. Default: five methods on the embedded digits network at two widths.
        subjects: Networks of your own with their data and task, in place of those that the suite names.
        progress: ``True`` to show progress on standard error, ``False`` for silence, or a ``Progress``. Default: a bar where standard
            error is a terminal, and in a notebook.

    Returns:
        Tables, warnings and all results. ``suite.out`` gets ``comparison.html``, ``results.csv``, ``table.md``, ``table.tex``,
        ``methods.bib`` and ``suite.yaml``, and
        ``orderings.md`` where the suite has orderings.

    Raises:
        UnknownNameError: No such method, option, baseline or term.
        SpecError: Terms that cannot be met, a label twice, or stores that disagree.
        DataError: A network without data.
        OutputError: The folder cannot be written to, or another comparison works in it.

    Example:
        >>> import lowbit, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     suite = lowbit.Suite(methods=("round_to_nearest", "dfq"), bits=("8/8",), seeds=1, workers=0, out=folder)
        ...     comparison = lowbit.compare(suite)
        >>> sorted(row.label for row in comparison.tables.tables[0].rows if row.spread.mean > 0.9)
        ['dfq', 'round_to_nearest']
    """
    suite, progress = suite or Suite(), Progress.of(progress)
    suite.check()
    folder = prepare_folder(Path(suite.out), needed_bytes=10_000_000)
    store = Store(folder)
    with exclusive_run(folder):
        for other in suite.merge:
            progress.say(f"{store.merge(Store(other))} new cells from {other}")
        opened = _Opened(suite, subjects)
        planned = plan_cells(suite, store, opened)
        known = store.load()
        for one in planned:
            if one.reason and one.key not in known:
                store.keep(Result(one.key, one.cell, one.facts, "skipped", one.reason, machine=machine_facts(suite.threads)))
        missing = [one for one in planned if not one.is_stored and not one.reason]
        if missing:
            progress.say(f"{len(missing)} cells to run, {len(planned) - len(missing)} are stored or skipped")
        for outcome in _run(suite, _jobs(missing, store, opened, progress), progress):
            _keep(store, outcome, {one.key: one for one in missing}, suite, progress)
        if not suite.only:  # cells that are left may take the same samples
            store.forget_work(CACHE)
        return _reported(suite, store, [one.key for one in planned])


def tables_of(suite: Suite) -> Comparison:
    """The tables of what is stored in ``suite.out``; nothing is run.

    Raises:
        SpecError: Nothing is stored there.
        FileFormatError: A stored result is damaged.
    """
    store = Store(suite.out)
    if not store.load():
        raise SpecError(f"out={suite.out!r} holds no results of a comparison. Name a folder that 'lowbit compare' wrote.")
    with exclusive_run(store.folder):
        return _reported(suite, store, [])


def _reported(suite: Suite, store: Store, current: Sequence[str]) -> Comparison:
    tables = make_tables(store.load().values(), baseline=suite.baseline or suite.methods[0].name, equal=suite.equal, current=current)
    against = None if suite.against is None else Path(suite.against)
    verdicts = judge(suite.orderings, [result for result in tables.results if not current or result.key in current])
    report = ComparisonReport(tables, suite.to_yaml(), commands_of(suite, tables), against, verdicts)
    return Comparison(suite, tables, verdicts, store.folder, write_comparison(report, store.folder))


def plan_cells(suite: Suite, store: Store, opened: _Opened | None = None) -> list[PlannedCell]:
    """Every cell of ``suite`` with the name of its result, and whether it is stored."""
    opened = opened or _Opened(suite, ())
    known = store.load()
    planned: list[PlannedCell] = []
    for cell, reason in suite.cells(opened.names or None):
        facts = opened.facts(cell)
        key = cell.key(facts)
        found = known.get(key)
        planned.append(PlannedCell(cell, key, facts, reason, found is not None and found.status != "failed"))
    if not planned:
        raise SpecError(f"no cell of the suite is called {' or '.join(map(repr, suite.only))}. Names are like 'lsq 4/4 on digits, seed 0'.")
    return planned


def estimate_cells(suite: Suite, store: Store, *, progress: Progress, subjects: Sequence[Subject] = ()) -> list[PlannedCell]:
    """The cells of ``suite`` with the time that each takes: of a stored cell like it, else extrapolated from its first steps."""
    opened = _Opened(suite, subjects)
    planned = plan_cells(suite, store, opened)
    known: dict[object, float] = {}
    for result in store.load().values():
        if result.seconds is not None:
            known[_but_for_the_seed(result.cell)] = result.seconds
    missing = [one for one in planned if not one.is_stored and not one.reason]
    kinds = {_but_for_the_seed(group[0].cell): group for group in _by_run(missing).values()}
    kinds = {kind: group for kind, group in kinds.items() if kind not in known}
    with progress.stage("measuring steps", total=len(kinds)) as stage:
        for kind, group in kinds.items():
            known[kind] = _measured_seconds(group[0], store, opened) / len(group)
            stage.advance(1, group[0].cell.name)
    return [
        dataclasses.replace(one, seconds=None if one.is_stored or one.reason else known[_but_for_the_seed(one.cell)]) for one in planned
    ]


class _Opened:
    """The networks of a suite, opened when they are needed, and the facts about them."""

    def __init__(self, suite: Suite, subjects: Sequence[Subject]) -> None:
        self._suite = suite
        self._given = {subject.name: subject for subject in subjects}
        if len(self._given) < len(subjects):
            raise SpecError("subjects: two of them have the same name. Give each its own.")
        self._settings = {} if subjects else {one.title: one for one in suite.subjects}
        self._facts: dict[tuple[str, int | None], Mapping[str, object]] = {}
        self._scores: dict[str, Mapping[str, float]] = {}
        self._sources: dict[tuple[str | None, ...], str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the networks that were given as objects."""
        return tuple(self._given)

    def named(self, name: str) -> Subject | SubjectSettings:
        """What a worker opens."""
        return self._given.get(name) or self._settings[name]

    def facts(self, cell: Cell) -> dict[str, object]:
        """Digests of all that the cell runs on."""
        subject = opened_subject(self.named(cell.subject), cell.seed)
        at = (cell.subject, cell.seed if subject.follows_seed else None)
        if at not in self._facts:
            self._facts[at] = subject.facts()
        of = (cell.method, cell.kind, cell.surrogate, cell.procedure, cast(str | None, cell.search.get("method")), cell.calibration)
        if of not in self._sources:
            self._sources[of] = method_digest(cell)
        return {
            **self._facts[at],
            "source": self._sources[of],
            "threads": self._suite.threads,
            "configurations": 1,
            "selection": "last epoch",
        }

    def float_metrics(self, cell: Cell, known: Iterable[Result], progress: Progress) -> Mapping[str, float]:
        """The float network's own metrics, measured once; none where its weights are random."""
        subject = opened_subject(self.named(cell.subject), cell.seed)
        if subject.follows_seed:
            return {}
        facts = self.facts(cell)
        if cell.subject not in self._scores:
            same = (
                r.float_metrics for r in known if r.float_metrics and all(r.facts.get(n) == facts[n] for n in ("weights", "data", "task"))
            )
            found = next(same, None)
            if found is None:
                found = dict(evaluate(subject.model, subject.test_data, task=subject.task, progress=progress).metrics)
            self._scores[cell.subject] = found
        return self._scores[cell.subject]


_cache: dict[object, Subject] = {}


def opened_subject(named: Subject | SubjectSettings, seed: int) -> Subject:
    """The opened network; a process opens each once, and those with random weights once for each seed."""
    if isinstance(named, Subject):
        return named
    key = named.to_yaml()
    if key in _cache or (key, seed) in _cache:
        return _cache[key] if key in _cache else _cache[key, seed]
    subject = open_subject(named, seed)
    _cache[(key, seed) if subject.follows_seed else key] = subject
    return subject


def method_digest(cell: Cell) -> str:
    """SHA-256 of the files that define the cell's method, procedure, search and synthesis, those they derive from, and its surrogate."""
    info = find_method(cell.method, cell.kind)
    procedure = None if cell.procedure is None else find_procedure(cell.procedure).method
    searched = find_method(cell.search["method"], "search").method if cell.search else None
    made = None if cell.calibration in (None, NOISE) else find_method(cell.calibration, "synthesis").method
    families = [cls.__mro__ for cls in (info.method, procedure, searched, made) if cls is not None]
    classes = [cls for family in families for cls in family if _is_own(cls.__module__)]
    if cell.surrogate is not None:
        classes.append(type(make_surrogate(cell.surrogate)))
    digest = hashlib.sha256()
    for cls in classes:
        try:
            digest.update(Path(inspect.getfile(cls)).read_bytes())
        except (OSError, TypeError):  # made outside of a file
            digest.update(cls.__qualname__.encode())
    return digest.hexdigest()


def _is_own(module: str) -> bool:
    """Whether a class of this module belongs to a method, and not to the library or to Python."""
    return module.startswith("lowbit.methods.") or module.partition(".")[0] not in ("lowbit", "builtins", "abc", "typing")


def _jobs(missing: Sequence[PlannedCell], store: Store, opened: _Opened, progress: Progress) -> list[Job]:
    known = list(store.load().values())
    jobs = []
    for key, group in _by_run(missing).items():
        cell = group[0].cell
        metrics = opened.float_metrics(cell, known, progress)
        work = store.work_folder(key).absolute()
        task = CellTask({one.key: one.cell for one in group}, opened._suite, opened.named(cell.subject), work, metrics)
        bits = ", ".join(one.cell.bits for one in group)
        jobs.append(Job(key, f"{cell.label} {bits} on {cell.subject}, seed {cell.seed}", task))
    return jobs


def _by_run(planned: Iterable[PlannedCell]) -> dict[str, list[PlannedCell]]:
    """Cells by what has to be run for them."""
    groups: dict[str, list[PlannedCell]] = {}
    for one in planned:
        groups.setdefault(one.cell.trained.key(one.facts), []).append(one)
    return groups


def _run(suite: Suite, jobs: Sequence[Job], progress: Progress) -> Iterator[Outcome]:
    if not jobs:
        return iter(())
    if suite.ray is not None:
        memory = None if suite.memory_gb is None else int(suite.memory_gb * 2**30)
        return run_on_ray(
            jobs, run_cell, address=suite.ray, threads=suite.threads, memory_bytes=memory, stage_name=COMPARISON, progress=progress
        )
    workers = workers_of(suite)
    if workers == 0:
        return run_here(jobs, run_cell, stage_name=COMPARISON, progress=progress)
    return run_in_processes(jobs, run_cell, workers=workers, threads=suite.threads, stage_name=COMPARISON, progress=progress)


def workers_of(suite: Suite) -> int:
    """Number of processes that run cells here."""
    return max(1, (os.cpu_count() or 1) // suite.threads) if suite.workers is None else suite.workers


def _keep(store: Store, outcome: Outcome, planned: Mapping[str, PlannedCell], suite: Suite, progress: Progress) -> None:
    for key in cast(CellTask, outcome.job.payload).cells:
        one, problem = planned[key], {"status": "failed", "reason": outcome.problem}
        answer = {"machine": machine_facts(suite.threads), **cast(Any, problem if outcome.answer is None else outcome.answer[key])}
        result = Result(key, one.cell, one.facts, **answer)
        store.keep(result)
        if result.status != "done":
            progress.say(f"{one.cell.name}: {result.status}: {result.reason}")
    if outcome.answer is not None:
        store.forget_work(outcome.job.key)


def run_cell(job: Job, progress: Progress) -> Mapping[str, Mapping[str, object]]:
    """Run what a job asks for and measure what came out; for each cell the fields of ``Result`` that are known then, as plain values."""
    task = cast(CellTask, job.payload)
    cell, suite = next(iter(task.cells.values())).trained, task.suite
    start = time.perf_counter()
    subject = opened_subject(task.subject, cell.seed)
    goal = as_task(subject.task)
    facts: dict[str, object] = {
        "metric": goal.metric_name,
        "higher_is_better": goal.higher_is_better,
        "unit": goal.units.get(goal.metric_name, ""),
        "float_metrics": task.float_metrics,
        "machine": machine_facts(suite.threads),
    }
    task.work.mkdir(parents=True, exist_ok=True)
    try:
        model, sample, seen = (_trained if cell.kind == "training" else _quantized)(task, cell, subject, progress)
    except DivergedError as error:
        seconds = (time.perf_counter() - start) / len(task.cells)
        return {key: {**facts, "status": "diverged", "reason": str(error), "seconds": seconds} for key in task.cells}
    run_seconds = (time.perf_counter() - start) / len(task.cells)
    found = {}
    for key, own in task.cells.items():
        start = time.perf_counter()
        measured = _measured(own, task, subject, model, sample, progress)
        terms = {**cast(dict[str, object], measured["terms"]), **seen}
        found[key] = {**facts, **measured, "terms": terms, "seconds": run_seconds + time.perf_counter() - start}
    return found


def _measured(cell: Cell, task: CellTask, subject: Subject, model: nn.Module, sample: Inputs, progress: Progress) -> dict[str, object]:
    """What came out, of a network of several widths at those of the cell."""
    if cell.mixtures:
        metrics = _mixed_metrics(cell, subject, model, progress)
    else:
        if cell.widths:
            set_bits(model, LayerBits(cell.weight_bits, cell.activation_bits))
        metrics = _metrics(subject, model, progress)
    metric = as_task(subject.task).metric_name
    status: Status = "done" if math.isfinite(metrics[metric]) else "diverged"
    terms = equal_terms(model, subject.model, sample)
    facts: dict[str, object] = {
        "status": status,
        "reason": "" if status == "done" else f"{metric} is {metrics[metric]}",
        "metrics": metrics,
        "terms": {**terms, "inner_layers": MIXED} if cell.mixtures else terms,
        "size_bytes": model_size(model).total_bytes,
    }
    if task.suite.latency and status == "done":
        facts |= _latency(model, sample, task.work)
    return facts


def _metrics(subject: Subject, model: nn.Module, progress: Progress) -> dict[str, float]:
    return dict(evaluate(model, subject.test_data, task=subject.task, progress=progress).metrics)


def _mixed_metrics(cell: Cell, subject: Subject, model: nn.Module, progress: Progress) -> dict[str, float]:
    """Means over networks whose layers have widths drawn for each, the same draws for all methods; and the least and the greatest."""
    generator, layers, switches = torch.Generator().manual_seed(cell.seed), switching_layers(model), switches_of(model)
    found = []
    for _ in range(cell.mixtures):
        places = torch.randint(len(switches), (len(layers),), generator=generator).tolist()
        set_bits(model, {layer: switches[place] for layer, place in zip(layers, places, strict=True)})
        found.append(_metrics(subject, model, progress))
    means = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    ends = ((word, end) for word, end in (("least", min), ("greatest", max)))
    return means | {f"{word} {name}": end(one[name] for one in found) for word, end in ends for name in found[0]}


def _trained(task: CellTask, cell: Cell, subject: Subject, progress: Progress) -> tuple[nn.Module, Inputs, dict[str, object]]:
    suite = task.suite
    method = training_method(cell.method, cell.options, cell.procedure, cell.procedure_options)
    if subject.train_data is None and cell.calibration is None and method.generated_steps() is None:
        if isinstance(task.subject, SubjectSettings):
            training_data(task.subject)  # raises why there are none
        raise SpecError(f"{subject.name}: {cell.method} trains, and there are no training data. Give the network data.")
    recipe = suite.recipe_for(cell, method.default_recipe() if suite.track == "published" else Recipe())
    settings = TrainSettings(
        recipe=recipe, surrogate=cell.surrogate, augment=suite.augment, save_every=suite.save_every, tensorboard=False, select="last"
    )
    data, images, sample = subject.train_data, sample_total(subject.train_data), None
    if method.generated_steps() is not None:
        making = Making(NOISE, count=suite.batch_size_calibration, seed=cell.seed)
        data, images, sample = None, 0, making.make(subject.model, subject.one_input(), progress=progress)
    elif cell.calibration is not None:
        made = samples_of_cell(cell, subject, suite.synthesized_samples, task.work, progress)
        data, images = training_data_of(made), made.batch_size
    teacher = subject.model if "teacher" in method.info.needs or cell.calibration is not None else None
    job = TrainingJob(
        subject.model, data, method, policy_of_cell(suite, cell, subject, method, task.work, progress), teacher=teacher, task=subject.task,
        bits=cell.widths or None, sample=sample,
    )  # fmt: skip
    trained = train_network(job, settings, trainer_for(settings, progress), out=task.work)
    return trained.model, trained.sample, {"images": len(trained.curve) * images, "calibration": cell.calibration or OWN_DATA}


def _quantized(task: CellTask, cell: Cell, subject: Subject, progress: Progress) -> tuple[nn.Module, Inputs, dict[str, object]]:
    suite = task.suite
    method = make_method(cell.method, "post_training", cell.options)
    assert isinstance(method, PostTrainingMethod)
    calibration = calibration_of_cell(suite, cell, subject, task.work, progress)
    policy = policy_of_cell(suite, cell, subject, method, task.work, progress)
    job = run_job(subject.model, method, policy, calibration, seed=cell.seed, progress=progress, work_dir=task.work)
    seen = {"images": 0, "calibration_images": calibration.samples, "calibration": cell.calibration or OWN_DATA}
    return job.model, job.sample, seen


def _latency(model: nn.Module, sample: Inputs, work: Path) -> dict[str, object]:
    """Times of the ONNX file; a note where there is none, so that a figure that is missing has its reason."""
    try:
        written = export(model, work / "model.onnx", sample=sample)
    except LowbitError as error:
        return {"reason": f"not timed: {error}"}
    if written.speed is None:
        return {"reason": "not timed"}
    return {"latency_ms": written.speed.quantized_ms, "float_latency_ms": written.speed.float_ms}


def machine_facts(threads: int) -> dict[str, object]:
    """Where a cell runs: what its time, and the last bits of its result, may depend on."""
    return {"processor": processor_name(), "system": platform.system(), "threads": threads, **versions()}


def commands_of(suite: Suite, tables: Tables) -> dict[str, str]:
    """The command that runs each result of ``suite`` alone, by its key.

    Networks given as objects have no command, nor have results of other suites in the same folder.
    """
    asked = {cell.key({}) for cell, _ in dataclasses.replace(suite, only=()).cells()}
    file = Path(suite.out) / "suite.yaml"
    return {
        result.key: shlex.join(["lowbit", "compare", str(file), "--only", result.cell.name, "--out", "one-cell"])
        for result in tables.results
        if result.cell.key({}) in asked
    }


def _but_for_the_seed(cell: Cell) -> str:
    return dataclasses.replace(cell.trained, seed=0).key({})


class _Enough(Exception):
    """Enough steps of a stage were measured."""


class _Probe(Progress):
    """Measures the first steps of each long stage and leaves out the others.

    Attributes:
        start: When the run began.
        left_out: Seconds that the steps which were left out would have taken.
    """

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.start = time.perf_counter()
        self.left_out = 0.0

    @property
    def seconds(self) -> float:
        """Time of the run so far, with all steps."""
        return time.perf_counter() - self.start + self.left_out

    def stage(self, name: str, total: float, *, done: int = 0) -> _ProbedStage:  # type: ignore[override]
        """A stage that ends when its time is known."""
        return _ProbedStage(self, name, total)


class _ProbedStage(Stage):
    STEPS, SECONDS, LONG = 2, 0.5, 1.0  # at least so many steps are measured, for at least so long, of stages with more than that left

    def __init__(self, probe: _Probe, name: str, total: float) -> None:
        super().__init__(name, total, None, None, None)
        self._probe, self._steps, self._first = probe, 0, (0.0, 0.0)

    def __enter__(self) -> _ProbedStage:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is _Enough

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count; raise ``_Enough``, which ends the stage, once the first steps show that the rest takes long."""
        super().advance(amount, note)
        self._steps += 1
        now = time.perf_counter()
        if self._steps == 1:  # the first step builds what the others use
            self._first = (now, self.done)
            return
        passed = now - self._first[0]
        rest = passed / (self.done - self._first[1]) * (self.total - self.done)
        if self._steps >= self.STEPS and passed > self.SECONDS and rest > self.LONG:
            self._probe.left_out += rest
            raise _Enough


def _measured_seconds(one: PlannedCell, store: Store, opened: _Opened) -> float:
    probe = _Probe()
    work = store.work_folder(f"{one.key}-measured").absolute()
    task = CellTask({one.key: one.cell}, opened._suite, opened.named(one.cell.subject), work, {})
    try:
        run_cell(Job(one.key, one.cell.name, task), probe)
    except Exception:  # half of a stage can leave too little for what follows, whose time is then not counted
        if not probe.left_out:
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return probe.seconds
