"""``lowbit data``."""

import typer

app = typer.Typer()


@app.command("list")
def list_data() -> None:
    """X"""


@app.command("show")
def show_data() -> None:
    """X"""
