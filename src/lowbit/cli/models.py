"""``lowbit models``: which networks can be named, and how to name any other."""

from __future__ import annotations

import typer

from lowbit.cli.console import say, show_json, show_table
from lowbit.cli.settings import Json
from lowbit.errors import install_command

app = typer.Typer(add_completion=False, help="Which networks --model knows by name, and how to name any other.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Which networks --model knows by name, and how to name any other."""


@app.command("list")
def list_models(json: Json = False) -> None:
    """List the built-in networks and the ways to name any other."""
    from lowbit.models import BUILT_IN

    if json:
        show_json({name: summary for name, (_, summary) in BUILT_IN.items()})
        return
    show_table(("--model", "what it is"), ((name, summary) for name, (_, summary) in BUILT_IN.items()))
    say("")
    show_table(
        ("--model", "any other network"),
        (
            ("package.module:factory", "what the function or class 'factory' of an importable module returns"),
            ("file.py:factory", "the same from a file"),
            ("timm:NAME", f"a network of timm, for example timm:resnet18 ({install_command('models')})"),
            ("torchvision:NAME", f"a network of torchvision, for example torchvision:resnet18 ({install_command('models')})"),
        ),
    )
    say(
        "\nTrained weights come from --weights FILE (.safetensors, or a .pt/.pth state dict), "
        "arguments of the factory from --model-option, for example --model-option num_classes=10."
    )
