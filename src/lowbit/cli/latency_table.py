"""``lowbit latency-table``: the time of each layer at each pair of widths on this machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import typer

from lowbit.cli.console import SpokenProgress, resumable, say, show_table
from lowbit.cli.settings import Quiet, options_of
from lowbit.workflows.requests import LatencyTableRequest

app = typer.Typer(add_completion=False)


@app.command("latency-table")
@options_of(LatencyTableRequest)
def latency_table(given: dict[str, Any], quiet: Quiet = False) -> None:
    """Measure the time of each layer of a network at each pair of widths, by the fastest kernel that this machine has for it.

    The file is what 'lowbit search' takes for budgets of time. A run that was stopped goes on where it was.
    """
    request = LatencyTableRequest().changed(given)
    from lowbit.workflows.latency_table import measure_and_save

    with resumable():
        table = measure_and_save(request, progress=SpokenProgress(quiet=quiet))
    if not quiet:
        names = list(next(iter(table.times.values())))
        shown = [name for name in names if len(set(name.split("/"))) == 1] or names
        rows = [(layer, *(f"{1e3 * times[name]:.1f}" for name in shown)) for layer, times in table.times.items()]
        total = [sum(times[name] for times in table.times.values()) for name in shown]
        show_table(("microseconds", *shown), [*rows, ("all", *(f"{1e3 * value:.1f}" for value in total))])
        used = Counter(kernel for kernels in table.kernels.values() for kernel in kernels.values())
        show_table(("\nkernel", "entries of the table"), used.most_common())
    say(f"latency table: {Path(request.out)}")
