from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lowbit.errors import OutputError, SpecError
from lowbit.workfolder import LOCK, exclusive_run, open_work_folder, unfinished_facts, weights_digest


def test_state_of_the_same_run_is_kept_and_of_another_run_deleted(tmp_path: Path) -> None:
    path = tmp_path / ".work"
    first = open_work_folder(path, {"method": "brecq", "seed": 0}, resume=True)
    assert not first.is_resumed
    (path / "state").write_text("half done")

    again = open_work_folder(path, {"seed": 0, "method": "brecq"}, resume=True)
    assert again.is_resumed
    assert (path / "state").read_text() == "half done"

    other = open_work_folder(path, {"method": "brecq", "seed": 1}, resume=True)
    assert not other.is_resumed
    assert not (path / "state").exists()


def test_a_fresh_start_deletes_the_state_of_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / ".work"
    open_work_folder(path, {"seed": 0}, resume=True)
    (path / "state").write_text("half done")
    assert not open_work_folder(path, {"seed": 0}, resume=False).is_resumed
    assert not (path / "state").exists()


def test_a_damaged_record_starts_over(tmp_path: Path) -> None:
    path = tmp_path / ".work"
    open_work_folder(path, {"seed": 0}, resume=True)
    (path / "run.json").write_bytes(b"\xff\xfe broken")
    assert not open_work_folder(path, {"seed": 0}, resume=True).is_resumed


def test_removing_leaves_nothing(tmp_path: Path) -> None:
    open_work_folder(tmp_path / ".work", {}, resume=True).remove()
    assert list(tmp_path.iterdir()) == []


def test_the_digest_tells_weights_apart_and_is_the_same_for_copies() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    digest = weights_digest(model)
    other = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    other.load_state_dict(model.state_dict())
    assert weights_digest(other) == digest
    with torch.no_grad():
        other[0].bias[1] += 1e-7
    assert weights_digest(other) != digest


@pytest.mark.parametrize("name", ["unit.safetensors", "traces.json", "haq/episodes.safetensors"])
def test_state_of_a_stopped_run_is_only_deleted_on_demand(name: str, tmp_path: Path) -> None:
    path = tmp_path / ".work"
    open_work_folder(path, {"seed": 0}, resume=True)
    open_work_folder(path / "haq", {"seed": 0}, resume=True)  # the settings of a part are no state
    open_work_folder(path, {"seed": 1}, resume=True)  # there was nothing to keep
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).write_text("half done")
    with pytest.raises(SpecError, match=r"stopped run with other settings \(seed: 1, now 2\).*start over with resume=False"):
        open_work_folder(path, {"seed": 2}, resume=True)
    assert (path / name).read_text() == "half done"
    open_work_folder(path, {"seed": 2}, resume=False)
    assert not (path / name).exists()


@pytest.mark.parametrize("name", ["unit.safetensors", "traces.json"])
def test_only_state_to_go_on_from_survives_an_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / ".work"
    open_work_folder(path, {}, resume=True).remove_if_useless()
    assert not path.exists()
    work = open_work_folder(path, {}, resume=True)
    (path / name).write_text("half done")
    work.remove_if_useless()
    assert (path / name).exists()


def test_a_second_run_in_a_folder_is_refused_and_the_next_one_may_work_there(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with exclusive_run(folder):
        with pytest.raises(OutputError, match=rf"{folder}: another run is working in this folder. Wait for it"), exclusive_run(folder):
            pass
        assert (folder / LOCK).exists()
    assert list(folder.iterdir()) == []
    with exclusive_run(folder):
        pass


def test_an_error_within_a_run_frees_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="broken"), exclusive_run(tmp_path):
        raise ValueError("broken")
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from lowbit.workfolder import exclusive_run
with exclusive_run(Path({str(tmp_path)!r})):
    print("held", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another run"), exclusive_run(tmp_path):
            pass
        holder.kill()
    assert (tmp_path / LOCK).exists()  # a dead process cannot remove it
    with exclusive_run(tmp_path):
        pass
    assert not (tmp_path / LOCK).exists()


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="cannot write there"), exclusive_run(tmp_path / "out"):
        pass


def test_the_facts_of_a_stopped_run_are_known_until_it_is_done_and_do_not_keep_it_from_resuming(tmp_path: Path) -> None:
    path, settings = tmp_path / ".work", {"kind": "train", "bits": (4, 4)}
    assert unfinished_facts(path, "train") is None
    work = open_work_folder(path, settings, resume=True, facts={"model": "net.py:build"})
    assert unfinished_facts(path, "train") is None  # nothing to resume from yet
    (path / "state.safetensors").write_bytes(b"state")
    assert unfinished_facts(path, "train") == {"model": "net.py:build"}
    assert unfinished_facts(path, "quantize") is None
    assert open_work_folder(path, settings, resume=True, facts={"model": "moved.py:build"}).is_resumed
    work.mark_done()
    assert unfinished_facts(path, "train") is None
