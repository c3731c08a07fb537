"""Processor time of starting up: the command line against its limit, and ``import lowbit`` against ``import torch``.

The commands take turns, so that what else the machine does meets all of them alike.

    python benchmarks/startup.py --rounds 10
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys

LIMIT_S = 0.4  # of a command that needs no network
LIMIT_RATIO = 1.15  # of importing lowbit over importing torch
CLI = "import sys; sys.argv[0] = 'lowbit'; from lowbit.cli import main; main()"
COMMANDS = {
    "lowbit --help": ["-c", CLI, "--help"],
    "lowbit --version": ["-c", CLI, "--version"],
    "lowbit quantize --nothing": ["-c", CLI, "quantize", "--nothing"],
    "lowbit train --epochs many": ["-c", CLI, "train", "--epochs", "many"],
    "completion of a command": ["-c", CLI],
    "completion of a method": ["-c", CLI],
}
COMPLETED = {"completion of a command": "lowbit qu", "completion of a method": "lowbit train --method ew"}
IMPORTS = {
    "import torch": ["-c", "import torch"],
    "import lowbit": ["-c", "import lowbit"],
    "import lowbit; lowbit.quantize": ["-c", "import lowbit; lowbit.quantize"],
    "import lowbit; lowbit.train": ["-c", "import lowbit; lowbit.train"],
}


def processor_seconds(name: str, arguments: list[str]) -> float:
    """Processor time, user and system, that a Python process with ``arguments`` takes."""
    environment = dict(os.environ)
    if name in COMPLETED:
        words = COMPLETED[name]
        environment |= {"_LOWBIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each is started; medians are printed")
    rounds = parser.parse_args().rounds
    everything = {**COMMANDS, **IMPORTS}
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    for index in range(rounds + 1):
        for name, arguments in everything.items():
            passed = processor_seconds(name, arguments)
            if index:  # the first round fills caches
                seconds[name].append(passed)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name in COMMANDS:
        print(f"{name:32} {medians[name]:.2f} s   {medians[name] / LIMIT_S:.2f} of the limit of {LIMIT_S} s")
    for name in IMPORTS:
        print(f"{name:32} {medians[name]:.2f} s   {medians[name] / medians['import torch']:.2f}x import torch")
    slow = [name for name in COMMANDS if medians[name] > LIMIT_S]
    slow += ["import lowbit"] * (medians["import lowbit"] > LIMIT_RATIO * medians["import torch"])
    sys.exit(f"above the limit: {', '.join(slow)}" if slow else 0)


if __name__ == "__main__":
    main()
