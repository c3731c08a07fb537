"""Any number of hostile cases: what the tests marked slow try a few hundred of.

    PYTHONPATH=. .venv/bin/python benchmarks/fuzz.py --cases 5000 --first 100000 [calls layers yaml pictures]

Prints the counts of each kind and every fault with its seed; exits with 1 where there is one. ``--show SEED`` runs one case in this process.
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzzing import CASES, faults, try_cases


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", help=f"some of {', '.join(CASES)}; all by default")
    parser.add_argument("--cases", type=int, default=1000, help="number of cases of each kind")
    parser.add_argument("--first", type=int, default=0, help="seed of the first case")
    parser.add_argument("--show", type=int, help="run the case with this seed in this process")
    asked = parser.parse_args()
    found = 0
    for kind in asked.kinds or CASES:
        with tempfile.TemporaryDirectory() as folder:
            if asked.show is not None:
                CASES[kind](asked.show, Path(folder))
                continue
            start = time.perf_counter()
            outcomes = try_cases(CASES[kind], range(asked.first, asked.first + asked.cases), Path(folder))
        counts = collections.Counter(outcome.kind for outcome in outcomes)
        said = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
        print(f"{kind}: seeds {asked.first} to {asked.first + asked.cases - 1}: {said} in {time.perf_counter() - start:.0f} s")
        for line in faults(outcomes):
            print(f"  {line}")
            found += 1
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
