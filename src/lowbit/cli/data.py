"""``lowbit data``: available data, where it is searched for, and its contents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowbit.cli.console import say, show_json, show_table
from lowbit.cli.names import data_names
from lowbit.cli.settings import Json, key_values, name_completion
from lowbit.options import settings_of
from lowbit.workflows.requests import NetworkSettings

if TYPE_CHECKING:
    from lowbit.data import ImageData

SPLITS: tuple[Literal["train", "test"], ...] = ("train", "test")
app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    help="Which data --data and --calibration know by name, where it is looked for, and what is in it.",
    no_args_is_help=True,
)


@app.command("list")
def list_data(json: Json = False) -> None:
    """List the data suites: where they are looked for, and how to get them."""
    from lowbit.data import SUITES

    if json:
        show_json({name: {"summary": suite.summary, "places": suite.places} for name, suite in SUITES.items()})
        return
    show_table(("--data", "what it is", "where it is looked for"), ((name, suite.summary, suite.places) for name, suite in SUITES.items()))
    say("")
    show_table(
        ("--data", "any other data"),
        (
            ("NAME:FOLDER", "a suite whose files are in FOLDER, for example fashion-mnist:/data/fashion"),
            ("FOLDER", "pictures in one sub-folder per class (train/ and test/ or val/ above them, if there are any); see --preprocess"),
            ("FOLDER", "pictures without labels, for --calibration"),
            ("FILE.npy, FILE.npz", "arrays of samples"),
        ),
    )


@app.command("show")
def show_data(
    name: Annotated[
        str,
        typer.Argument(
            help="A suite from 'lowbit data list', NAME:FOLDER, a folder of pictures, or a .npy/.npz file.",
            autocompletion=name_completion(data_names),
        ),
    ],
    preprocess: Annotated[
        list[str] | None,
        typer.Option("--preprocess", help=settings_of(NetworkSettings)["preprocess"].meaning, metavar="NAME=VALUE", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Read the data and show what is in it."""
    from lowbit.data import load_data
    from lowbit.workflows.source import preprocessing_of

    rows = []
    preprocessing = preprocessing_of(key_values(preprocess or [], "--preprocess"))
    splits = {split: load_data(name, split=split, preprocessing=preprocessing) for split in SPLITS}
    if json:
        show_json({split: _facts(found) for split, found in splits.items()})
        return
    for split, found in splits.items():
        classes = "no labels" if found.num_classes is None else found.num_classes
        rows.append((split, len(found), "x".join(map(str, found.input_shape)), classes, _numbers(found.mean), _numbers(found.std)))
    show_table(("split", "samples", "shape", "classes", "mean", "std"), rows, title=name)
    if found.class_names:
        say(f"classes: {', '.join(found.class_names)}")
    if found.ignored or found.skipped:
        say(f"{found.ignored} files are no pictures and were left out; {len(found.skipped)} pictures could not be decoded")


def _facts(data: ImageData) -> dict[str, object]:
    return {
        "samples": len(data),
        "shape": data.input_shape,
        "classes": data.num_classes,
        "class_names": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "ignored_files": data.ignored,
        "undecodable_pictures": len(data.skipped),
    }


def _numbers(values: tuple[float, ...]) -> str | None:
    return ", ".join(f"{value:.4g}" for value in values) or None
