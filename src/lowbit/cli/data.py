"""``lowbit data``: available data, where it is searched for, and its contents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lowbit.cli.console import say, show_json, show_table
from lowbit.cli.names import data_names
from lowbit.cli.settings import Json, key_values, name_completion
from lowbit.options import settings_of
from lowbit.workflows.settings import NetworkSettings

if TYPE_CHECKING:
    from lowbit.data import ImageData, UpscalingData

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
    from lowbit.data import SUITES, UPSCALING_SUITES

    groups = {
        "--data": {name: (suite.summary, suite.places) for name, suite in SUITES.items()},
        "--task super-resolution --data": {name: (suite.summary, suite.places) for name, suite in UPSCALING_SUITES.items()},
    }
    if json:
        show_json({name: {"summary": what, "places": where} for suites in groups.values() for name, (what, where) in suites.items()})
        return
    for heading, suites in groups.items():
        show_table((heading, "what it is", "where it is looked for"), ((name, *facts) for name, facts in suites.items()))
        say("")
    show_table(
        ("--data", "any other data"),
        (
            ("NAME:FOLDER", "a suite whose files are in FOLDER, for example fashion-mnist:/data/fashion"),
            ("FOLDER", "pictures in one sub-folder per class (train/ and test/ or val/ above them, if there are any); see --preprocess"),
            ("FOLDER", "pictures without labels, for --calibration"),
            (
                "FOLDER",
                "with --task super-resolution: originals, or originals in HR/ and small pictures of the same names in LR/ or LR/X2/",
            ),
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
    task: Annotated[
        Literal["classification", "super-resolution"] | None,
        typer.Option("--task", help="What the data are for. Default: as named, else classification.", show_default=False),
    ] = None,
    scale: Annotated[int, typer.Option("--scale", help="For super-resolution, how many times larger originals are.", min=2, max=4)] = 2,
    patch: Annotated[
        int | None, typer.Option("--patch", help=settings_of(NetworkSettings)["patch"].meaning, min=8, show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Read the data and show what is in it."""
    from lowbit.data import UPSCALING_SUITES, UpscalingData
    from lowbit.workflows.domain import domain_of
    from lowbit.workflows.source import preprocessing_of

    rows = []
    preprocessing = preprocessing_of(key_values(preprocess or [], "--preprocess"))
    is_upscaling = task == "super-resolution" or (task is None and name in UPSCALING_SUITES)
    settings = NetworkSettings(task="super-resolution", scale=scale, patch=patch) if is_upscaling else NetworkSettings()
    splits = {split: domain_of(settings).load(name, split, settings, preprocessing) for split in SPLITS}
    if json:
        show_json({split: _facts(found) for split, found in splits.items()})
        return
    pairs: dict[str, UpscalingData] = {split: found for split, found in splits.items() if isinstance(found, UpscalingData)}
    if pairs:
        _show_pairs(pairs, name)
        return
    for split, found in splits.items():
        classes = "no labels" if found.num_classes is None else found.num_classes
        rows.append((split, len(found), "x".join(map(str, found.input_shape)), classes, _numbers(found.mean), _numbers(found.std)))
    show_table(("split", "samples", "shape", "classes", "mean", "std"), rows, title=name)
    if found.class_names:
        say(f"classes: {', '.join(found.class_names)}")
    if found.ignored or found.skipped:
        say(f"{found.ignored} files are no pictures and were left out; {len(found.skipped)} pictures could not be decoded")


def _show_pairs(splits: Mapping[str, UpscalingData], name: str) -> None:
    rows = []
    for split, found in splits.items():
        smallest, largest = found.sizes()
        made = "given" if found.given else f"made at scale {found.scale}"
        rows.append((split, found.pictures, f"{smallest} to {largest}", made, len(found)))
    show_table(("split", "pictures", "sizes", "small pictures", "samples"), rows, title=name)
    if found.ignored:
        say(f"{found.ignored} files are no pictures and were left out")


def _facts(data: ImageData) -> dict[str, object]:
    from lowbit.data import UpscalingData

    if isinstance(data, UpscalingData):
        smallest, largest = data.sizes()
        return {
            "samples": len(data),
            "pictures": data.pictures,
            "smallest": smallest,
            "largest": largest,
            "scale": data.scale,
            "small_pictures_given": data.given,
            "ignored_files": data.ignored,
        }
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
