"""Pages of results, made from suites of comparisons and what is committed of them under benchmarks/results/."""

from __future__ import annotations

from pathlib import Path

from lowbit.comparison.tables import make_tables
from lowbit.comparison.verdicts import judge
from lowbit.report.comparison import markdown
from lowbit.report.orderings import orderings_page
from lowbit.report.results_csv import read_results
from lowbit.workflows.suite import Suite

ROOT = Path(__file__).parents[2]
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


def results_pages() -> dict[str, str]:
    """The text of each page by its name; sections whose results are not there are left out."""
    found = {}
    for name, titles in TITLES.items():
        parts = [
            section(suite, title, has_tables=name != "orderings")
            for suite, title in titles.items()
            if (ROOT / "benchmarks" / "results" / f"{suite}.csv").exists()
        ]
        if parts:
            found[name] = "\n".join(parts)
    return found
