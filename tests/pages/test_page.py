from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from lowbit.errors import LowbitError, UnknownNameError
from lowbit.pages import page as module
from lowbit.pages.examples import run_example
from lowbit.pages.page import VECTORS, Shown, escaped, method_page, table, vectors_sentence, write_method_pages
from lowbit.pages.sources import file_digest, source_file
from lowbit.registry import get_method

SHOWN = Shown("<svg>light</svg>", "<svg>dark</svg>", "a title", ("a note",), "print(1)", "1\n")


def test_the_page_of_a_method_says_what_its_registration_and_its_file_say() -> None:
    text = method_page("ewgs", shown=SHOWN, link="https://example.org/{path}#L{line}")
    for part in (
        "[arxiv.org/abs/2104.00903](https://arxiv.org/abs/2104.00903)",
        "booktitle = {CVPR}",
        "- The interval is kept from closing, because an empty one divides by zero.",
        "| Eq. 11 | `estimate_deltas` | [`src/lowbit/methods/gradients/ewgs.py:",
        "https://example.org/src/lowbit/methods/gradients/ewgs.py#L",
        "| `delta` | float | 0 or more | `0.0` |",
        "```text\n1\n```",
        "ewgs.dark.svg",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (None, "not in this checkout"),
        ({}, "no reference vectors of its own"),
        ({"ewgs": {"passed": 7, "cases": 9, "date": "2026-01-02", "digest": "other"}}, "7 of 9 .* has changed since"),
        ({"ewgs": {"passed": 9, "cases": 9, "date": "2026-01-02", "digest": ""}}, "9 of 9 .* as it is now"),
    ],
)
def test_a_pass_is_said_only_of_the_file_that_was_run(record: dict[str, dict[str, object]] | None, said: str, tmp_path: Path) -> None:
    info = get_method("ewgs")
    if record is not None:
        for entry in record.values():
            entry["digest"] = entry["digest"] or file_digest(source_file(info))
        (tmp_path / VECTORS).parent.mkdir(parents=True)
        (tmp_path / VECTORS).write_text(json.dumps(record))
    assert re.search(said, vectors_sentence(info, tmp_path))


def test_what_ran_is_kept_until_a_source_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []
    monkeypatch.setattr(module, "show", lambda info, reference: runs.append(info.name) or SHOWN)
    assert write_method_pages(tmp_path, ["twn", "lsq"]) == [tmp_path / "twn.md", tmp_path / "lsq.md"]
    write_method_pages(tmp_path, ["twn", "lsq"])
    assert runs == ["twn", "lsq"]
    monkeypatch.setattr(module, "digest_of", lambda info: "changed")
    write_method_pages(tmp_path, ["lsq"])
    assert runs == ["twn", "lsq", "lsq"]
    assert (tmp_path / "lsq.light.svg").read_text() == SHOWN.light


def test_methods_of_several_kinds_have_a_page_for_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "show", lambda info, reference: SHOWN)
    assert [path.name for path in write_method_pages(tmp_path, ["zeroq"])] == ["zeroq_post_training.md", "zeroq_synthesis.md"]
    with pytest.raises(UnknownNameError, match="unknown method 'zeroqq'"):
        write_method_pages(tmp_path, ["zeroqq"])


def test_an_example_that_prints_nothing_is_an_error() -> None:
    assert run_example("print(2 + 2)") == "4\n"
    with pytest.raises(LowbitError, match="printed nothing"):
        run_example("x = 1")


def test_text_stays_text() -> None:
    assert escaped("2**n ``a*b`` |w|") == r"2\*\*n `a*b` |w|"
    assert table(("a",), [("|w|",)]).splitlines()[2] == r"| \|w\| |"
