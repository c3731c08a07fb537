"""The page of a method: Markdown from its registration, its docstrings, and runs of its code."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lowbit.comparison.cells import Result
from lowbit.errors import OutputError
from lowbit.files import write_text
from lowbit.options import option_rows
from lowbit.pages.examples import example, run_example
from lowbit.pages.picture import method_picture
from lowbit.pages.sources import IN_REPOSITORY, PACKAGE, digest_of, equations, file_digest, module_text, shown_path, source_file
from lowbit.qat.task import format_metric
from lowbit.registry import Kind, MethodInfo, bits_span, find_method, list_methods
from lowbit.report.bibliography import Reference, bibtex
from lowbit.report.results_csv import read_results

REPOSITORY = PACKAGE.parent.parent  # of a checkout
VECTORS = "tests/conformance/passed.json"
RESULTS = "benchmarks/results"
COMMANDS: Mapping[Kind, str] = {
    "training": "lowbit train --method {}",
    "post_training": "lowbit quantize --method {}",
    "search": "lowbit search --method {}",
    "synthesis": "lowbit synthesize --method {}",
}


@dataclass(frozen=True)
class Shown:
    """What running a method gave: its picture in both themes, and its example with what it printed."""

    light: str
    dark: str
    title: str
    notes: tuple[str, ...]
    code: str
    output: str


def page_name(info: MethodInfo) -> str:
    """The name of the page: the method's, with its kind where methods of several kinds have that name."""
    kinds = [other for other in list_methods(kind=None) if other.name == info.name]
    return info.name if len(kinds) < 2 else f"{info.name}_{info.kind}"


def write_method_pages(
    folder: Path | str,
    names: Iterable[str] | None = None,
    *,
    link: str = "{path}#L{line}",
    workers: int = 1,
    cache: Path | str | None = None,
) -> list[Path]:
    """Write a page and two pictures, for light and dark ground, for each method.

    Pictures and examples are made again only where a source file behind them has changed.

    Args:
        folder: Where ``NAME.md``, ``NAME.light.svg`` and ``NAME.dark.svg`` go.
        names: Methods: registered names, or ``path/to/file.py:Class``. Default: all that are registered.
        link: Address of a line of the repository, with ``{path}`` and ``{line}``.
        workers: Processes that run methods.
        cache: Folder of pictures and outputs by their digests. Default: ``.cache`` in ``folder``.

    Returns:
        The pages, in the order of their names.

    Raises:
        UnknownNameError: No such method.
        OutputError: The folder cannot be written to.
        MissingExtraError: matplotlib or scikit-learn is not installed.
    """
    folder = Path(folder)
    kept = Path(cache) if cache is not None else folder / ".cache"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {error.filename}: {error.strerror}. Name another one.") from error
    asked = [(info, reference) for name in names for info, reference in _named(name)] if names is not None else _registered()
    places = [_kept_at(kept, info) for info, _ in asked]
    missing = {place: pair for place, pair in zip(places, asked, strict=True) if not place.is_file()}
    for place, shown in zip(missing, _run_all(list(missing.values()), workers), strict=True):
        write_text(place, json.dumps(vars(shown)))
    return [_write(folder, info, reference, _load(place), link) for place, (info, reference) in zip(places, asked, strict=True)]


def method_page(method: object, kind: Kind | None = None, *, shown: Shown | None = None, link: str = "{path}#L{line}") -> str:
    """The page of one method as Markdown (MyST); runs the method where ``shown`` is left out, which takes some seconds."""
    info = find_method(method, kind)
    reference = method if isinstance(method, str) else None
    return _page(info, reference, shown or show(info, reference), link)


def show(info: MethodInfo, reference: str | None = None) -> Shown:
    """Draw the method's picture and run its example."""
    picture, code = method_picture(info.method, info.kind), example(info, reference)
    light, dark = (picture.svg(theme, is_transparent=True) for theme in ("light", "dark"))
    return Shown(light, dark, picture.title, picture.notes, code, run_example(code))


def _named(name: str) -> list[tuple[MethodInfo, str | None]]:
    found = [(info, None) for info in list_methods() if info.name == name]
    return list(found) or [(find_method(name), name)]


def _registered() -> list[tuple[MethodInfo, str | None]]:
    return [(info, None) for info in list_methods()]


def _kept_at(cache: Path, info: MethodInfo) -> Path:
    return cache / f"{page_name(info)}-{digest_of(info)}.json"


