"""The page of the tour: ``examples/tour.ipynb`` is run, and becomes Markdown with its pictures."""

from __future__ import annotations

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "examples" / "tour.ipynb"
SECONDS = 300  # for one cell, on a loaded machine


def write_tour(folder: Path) -> None:
    """Run the notebook in a folder of its own, and write ``tour.md`` and its pictures into ``folder``."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as work:
        NotebookClient(notebook, timeout=SECONDS, resources={"metadata": {"path": work}}).execute()
    text, resources = MarkdownExporter(preprocessors=[CoalesceStreamsPreprocessor]).from_notebook_node(
        notebook, {"output_files_dir": "tour"}
    )
    for name, content in resources["outputs"].items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "tour.md").write_text(text, encoding="utf-8")
