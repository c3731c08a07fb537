"""Where jobs run: in this process, in worker processes of this machine, or on a Ray cluster. The results are the same."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from lowbit.errors import SpecError, missing_extra
from lowbit.progress import Progress, Stage

Runner = Callable[["Job", Progress], Mapping[str, Any]]  # what it returns is plain
LONGEST_LAG = 0.5  # seconds between two reports of a worker


@dataclass(frozen=True)
class Job:
    """A piece of work, as it is sent to a worker.

    Attributes:
        key: Key of the result.
        name: Name shown to people.
        payload: What the runner needs; it is pickled.
    """

    key: str
    name: str
    payload: object = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """What a worker says of a job: the runner's answer, or why there is none."""

    job: Job
    answer: Mapping[str, Any] | None
    problem: str = ""


def run_here(jobs: Sequence[Job], runner: Runner, *, stage_name: str, progress: Progress) -> Iterator[Outcome]:
    """Run jobs one after the other in this process."""
    with progress.stage(stage_name, total=len(jobs)) as stage:
        for job in jobs:
            shares = _Shares(stage)
            answer, problem = _answer(runner, job, _Reporting(lambda share, job=job, shares=shares: shares.report(job, share)))  # type: ignore[misc]
            shares.finish(job)
            yield Outcome(job, answer, problem)


def run_in_processes(
    jobs: Sequence[Job], runner: Runner, *, workers: int, threads: int, stage_name: str, progress: Progress, patience: int = 1
) -> Iterator[Outcome]:
    """Run jobs in worker processes, each with its own interpreter, and yield outcomes as they come.

    A worker that dies (for memory, or killed) costs its own job only: the job fails with the reason and a new worker starts.

    Args:
        jobs: What to run.
        runner: A function at the top of a module; called in the workers.
        workers: Number of processes.
        threads: CPU threads of each.
        stage_name: What the display calls the work.
        progress: One display for all jobs.
        patience: How often a job is run again whose worker died.
    """
    pending, tries = deque(jobs), dict[str, int]()
    team: list[_Worker] = []
    with _threads(threads), progress.stage(stage_name, total=len(jobs)) as stage:
        shares = _Shares(stage)
        try:
            while pending or any(worker.job is not None for worker in team):
                while pending and len(team) < min(workers, len(pending) + len(team)):
                    team.append(_Worker(runner, threads))
                for worker in team:
                    if worker.job is None and pending:
                        worker.start(pending.popleft())
                for worker in _ready(team):
                    message = worker.receive()
                    job = worker.job
                    assert job is not None
                    if isinstance(message, float):
                        shares.report(job, message)
                        continue
                    worker.job = None
                    if message is not None:
                        shares.finish(job)
                        yield Outcome(job, *message)
                        continue
                    team.remove(worker)
                    tries[job.key] = tries.get(job.key, 0) + 1
                    if tries[job.key] <= patience:
                        progress.say(f"{job.name}: {worker.death()}; it is run again from its last state")
                        pending.append(job)
                    else:
                        shares.finish(job)
                        yield Outcome(job, None, worker.death())
        finally:
            for worker in team:
                worker.stop()


