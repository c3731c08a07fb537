"""The figures of a benchmark with the code of another checkout and with this one's, in turns.

    git worktree add --detach /tmp/before HEAD~
    python benchmarks/before_after.py --before /tmp/before --out benchmarks/results/packed_linear_before_after.json packed_linear.py --rows 64

Each round runs the benchmark, of this checkout, once with either code, in a process of its own. Every number that is written is the median over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def run(source: Path, command: list[str]) -> object:
    """What the benchmark writes with the code in ``source``."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        subprocess.run(
            [sys.executable, str(HERE / command[0]), *command[1:], "--out", str(out)],
            env={**os.environ, "PYTHONPATH": str(source)},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(out.read_text())


def median(results: list[object]) -> object:
    """Results of the same form as one."""
    first = results[0]
    if isinstance(first, dict):
        return {key: median([result[key] for result in results]) for key in first}  # type: ignore[index]
    if isinstance(first, list):
        return [median(list(entries)) for entries in zip(*results, strict=True)]  # type: ignore[call-overload]
    if isinstance(first, float):
        return round(statistics.median(results), 4)  # type: ignore[type-var]
    return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="a checkout with the code to compare with")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="benchmark and its options, without --out")
    args = parser.parse_args()
    sources = {"before": args.before / "src", "after": HERE.parent / "src"}
    found: dict[str, list[object]] = {name: [] for name in sources}
    for _ in range(args.rounds):
        for name, source in sources.items():
            found[name].append(run(source, args.command))
            print(name, json.dumps(found[name][-1]), flush=True)
    result = {"command": " ".join(args.command), "rounds": args.rounds, **{name: median(results) for name, results in found.items()}}
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
