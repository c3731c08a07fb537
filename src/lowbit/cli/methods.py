"""``lowbit methods``: which methods there are, and what each one does and takes."""

from __future__ import annotations

import dataclasses
import tempfile
import webbrowser
from pathlib import Path
from typing import Annotated, Literal

import typer

from lowbit import registry
from lowbit.cli.console import results, say, show_json, show_table
from lowbit.cli.names import method_names
from lowbit.cli.settings import Json, name_completion
from lowbit.errors import SpecError, unknown_name
from lowbit.options import option_rows
from lowbit.plotting import check_suffix

app = typer.Typer(add_completion=False, help="Which methods there are, and what each one does and takes.", no_args_is_help=True)


@app.command("list")
def list_methods(
    pattern: Annotated[str, typer.Argument(help="Only methods whose name matches this shell pattern, for example 'ada*'.")] = "*",
    kind: Annotated[registry.Kind | None, typer.Option(help="Only methods of this kind. Default: all.")] = None,
    axis: Annotated[registry.Axis | None, typer.Option(help="Only methods that answer this question. Default: all.")] = None,
    json: Json = False,
) -> None:
    """List the methods with their bit-widths and needs.

    The procedures among them that any quantizer can go through: lowbit methods list --axis procedure
    """
    infos = registry.list_methods(pattern, kind=kind, axis=axis)
    if not infos:
        raise unknown_name("method", pattern, (info.name for info in registry.list_methods(kind=kind, axis=axis)))
    if json:
        show_json([facts_of(info) for info in infos])
        return
    rows: list[tuple[object, ...]] = [
        (i.name, i.kind, registry.bits_span(i.weight_bits), registry.bits_span(i.activation_bits), ", ".join(i.needs) or None, i.summary)
        for i in infos
    ]
    heads = ["method", "kind", "weight bits", "activation bits", "needs", "what it does"]
    if axis == "procedure":
        heads.insert(1, "quantizers")
        rows = [(row[0], "any (--procedure)" if i.is_procedure else "its own", *row[1:]) for row, i in zip(rows, infos, strict=True)]
    show_table(heads, rows)


@app.command("show")
def show_method(
    name: Annotated[
        str,
        typer.Argument(
            help="Name of the method, as 'lowbit methods list' prints it, or FILE.py:CLASS.", autocompletion=name_completion(method_names)
        ),
    ],
    kind: Annotated[registry.Kind | None, typer.Option(help="Which one, where methods of several kinds have this name.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw what it does, by running it for some seconds, and write that to this .svg or .png file.")
    ] = None,
    is_opened: Annotated[bool, typer.Option("--open", help="Draw it and open it in a browser.")] = False,
    json: Json = False,
) -> None:
    """Show the paper, the axes and the hyper-parameters of one method; with --plot also what it does."""
    if plot is not None:
        check_suffix(plot)
    kinds = [info.kind for info in registry.list_methods(kind=kind) if info.name == name]
    if len(kinds) > 1:
        raise SpecError(f"{name!r} is a method of several kinds. Say which: {' or '.join(f'--kind {one}' for one in kinds)}.")
    info = registry.find_method(name, kind)
    if json:
        names = ("name", "type", "allowed", "default", "meaning")
        picture, _ = _draw(info, plot, is_opened=is_opened)
        facts_shown = {**facts_of(info), "options": [dict(zip(names, row, strict=True)) for row in option_rows(info)]}
        show_json(facts_shown if picture is None else {**facts_shown, "picture": str(picture)})
        return
    results.print(f"[bold]{info.name}[/]: {info.summary}\n")
    facts = {
        "title": info.title,
        "paper": info.paper,
        "address": info.url or None,
        "section": info.section,
        "axes": ", ".join(info.axes),
        "procedure": "any training method's quantizers can go through it, with --procedure" if info.is_procedure else None,
        "kind": info.kind,
        "weight bits": registry.bits_span(info.weight_bits),
        "activation bits": registry.bits_span(info.activation_bits),
        "needs": ", ".join(info.needs) or "nothing but the network",
        "fidelity": "; ".join(filter(None, (info.fidelity, info.evidence))),
    }
    show_table(("fact", ""), [(name, fact) for name, fact in facts.items() if fact is not None])
    results.print()
    show_table(
        ("option", "type", "allowed", "default", "meaning"), option_rows(info), title="Hyper-parameters, set with --option NAME=VALUE"
    )
    picture, remarks = _draw(info, plot, is_opened=is_opened)
    for remark in remarks:
        say(remark)
    if picture is not None:
        say(f"picture: {picture}")


def _draw(info: registry.MethodInfo, path: Path | None, *, is_opened: bool) -> tuple[Path | None, list[str]]:
    """Write the method's picture where it was asked for; the file, and what to say about it."""
    if path is None and not is_opened:
        return None, []
    from lowbit.pages import method_picture  # it brings torch and all workflows

    picture = method_picture(info.method, info.kind)
    written = picture.save(path or Path(tempfile.mkdtemp(prefix="lowbit-")) / f"{info.name}.svg")
    remarks = list(picture.notes)
    if is_opened and not _opened(written):
        remarks.append("There is no browser to open it with.")
    return written, remarks


def _opened(path: Path) -> bool:
    """Whether a browser took the file."""
    try:
        return webbrowser.open(path.resolve().as_uri())
    except webbrowser.Error:
        return False


@app.command("new")
def new_method(
    name: Annotated[str, typer.Argument(help="Name of the method: a lower-case Python name such as my_method.")],
    kind: Annotated[Literal["training", "post_training"], typer.Option(help="What the method does.")] = "training",
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write to. Default: lowbit_NAME.")] = None,
) -> None:
    """Write a small package with a method of its own, which works and keeps the laws, to start from."""
    from lowbit.testing.skeleton import write_skeleton  # it brings training and all methods, which no other command here needs

    folder = write_skeleton(name, kind, out)
    say(f"wrote {folder}. Install it with: pip install -e '{folder}[test]'   Hold it to the laws with: pytest {folder}")


def facts_of(info: registry.MethodInfo) -> dict[str, object]:
    """What is known of a method, for programs."""
    facts = {field.name: getattr(info, field.name) for field in dataclasses.fields(info) if field.name != "method"}
    plain = {name: list(value) if isinstance(value, (range, tuple)) else value for name, value in facts.items()}
    return {**plain, "is_procedure": info.is_procedure}
