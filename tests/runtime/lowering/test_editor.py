from __future__ import annotations

import torch

from lowbit.formats.program.calls import Graph, GraphInput, OperatorCall, Result, Stored
from lowbit.runtime.lowering.editor import GraphEditor

X = GraphInput("x", (None, 3), torch.float32)


def call(name: str, *args: object, operator: str = "aten.relu.default") -> OperatorCall:
    return OperatorCall(name, operator, args, {})


def graph(*calls: OperatorCall, outputs: tuple[object, ...]) -> Graph:
    return Graph((X,), calls, outputs, None)


def test_the_only_reader_is_found_and_none_where_two_read_or_it_is_returned() -> None:
    editor = GraphEditor(
        graph(call("a", Result("x")), call("b", Result("a")), call("c", Result("b")), call("d", Result("b")), outputs=(Result("d"),))
    )
    reader = editor.only_reader(editor.nodes["a"])
    assert reader is not None
    assert reader.name == "b"
    assert editor.only_reader(editor.nodes["b"]) is None
    assert editor.only_reader(editor.nodes["c"]) is None  # nothing reads it
    assert editor.only_reader(editor.nodes["d"]) is None


def test_a_value_that_is_read_twice_by_one_call_has_no_only_reader() -> None:
    editor = GraphEditor(graph(call("a", Result("x")), call("b", Result("a"), Result("a")), outputs=(Result("b"),)))
    assert editor.only_reader(editor.nodes["a"]) is None


def test_sources_are_calls_and_nothing_else() -> None:
    editor = GraphEditor(graph(call("a", Result("x")), outputs=(Result("a"),)))
    source = editor.source(Result("a"))
    assert source is not None
    assert source.name == "a"
    assert [editor.source(value) for value in (Result("x"), Stored("a"), 3)] == [None, None, None]


def test_a_fused_call_keeps_the_last_place_and_takes_out_what_only_the_others_read() -> None:
    before = graph(
        call("scale", Stored("w")), call("a", Result("x"), Result("scale")), call("other", Result("x")), call("b", Result("a")),
        call("end", Result("b"), Result("other")), outputs=(Result("end"),),
    )  # fmt: skip
    editor = GraphEditor(before)
    editor.fuse([editor.nodes["a"], editor.nodes["b"]], call("b", Result("x"), operator="lowbit.fused.default"))
    after = editor.graph()
    assert [(node.name, node.operator.split(".")[1]) for node in after.nodes] == [("other", "relu"), ("b", "fused"), ("end", "relu")]
    assert after.tensors == frozenset()
    fused = editor.only_reader(editor.nodes["b"])
    assert fused is not None
    assert fused.name == "end"


def test_what_nothing_reads_is_left_out_and_outputs_in_lists_stay() -> None:
    editor = GraphEditor(
        graph(call("a", Result("x")), call("b", Result("a")), call("c", Result("x")), outputs=([Result("a"), Result("c")],))
    )
    assert [node.name for node in editor.graph().nodes] == ["a", "c"]
