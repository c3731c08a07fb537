"""``lowbit search``: which layer gets how many bits, under a budget."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from lowbit.cli.console import SpokenProgress, errors, resumable, say, show_json, show_table
from lowbit.cli.names import procedure_names
from lowbit.cli.settings import Json, PrintConfig, Quiet, RecipeFile, options_of
from lowbit.workflows.requests import SearchRequest

app = typer.Typer(add_completion=False)


@app.command("search")
@options_of(SearchRequest, kind="search")
def search(
    given: dict[str, Any], file: RecipeFile = None, quiet: Quiet = False, json: Json = False, print_config: PrintConfig = False
) -> None:
    """Choose bits for each layer under a budget; write policy.yaml, search.json and report.html.

    The embedded example: lowbit search --budget average=4

    Several budgets: lowbit search --budget size=10% --budget bops=5% --candidates 2,3,4,6,8

    The cheapest network that loses one point: lowbit search --max-drop 1.0

    Search, quantize, and compare with the uniform network of that cost: lowbit search --budget size=12% --then adaround

    What comes of it: lowbit quantize --policy lowbit-search/policy.yaml; lowbit train --policy lowbit-search/policy.yaml
    """
    request = SearchRequest().changed(given) if file is None else SearchRequest.from_yaml(file, given)
    if print_config:
        typer.echo(request.to_yaml(), nl=False)
        return
    from lowbit.report.search import cost_heads, layer_rows, network_rows
    from lowbit.workflows.search import FILES, search_and_write

    with resumable():
        searched = search_and_write(request, progress=SpokenProgress(quiet=quiet))
    result = searched.result
    if json:
        show_json({**result.to_dict(), "out": str(searched.out)})
    elif not quiet:
        show_table(("layer", "weight bits", "input bits", "predicted loss"), layer_rows(result), title=f"bits by {result.method}")
        show_table(cost_heads(result), network_rows(result))
    problems = [] if searched.delivery is None else searched.delivery.problems
    for problem in problems:
        errors.print(f"[bold red]not written:[/] {escape(problem)}", highlight=False, soft_wrap=True)
    if not json:
        say(f"written to {searched.out}: {', '.join(FILES)}{'' if searched.delivery is None else ', quantized/'}")
        policy = Path(searched.out) / FILES[0]
        named = {"--task": request.task, "--model": request.model, "--weights": request.weights, "--data": request.data}
        network = "".join(f" {flag} {shlex.quote(value)}" for flag, value in named.items() if value is not None)
        say(f"use it: lowbit quantize{network} --policy {policy}")
        if result.order and result.method in procedure_names():
            say(f"retrain it layer by layer: lowbit train --policy {policy} --procedure {result.method}")
    if problems:
        raise typer.Exit(1)
