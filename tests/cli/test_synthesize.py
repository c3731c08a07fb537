"""``lowbit synthesize`` as it is typed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from tests import forked
from typer.testing import CliRunner

import lowbit
from lowbit.cli import app, main
from lowbit.progress import Stage
from lowbit.synthesis import descent

QUICK = ["--method", "zeroq", "--count", "6", "-o", "iterations=12"]


def run(*arguments: object) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["synthesize", *map(str, arguments)])
    return found.exit_code, found.output


def test_samples_are_written_and_a_table_says_how_near_they_come(tmp_path: Path) -> None:
    code, output = run(*QUICK, "--out", tmp_path)
    assert code == 0, output
    assert "block1.norm1" in output and "after 12 iterations" in output and "samples.safetensors, samples.png" in output
    assert len(lowbit.SynthesizedData.load(tmp_path / "samples.safetensors")) == 6


def test_json_is_all_that_is_printed_where_it_is_asked_for(tmp_path: Path) -> None:
    code, output = run(*QUICK, "--json", "--quiet", "--compared", "0", "--out", tmp_path)
    assert code == 0, output
    content = json.loads(output)
    assert content["count"] == 6 and content["statistics"][0]["data"] is None


def test_a_recipe_can_be_printed_and_given_back(tmp_path: Path) -> None:
    code, output = run(*QUICK, "--print-config")
    assert code == 0
    (tmp_path / "recipe.yaml").write_text(output)
    again = run(tmp_path / "recipe.yaml", "--print-config")
    assert again == (0, output) and "method: zeroq" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--count", "0"], "count must be 1 or more"),
        (["--model", "resnet8"], "--input-shape"),
        (["--method", "zeroqq"], "Did you mean 'zeroq'?"),
        (["-o", "iterations=many"], "iterations must be int"),
    ],
)
def test_what_cannot_be_is_said_in_options(arguments: list[str], words: str, tmp_path: Path) -> None:
    code, output = run(*arguments, "--out", tmp_path / "none")
    assert code == 2 and words in " ".join(output.split()), output
    assert not (tmp_path / "none").exists()


def lowbit_synthesize(out: str, kill: int) -> None:
    """The command, killed behind a step unless ``kill`` is 0."""
    torch.set_num_threads(1)
    advance = Stage.advance

    def deadly(stage: Stage, amount: float = 1, note: str = "") -> None:
        advance(stage, amount, note)
        if stage.name == "synthesis" and stage.done == kill:
            os.kill(os.getpid(), signal.SIGKILL)

    Stage.advance = deadly  # type: ignore[method-assign]
    descent.SAVE_SECONDS = 0.0
    sys.argv = ["lowbit", "synthesize", "--method", "dsg", "-o", "iterations=20", "-o", "noise_samples=32", "--out", out]
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    main()


@pytest.mark.slow
def test_kills_change_no_bit(tmp_path: Path) -> None:
    whole, killed = str(tmp_path / "whole"), str(tmp_path / "killed")
    assert forked.end(forked.start(lowbit_synthesize, whole, 0)) == 0
    for step in (3, 17):
        assert forked.end(forked.start(lowbit_synthesize, killed, step)) == -signal.SIGKILL
    assert forked.end(forked.start(lowbit_synthesize, killed, 0)) == 0
    expected, found = (lowbit.SynthesizedData.load(Path(folder) / "samples.safetensors") for folder in (whole, killed))
    assert torch.equal(found.inputs.args[0], expected.inputs.args[0]) and found.to_dict() == expected.to_dict()
