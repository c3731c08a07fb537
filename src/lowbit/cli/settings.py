"""Options of a command, made from the settings of its request."""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import wraps
from typing import Annotated, Any, Literal

import typer

from lowbit.cli import names
from lowbit.cli.flags import flag_of, flags_of, off_flag_of
from lowbit.errors import SpecError
from lowbit.options import Setting, settings_of, value_word
from lowbit.reading import parse_yaml
from lowbit.workflows.request import Request, fields_of

RUN, OUTPUT, METHOD = "Run", "Output", "Method"  # headings in --help for what is no setting
MAPPINGS = (  # given as NAME=VALUE
    "options",
    "then_options",
    "procedure_options",
    "calibration_options",
    "data_options",
    "model_options",
    "teacher_options",
    "preprocess",
)
PARSED = ("model_options", "teacher_options")  # their values are Python's, as YAML writes them

PIXELS = ("mean", "std")  # of the preprocessing, as options of their own

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="No progress and no tables; files are written all the same.", rich_help_panel=RUN)
]
Json = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON, and nothing else, on standard output.", rich_help_panel=OUTPUT)
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Check everything, print what each layer would get, and neither write nor download anything.",
        rich_help_panel=OUTPUT,
    ),
]
PrintConfig = Annotated[
    bool,
    typer.Option("--print-config", help="Print the effective recipe as YAML, which can be given back, and stop.", rich_help_panel=OUTPUT),
]
RecipeFile = Annotated[
    str | None,
    typer.Argument(
        help="A YAML file with any of these settings; options override it. See --print-config.", metavar="RECIPE", show_default=False
    ),
]


def options_of(
    request: type[Request], *, kind: str | None = None, without: Collection[str] = (), shortcuts: type | None = None
) -> Callable[[Callable[..., None]], Any]:
    """Decorator: add an option to a command for each setting of ``request``.

    Its first parameter gets the values that the user gave, named as in a recipe file; parameters of its own stay.

    Args:
        request: The request.
        kind: The kind of methods that are completed.
        without: Settings that the command takes in another way, such as a positional argument.
        shortcuts: More settings, of the method.
    """
    found = {path: option for path, option in _options(request, kind) if path[-1] not in without}
    if shortcuts is not None:
        found |= {(name,): _option(setting, METHOD, kind) for name, setting in settings_of(shortcuts).items()}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(command, eval_str=True).parameters.values()

        @wraps(command)
        def run(**values: Any) -> None:
            given = {path: values.pop(_parameter(path)) for path in found}
            command(_nested(given), **values)

        positional = [p for p in own if isinstance(typing.get_args(p.annotation)[-1], typer.models.ArgumentInfo)]
        generated = [
            inspect.Parameter(_parameter(path), inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
            for path, option in found.items()
        ]
        rest = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own if p not in positional]
        positional = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in positional]
        parameters = [*positional, *generated, *rest]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def key_values(pairs: list[str], option: str) -> dict[str, str]:
    """``["a=1", "b=x"]`` as a dictionary; SpecError where the equals sign is missing or a key comes twice."""
    values: dict[str, str] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise SpecError(f"{option} {pair}: expected NAME=VALUE, for example {option} iterations=1000")
        if key in values:
            raise SpecError(f"{option} {pair}: {key} was given twice, also as {values[key]!r}")
        values[key] = value
    return values


def _options(request: type[Request], kind: str | None) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Each setting, by its path through nested groups, with the option for it."""
    settings = settings_of(request)
    for name, group in fields_of(request):
        heading = (group.__doc__ or "").partition("\n")[0].rstrip(".")
        for path, setting in _leaves(settings[name]):
            yield path, _option(setting, heading, kind)
            if path == ("preprocess",):
                yield from (((*path, part), _shortcut(part, heading)) for part in PIXELS)


def _leaves(setting: Setting) -> Iterator[tuple[tuple[str, ...], Setting]]:
    """``setting`` itself, or the settings in it by their place in a file: fields of a group stand beside the others, groups within it apart."""
    if not dataclasses.is_dataclass(setting.type):
        yield (setting.name,), setting
        return
    for inner in settings_of(setting.type).values():  # type: ignore[arg-type]
        if dataclasses.is_dataclass(inner.type):
            yield from (((inner.name, leaf.name), leaf) for leaf in settings_of(inner.type).values())  # type: ignore[arg-type]
        else:
            yield (inner.name,), inner


def _parameter(path: tuple[str, ...]) -> str:
    return "_".join(path) if path[-1] == "kind" else path[-1]


def _option(setting: Setting, heading: str, kind: str | None) -> Any:
    """The annotation of typer's parameter for ``setting``: text, which the request converts; several texts; or a switch."""
    is_many = setting.type == tuple[str, ...] or _is_mapping(setting)
    facts: dict[str, Any] = {"help": _help(setting, is_many), "rich_help_panel": heading, "show_default": False}
    if bool in (setting.type, *typing.get_args(setting.type)):
        on = flag_of(setting.name)
        return Annotated[bool | None, typer.Option(on if setting.default is False else f"{on}/{off_flag_of(setting.name)}", **facts)]
    facts |= {"metavar": _metavar(setting), "autocompletion": _completion(setting, kind)}
    return Annotated[list[str] | None if is_many else str | None, typer.Option(*flags_of(setting.name), **facts)]


