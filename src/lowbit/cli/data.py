"""``lowbit data``: which data there is, where it is looked for, and what is in it."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.cli.console import say, show_table
from lowbit.cli.options import Preprocess
from lowbit.cli.source import preprocessing_of
from lowbit.data import SUITES, Split, load_data

app = typer.Typer(help="Which data --data and --calibration know by name, where it is looked for, and what is in it.", no_args_is_help=True)
SPLITS: tuple[Split, ...] = ("train", "test")


@app.command("list")
def list_data() -> None:
    """List the data suites: where they are looked for, and how to get them."""
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
    name: Annotated[str, typer.Argument(help="A suite from 'lowbit data list', NAME:FOLDER, a folder of pictures, or a .npy/.npz file.")],
    preprocess: Preprocess = None,
) -> None:
    """Read the data and show what is in it."""
    rows = []
    for split in SPLITS:
        found = load_data(name, split=split, preprocessing=preprocessing_of(preprocess))
        classes = "no labels" if found.num_classes is None else found.num_classes
        rows.append((split, len(found), "x".join(map(str, found.input_shape)), classes, _numbers(found.mean), _numbers(found.std)))
    show_table(("split", "samples", "shape", "classes", "mean", "std"), rows, title=name)
    if found.class_names:
        say(f"classes: {', '.join(found.class_names)}")
    if found.ignored or found.skipped:
        say(f"{found.ignored} files are no pictures and were left out; {len(found.skipped)} pictures could not be decoded")


def _numbers(values: tuple[float, ...]) -> str | None:
    return ", ".join(f"{value:.4g}" for value in values) or None
