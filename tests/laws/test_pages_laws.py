"""Law 9: every registered method has its page, with a picture from its own code, and its example runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit.pages.page import page_name, write_method_pages
from lowbit.registry import MethodInfo, list_methods

METHODS = list_methods()
STAIRCASES = ("weights", "weights: gradient")
PANELS = {
    "training": STAIRCASES,
    "post_training": ("largest |w|",),
    "search": ("bits that were found",),
    "synthesis": ("samples", "loss on the way"),
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.mark.slow
@pytest.mark.parametrize("info", METHODS, ids=page_name)
def test_every_method_has_a_page_with_its_picture_and_an_example_that_ran(info: MethodInfo, folder: Path) -> None:
    pages = {path.stem: path for path in write_method_pages(folder, [info.name])}
    assert page_name(info) in pages
    text = pages[page_name(info)].read_text(encoding="utf-8")
    for theme in ("light", "dark"):
        picture = (folder / f"{page_name(info)}.{theme}.svg").read_text(encoding="utf-8")
        assert f"{page_name(info)}.{theme}.svg" in text
        titles = re.findall(r"<!-- (.+?) -->|>([^<>]+)</text>", picture)
        said = " ".join(first or second for first, second in titles)
        assert all(panel in said for panel in PANELS[info.kind]), said
        assert len(re.findall(r"<path ", picture)) > 10
    code, output = re.findall(r"```(?:python|text)\n(.*?)\n```", text, flags=re.DOTALL)[:2]
    assert info.name in code
    assert re.search(r"\d", output)
    assert f"# {page_name(info)}\n" in text and info.title.split(":")[0][:12] in text.replace("\\", "")
    assert info.url in text and (info.url or info.fidelity == "baseline")
    assert "## Options" in text and "## Where its equations are" in text and "## Reference vectors" in text


def test_every_paper_has_an_address() -> None:
    assert [info.name for info in METHODS if not info.url.startswith("https://") and info.paper != "none"] == []
