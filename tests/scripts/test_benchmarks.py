from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"

# One process for all of them: each would spend seconds on importing torch. It runs scripts as the command line does, and tells what became of them.
ASK_FOR_HELP = """
import contextlib, io, json, runpy, sys
told = {}
for script in sys.argv[1:]:
    sys.argv, said, code = [script, "--help"], io.StringIO(), None
    try:
        with contextlib.redirect_stdout(said):
            runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        code = done.code
    except Exception as error:
        code = repr(error)
    told[script] = [code, said.getvalue()]
print(json.dumps(told))
"""


def test_benchmarks_can_be_imported_and_those_with_options_answer_help() -> None:
    scripts = {path: is_main(path) for path in sorted(BENCHMARKS.glob("*.py"))}
    assert sum(scripts.values()) > 10
    places = [str(BENCHMARKS), str(ROOT), *sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, "-c", ASK_FOR_HELP, *map(str, scripts)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    failed = {path.name: told[str(path)] for path, is_script in scripts.items() if told[str(path)][0] != (0 if is_script else None)}
    assert not failed
    assert all("usage:" in told[str(path)][1] for path, is_script in scripts.items() if is_script)


def is_main(path: Path) -> bool:
    """Whether a file is run, not only imported: it has ``if __name__ == "__main__"``."""
    tests = (node.test for node in ast.parse(path.read_text()).body if isinstance(node, ast.If))
    return any(ast.unparse(test) == "__name__ == '__main__'" for test in tests)
