"""Write the table of methods in README.md from the registry.

python scripts/methods_table.py            # update README.md
python scripts/methods_table.py --check    # exit 1 when it is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowbit.cli.methods import span
from lowbit.registry import list_methods

README = Path(__file__).parent.parent / "README.md"
START, END = "<!-- methods: written by scripts/methods_table.py -->", "<!-- end of methods -->"


def methods_table() -> str:
    """One Markdown row for each registered method."""
    rows = ["| method | paper | weight bits | activation bits | needs | what it does |", "| --- | --- | --- | --- | --- | --- |"]
    rows += [
        f"| `{i.name}` | {i.paper} | {span(i.weight_bits)} | {span(i.activation_bits)} | {', '.join(i.needs) or '-'} | {i.summary} |"
        for i in list_methods()
    ]
    return "\n".join(rows)


def updated(text: str) -> str:
    """``text`` with the table between its markers replaced."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{README} lacks the lines {START!r} and {END!r}")
    return f"{before}{START}\n{methods_table()}\n{END}{after}"


def main() -> None:
    """Write the table of methods between the markers of the README."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when README.md is out of date")
    text = README.read_text()
    fresh = updated(text)
    if parser.parse_args().check:
        sys.exit(f"{README} is out of date: run python scripts/methods_table.py" if fresh != text else 0)
    README.write_text(fresh)


if __name__ == "__main__":
    main()
