from __future__ import annotations

import platform
import time

import pytest
import torch

from lowbit.report.facts import command_line, run_facts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/usr/bin/lowbit", "quantize", "-w", "4"], "lowbit quantize -w 4"),
        (["/site-packages/lowbit/__main__.py", "train", "--out", "two words"], "lowbit train --out 'two words'"),
        (["train.py", "--fast"], "python train.py --fast"),
        (["/usr/lib/ipykernel_launcher", "-f", "kernel.json"], None),
        ([""], None),
        ([], None),
    ],
)
def test_the_command_is_what_was_typed(arguments: list[str], expected: str | None) -> None:
    assert command_line(arguments) == expected


def test_the_facts_name_machine_versions_data_and_time() -> None:
    facts = run_facts(time.time() - 90, {"test": "digits"})
    assert 90 <= float(str(facts["seconds"])) < 600
    assert facts["data"] == {"test": "digits"}
    machine, versions = facts["machine"], facts["versions"]
    assert isinstance(machine, dict) and isinstance(versions, dict)
    assert machine["threads"] == torch.get_num_threads() and machine["processor"]
    assert (versions["python"], versions["torch"]) == (platform.python_version(), torch.__version__)
