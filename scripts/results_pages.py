"""Write docs/orderings.md, docs/procedures.md, docs/mixed_precision.md, docs/zero_shot.md and docs/accuracy.md from suites of comparisons and their committed results.

python scripts/results_pages.py            # after a results.csv was copied to benchmarks/results/NAME.csv
python scripts/results_pages.py --check    # exit 1 when a page is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lowbit.comparison.tables import make_tables
from lowbit.comparison.verdicts import judge
from lowbit.report.comparison import markdown
from lowbit.report.orderings import orderings_page
from lowbit.report.results_csv import read_results
from lowbit.workflows.suite import Suite

ROOT = Path(__file__).parent.parent
TITLES = {
    "orderings": {"orderings": "Orderings from papers"},
    "procedures": {
        "procedures": "Procedures of training",
        "incremental": "INQ at the learning rate of its recipe",
        "depthwise": "PROFIT on depthwise convolutions",
        "widths": "Networks of several widths",
        "published": "Recipes and policies of the papers",
    },
    "mixed_precision": {
        "mixed_precision": "Bits of each layer by search",
        "mixed_precision_networks": "On a network for ImageNet, without training",
        "mixed_precision_budgets": "Under other budgets",
    },
    "zero_shot": {"zero_shot": "Calibration without data", "zero_shot_photographs": "On photographs"},
    "accuracy": {
        "post_training": "Methods after training",
        "photographs": "Methods after training on photographs",
        "training": "Methods of training",
    },
}


def section(suite_name: str, title: str, *, has_tables: bool) -> str:
    """What was found about a suite's orderings, and its tables."""
    file = ROOT / "benchmarks" / "suites" / f"{suite_name}.yaml"
    suite, results = Suite.from_yaml(file), read_results(ROOT / "benchmarks" / "results" / f"{suite_name}.csv")
    name = str(file.relative_to(ROOT))
    page = f"# {title}\n\nMeasured by `lowbit compare {name}`.\n"
    if suite.orderings:
        page = orderings_page(judge(suite.orderings, results), name, title)
    return f"{page}\n{markdown(make_tables(results, baseline=suite.baseline))}" if has_tables else page


def pages() -> dict[Path, str]:
    """The text of each page; sections whose results are not there are left out."""
    found = {}
    for name, titles in TITLES.items():
        parts = [
            section(suite, title, has_tables=name != "orderings")
            for suite, title in titles.items()
            if (ROOT / "benchmarks" / "results" / f"{suite}.csv").exists()
        ]
        if parts:
            found[ROOT / "docs" / f"{name}.md"] = "\n".join(parts)
    return found


def main() -> None:
    """Write the pages, or say which are out of date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when a page is out of date")
    is_check = parser.parse_args().check
    for path, text in pages().items():
        if is_check and (not path.exists() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path} is out of date: run python scripts/results_pages.py")
        if not is_check:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
