"""``lowbit compare``: methods on equal terms, as tables and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.console import SpokenProgress, resumable, say, show_table
from lowbit.cli.settings import OUTPUT, PrintConfig, Quiet, options_of
from lowbit.workflows.suite import Suite

app = typer.Typer(add_completion=False)
SuiteFile = Annotated[
    str | None,
    typer.Argument(help="A YAML file with the suite; options override it. See --print-config.", show_default=False),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print the cells, the time estimated from their first steps, and the disk needed.", rich_help_panel=OUTPUT
    ),
]
OnlyTables = Annotated[
    bool, typer.Option("--tables", help="Run nothing: make the tables of what is stored in --out.", rich_help_panel=OUTPUT)
]


@app.command("compare")
@options_of(Suite)
def compare(
    given: dict[str, Any],
    suite_file: SuiteFile = None,
    quiet: Quiet = False,
    dry_run: DryRun = False,
    only_tables: OnlyTables = False,
    print_config: PrintConfig = False,
) -> None:
    """Compare methods on equal terms: same network, data, layers, images and seeds.

    The embedded example, five methods at two widths with three seeds: lowbit compare

    Methods and bits: lowbit compare --methods dorefa,lsq,pact --bits 4/4,2/2 --seeds 3

    From a file: lowbit compare --methods lsq,pact --print-config > suite.yaml; lowbit compare suite.yaml
    """
    suite = Suite() if suite_file is None else Suite.from_yaml(suite_file)
    suite = suite.changed(given)
    if print_config:
        typer.echo(suite.to_yaml(), nl=False)
        return
    from lowbit.workflows.compare import compare as run, tables_of

    progress = SpokenProgress(quiet=quiet)
    if dry_run:
        show_plan(suite, progress)
        return
    if only_tables:
        comparison = tables_of(suite)
    else:
        with resumable(flags=()):  # the same command resumes
            comparison = run(suite, progress=progress)
    from lowbit.report.comparison import HEADS, earlier_means, remarks, row_cells, table_note, unfinished
    from lowbit.report.orderings import HEADS as ORDERING_HEADS, notes, ordering_cells

    earlier = {} if suite.against is None else earlier_means(Path(suite.against))
    if not quiet:
        for table in comparison.tables.tables:
            heads = [*HEADS, *(["to earlier"] if earlier else [])]
            show_table(heads, [row_cells(table, row, earlier) for row in table.rows], title=table.title)
            for text in [table_note(table), *unfinished(table)]:
                say(text)
            say("")
        if comparison.verdicts:
            show_table(ORDERING_HEADS, [ordering_cells(verdict) for verdict in comparison.verdicts], title="orderings")
        for text in [*notes(comparison.verdicts), *remarks(comparison.tables)]:
            say(text)
    say(f"written to {comparison.folder}: {', '.join(path.name for path in comparison.files)}")
    if not comparison.tables.count("done"):
        raise typer.Exit(1)


def show_plan(suite: Suite, progress: SpokenProgress) -> None:
    """Print every cell with its estimated time, and what the whole takes."""
    from lowbit.comparison.store import Store
    from lowbit.workflows.compare import CELL_BYTES, estimate_cells, workers_of

    planned = estimate_cells(suite, Store(Path(suite.out)), progress=progress)
    rows = [
        (
            one.cell.subject,
            one.cell.label,
            one.cell.bits,
            one.cell.seed,
            one.reason or ("stored" if one.is_stored else f"{one.seconds:.0f} s"),
        )
        for one in planned
    ]
    show_table(("network", "method", "bits", "seed", "time"), rows)
    missing = [one for one in planned if not one.is_stored and not one.reason]
    seconds = sum(one.seconds or 0.0 for one in missing)
    workers = min(max(workers_of(suite), 1), max(len(missing), 1))
    say(
        f"{len(missing)} of {len(planned)} cells to run: about {seconds:.0f} s of computing, {seconds / workers:.0f} s with {workers} worker{'s' * (workers > 1)}, "
        f"{len(missing) * CELL_BYTES / 1000:.0f} kB of results"
    )
