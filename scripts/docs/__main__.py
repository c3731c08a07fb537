"""Build the documentation: pages by hand, pages from the registry and from running code, and a check of all links.

python -m scripts.docs                             # build/docs/html/index.html
python -m scripts.docs --method my_file.py:MyMethod  # with a page for a method from outside of the package
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from scripts.docs import api, commands, exports, links, methods, results, source as sources, tour

from lowbit.pages import write_method_pages
from lowbit.registry import find_method, list_methods

ROOT = Path(__file__).parents[2]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def main() -> None:
    """Build everything below ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs", help="folder of the build; default: build/docs")
    parser.add_argument("--method", action="append", default=[], help="a method from outside, FILE.py:CLASS; several times for several")
    parser.add_argument("--pages-only", action="store_true", help="write the pages, and leave Sphinx alone")
    given = parser.parse_args()
    source, html = given.out / "source", given.out / "html"
    write_sources(source, given.out / "cache", given.method)
    if given.pages_only:
        return
    shutil.rmtree(html, ignore_errors=True)  # pages that are gone must not be linked to
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-j", "auto", "-q", "-n", "-W", "--keep-going", "-E"]
    environment = {**os.environ, "LOWBIT_DOCS_VERSION": VERSION}
    done = subprocess.run([*command, "-d", str(given.out / "doctrees"), str(source), str(html)], env=environment, check=False)
    broken = list(links.problems(html))
    sys.stderr.writelines(f"{line}\n" for line in broken)
    if done.returncode or broken:
        sys.exit(1)
    print(html / "index.html")


def write_sources(source: Path, cache: Path, outside: Sequence[str]) -> None:
    """Write all pages as Markdown into ``source``; what takes long comes from ``cache`` while nothing that it depends on has changed.

    Args:
        source: The folder, which is made anew.
        cache: The folder of what takes long.
        outside: Methods in files, ``FILE.py:CLASS``, which get a page beside those that are registered.
    """
    known = list_methods()
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source)
    for name in ("CHANGELOG.md", "CONTRIBUTING.md"):
        shutil.copy2(ROOT / name, source / name.lower())
    texts: dict[str, Callable[[], str]] = {
        "methods/index.md": lambda: methods.methods_page([*known, *map(find_method, outside)]),
        "reference/commands.md": commands.commands_page,
        "reference/python.md": api.api_page,
        **{f"results/{name}.md": lambda text=text: results.unbroken(text) for name, text in results.results_pages().items()},
    }
    for name, make in texts.items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(make(), encoding="utf-8")
    files = {Path(name.rpartition(":")[0]).resolve() for name in outside}
    sources.write_source_pages(source / "_extra" / "source", [*sorted((ROOT / "src").rglob("*.py")), *sorted(files)])
    names = [*dict.fromkeys(info.name for info in known), *outside]
    with ThreadPoolExecutor(1) as beside:  # the tour has one process, and leaves a core to the rest
        toured = beside.submit(timed, "tour", lambda: cached(source, cache / "tour", tour.write_tour, [Path(tour.__file__), tour.NOTEBOOK]))
        timed("export matrix", lambda: cached(source, cache / "exports", exports.write_exports, [Path(exports.__file__)]))
        timed("method pages", lambda: write_method_pages(source / "methods", names, link=sources.LINK, workers=2, cache=cache / "methods"))
        toured.result()


def cached(folder: Path, cache: Path, write: Callable[[Path], None], inputs: Iterable[Path]) -> None:
    """Let ``write`` fill a folder, and copy that into ``folder``; a folder filled before for the same inputs and library is taken as it is."""
    made = cache / digest([*inputs, *sorted((ROOT / "src").rglob("*.py")), ROOT / "constraints.txt"])
    if not made.exists():
        shutil.rmtree(cache, ignore_errors=True)
        half = cache / "half"
        half.mkdir(parents=True)
        write(half)
        half.rename(made)
    shutil.copytree(made, folder, dirs_exist_ok=True)


def digest(paths: Iterable[Path]) -> str:
    """SHA-256 of the files' contents, and of what runs them."""
    found = hashlib.sha256(f"{sys.version} {torch.__version__}".encode())
    for path in paths:
        found.update(path.name.encode() + b"\0" + path.read_bytes())
    return found.hexdigest()


def timed(name: str, make: Callable[[], object]) -> None:
    """Run ``make`` and say how long it took."""
    start = time.perf_counter()
    make()
    print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
