from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import SpecError
from lowbit.reading import DEEPEST_YAML, LARGEST_YAML, line_of, parse_yaml, read_yaml
from lowbit.spec import BitPolicy

LAUGHS = "- &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"- &{c} [{','.join(['*' + p] * 9)}]\n" for p, c in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 20_000, f"f, line 1: nested deeper than {DEEPEST_YAML} levels"),
        (LAUGHS, r"f, line 6: more than 100,000 values, aliases written out"),
        ("a: &a [*a]", "f, line 1: a value that contains itself"),
        ("a: 1\nb: 2\na: 3", "f, line 3: the key 'a' stands twice"),
        ("x: 2001-99-99", "f: cannot be understood as YAML"),
        (f"x: {'9' * 5000}", "f: cannot be understood as YAML"),
        ("!!python/object:os.system x", "f, line 1: could not determine a constructor"),
        ("!!timestamp x", "f: cannot be understood as YAML"),
        ("a\x00", "f: cannot be understood as YAML"),
        (" " * (LARGEST_YAML + 1), "characters of YAML, at most"),
    ],
    ids=range(10),
)
def test_yaml_beyond_the_limits_is_refused_with_its_line(text: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse_yaml(text, "f")


def test_ordinary_yaml_is_plain_values_whose_mappings_know_their_lines() -> None:
    found = parse_yaml("a: &a {x: 1}\nb: [*a, 2.5, null]\nc:\n  <<: *a\n  y: true\n", "f")
    assert found == {"a": {"x": 1}, "b": [{"x": 1}, 2.5, None], "c": {"x": 1, "y": True}}
    assert isinstance(found, dict)
    assert [line_of(found), line_of(found["c"]), line_of(5)] == [", line 1", ", line 4", ""]


def test_files_that_cannot_be_read_are_spec_errors(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 5000)):
        with pytest.raises(SpecError):
            read_yaml(path)
    (tmp_path / "latin").write_bytes(b"a: \xff")
    with pytest.raises(SpecError, match="cannot be read as text in UTF-8"):
        read_yaml(tmp_path / "latin")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rules:\n- match: 5\n  weight: 4\n", "line 2: a rule's match must be text, such as 'layer1.*', got 5"),
        ("rules:\n- {match: a, weight: 4}\n- {type: [Linear], weight: 4}\n", r"line 3: a rule's type must be text.* got \['Linear'\]"),
        ("rules:\n- match: a\n  weight: [1]\n", r"line 2: .*weight: bit_width must be a whole number from 1 to 8, got \[1\]"),
        ("default:\n  weight: {a: 1}\n", "line 2: default.weight: bit_width must be"),
        ("1: 2\nx: 3\n", "expected the keys default, first_last, rules, merges, before_functions, order and network"),
    ],
)
def test_wrong_types_in_a_policy_are_named_with_their_line(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SpecError, match=reason):
        BitPolicy.from_yaml(tmp_path / "p.yaml")
