"""The pages that are written by code, the facts in those written by hand, and the check of links."""

from __future__ import annotations

import json
import re
import types
from pathlib import Path

import pytest
from scripts.docs.api import api_page
from scripts.docs.commands import commands_page
from scripts.docs.links import problems
from scripts.docs.methods import methods_page

import lowbit
from lowbit.cli.app import COMMANDS
from lowbit.registry import bits_span, list_methods

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
CHOOSER = (DOCS / "which_method.md").read_text(encoding="utf-8")
CHOICES = [
    [cell.strip() for cell in line.strip("|").split(" | ")] for line in CHOOSER.splitlines() if "](methods/" in line and line[0] == "|"
]


def span_of(cell: str) -> set[int]:
    if cell == "float":
        return set()
    low, _, high = cell.partition("-")
    return set(range(int(low), int(high or low) + 1))


@pytest.mark.parametrize("row", CHOICES, ids=lambda row: row[-1])
def test_which_method_says_what_the_registry_says(row: list[str]) -> None:
    _, _, _, weight_bits, activation_bits, method, needs, command = row
    (found,) = re.findall(r"\[(\w+)\]\(methods/(\w+)\.md\)", method)
    name, page = found
    verb = re.match(r"`lowbit (\w+)", command)[1]  # type: ignore[index]
    kinds = {"train": "training", "search": "search", "quantize": "synthesis" if "makes samples" in method else "post_training"}
    (info,) = (info for info in list_methods(name, kind=kinds[verb]))  # type: ignore[arg-type]
    assert page in (name, f"{name}_{info.kind}")
    assert needs == (", ".join(need.replace("_", " ") for need in info.needs) or "–")
    if info.kind != "synthesis":  # which quantizes nothing itself
        assert span_of(weight_bits) <= set(info.weight_bits), bits_span(info.weight_bits)
        assert span_of(activation_bits) <= set(info.activation_bits or ()), bits_span(info.activation_bits)
        assert activation_bits != "float" or info.activation_bits is None


def test_every_method_of_the_picture_is_in_the_table() -> None:
    named = set(re.findall(r"\]\(methods/(\w+)\.md\)", CHOOSER))
    assert len(CHOICES) >= 15
    assert {re.findall(r"methods/(\w+)\.md", row[5])[0] for row in CHOICES} <= named


@pytest.mark.parametrize(
    "line", [line for line in (DOCS / "troubleshooting.md").read_text().splitlines() if re.match(r"\| `[^`]*` ", line)]
)
def test_messages_of_the_troubleshooting_page_are_those_of_the_library(line: str) -> None:
    message = line.split("`")[1]
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    assert all(part.strip() in source for part in message.split("...") if part.strip()), message


def test_pages_of_commands_and_of_python_leave_nothing_out() -> None:
    commands, python = commands_page(), api_page()
    assert all(f"## lowbit {name}\n" in commands for name in COMMANDS)
    assert all(f"`{flag}`" in commands for flag in ("--weight-bits", "--budget", "--dry-run", "--no-onnx", "--then-option"))
    assert all(f":: lowbit.{name}\n" in python for name in set(lowbit.__all__) - {"errors"})
    assert ":: lowbit.errors.CalibrationError\n" in python


def test_every_method_has_a_row_that_leads_to_its_page() -> None:
    page = methods_page(list_methods())
    listed = page[page.index("{toctree}") :]
    for info in list_methods():
        (target,) = set(re.findall(rf"^\| \[{info.name}\]\((\w+)\.md\) \| {re.escape(info.summary)}", page, flags=re.MULTILINE))
        assert f"\n{target}\n" in listed


def test_links_must_lead_somewhere_and_nothing_comes_from_another_host(tmp_path: Path) -> None:
    (tmp_path / "other.html").write_text('<h2 id="there">There</h2>')
    (tmp_path / "page.html").write_text(
        '<p id="top"><a href="#top"></a><a href="other.html#there"></a><a href="https://arxiv.org/abs/1"></a>'
        '<a href="other.html#gone"></a><a href="gone.html"></a><a href="https://no host/"></a>'
        '<script src="https://cdn.example.org/x.js"></script><link href="//fonts.example.org/y.css">'
    )
    (tmp_path / "style.css").write_text("@import url(https://fonts.example.org/z.css); p { background: url(data:image/png;base64,AA) }")
    assert list(problems(tmp_path)) == [
        "page.html: <a> other.html#gone: there is no such place in it",
        "page.html: <a> gone.html: there is no such file",
        "page.html: <a> https://no host/: not an address",
        "page.html: <script> https://cdn.example.org/x.js: loaded from another host",
        "page.html: <link> //fonts.example.org/y.css: loaded from another host",
        "style.css: https://fonts.example.org/z.css: loaded from another host",
    ]


def test_operators_of_an_onnx_graph_are_told_apart_by_what_they_compute_with() -> None:
    onnx = pytest.importorskip("onnx")
    from scripts.docs.exports import float_operators

    def node(kind: str, inputs: str, output: str) -> object:
        return onnx.helper.make_node(kind, inputs.split(), [output])

    nodes = [
        node("QuantizeLinear", "x s z", "a"),
        node("QLinearConv", "a s z w s z s z b", "c"),
        node("MaxPool", "c", "d"),
        node("QLinearConcat", "s z d s z c s z", "e"),
        node("QGemm", "e s z w s z b", "f"),  # without an output scale: numbers
        node("LayerNormalization", "f g", "h"),
        node("DequantizeLinear", "e s z", "i"),
        node("Gelu", "i", "j"),
    ]
    model = types.SimpleNamespace(graph=types.SimpleNamespace(node=nodes, initializer=[]))
    assert list(float_operators(model)) == ["LayerNormalization", "Gelu"]


def test_the_tour_is_committed_without_what_it_prints() -> None:
    cells = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 5 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    for cell in code:
        compile("".join(cell["source"]), "tour", "exec")
