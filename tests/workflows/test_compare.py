from __future__ import annotations

import csv
import errno
import functools
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from markupsafe import escape
from tests.qat.adaptive import chain
from tests.qat.training import data
from torch import nn
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app
from lowbit.comparison.store import Store
from lowbit.comparison.tables import make_tables
from lowbit.errors import LowbitError, OutputError, SpecError
from lowbit.workflows.compare import commands_of, compare, estimate_cells, plan_cells, tables_of
from lowbit.workflows.subjects import Subject
from lowbit.workflows.suite import Suite

SEPARABLE = torch.Generator().manual_seed(0)


def points(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(count, 4, generator=generator)
    return inputs, (inputs[:, 0] > inputs[:, 1]).long()


def subject(name: str = "points") -> Subject:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
    generator = torch.Generator().manual_seed(0)
    return Subject(name, model, points(256, generator), points(128, generator))


def suite(out: Path, **changes: object) -> Suite:
    given = {"methods": ("lsq", "round_to_nearest"), "bits": ("2/4",), "seeds": 3, "workers": 0, **changes}
    return Suite(out=str(out), **given).changed({"epochs": 2, "batch_size": 32})  # type: ignore[arg-type]


def values(comparison: lowbit.Comparison) -> dict[tuple[str, str, int], float | None]:
    return {(r.cell.label, r.cell.bits, r.cell.seed): r.value for r in comparison.tables.results}


def test_a_comparison_of_own_networks_runs_every_kind_and_stores_each_cell(tmp_path: Path) -> None:
    comparison = compare(suite(tmp_path), subjects=[subject()])
    assert {table.kind: [row.label for row in table.rows] for table in comparison.tables.tables} == {
        "training": ["lsq"],
        "post_training": ["round_to_nearest"],
    }
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != ".work") == [
        "cells", "comparison.html", "methods.bib", "results.csv", "suite.yaml", "table.md", "table.tex",
    ]  # fmt: skip
    results = {(r.cell.label, r.cell.seed): r for r in comparison.tables.results}
    trained, rounded = results["lsq", 0], results["round_to_nearest", 0]
    assert trained.terms["images"] == 512 and rounded.terms["calibration_images"] == 256 and rounded.terms["images"] == 0
    assert trained.terms["first_layer"] == trained.terms["last_layer"] == "8/8" and trained.terms["inner_layers"] == "2/4"
    assert trained.terms["float_share"] == 0.0 and trained.terms["norms"] == "none"
    assert trained.size_bytes is not None and trained.size_bytes < 4 * (4 * 16 + 16 * 16 + 16 * 2)
    assert trained.value is not None and trained.value > trained.float_metrics["accuracy"]
    assert trained.float_metrics == {name: pytest.approx(value) for name, value in rounded.float_metrics.items()}
    assert trained.facts["weights"] == rounded.facts["weights"] and len(str(trained.facts["weights"])) == 64


def test_a_second_call_runs_nothing_and_gives_the_same_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(suite(tmp_path), subjects=[subject()])
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    monkeypatch.setattr("lowbit.workflows.compare.run_cell", lambda *_: pytest.fail("nothing is to be run"))
    again = compare(suite(tmp_path), subjects=[subject()])
    assert values(again) == values(first) and again.tables.tables == first.tables.tables
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == stamps


def test_a_cell_is_what_a_bare_training_gives(tmp_path: Path) -> None:
    one = subject()
    found = values(compare(suite(tmp_path, methods=("lsq",), seeds=1), subjects=[one]))
    trained = lowbit.train(
        one.model, one.train_data, method="lsq", weight_bits=2, activation_bits=4, recipe=lowbit.Recipe(epochs=2, batch_size=32)
    )
    assert found["lsq", "2/4", 0] == lowbit.evaluate(trained, one.test_data)["accuracy"]