def _load(path: Path) -> Shown:
    fields = json.loads(path.read_text(encoding="utf-8"))
    return Shown(**{**fields, "notes": tuple(fields["notes"])})


def _run_all(methods: Sequence[tuple[MethodInfo, str | None]], workers: int) -> Iterator[Shown]:
    if workers < 2 or len(methods) < 2:
        for info, reference in methods:
            yield show(info, reference)
        return
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that start here
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        tasks = [pool.submit(_show_named, reference or info.name, info.kind, reference) for info, reference in methods]
        for task in tasks:
            yield task.result()


def _show_named(name: str, kind: Kind, reference: str | None) -> Shown:
    return show(find_method(name, kind), reference)


def _write(folder: Path, info: MethodInfo, reference: str | None, shown: Shown, link: str) -> Path:
    name = page_name(info)
    write_text(folder / f"{name}.light.svg", shown.light)
    write_text(folder / f"{name}.dark.svg", shown.dark)
    write_text(folder / f"{name}.md", _page(info, reference, shown, link))
    return folder / f"{name}.md"


def _page(info: MethodInfo, reference: str | None, shown: Shown, link: str) -> str:
    path, name = source_file(info), page_name(info)
    text = module_text(_docstring(path))
    sections = [
        f"# {name}\n\n**{escaped(info.title)}**\n\n{_paper(info)}",
        _idea(info, text.idea),
        _facts(info, reference),
        _picture(name, shown),
        f"## Example\n\n```python\n{shown.code.rstrip()}\n```\n\nIt printed:\n\n```text\n{shown.output.rstrip()}\n```",
        _options(info),
        f"## Where its equations are\n\n{_sources(text.paper, text.symbols)}{_equations(info, link)}",
        _differences(info, text.differences, text.rest),
        f"## Reference vectors\n\n{vectors_sentence(info)}",
        _results(info),
        _bibtex(info),
    ]
    return "\n\n".join(filter(None, sections)) + "\n"


def _docstring(path: Path) -> str:
    import ast

    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _paper(info: MethodInfo) -> str:
    if info.paper == "none":
        return "There is no paper; it is a baseline."
    paper = Reference.of(info.paper)
    said = ", ".join(filter(None, (", ".join(paper.authors), " ".join(filter(None, (paper.venue, paper.year))))))
    more = info.paper.partition(";")[2].strip()
    return " ".join(
        filter(
            None,
            (
                f"{escaped(said)}.",
                f"[{info.url.removeprefix('https://')}]({info.url})." if info.url else "",
                f"{escaped(more)}." if more else "",
            ),
        )
    )


def _idea(info: MethodInfo, idea: str) -> str:
    return "\n\n".join(filter(None, ("## The idea", escaped(idea), escaped(_sentence(_class_text(info))))))


def _class_text(info: MethodInfo) -> str:
    """What the class says of itself, before its sections."""
    first = re.split(r"\n\s*(?:Attributes|Args|Example|Source)s?:", (info.method.__doc__ or "") if info.method else "")[0]
    return " ".join(first.split())


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", ":")) else ".") if text else ""


def _facts(info: MethodInfo, reference: str | None) -> str:
    rows = {
        "kind": info.kind.replace("_", " "),
        "what it decides": ", ".join(axis.replace("_", " ") for axis in info.axes),
        "weight bits": bits_span(info.weight_bits),
        "activation bits": bits_span(info.activation_bits),
        "needs": ", ".join(need.replace("_", " ") for need in info.needs) or "nothing but the network",
        "fidelity": "; ".join(filter(None, (info.fidelity, info.evidence))),
        "command": f"`{COMMANDS[info.kind].format(reference or info.name)}`",
    }
    return table(("fact", ""), [(name, value if name == "command" else escaped(value)) for name, value in rows.items()])


def _picture(name: str, shown: Shown) -> str:
    images = "\n\n".join(
        f":::{{image}} {name}.{theme}.svg\n:alt: {shown.title}\n:class: only-{theme}\n:width: 100%\n:::" for theme in ("light", "dark")
    )
    return f"## What it does\n\n{images}\n\n{' '.join(map(escaped, shown.notes))}"


