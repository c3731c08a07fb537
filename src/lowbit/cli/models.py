"""``lowbit models``: which networks can be named, and how to name any other."""

from __future__ import annotations

import typer

from lowbit.cli.console import say, show_table

app = typer.Typer(add_completion=False, help="Which networks --model knows by name, and how to name any other.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Which networks --model knows by name, and how to name any other."""


@app.command("list")
def list_models() -> None:
    """List the built-in networks and the ways to name any other."""
    from lowbit.models import BUILT_IN

    show_table(("--model", "what it is"), ((name, summary) for name, (_, summary) in BUILT_IN.items()))
    say("")
    show_table(
        ("--model", "any other network"),
        (
            ("package.module:factory", "what the function or class 'factory' of an importable module returns"),
            ("file.py:factory", "the same from a file"),
            ("timm:NAME", "a network of timm, for example timm:resnet18 (pip install timm)"),
            ("torchvision:NAME", "a network of torchvision, for example torchvision:resnet18 (pip install torchvision)"),
        ),
    )
    say(
        "\nTrained weights come from --weights FILE (.safetensors, or a .pt/.pth state dict), "
        "arguments of the factory from --model-option, for example --model-option num_classes=10."
    )
