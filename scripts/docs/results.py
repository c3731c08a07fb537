"""Pages of results, made from suites of comparisons and what is committed of them under benchmarks/results/."""

from __future__ import annotations

import re
from pathlib import Path

from lowbit.comparison.tables import make_tables
from lowbit.comparison.verdicts import judge
from lowbit.report.comparison import markdown
from lowbit.report.orderings import orderings_page
from lowbit.report.results_csv import read_results
from lowbit.workflows.suite import Suite

ROOT = Path(__file__).parents[2]
PAGES = {  # titles, and the suites on each page with theirs
    "orderings": ("What papers claim", {"orderings": "Orderings from papers"}),
    "accuracy": (
        "Accuracy",
        {
            "post_training": "Methods after training",
            "photographs": "Methods after training on photographs",
            "training": "Methods of training",
        },
    ),
    "procedures": (
        "Procedures and several widths",
        {
            "procedures": "Procedures of training",
            "incremental": "INQ at the learning rate of its recipe",
            "depthwise": "PROFIT on depthwise convolutions",
            "widths": "Networks of several widths",
            "published": "Recipes and policies of the papers",
        },
    ),
    "mixed_precision": (
        "Bits of each layer by search",
        {
            "mixed_precision": "On Fashion-MNIST and on photographs",
            "mixed_precision_networks": "On networks for ImageNet, without training",
            "mixed_precision_budgets": "Under other budgets",
        },
    ),
    "super_resolution": ("Super-resolution", {"super_resolution": "On photographs"}),
    "zero_shot": (
        "What made samples are worth",
        {"zero_shot": "Calibration without data", "zero_shot_photographs": "On photographs"},
    ),
}


def section(suite_name: str, title: str, *, has_tables: bool) -> str:
    """What was found about a suite's orderings, and its tables, under a heading of the second level."""
    file = ROOT / "benchmarks" / "suites" / f"{suite_name}.yaml"
    suite, results = Suite.from_yaml(file), read_results(ROOT / "benchmarks" / "results" / f"{suite_name}.csv")
    name = str(file.relative_to(ROOT))
    page = f"# {title}\n\nMeasured by `lowbit compare {name}`.\n"
    if suite.orderings:
        page = orderings_page(judge(suite.orderings, results), name, title)
    tables = f"\n{markdown(make_tables(results, baseline=suite.baseline))}" if has_tables else ""
    return f"#{page}{tables}"


def unbroken(text: str) -> str:
    """``text`` whose figures keep their units on narrow screens."""
    return re.sub(r"(?<=\d) (?=%|s\b|[kM]?B\b)", "\u00a0", text)


def results_pages() -> dict[str, str]:
    """The text of each page by its name; sections whose results are not there are left out."""
    found = {}
    for name, (title, suites) in PAGES.items():
        parts = [
            section(suite, heading, has_tables=name != "orderings")
            for suite, heading in suites.items()
            if (ROOT / "benchmarks" / "results" / f"{suite}.csv").exists()
        ]
        if parts:
            found[name] = "\n".join([f"# {title}\n", *parts])
    return found