def test_seeds_are_paired_whatever_the_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowbit.qat.engine.batches as batches

    orders: dict[str, list[list[int]]] = {}
    running = ""
    plain = batches._fetch

    def spied(*args: object, **settings: object):  # type: ignore[no-untyped-def]
        fetch, count = plain(*args, **settings)  # type: ignore[arg-type]
        if fetch is None or args[1] != "training data":
            return fetch, count
        return lambda chosen, generator: (orders.setdefault(running, []).extend(chosen), fetch(chosen, generator))[1], count

    monkeypatch.setattr(batches, "_fetch", spied)
    for name in ("lsq", "lq_nets", "dorefa"):
        running = name
        compare(suite(tmp_path / name, methods=(name,), seeds=2), subjects=[subject()])
    assert orders["lsq"] == orders["dorefa"] == orders["lq_nets"]
    epochs = orders["lsq"][-16:]  # of the second seed, 8 steps each
    assert sorted(itertools.chain(*epochs[:8])) == sorted(itertools.chain(*epochs[8:])) == list(range(256)) and epochs[:8] != epochs[8:]
    drawn = [subject().draw_calibration(64, 32, seed).sample.tensors for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(drawn[0], drawn[1], strict=True))
    assert not torch.equal(next(iter(drawn[0])), next(iter(drawn[2])))


METHOD = """
from dataclasses import dataclass
import lowbit
from lowbit.methods.quantizer_design.lsq import Lsq

@dataclass
class Mine(Lsq):
    note: str = "{note}"
"""


