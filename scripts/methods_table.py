"""Write the tables of methods in docs/methods.md from the registry, one for each kind.

python scripts/methods_table.py            # update docs/methods.md
python scripts/methods_table.py --check    # exit 1 when it is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowbit.registry import Kind, bits_span, list_methods

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
START, END = "<!-- methods: written by scripts/methods_table.py -->", "<!-- end of methods -->"
HEADINGS: dict[Kind, str] = {
    "post_training": "After training, with unlabelled samples or none (`lowbit quantize`, `lowbit.quantize`):",
    "training": "In training, with labels or a teacher (`lowbit train`, `lowbit.prepare`):",
    "search": "Bits for each layer under a budget (`lowbit search`, `lowbit.search`):",
    "synthesis": "Samples where there are no data (`--calibration NAME`, `lowbit.synthesize`):",
}


def methods_tables() -> str:
    """A Markdown table for each kind of methods, with a row for each registered method."""
    tables = []
    for kind, heading in HEADINGS.items():
        infos = list_methods(kind=kind)
        if infos:
            rows = ["| method | paper | weight bits | activation bits | needs | what it does |", "| --- | --- | --- | --- | --- | --- |"]
            rows += [
                f"| `{i.name}` | {i.paper} | {bits_span(i.weight_bits)} | {bits_span(i.activation_bits)} | {', '.join(i.needs) or '-'} | {i.summary} |"
                for i in infos
            ]
            tables.append("\n".join([heading, "", *rows]))
    return "\n\n".join(tables)


def updated(text: str) -> str:
    """``text`` with the tables between its markers replaced."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise SystemExit(f"{PAGE} lacks the lines {START!r} and {END!r}")
    return f"{before}{START}\n{methods_tables()}\n{END}{after}"


def main() -> None:
    """Write the tables of methods between the markers of the PAGE."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when PAGE.md is out of date")
    text = PAGE.read_text()
    fresh = updated(text)
    if parser.parse_args().check:
        sys.exit(f"{PAGE} is out of date: run python scripts/methods_table.py" if fresh != text else 0)
    PAGE.write_text(fresh)


if __name__ == "__main__":
    main()
