"""What the results of a comparison say about orderings that are claimed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from lowbit.comparison.cells import Result, Track
from lowbit.comparison.orderings import Ordering
from lowbit.comparison.statistics import Difference, Spread, paired_difference, spread
from lowbit.comparison.terms import EQUAL, differing

Finding = Literal["holds", "no difference shown", "does not hold", "not measured"]


@dataclass(frozen=True)
class Verdict:
    """What results say about an ordering on one network.

    Attributes:
        ordering: The claim.
        subject, track: Network, and terms; without a network where nothing is measured.
        finding: ``holds`` or ``does not hold`` where the interval of the difference leaves 0 out; ``not measured`` with fewer than three
            seeds that both methods have.
        better, worse: Spread over the seeds of the two methods.
        difference: How much better the first one is, in the metric's direction, so that positive values agree with the claim.
        unit: Of the metric.
        unequal: Terms of the track that the two methods do not share, in words.
    """

    ordering: Ordering
    subject: str
    track: Track
    finding: Finding
    better: Spread | None
    worse: Spread | None
    difference: Difference | None
    unit: str
    unequal: tuple[str, ...] = ()


def judge(orderings: Iterable[Ordering], results: Sequence[Result]) -> list[Verdict]:
    """A verdict for each ordering on each network and track where one of its methods has results, or one that says that it is not measured.

    Args:
        orderings: Claims.
        results: Of a comparison, each cell once.

    Example:
        >>> [verdict.finding for verdict in judge([Ordering("lsq > dorefa at 2/2")], [])]
        ['not measured']
    """
    return [verdict for ordering in orderings for verdict in _verdicts(ordering, _about(ordering, results))]


def _verdicts(ordering: Ordering, found: Sequence[Result]) -> list[Verdict]:
    groups: dict[tuple[str, Track], list[Result]] = {}
    for one in found:
        groups.setdefault((one.cell.subject, one.cell.track), []).append(one)
    if not groups:
        return [Verdict(ordering, "", "aligned", "not measured", None, None, None, "")]
    return [_verdict(ordering, subject, track, group) for (subject, track), group in groups.items()]


def _about(ordering: Ordering, results: Sequence[Result]) -> list[Result]:
    labels = (ordering.better, ordering.worse)
    return [one for one in results if one.cell.bits == ordering.bits and one.cell.label in labels and one.status != "skipped"]


def _verdict(ordering: Ordering, subject: str, track: Track, found: Sequence[Result]) -> Verdict:
    done = [one for one in found if one.status == "done"]
    higher, unit = (done or found)[0].higher_is_better, (done or found)[0].unit
    values = {
        label: {one.cell.seed: one.value for one in done if one.cell.label == label and one.value is not None}
        for label in (ordering.better, ordering.worse)
    }
    first, second = values[ordering.better], values[ordering.worse]
    difference = paired_difference(first, second) if higher else paired_difference(second, first)
    return Verdict(
        ordering,
        subject,
        track,
        _finding(difference),
        spread(list(first.values())) if first else None,
        spread(list(second.values())) if second else None,
        difference,
        unit,
        tuple(name.replace("_", " ") for name in differing(done, EQUAL[track])),
    )


def _finding(difference: Difference | None) -> Finding:
    if difference is None:
        return "not measured"
    if not difference.is_shown:
        return "no difference shown"
    return "holds" if difference.low > 0 else "does not hold"