def test_a_changed_method_runs_its_own_cells_again_only(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(METHOD.format(note="first"))
    asked = suite(tmp_path / "out", methods=(f"{file}:Mine", "lsq"), seeds=1)
    first = compare(asked, subjects=[subject()])
    file.write_text(METHOD.format(note="second"))
    store = Store(tmp_path / "out")
    assert [one.cell.method for one in plan_cells(asked, store, _opened(asked)) if not one.is_stored] == [f"{file}:Mine"]
    again = compare(asked, subjects=[subject()])
    assert again.tables.superseded == 1 and values(again) == values(first)
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 3


def _opened(asked: Suite):  # type: ignore[no-untyped-def]
    from lowbit.workflows.compare import _Opened

    return _Opened(asked, [subject()])


def test_folders_of_two_machines_merge_to_the_table_of_one(tmp_path: Path) -> None:
    whole = compare(suite(tmp_path / "whole"), subjects=[subject()])
    compare(suite(tmp_path / "a", methods=("lsq",)), subjects=[subject()])
    compare(suite(tmp_path / "b", methods=("round_to_nearest",)), subjects=[subject()])
    merged = compare(suite(tmp_path / "a", merge=(str(tmp_path / "b"),)), subjects=[subject()])
    assert values(merged) == values(whole)
    assert [table.rows[0].spread for table in merged.tables.tables] == [table.rows[0].spread for table in whole.tables.tables]


@dataclass(frozen=True)
class NanTask(lowbit.Classification):
    def metrics(self, sums):  # type: ignore[no-untyped-def]
        return {name: float("nan") for name in super().metrics(sums)}


def test_what_is_not_done_has_its_reason_and_is_never_dropped(tmp_path: Path) -> None:
    broken = replace(subject("no data"), train_data=None, calibration=None)
    comparison = compare(
        suite(tmp_path, methods=("lsq", "bi_real_net", "round_to_nearest"), seeds=1),
        subjects=[broken, replace(subject("nan"), task=NanTask())],
    )
    found = {(r.cell.subject, r.cell.label): (r.status, r.reason) for r in comparison.tables.results}
    assert found["no data", "bi_real_net"] == ("skipped", "bi_real_net has weight bits 1, not 2")
    assert found["no data", "lsq"][0] == "failed" and "there are no training data" in found["no data", "lsq"][1]
    assert found["no data", "round_to_nearest"][0] == "failed" and "no samples to calibrate on" in found["no data", "round_to_nearest"][1]
    assert found["nan", "lsq"] == ("diverged", "accuracy is nan")
    page = (tmp_path / "comparison.html").read_text()
    assert "accuracy is nan" in page and "there are no training data" in page
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 6 and {row["status"] for row in rows} == {"skipped", "failed", "diverged"}


def test_a_loss_that_diverges_is_told(tmp_path: Path) -> None:
    asked = suite(tmp_path, methods=("lsq",), seeds=1).changed({"optimizer": {"learning_rate": 1e30}})
    (result,) = compare(asked, subjects=[subject()]).tables.results
    assert result.status == "diverged" and result.value is None and result.reason


def test_failed_cells_run_again_and_diverged_ones_do_not(tmp_path: Path) -> None:
    asked, broken = suite(tmp_path, methods=("round_to_nearest",), seeds=1), replace(subject(), train_data=None)
    compare(asked, subjects=[broken])
    store = Store(tmp_path)
    (failed,) = store.load().values()
    assert failed.status == "failed"
    from lowbit.workflows.compare import _Opened

    assert [one.is_stored for one in plan_cells(asked, store, _Opened(asked, [broken]))] == [False]
    store.keep(replace(failed, status="diverged"))
    assert [one.is_stored for one in plan_cells(asked, store, _Opened(asked, [broken]))] == [True]


def test_two_comparisons_do_not_work_in_one_folder(tmp_path: Path) -> None:
    from lowbit.workfolder import exclusive_run

    with exclusive_run(tmp_path), pytest.raises(OutputError, match="another run"):
        compare(suite(tmp_path), subjects=[subject()])


def test_tables_come_from_what_is_stored_without_running(tmp_path: Path) -> None:
    done = compare(suite(tmp_path), subjects=[subject()])
    (tmp_path / "comparison.html").unlink()
    assert tables_of(suite(tmp_path)).tables.tables == done.tables.tables and (tmp_path / "comparison.html").exists()
    with pytest.raises(SpecError, match="holds no results"):
        tables_of(suite(tmp_path / "none"))


def test_the_estimate_knows_stored_cells_and_measures_the_others(tmp_path: Path) -> None:
    asked = suite(tmp_path, methods=("lsq",), seeds=2)
    compare(suite(tmp_path, methods=("lsq",), seeds=1), subjects=[subject()])
    planned = estimate_cells(asked, Store(tmp_path), progress=lowbit.progress.Progress.silent(), subjects=[subject()])
    (stored,) = Store(tmp_path).load().values()
    assert [(one.cell.seed, one.is_stored, one.seconds) for one in planned] == [(0, True, None), (1, False, stored.seconds)]
    fresh = estimate_cells(asked, Store(tmp_path / "new"), progress=lowbit.progress.Progress.silent(), subjects=[subject()])
    assert all(one.seconds is not None and one.seconds > 0 for one in fresh)
    assert not list((tmp_path / "new").rglob("*.json"))


@pytest.mark.parametrize("fails", ["not at all", "behind the stages", "before them"])
def test_the_estimate_counts_all_long_stages_without_running_them(fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowbit.workflows.compare as module

    def run_cell(_job: object, progress: lowbit.progress.Progress) -> dict[str, object]:
        if fails == "before them":
            raise ValueError("no such layer")
        for _ in range(2):
            with progress.stage("steps", total=1000) as stage:
                for _ in range(1000):
                    time.sleep(0.02)
                    stage.advance()
        if fails == "behind the stages":
            raise ValueError("no last epoch")
        return {}

    monkeypatch.setattr(module, "run_cell", run_cell)
    asked, start = suite(tmp_path, methods=("lsq",), seeds=1), time.perf_counter()
    estimate = functools.partial(estimate_cells, asked, Store(tmp_path), progress=lowbit.progress.Progress.silent(), subjects=[subject()])
    if fails == "before them":
        with pytest.raises(ValueError, match="no such layer"):
            estimate()
        return
    found = {one.seconds for one in estimate()}
    assert time.perf_counter() - start < 20
    assert all(seconds is not None and 40 <= seconds < 400 for seconds in found)  # 1000 steps of at least 20 ms, twice


def test_an_earlier_comparison_is_compared_with(tmp_path: Path) -> None:
    compare(suite(tmp_path / "a", seeds=1), subjects=[subject()])
    before = tmp_path / "before.csv"
    shutil.copy(tmp_path / "a" / "results.csv", before)
    compare(suite(tmp_path / "a", seeds=1, against=str(before)), subjects=[subject()])
    text = (tmp_path / "a" / "table.md").read_text()
    assert "| to earlier |" in text and "| +0.00 |" in text


def test_the_published_track_takes_the_papers_recipe_and_policy(tmp_path: Path) -> None:
    comparison = compare(suite(tmp_path, methods=("dorefa", "lsq"), track="published", paper_epochs=1, seeds=1), subjects=[subject()])
    terms = {r.cell.label: r.terms for r in comparison.tables.results}
    assert all(r.status == "done" for r in comparison.tables.results)
    assert terms["dorefa"]["images"] == 256
    assert terms["dorefa"]["first_layer"] == "float/float" and terms["lsq"]["first_layer"] == "8/8"
    (table,) = comparison.tables.tables
    assert table.track == "published" and len(table.rows) == 2


PROGRAM = ["-m", "lowbit", "compare", "--methods", "lsq", "--bits", "2/2", "--seeds", "2", "--epochs", "6", "--save-every", "5", "-q"]


@pytest.mark.slow
def test_a_comparison_that_is_killed_resumes_to_the_same_tables(tmp_path: Path) -> None:
    command = [sys.executable, *PROGRAM, "--workers", "1", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "killed")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    work = tmp_path / "killed" / ".work"
    while process.poll() is None and not list(work.glob("*/.work/last.safetensors")):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(work.glob("*/.work/last.safetensors")), "it was done before it was killed"
    for folder in ("killed", "whole"):
        done = subprocess.run([*command, str(tmp_path / folder)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    first, second = (Store(tmp_path / folder).load() for folder in ("killed", "whole"))
    assert first.keys() == second.keys() and len(first) == 2
    assert {key: result.metrics for key, result in first.items()} == {key: result.metrics for key, result in second.items()}
    resumed = [json.loads(path.read_text())["seconds"] for path in (tmp_path / "killed" / "cells").iterdir()]
    assert len(resumed) == 2 and not list(work.iterdir())


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_table_though_a_worker_is_killed(tmp_path: Path) -> None:
    ray_cluster = pytest.importorskip("ray.cluster_utils")
    cluster = ray_cluster.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    signal.signal(signal.SIGALRM, too_late)
    signal.alarm(600)  # a cluster that does not come up must not hold the tests
    try:
        cluster.add_node(num_cpus=1)
        asked = suite(tmp_path / "ray", methods=("lsq", "round_to_nearest"), seeds=2, ray=cluster.address)
        one = subject()
        killer = subprocess.Popen([sys.executable, "-c", KILLER])
        far = compare(asked, subjects=[one])
        assert killer.wait() == 0
    finally:
        signal.alarm(0)
        cluster.shutdown()
    here = compare(suite(tmp_path / "here", seeds=2), subjects=[one])
    assert values(far) == values(here) and all(value is not None for value in values(far).values())


def too_late(*_: object) -> None:
    raise TimeoutError("the cluster did not finish its cells")


# kills the first process of Ray that runs a cell
KILLER = """
import os, signal, sys, time
end = time.monotonic() + 120
while time.monotonic() < end:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = open(f"/proc/{name}/cmdline").read()
        except OSError:
            continue
        if command.startswith("ray::_on_ray"):
            os.kill(int(name), signal.SIGKILL)
            sys.exit(0)
    time.sleep(0.002)
sys.exit("no worker was seen")
"""


def test_the_command_of_a_cell_makes_it_again(tmp_path: Path) -> None:
    asked = Suite(
        methods=("round_to_nearest", {"method": "lsq", "surrogate": "ewgs", "procedure": "qkd", "procedure_options": {"temperature": 3}}),
        bits=("2/2",),
        seeds=2,
        workers=0,
        first_last_bits=4,
        out=str(tmp_path / "c"),
    ).changed({"epochs": 1, "optimizer": {"momentum": 0.5}, "calibration_samples": 64})  # type: ignore[arg-type]
    results = compare(asked).tables.results
    keys = [result.key for result in results]
    commands = commands_of(asked, make_tables(results))
    assert commands.keys() == set(keys) and commands_of(Suite(methods=("dfq",)), make_tables(results)) == {}  # type: ignore[arg-type]
    assert all(command in tables_of(asked).files[4].read_text() for command in map(str, map(escape, commands.values())))
    for result in results:
        words = shlex.split(commands[result.key])[1:-1]
        done = CliRunner().invoke(app, [*words, str(tmp_path / result.key), "--workers", "0", "-q"])
        assert done.exit_code == 0, done.output
        assert {key: one.metrics for key, one in Store(tmp_path / result.key).load().items()} == {result.key: result.metrics}


def test_a_cell_is_the_same_whatever_other_methods_are_compared(tmp_path: Path) -> None:
    alone = plan_cells(Suite(methods=("dfq",), bits=("8/8",), seeds=1), Store(tmp_path))  # type: ignore[arg-type]
    beside = plan_cells(Suite(methods=("lsq", "dfq"), bits=("8/8",), seeds=1), Store(tmp_path))  # type: ignore[arg-type]
    assert [one.key for one in alone] == [one.key for one in beside if one.cell.label == "dfq"]
    assert len({one.key for one in beside}) == 2


def test_only_the_named_cells_are_run(tmp_path: Path) -> None:
    asked = suite(tmp_path, only=("round_to_nearest 2/4 on points, seed 1", "lsq * seed 2"))
    found = compare(asked, subjects=[subject()]).tables.results
    assert sorted(result.cell.name for result in found) == ["lsq 2/4 on points, seed 2", "round_to_nearest 2/4 on points, seed 1"]
    with pytest.raises(SpecError, match="no cell of the suite is called 'none'"):
        compare(suite(tmp_path, only=("none",)), subjects=[subject()])


def test_a_full_disk_loses_nothing_and_the_same_call_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = suite(tmp_path, methods=("round_to_nearest",), seeds=3)
    fsync, calls = os.fsync, itertools.count()

    def filling(descriptor: int) -> None:
        if next(calls) >= 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", filling)
        with pytest.raises(OutputError, match="the disk is full"):
            compare(asked, subjects=[subject()])
    (stored,) = (tmp_path / "cells").iterdir()
    before = stored.stat().st_mtime_ns
    assert [row.spread and row.spread.count for row in compare(asked, subjects=[subject()]).tables.tables[0].rows] == [3]
    assert stored.stat().st_mtime_ns == before and len(list((tmp_path / "cells").iterdir())) == 3


def test_orderings_are_judged_and_written(tmp_path: Path) -> None:
    asked = suite(tmp_path, methods=("round_to_nearest", "dfq"), bits=("8/8",), orderings=("round_to_nearest >= dfq at 8/8",))
    comparison = compare(asked, subjects=[subject()])
    (verdict,) = comparison.verdicts
    assert verdict.subject == "points" and verdict.better is not None and verdict.better.count == 3
    assert verdict.finding in (tmp_path / "orderings.md").read_text()
    assert "round_to_nearest &gt;= dfq at 8/8" in (tmp_path / "comparison.html").read_text()
    assert tables_of(asked).verdicts == comparison.verdicts


def test_one_training_answers_for_all_widths_of_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lowbit.workflows.compare as module

    trained = []
    plain = module.train_network
    monkeypatch.setattr(module, "train_network", lambda *args, **more: (found := plain(*args, **more), trained.append(found))[0])
    images = Subject("images", chain(), data(), data())
    asked = suite(tmp_path, methods=({"method": "bit_mixer", "widths": "4,2", "mixtures": 3},), seeds=2)
    planned = plan_cells(asked, Store(tmp_path), module._Opened(asked, [images]))
    assert [one.cell.bits for one in planned] == ["4/4"] * 2 + ["2/2"] * 2 + ["mixed"] * 2
    found = compare(asked, subjects=[images])
    assert len(trained) == 2 and found.tables.count("done") == 6 and not list((tmp_path / ".work").glob("*/*"))
    results = {(r.cell.bits, r.cell.seed): r for r in found.tables.results}
    for (bits, seed), result in results.items():
        model = trained[seed].model
        if bits != "mixed":
            lowbit.set_bits(model, int(bits[0]))
            assert result.metrics["accuracy"] == lowbit.evaluate(model, data())["accuracy"]
            assert result.terms["inner_layers"] == bits
        else:
            assert result.terms["inner_layers"] == "mixed"
            assert result.metrics["least accuracy"] <= result.metrics["accuracy"] <= result.metrics["greatest accuracy"]
    assert {table.bits for table in found.tables.tables} == {"4/4", "2/2", "mixed"}
    with (tmp_path / "results.csv").open(encoding="utf-8") as file:
        assert {row["weight_bits"] for row in csv.DictReader(file)} == {"4", "2", "mixed"}

    next((tmp_path / "cells").glob("*.json")).unlink()
    again = compare(asked, subjects=[images])
    assert len(trained) == 3 and values(again) == values(found)  # what is missing is trained again, and measured alone


def test_searched_bits_stand_beside_the_uniform_network_of_their_cost(tmp_path: Path) -> None:
    search = {"method": "random_bits", "candidates": "2,3,4,6,8"}
    contenders = ("round_to_nearest", {"method": "round_to_nearest", "label": "searched", "search": search})
    suite = Suite(methods=contenders, bits=("4/8",), seeds=2, workers=0, calibration_samples=32, out=str(tmp_path))
    comparison = compare(suite, progress=False)
    (table,) = comparison.tables.tables
    rows = {row.label: row for row in table.rows}
    assert rows.keys() == {"round_to_nearest", "searched"}
    uniform, searched = rows["round_to_nearest"], rows["searched"]
    assert searched.size_bytes is not None and uniform.size_bytes is not None
    assert 0.9 * uniform.size_bytes < searched.size_bytes <= uniform.size_bytes
    assert uniform.term("inner_layers") == "4/8" and "," in str(searched.term("inner_layers"))
    assert len({str(result.terms["inner_layers"]) for result in searched.results}) == 2  # each seed draws its own


@pytest.mark.parametrize(
    ("search", "said"),
    [({"cost": "size"}, "needs the method"), ({"method": "random_bits", "cost": "weight"}, "cost must be one of"), ({"method": "hawq_v3"}, "hawq_v2")],
)  # fmt: skip
def test_a_search_that_cannot_be_run_is_refused_before_anything_runs(search: dict[str, object], said: str) -> None:
    suite = Suite(methods=({"method": "round_to_nearest", "label": "searched", "search": search},), bits=("4/8",))
    with pytest.raises(LowbitError, match=said):
        suite.check()


def test_methods_are_compared_on_samples_that_are_made(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    inputs = torch.randn(128, 1, 6, 6, generator=torch.Generator().manual_seed(1)) + 1
    model(inputs)
    own = Subject("pictures", model.eval(), None, (inputs, model(inputs).argmax(1)), inputs)
    quick = {"iterations": 10}
    contenders = (
        "round_to_nearest",
        {"method": "round_to_nearest", "label": "noise", "calibration": "noise"},
        {"method": "round_to_nearest", "label": "made", "calibration": "zeroq", "calibration_options": quick},
        {"method": "lsq", "label": "lsq, made", "calibration": "zeroq", "calibration_options": quick, "bits": "4/8"},
    )
    asked = suite(tmp_path, methods=contenders, bits=("4/8", "2/8"), seeds=2, calibration_samples=16, synthesized_samples=64)
    compare(replace(asked, only=("made 4/8*",)), subjects=[own])
    assert any((tmp_path / ".work" / ".samples").rglob("*.safetensors"))  # for the cells that are left
    comparison = compare(asked, subjects=[own])
    results = comparison.tables.results
    assert {result.status for result in results} == {"done"}, [result.reason for result in results]
    terms = {
        result.cell.label: (result.terms["calibration"], result.terms.get("calibration_images"), result.terms["images"])
        for result in results
    }
    assert terms == {
        "round_to_nearest": ("data", 16, 0),
        "noise": ("noise", 16, 0),
        "made": ("zeroq", 16, 0),
        "lsq, made": ("zeroq", None, 128),
    }
    tables = {table.kind: {row.label for row in table.rows} for table in comparison.tables.tables}
    assert tables == {"post_training": {"round_to_nearest", "noise", "made"}, "training": {"lsq, made"}}
    with open(tmp_path / "results.csv", newline="") as file:
        assert {(row["label"], row["calibration"]) for row in csv.DictReader(file)} == {(label, entry[0]) for label, entry in terms.items()}
    assert not (tmp_path / ".work").exists() or not any((tmp_path / ".work").rglob("*.safetensors"))
    made = suite(tmp_path / "made", methods=contenders[1:], bits=("4/8",), seeds=1, calibration_samples=16, synthesized_samples=64)
    without_data = compare(made, subjects=[replace(own, calibration=None)]).tables.results
    assert {result.status for result in without_data} == {"done"}
