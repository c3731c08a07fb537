"""A training or a search that is killed by SIGKILL ends, by the same command, with the same bits, in any of its phases, companions included."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tests import forked
from torch import Tensor

from lowbit.cli import main
from lowbit.files import read_tensors
from lowbit.progress import Stage

BITS = ["-w", "4", "-a", "4"]
CASES = {
    "effective_lowbit": ["--epochs", "4", *BITS],
    "qkd": ["--epochs", "3", *BITS, "-o", "self_share=0.33", "-o", "co_share=0.33"],
    "fp_auxiliary": ["--epochs", "4", *BITS],
    "profit": ["--epochs", "16", *BITS, "-o", "widths=8"],
    "inq": ["--epochs", "4", "-w", "4"],
    "bsq": ["--epochs", "5", *BITS, "-o", "alpha=20"],
    "adabits": ["--epochs", "2", "--bits", "8,4,2"],
    "sp_nets": ["--epochs", "2", "--bits", "32/32,4/4,2/2"],
    "bit_mixer": ["--epochs", "3", "--bits", "8,4,2", "-o", "distillation=add"],
}
PHASES = {"effective_lowbit": 2, "fp_auxiliary": 2, "qkd": 3, "profit": 8, "bit_mixer": 3, "bsq": 4}  # at least so many


def lowbit(arguments: list[str], kill: int, stage_name: str = "train") -> None:
    """The command, killed behind a step of that stage (a training: an optimizer step) unless ``kill`` is 0."""
    torch.set_num_threads(1)
    advance = Stage.advance

    def deadly(stage: Stage, amount: float = 1, note: str = "") -> None:
        advance(stage, amount, note)
        if stage.name == stage_name and stage.done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    Stage.advance = deadly  # type: ignore[method-assign]
    sys.argv = ["lowbit", *arguments]
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    main()


def trained(out: Path) -> dict[str, Tensor]:
    tensors, _ = read_tensors(out / ".work" / "last.safetensors")
    return {name: value for name, value in tensors.items() if name.startswith(("model.", "networks."))}


def middles(curve: list[dict[str, object]]) -> dict[str, int]:
    """A step in the middle of each phase."""
    ends: dict[str, int] = {}
    for epoch in curve:
        ends[str(epoch["phase"])] = int(epoch["step"])  # type: ignore[call-overload]
    starts = [0, *ends.values()]
    return {phase: (start + end) // 2 for (phase, end), start in zip(ends.items(), starts, strict=False)}


@pytest.mark.slow
@pytest.mark.parametrize("method", CASES)
def test_kills_in_every_phase_of_a_training_change_no_bit(method: str, tmp_path: Path) -> None:
    common = [
        "train",
        "--method",
        method,
        *CASES[method],
        "--batch-size",
        "128",
        "--save-every",
        "3",
        "--no-onnx",
        "--no-packed",
        "--no-tensorboard",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forked.end(forked.start(lowbit, [*common, "--out", str(whole)], 0)) == 0
    curve = json.loads((whole / "train.json").read_text())["curve"]
    steps = middles(curve)
    assert len(steps) >= PHASES.get(method, 1)
    for step in steps.values():
        assert forked.end(forked.start(lowbit, [*common, "--out", str(killed)], step)) == -signal.SIGKILL
        saved = read_tensors(killed / ".work" / "last.safetensors")[1]["position"]["step"]  # type: ignore[index]
        assert step - 3 <= saved <= step
    assert forked.end(forked.start(lowbit, [*common, "--out", str(killed)], 0)) == 0
    expected, found = trained(whole), trained(killed)
    assert found.keys() == expected.keys()
    assert any(name.startswith("networks.") for name in found) is (method in ("effective_lowbit", "qkd", "fp_auxiliary", "profit"))
    assert [name for name, value in found.items() if not torch.equal(value.nan_to_num(7.25), expected[name].nan_to_num(7.25))] == []
    again = json.loads((killed / "train.json").read_text())["curve"]
    for key in ("phase", "step", "loss", "metrics", "learning_rate"):
        assert [epoch[key] for epoch in again] == [epoch[key] for epoch in curve], key


SEARCHES = {
    "hawq_v2": (["-o", "samples=32", "-o", "max_probes=25", "-o", "joint=false"], "traces of the Hessian by weights", 3, "traces*.json"),
    "haq": (["-o", "episodes=9", "-o", "warmup=3", "-o", "hidden=16,16"], "episodes", 5, "haq/episodes.safetensors"),
    "zeroq_pareto": ([], "zeroq sensitivity", 7, "zeroq*.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", SEARCHES)
def test_a_killed_search_ends_with_the_same_policy(method: str, tmp_path: Path) -> None:
    options, stage, kill, state = SEARCHES[method]
    common = ["search", "--method", method, "--budget", "average=4", "--calibration-samples", "64", *options]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert forked.end(forked.start(lowbit, [*common, "--out", str(whole)], 0)) == 0
    assert forked.end(forked.start(lowbit, [*common, "--out", str(killed)], kill, stage)) == -signal.SIGKILL
    assert len(list((killed / ".work").glob(state))) == 1
    assert forked.end(forked.start(lowbit, [*common, "--seed", "1", "--out", str(killed)], 0)) == 2  # its state is not lost
    assert forked.end(forked.start(lowbit, [*common, "--out", str(killed)], 0)) == 0
    assert (killed / "policy.yaml").read_text() == (whole / "policy.yaml").read_text()
    found, expected = (json.loads((out / "search.json").read_text()) for out in (killed, whole))
    for content in (found, expected):
        del content["run"]  # when, and how long
    assert found == expected
    assert not (killed / ".work").exists()
