"""Orderings and what a comparison found about them, as a page in Markdown and as rows of tables."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.comparison.statistics import CONFIDENCE, Spread
from lowbit.comparison.verdicts import Verdict
from lowbit.report.formatting import NOTHING

HEADS = ("claim", "source", "network", "first", "second", "first minus second", "finding")


def ordering_cells(verdict: Verdict) -> list[str]:
    """The cells of a row under ``HEADS``, as people read them."""
    return [
        verdict.ordering.claim,
        verdict.ordering.source or NOTHING,
        (verdict.subject or NOTHING) if verdict.track == "aligned" else f"{verdict.subject}, {verdict.track}",
        _spread(verdict.better, verdict.unit),
        _spread(verdict.worse, verdict.unit),
        _difference(verdict),
        verdict.finding,
    ]


def notes(verdicts: Sequence[Verdict]) -> list[str]:
    """What is to be known about single findings: the orderings' own notes, and terms on which two methods differ."""
    found = [f"{one.ordering.claim}: {one.ordering.note}" for one in verdicts if one.ordering.note]
    found += [f"{one.ordering.claim} on {one.subject}: the two differ in {', '.join(one.unequal)}" for one in verdicts if one.unequal]
    return list(dict.fromkeys(found))


def orderings_page(verdicts: Sequence[Verdict], suite: str = "suite.yaml", title: str = "Orderings from papers") -> str:
    """A page in Markdown: counts, a row for each ordering and network, and notes.

    Args:
        verdicts: What was found.
        suite: Name of the suite, for the command.
        title: Heading of the page.
    """
    counts = {
        name: sum(one.finding == name for one in verdicts) for name in ("holds", "no difference shown", "does not hold", "not measured")
    }
    lines = [
        f"# {title}",
        "",
        f"What papers claim, measured by `lowbit compare {suite}`: "
        + ", ".join(f"{'once' if count == 1 else f'{count} times'} *{name}*" for name, count in counts.items() if count)
        + ".",
        "",
        "Each row compares two methods on one network over the same seeds: mean and standard deviation of each, and the mean of the differences "
        f"seed by seed with its {CONFIDENCE:.0%} bootstrap interval. An ordering *holds* where the interval lies above 0 and *does not hold* where "
        "it lies below; where it covers 0 *no difference* is *shown*, which agrees with claims that say >=. Networks and budgets are far smaller "
        "than the papers': a finding is about these, not about the papers.",
        "",
        f"| {' | '.join(HEADS)} |",
        f"|{' --- |' * len(HEADS)}",
        *(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in ordering_cells(one))} |" for one in verdicts),
        "",
    ]
    return "\n".join([*lines, *(f"- {text}" for text in notes(verdicts))]).rstrip() + "\n"


def _spread(found: Spread | None, unit: str) -> str:
    if found is None:
        return NOTHING
    scale, mark = (100, " %") if unit == "%" else (1, f" {unit}".rstrip())
    deviation = "" if found.deviation is None else f" ± {scale * found.deviation:.2f}"
    return f"{scale * found.mean:.2f}{deviation}{mark}"


def _difference(verdict: Verdict) -> str:
    if verdict.difference is None:
        return NOTHING
    scale = 100 if verdict.unit == "%" else 1
    mean, low, high = (f"{scale * value:+.2f}" for value in (verdict.difference.mean, verdict.difference.low, verdict.difference.high))
    return f"{mean} [{low}, {high}]"
