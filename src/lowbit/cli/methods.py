"""``lowbit methods``: which methods there are, and what each one does and takes."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Literal

import typer

from lowbit import registry
from lowbit.cli.console import results, show_table
from lowbit.errors import unknown_name
from lowbit.options import settings_of

app = typer.Typer(help="Which methods there are, and what each one does and takes.", no_args_is_help=True)


@app.command("list")
def list_methods(
    pattern: Annotated[str, typer.Argument(help="Only methods whose name matches this shell pattern, for example 'ada*'.")] = "*",
    kind: Annotated[
        Literal["post_training", "training", "search", "synthesis"] | None, typer.Option(help="Only methods of this kind. Default: all.")
    ] = None,
) -> None:
    """List the methods with their bit-widths and needs."""
    infos = registry.list_methods(pattern, kind=kind)
    if not infos:
        raise unknown_name("method", pattern, (info.name for info in registry.list_methods(kind=kind)))
    show_table(
        ("method", "kind", "weight bits", "activation bits", "needs", "what it does"),
        ((i.name, i.kind, span(i.weight_bits), span(i.activation_bits), ", ".join(i.needs) or None, i.summary) for i in infos),
    )


@app.command("show")
def show_method(name: Annotated[str, typer.Argument(help="Name of the method, as 'lowbit methods list' prints it.")]) -> None:
    """Show the paper, the axes and the hyper-parameters of one method."""
    info = registry.get_method(name)
    results.print(f"[bold]{info.name}[/]: {info.summary}\n")
    facts = {
        "title": info.title,
        "paper": info.paper,
        "section": info.section,
        "axes": ", ".join(info.axes),
        "kind": info.kind,
        "weight bits": span(info.weight_bits),
        "activation bits": span(info.activation_bits),
        "needs": ", ".join(info.needs) or "nothing but the network",
        "fidelity": info.fidelity,
    }
    show_table(("fact", ""), facts.items())
    results.print()
    show_table(("option", "type", "default", "meaning"), option_rows(info), title="Hyper-parameters, set with --option NAME=VALUE")


def option_rows(info: registry.MethodInfo) -> list[tuple[str, str, str, str]]:
    """Name, type, default and meaning of each hyper-parameter of a method."""
    assert info.method is not None
    return [(s.name, type_word(s.type), value_word(s.default), s.meaning) for s in settings_of(info.method).values()]


def type_word(hint: object) -> str:
    """What a value may be: ``int``, ``mse | fisher_diag``, ``float | none``, ``text, text, ...``."""
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join(map(type_word, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        inner = type_word(typing.get_args(hint)[0])
        return f"{inner}, {inner}, ..."
    return {str: "text", bool: "true | false", type(None): "none"}.get(hint, getattr(hint, "__name__", str(hint)))  # type: ignore[call-overload, no-any-return]


def value_word(value: object) -> str:
    """A default as users would type it."""
    if isinstance(value, tuple):
        return ",".join(map(value_word, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def span(bits: range | None) -> str:
    """``2-8``, or ``float`` where the method leaves them alone."""
    if bits is None:
        return "float"
    return f"{bits.start}-{bits.stop - 1}" if len(bits) > 1 else str(bits.start)