def _shortcut(name: str, heading: str) -> Any:
    """The annotation of typer's parameter for an entry of the preprocessing that has an option of its own."""
    text = f"{name.capitalize()} of the pixels, in 0..1, for each channel; short for --preprocess {name}=..."
    return Annotated[str | None, typer.Option(f"--{name}", help=text, metavar="NUMBER,...", rich_help_panel=heading, show_default=False)]


def _is_mapping(setting: Setting) -> bool:
    return typing.get_origin(setting.type) is Mapping


def _help(setting: Setting, is_many: bool) -> str:
    text = setting.meaning
    is_silent = setting.default in (None, (), dataclasses.MISSING) or isinstance(setting.default, (dict, bool))
    if not is_silent and "Default:" not in text:
        text += f" Default: {value_word(setting.default)}."
    if _is_mapping(setting):
        text += " As NAME=VALUE, repeatable."
    elif is_many:
        text += " Repeatable."
    return text


def _metavar(setting: Setting) -> str:
    if _is_mapping(setting):
        return "NAME=VALUE"
    if setting.name.endswith("_bits"):
        return "BITS"
    kinds = [kind for kind in (typing.get_args(setting.type) if _is_union(setting.type) else (setting.type,)) if kind is not type(None)]
    if typing.get_origin(kinds[0]) is Literal:
        return f"[{'|'.join(map(str, typing.get_args(kinds[0])))}]"
    return {int: "INTEGER", float: "NUMBER"}.get(kinds[0], "NUMBER,..." if setting.type == tuple[float, ...] else "TEXT")


def _is_union(hint: object) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _completion(setting: Setting, kind: str | None) -> Callable[[str], list[str]] | None:
    """What the shell offers for the value of ``setting``; its own completion of files where there is nothing to offer."""
    if setting.name == "method":
        return name_completion(lambda: names.method_names(kind))
    if setting.name in ("model", "teacher"):
        return name_completion(names.model_names)
    if setting.name == "calibration":
        return name_completion(lambda: [*names.data_names(), *names.method_names("synthesis")])
    if setting.name in ("data", "test_data"):
        return name_completion(names.data_names)
    if setting.name in ("then", "quantizer"):
        return name_completion(lambda: names.method_names("post_training"))
    if setting.name == "procedure":
        return name_completion(names.procedure_names)
    if setting.name == "surrogate":
        return name_completion(names.surrogate_names)
    if setting.name.endswith("_bits"):
        return name_completion(lambda: [*map(str, range(1, 9)), "same" if setting.name == "first_last_bits" else "float"])
    choices = [str(choice) for choice in typing.get_args(setting.type)] if typing.get_origin(setting.type) is Literal else []
    return name_completion(lambda: choices) if choices else None


def name_completion(known: Callable[[], Sequence[str]]) -> Callable[[str], list[str]]:
    """What typer asks for completions: those of ``known()`` that start as what was typed."""

    def complete(incomplete: str) -> list[str]:
        return [name for name in known() if name.startswith(incomplete)]

    return complete


def _nested(given: Mapping[tuple[str, ...], object]) -> dict[str, object]:
    """The values that were given, as a recipe file holds them."""
    values: dict[str, Any] = {}
    for path, value in given.items():
        if value is None or value == []:
            continue
        if isinstance(value, list) and path[-1] in MAPPINGS:
            pairs = key_values(value, flag_of(path[-1]))
            value = {key: parse_yaml(text, f"{flag_of(path[-1])} {key}") for key, text in pairs.items()} if path[-1] in PARSED else pairs
        if len(path) == 1:
            values[path[0]] = value
        elif path[1] in values.setdefault(path[0], {}):
            raise SpecError(
                f"{flag_of(path[0])} {path[1]}={values[path[0]][path[1]]}: {path[1]} was given by --{path[1]} too, with {value!r}"
            )
        else:
            values[path[0]][path[1]] = value
    return values
