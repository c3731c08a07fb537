"""The page of all methods: a table for each kind, made from the registry."""

from __future__ import annotations

from collections.abc import Sequence

from lowbit.pages.page import page_name
from lowbit.registry import Kind, MethodInfo, bits_span

HEADINGS: dict[Kind, tuple[str, str]] = {
    "post_training": ("After training", "With unlabelled samples or none: `lowbit quantize`, `lowbit.quantize`."),
    "training": ("In training", "With labels or a teacher: `lowbit train`, `lowbit.train`, `lowbit.prepare`."),
    "search": ("Bits for each layer", "Under a budget: `lowbit search`, `lowbit.search`."),
    "synthesis": ("Samples where there are no data", "`--calibration NAME`, `lowbit.synthesize`."),
}
_HEAD = """# Methods

Every registered method has a page here, with pictures made by its own code. `lowbit methods show NAME` prints the same facts, and `--option NAME=VALUE` sets any of
its hyper-parameters. Not sure which one to take? [Which method?](../which_method.md)
"""


def methods_page(methods: Sequence[MethodInfo]) -> str:
    """A table for each kind of methods, with a row for each method, which links to its page."""
    parts = [_HEAD]
    for kind, (heading, text) in HEADINGS.items():
        infos = [info for info in methods if info.kind == kind]
        if infos:
            rows = ["| method | what it does | weight bits | activation bits | needs | paper |", "| --- | --- | --- | --- | --- | --- |"]
            parts.append("\n".join([f"## {heading}\n\n{text}\n", *rows, *map(_row, infos)]) + "\n")
    names = sorted(map(page_name, methods))
    parts.append("\n".join(["```{toctree}", ":hidden:", "", *names, "```"]) + "\n")
    return "\n".join(parts)


def _row(info: MethodInfo) -> str:
    cells = (
        f"[{info.name}]({page_name(info)}.md)",
        info.summary,
        bits_span(info.weight_bits),
        bits_span(info.activation_bits),
        ", ".join(need.replace("_", " ") for need in info.needs) or "–",
        info.paper,
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
