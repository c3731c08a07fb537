from __future__ import annotations

from pathlib import Path

from lowbit.pages.sources import PACKAGE, digest_of, equations, module_text, shown_path, source_file
from lowbit.registry import get_method

REPOSITORY = PACKAGE.parent.parent


def test_equations_lead_to_the_lines_that_define_them() -> None:
    found = equations(get_method("lcq"))
    assert ("Eq. 3-4", "curve") in [(one.source, one.name) for one in found]
    for one in found:
        line = (REPOSITORY / one.path).read_text().splitlines()[one.line - 1]
        assert one.name.rpartition(".")[2] in line and line.lstrip().startswith(("def ", "class ", "@"))


def test_parts_of_a_docstring() -> None:
    text = 'X: does.\n\nPaper: A 2020, "T".\n    Section 3.\nSymbols: a -> b.\nDiffers from the paper:\n    - one,\n      more.\n    - two\nFrom memory.'
    found = module_text(text)
    assert (found.idea, found.paper, found.symbols) == ("X: does. From memory.", 'A 2020, "T". Section 3.', "a -> b.")
    assert found.differences == ("one, more.", "two")


def test_a_digest_counts_the_methods_file_and_no_other_methods() -> None:
    first, second = get_method("twn"), get_method("lsq")
    assert digest_of(first) != digest_of(second)
    assert digest_of(first) == digest_of(get_method("twn"))
    assert shown_path(source_file(first)) == "src/lowbit/methods/quantization_aware/twn.py"


def test_files_of_others_are_shown_by_their_name(tmp_path: Path) -> None:
    assert shown_path(tmp_path / "x.py") == "x.py"
