"""The library's source as pages, to whose lines the pages of methods link."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = Path(__file__).parents[2]
LINK = "source:{path}#L-{line}"  # docs/conf.py says what the scheme means


def write_source_pages(folder: Path, paths: Iterable[Path]) -> None:
    """Write ``PATH.html`` for each Python file, with the place ``L-12`` at its twelfth line."""
    for path in paths:
        shown = str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path).lstrip("/")
        formatter = HtmlFormatter(full=True, title=shown, linenos="inline", lineanchors="L", anchorlinenos=True, wrapcode=True)
        page = folder / f"{shown}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(highlight(path.read_text(encoding="utf-8"), PythonLexer(), formatter), encoding="utf-8")
