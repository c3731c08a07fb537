"""Run the reference vectors beside a checkout and note in tests/conformance/passed.json how many passed, for the pages of methods.

python scripts/reference_vectors.py                      # all methods; takes minutes
python scripts/reference_vectors.py ewgs --golden FOLDER  # some of them, the others stay as they were
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from lowbit.files import write_text
from lowbit.pages.page import REPOSITORY, VECTORS
from lowbit.pages.sources import file_digest, source_file
from lowbit.registry import list_methods

GOLDEN = Path(os.environ.get("LOWBIT_REFERENCE_VECTORS", REPOSITORY.parent / "shared" / "golden"))


def counts(golden: Path, names: list[str]) -> dict[str, tuple[int, int]]:
    """Passed and all cases of each method that has an adapter, from what the vectors' own program prints."""
    program = [sys.executable, str(golden / "run.py"), *names]
    said = subprocess.run(program, cwd=REPOSITORY, capture_output=True, text=True, check=False).stdout
    return {found[1]: (int(found[2]), int(found[3])) for found in re.finditer(r"^(\w+)\s+(\d+)/(\d+)", said, flags=re.MULTILINE)}


def main() -> None:
    """Write the record; exit 1 where a case failed, and 2 where there are no vectors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="names of methods; default: all")
    parser.add_argument("--golden", type=Path, default=GOLDEN, help="folder of the reference vectors")
    arguments = parser.parse_args()
    if not (arguments.golden / "run.py").is_file():
        print(f"no reference vectors at {arguments.golden}; name their folder with --golden", file=sys.stderr)
        sys.exit(2)
    file = REPOSITORY / VECTORS
    record = json.loads(file.read_text()) if file.is_file() else {}
    infos = {info.name: info for info in list_methods()}
    found = counts(arguments.golden, arguments.methods)
    for name, (passed, cases) in found.items():
        if name in infos:
            today = datetime.datetime.now(datetime.UTC).date().isoformat()
            record[name] = {"passed": passed, "cases": cases, "date": today, "digest": file_digest(source_file(infos[name]))}
    write_text(file, json.dumps(dict(sorted(record.items())), indent=1) + "\n")
    print(f"{VECTORS}: {sum(passed for passed, _ in found.values())} of {sum(cases for _, cases in found.values())} cases passed")
    sys.exit(int(any(passed < cases for passed, cases in found.values())))


if __name__ == "__main__":
    main()
