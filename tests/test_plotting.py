from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from lowbit.errors import MissingExtraError, OutputError
from lowbit.plotting import Curve, Panel, Picture

PICTURE = Picture("lines", tuple(Panel(name, (Curve(name, [0.0, 1.0], [0.0, height]),)) for height, name in enumerate("abc")))


def test_the_same_numbers_give_the_same_file_and_themes_differ() -> None:
    assert PICTURE.svg() == PICTURE.svg()
    assert PICTURE.svg("dark") != PICTURE.svg("light")
    assert all(f">{name}</text>" in PICTURE.svg() for name in "abc")


def test_panels_lie_two_in_a_row_and_wide_ones_alone() -> None:
    wide = Picture("", (PICTURE.panels[0], Panel("wide", (), is_wide=True), *PICTURE.panels[1:]))
    axes = wide.figure().axes
    tops, lefts = (
        [round(float(value), 4) for value in column]
        for column in zip(*((a.get_position().y1, a.get_position().x0) for a in axes), strict=True)
    )
    assert tops[0] > tops[1] > tops[2] == tops[3]
    assert lefts[0] == lefts[1] == lefts[2] < lefts[3]
    assert axes[1].get_position().width > 2 * axes[0].get_position().width


def test_files_are_written_whole_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    assert PICTURE.save(tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    assert PICTURE.save(tmp_path / "a.SVG").read_text().startswith("<?xml")
    with pytest.raises(OutputError, match=r"a\.pdf: a picture is written as \.svg or \.png, got '\.pdf'"):
        PICTURE.save(tmp_path / "a.pdf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.SVG", "a.png"]


def test_without_matplotlib_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"matplotlib, which is not installed.*plot"):
        PICTURE.figure()
