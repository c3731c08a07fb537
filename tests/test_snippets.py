"""Every block of README.md and docs/ runs as it stands, one after the other in an empty folder, and prints what is shown."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WRITTEN = (
    "methods/",
    "results/",
    "reference/",
    "exports.md",
    "tour.md",
    "contributing.md",
    "changelog.md",
)  # by make docs, which checks links to them
BLOCK = re.compile(r"(<!-- not run: [^\n]+ -->\n)?```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the file that it is the content of, its text, and whether it is marked as not to be run."""

    language: str
    title: str
    text: str
    is_marked: bool


def blocks_of(page: str) -> list[Block]:
    found = []
    for marker, head, text in BLOCK.findall(page):
        language, _, rest = head.partition(" ")
        found.append(Block(language, rest.removeprefix('title="').rstrip('"'), text, bool(marker)))
    return found


def commands_of(text: str) -> Iterator[tuple[str, list[str]]]:
    """Each command of a console block with the lines that are shown below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, *shown = part.splitlines()
        yield command, [line for line in shown if line.strip() not in ("", "...")]


def shape_of(line: str) -> str:
    """``line`` without its figures, which differ from machine to machine and with what is measured."""
    return " ".join(re.sub(r"# [kM]?B", "# B", re.sub(r"[+-]?\d[\d.,]*", "#", line)).split())


def check_output(command: str, printed: str, shown: list[str]) -> None:
    lines = iter(map(shape_of, printed.splitlines()))
    missing = next((line for line in shown if shape_of(line) not in lines), None)
    assert missing is None, f"$ {command}\nshows {missing!r}, but prints\n{printed}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in, with the command ``lowbit``."""
    command = tmp_path / "bin" / "lowbit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lowbit "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    monkeypatch.setenv("COLUMNS", "140")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(sys, "path", [str(work), *sys.path])
    return work


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_block_runs_and_prints_what_it_shows(page: Path, folder: Path) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("onnxruntime")
    names: dict[str, object] = {"__name__": page.stem}
    for block in blocks_of(page.read_text(encoding="utf-8")):
        if block.is_marked:
            continue
        if block.title:
            (folder / block.title).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
        else:
            for command, shown in commands_of(block.text):
                done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
                check_output(command, done.stderr + done.stdout, shown)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_blocks_are_of_kinds_that_run_unless_they_are_marked(page: Path) -> None:
    for block in blocks_of(page.read_text(encoding="utf-8")):
        assert block.is_marked or block.title or block.language in ("python", "console"), block.text
        assert block.language != "console" or block.text.startswith("$ "), block.text
        if block.language == "python":
            compile(block.text, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]*(?:#[^)]*)?)\)", page.read_text(encoding="utf-8")):
        path, _, heading = target.partition("#")
        if page.name != "README.md" and path.startswith(WRITTEN):
            continue
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", other.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert heading in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_what_is_printed_is_compared_without_its_figures() -> None:
    shown = ["accuracy  99.33 %    99.50 %  +0.17 points", "stored  86.3 kB  3.5x smaller"]
    check_output("x", "first\naccuracy  9 %  12.5 %  -3.00 points\nstored  900 B  1x smaller\n", shown)
    with pytest.raises(AssertionError, match="shows 'stored"):
        check_output("x", "stored  900 B  1x smaller\naccuracy  9 %  12.5 %  -3.00 points\n", shown)
    text = "$ one\na\n...\nb\n$ two\n"
    assert list(commands_of(text)) == [("one", ["a", "b"]), ("two", [])]
    page = '<!-- not run: installs -->\n```sh\nmake\n```\n\n```python title="net.py"\nx = 1\n```\n'
    assert blocks_of(page) == [Block("sh", "", "make\n", True), Block("python", "net.py", "x = 1\n", False)]