def run_on_ray(
    jobs: Sequence[Job],
    runner: Runner,
    *,
    address: str,
    threads: int,
    memory_bytes: int | None,
    stage_name: str,
    progress: Progress,
    patience: int = 3,
) -> Iterator[Outcome]:
    """Run jobs as tasks of a Ray cluster, and yield outcomes as they come.

    Args:
        jobs: What to run.
        runner: A function at the top of a module that all nodes can import.
        address: ``auto`` for the cluster that this machine belongs to, ``local`` for one of its own, or ``HOST:PORT``.
        threads: Cores that each job declares and uses.
        memory_bytes: Memory that each job declares.
        stage_name: What the display calls the work.
        progress: One display for all jobs.
        patience: How often Ray runs a job again whose worker died.

    Raises:
        MissingExtraError: Ray is not installed.
        SpecError: There is no cluster at the address.
    """
    try:
        import ray
    except ImportError as error:
        raise missing_extra("ray", "ray", "running jobs on Ray") from error
    owns = not ray.is_initialized()
    if owns:
        try:
            ray.init(address=None if address == "local" else address, log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SpecError(f"ray={address!r}: there is no cluster to connect to ({error}). Start one with 'ray start --head'.") from error
    task = ray.remote(_on_ray).options(
        num_cpus=threads, memory=memory_bytes, max_retries=patience, runtime_env={"env_vars": {"OMP_NUM_THREADS": str(threads)}}
    )
    try:
        with progress.stage(stage_name, total=len(jobs)) as stage:
            running = {task.remote(runner, job, threads): job for job in jobs}
            while running:
                (ready, *_), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(ready)
                try:
                    answer, problem = ray.get(ready)
                except ray.exceptions.RayError as error:
                    answer, problem = None, f"its worker died ({type(error).__name__}); out of memory, or its node is gone"
                stage.advance(1, job.name)
                yield Outcome(job, answer, problem)
    finally:
        if owns:
            ray.shutdown()


def _on_ray(runner: Runner, job: Job, threads: int) -> tuple[Mapping[str, object] | None, str]:
    _use_threads(threads)
    return _answer(runner, job, Progress.silent())


def _answer(runner: Runner, job: Job, progress: Progress) -> tuple[Mapping[str, object] | None, str]:
    """What the runner says; an error becomes the reason."""
    try:
        return runner(job, progress), ""
    except MemoryError:
        return None, "there was not enough memory"
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


class _Worker:
    """A process that runs one job after the other."""

    def __init__(self, runner: Runner, threads: int) -> None:
        context = multiprocessing.get_context("spawn")  # threads of torch do not survive a fork
        self._pipe, other = context.Pipe()
        self._process: BaseProcess = context.Process(target=_work, args=(other, runner, threads), daemon=True)
        self._process.start()
        other.close()
        self.job: Job | None = None

    @property
    def pipe(self) -> Connection:
        """What to wait for."""
        return self._pipe

    def start(self, job: Job) -> None:
        """Send it a job."""
        self.job = job
        with contextlib.suppress(OSError):  # it is dead, which receive will tell
            self._pipe.send(job)

    def receive(self) -> Any:
        """A share of the job that is done, the runner's answer, or ``None``: the process is dead."""
        try:
            return self._pipe.recv()
        except (EOFError, OSError):
            self._process.join()
            return None

    def death(self) -> str:
        """How it ended, in words."""
        code = self._process.exitcode or 0
        if code == -signal.SIGKILL:
            return "its process was killed by signal 9, probably for lack of memory"
        return f"its process was killed by {signal.Signals(-code).name}" if code < 0 else f"its process ended with exit status {code}"

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def _ready(team: Sequence[_Worker]) -> list[_Worker]:
    busy = {worker.pipe: worker for worker in team if worker.job is not None}
    return [busy[pipe] for pipe in wait(list(busy)) if isinstance(pipe, Connection)]


def _work(pipe: Connection, runner: Runner, threads: int) -> None:
    """What a worker process does until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _use_threads(threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            job = pipe.recv()
            pipe.send(_answer(runner, job, _Reporting(pipe.send)))


def _end_with_parent() -> None:
    """A parent that was killed cannot end its workers, and who resumes its work needs their folders."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Processes that start meanwhile compute with so many threads."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


class _Reporting(Progress):
    """Shows nothing, and reports which share of the longest stage is done."""

    def __init__(self, report: Callable[[float], object]) -> None:
        super().__init__(quiet=True)
        self._report = report

    @contextlib.contextmanager
    def stage(self, name: str, total: float, *, done: int = 0) -> Iterator[Stage]:
        """A stage that reports itself now and then."""
        yield _ReportingStage(name, total, done, self._report)


class _ReportingStage(Stage):
    def __init__(self, name: str, total: float, done: float, report: Callable[[float], object]) -> None:
        super().__init__(name, total, None, None, None, done)
        self._report, self._last = report, time.monotonic()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Count, and report at most twice a second."""
        super().advance(amount, note)
        if time.monotonic() - self._last > LONGEST_LAG and self.total:
            self._last = time.monotonic()
            self._report(min(self.done / self.total, 1.0) * 0.99)


class _Shares:
    """Adds up what workers report, so that the bar never runs back."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._done: dict[str, float] = {}

    def report(self, job: Job, share: float) -> None:
        """``share`` of the job's current stage is done."""
        before = self._done.get(job.key, 0.0)
        if share > before:
            self._done[job.key] = share
            self._stage.advance(share - before, job.name)

    def finish(self, job: Job) -> None:
        """The job is done."""
        self._stage.advance(1 - self._done.pop(job.key, 0.0), job.name)
