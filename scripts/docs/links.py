"""Links of built pages: those to files and headings must lead somewhere, and nothing may be loaded from another host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = ("src", "srcset", "poster", "data", "action")  # attributes that make a browser ask for a file, besides a link's href


class _Page(HTMLParser):
    """Places that can be linked to, and all links with the element that they stand in."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.places: set[str] = set()
        self.links: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" or (name == "name" and tag == "a"):
                self.places.add(value or "")
            elif value and (name in LOADED or name == "href") and not (tag == "object" and name != "data"):
                self.links.append((tag, value))


def problems(folder: Path) -> Iterator[str]:
    """What is wrong with links in the HTML and CSS files of ``folder``, one line each. Nothing is asked of the network."""

    @cache
    def page(path: Path) -> _Page:
        return _Page(path.read_text(encoding="utf-8"))

    for path in sorted(folder.rglob("*.html")):
        for tag, link in page(path).links:
            problem = _problem(path, tag, link, page)
            if problem:
                yield f"{path.relative_to(folder)}: <{tag}> {link}: {problem}"
    for path in sorted(folder.rglob("*.css")):
        for link in re.findall(r"(?:url\(|@import)\s*['\"]?((?:https?:)?//[^'\")\s]+)", path.read_text(encoding="utf-8")):
            yield f"{path.relative_to(folder)}: {link}: loaded from another host"


def _problem(path: Path, tag: str, link: str, page: object) -> str | None:
    parts = urlsplit(link)
    if parts.scheme in ("data", "mailto", "javascript"):
        return None
    if parts.netloc:
        if tag != "a":
            return "loaded from another host"
        return None if parts.scheme in ("http", "https") and re.fullmatch(r"[\w.-]+\.\w{2,}(:\d+)?", parts.netloc) else "not an address"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if not target.is_file():
        return "there is no such file"
    if parts.fragment and target.suffix == ".html" and tag == "a" and unquote(parts.fragment) not in page(target).places:  # type: ignore[operator]
        return "there is no such place in it"
    return None
