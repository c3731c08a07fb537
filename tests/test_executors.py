from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from lowbit.errors import SpecError
from lowbit.executors import Job, run_here, run_in_processes, run_on_ray
from lowbit.progress import Progress


def double(job: Job, progress: Progress) -> Mapping[str, object]:
    with progress.stage("doubling", total=2) as stage:
        stage.advance(2)
    assert isinstance(job.payload, int)
    return {"value": 2 * job.payload, "threads": torch.get_num_threads()}


def misbehave(job: Job, _: Progress) -> Mapping[str, object]:
    what, folder = job.payload  # type: ignore[misc]
    if what == "raises":
        raise RuntimeError("no such luck")
    if what == "memory":
        raise MemoryError
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "killed once" and not Path(folder, "tried").exists():
        Path(folder, "tried").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exits":
        os._exit(3)
    return {"value": what}


JOBS = [Job(str(number), f"job {number}", number) for number in range(5)]


def test_jobs_in_processes_give_what_they_give_here() -> None:
    here = {outcome.job.key: outcome.answer for outcome in run_here(JOBS, double, stage_name="jobs", progress=Progress.silent())}
    apart = {
        outcome.job.key: outcome.answer
        for outcome in run_in_processes(JOBS, double, workers=2, threads=1, stage_name="jobs", progress=Progress.silent())
    }
    assert {key: answer["value"] for key, answer in here.items() if answer} == {str(number): 2 * number for number in range(5)}
    assert {key: answer["value"] for key, answer in apart.items() if answer} == {str(number): 2 * number for number in range(5)}
    assert {answer["threads"] for answer in apart.values() if answer} == {1}


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_own_cell_only(tmp_path: Path) -> None:
    whats = ["raises", "memory", "killed", "killed once", "exits", "well"]
    jobs = [Job(what, what, (what, tmp_path)) for what in whats]
    found = {o.job.key: o for o in run_in_processes(jobs, misbehave, workers=2, threads=1, stage_name="jobs", progress=Progress.silent())}
    assert found.keys() == set(whats)
    assert found["raises"].problem == "RuntimeError: no such luck"
    assert found["memory"].problem == "there was not enough memory"
    assert found["killed"].problem == "its process was killed by signal 9, probably for lack of memory"
    assert found["exits"].problem == "its process ended with exit status 3"
    assert [found[what].answer for what in ("killed once", "well")] == [{"value": "killed once"}, {"value": "well"}]


def wait_for_long(job: Job, _: Progress) -> Mapping[str, object]:
    Path(str(job.payload), str(os.getpid())).touch()
    time.sleep(600)
    return {}


def test_workers_end_when_nobody_waits_for_them_any_more(tmp_path: Path) -> None:
    outcomes = run_in_processes(
        [Job("a", "a", tmp_path), JOBS[0]], _mixed, workers=2, threads=1, stage_name="jobs", progress=Progress.silent()
    )
    next(outcomes)  # of the short one
    while not (started := list(tmp_path.iterdir())):
        time.sleep(0.05)
    outcomes.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int(started[0].name), 0)


def _mixed(job: Job, progress: Progress) -> Mapping[str, object]:
    return double(job, progress) if isinstance(job.payload, int) else wait_for_long(job, progress)


def test_a_cluster_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")

    def find_none(**_: object) -> None:  # another test's cluster may be running on this machine
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "init", find_none)
    with pytest.raises(SpecError, match=r"ray='auto': there is no cluster to connect to .*Could not find any running Ray instance"):
        list(run_on_ray(JOBS, double, address="auto", threads=1, memory_bytes=None, stage_name="jobs", progress=Progress.silent()))
