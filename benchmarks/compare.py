"""What ``lowbit compare`` costs: the same cells as bare calls of ``lowbit.train``, compared in this process, and with one and two workers.

    python benchmarks/compare.py                     # about five minutes; writes benchmarks/results/compare.json
    python benchmarks/compare.py --epochs 2 --rounds 1

Bare calls and comparisons take turns; times are the least over all rounds, processor time where all runs in this process.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

import lowbit
from lowbit.data import load_data
from lowbit.models import load_default
from lowbit.workflows.suite import Suite

SEEDS = 4


def bare(suite: Suite) -> dict[int, float]:
    """The accuracy of each seed, by calls of ``lowbit.train`` and ``lowbit.evaluate`` alone."""
    train, test = load_data("digits", split="train"), load_data("digits", split="test")
    found = {}
    for seed in suite.seed_numbers:
        recipe = replace(suite.recipe, seed=seed)
        trained = lowbit.train(load_default(), train, method="lsq", weight_bits=2, activation_bits=2, recipe=recipe, progress=False)
        found[seed] = lowbit.evaluate(trained, test)["accuracy"]
    return found


def compared(suite: Suite, workers: int) -> dict[int, float | None]:
    """The same by a comparison in a new folder."""
    with tempfile.TemporaryDirectory() as folder:
        comparison = lowbit.compare(replace(suite, workers=workers, out=folder), progress=False)
    return {result.cell.seed: result.value for result in comparison.tables.results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "compare.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    suite = Suite(methods=("lsq",), bits=("2/2",), seeds=SEEDS, threads=1).changed({"epochs": args.epochs})  # type: ignore[arg-type]
    bare(suite)  # what is imported and compiled at the first use is nobody's
    times: dict[str, list[float]] = {name: [] for name in ("bare", "here", "one worker", "two workers")}
    for _ in range(args.rounds):
        start = time.process_time()
        expected = bare(suite)
        times["bare"].append(time.process_time() - start)
        start = time.process_time()
        found = compared(suite, 0)
        times["here"].append(time.process_time() - start)
        assert found == expected, (found, expected)
        for name, workers in (("one worker", 1), ("two workers", 2)):
            start = time.perf_counter()
            assert compared(suite, workers) == expected
            times[name].append(time.perf_counter() - start)
    least = {name: round(min(values), 2) for name, values in times.items()}
    report = {
        "command": f"python benchmarks/compare.py --epochs {args.epochs} --rounds {args.rounds}",
        "seconds": least,
        "overhead": round(least["here"] / least["bare"], 3),
        "two_workers_over_one": round(least["one worker"] / least["two workers"], 2),
    }
    args.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