def _options(info: MethodInfo) -> str:
    rows = [
        (f"`{name}`", escaped(kind), escaped(allowed), f"`{default}`" if default else "", escaped(meaning))
        for name, kind, allowed, default, meaning in option_rows(info)
    ]
    body = table(("option", "type", "allowed", "default", "meaning"), rows) if rows else "It has none."
    return f"## Options\n\nDefaults are the paper's, where it says them and neither the meaning nor the differences below say otherwise.\n\n{body}"


def _sources(paper: str, symbols: str) -> str:
    said = [f"{escaped(paper)}" if paper else "", f"Symbols: {escaped(symbols)}" if symbols else ""]
    return "".join(f"{one}\n\n" for one in said if one)


def _equations(info: MethodInfo, link: str) -> str:
    rows = []
    for one in equations(info):
        where = f"{one.path}:{one.line}"
        if one.path.startswith(IN_REPOSITORY):
            where = f"[`{where}`]({link.format(path=one.path, line=one.line)})"
        rows.append((escaped(one.source), f"`{one.name}`", where))
    if not rows:
        path = shown_path(source_file(info))
        shown = f"[`{path}`]({link.format(path=path, line=1)})" if path.startswith(IN_REPOSITORY) else f"`{path}`"
        return f"No function names an equation of its own; the method is in {shown}."
    return table(("source", "function", "where"), rows)


def _differences(info: MethodInfo, differences: Sequence[str], rest: Mapping[str, str]) -> str:
    items = "\n".join(f"- {escaped(one)}" for one in differences) or "No difference is known."
    more = "".join(f"\n\n{escaped(name)}: {escaped(text)}" for name, text in rest.items())
    return f"## Differs from the paper\n\n{items}{more}" if info.fidelity != "baseline" or differences else ""


def vectors_sentence(info: MethodInfo, repository: Path = REPOSITORY) -> str:
    """What is known of the method's reference vectors; a pass is said only of the source file as it was when they were run."""
    file = repository / VECTORS
    if not file.is_file():
        return "The record of reference vectors is not in this checkout."
    record = json.loads(file.read_text(encoding="utf-8")).get(info.name)
    if record is None:
        return "There are no reference vectors of its own."
    said = f"{record['passed']} of {record['cases']} reference vectors passed on {record['date']}"
    if record["digest"] != file_digest(source_file(info)):
        return f"{said}, but its source file has changed since."
    return f"{said}, with its source file as it is now."


def _results(info: MethodInfo, repository: Path = REPOSITORY) -> str:
    """Its rows of the committed comparisons: the mean over seeds."""
    rows = []
    for path in sorted((repository / RESULTS).glob("*.csv")):
        groups: dict[tuple[str, ...], list[Result]] = {}
        for result in _results_at(path, path.stat().st_mtime_ns):
            if result.cell.method == info.name and result.cell.kind == info.kind and result.value is not None:
                groups.setdefault(
                    (result.cell.subject, result.cell.label, "/".join(result.cell.operand_bits), result.cell.track), []
                ).append(result)
        for (subject, label, bits, track), results in groups.items():
            values = [result.value for result in results if result.value is not None]
            floats = [value for value in (result.float_metrics.get(result.metric) for result in results) if value is not None]
            shown = [format_metric(sum(found) / len(found), results[0].unit) if found else "" for found in (values, floats)]
            rows.append((escaped(subject), escaped(label), bits, track, results[0].metric, *shown, str(len(values)), f"`{path.name}`"))
    heads = ("network", "label", "bits", "terms", "metric", "mean", "float", "seeds", "file")
    return f"## Measured\n\nFrom the committed results of comparisons, all in `{RESULTS}/`.\n\n{table(heads, rows)}" if rows else ""


@functools.cache
def _results_at(path: Path, _changed: int) -> list[Result]:
    return read_results(path)


def _bibtex(info: MethodInfo) -> str:
    entry = bibtex(info)
    return f"## Cite\n\n```bibtex\n{entry.rstrip()}\n```" if entry else ""


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace(chr(10), ' ').replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text of a docstring as Markdown: code between double backticks stays code, all else is text.

    >>> escaped("``a * b`` is 2**n1 [x]")
    '`a * b` is 2\\\\*\\\\*n1 \\\\[x\\\\]'
    """
    parts = re.split(r"``(.+?)``", text)
    return "".join(f"`{part}`" if index % 2 else re.sub(r"([\\*_<>\[\]$`{}~])", r"\\\1", part) for index, part in enumerate(parts))
