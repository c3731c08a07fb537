from __future__ import annotations

import copy
import json
from collections.abc import Callable

import pytest
import torch
from tests.formats.networks import quantized
from tests.networks import DictOutputNet, TinyNet, Torture
from torch import Tensor, nn
from torch.nn import functional as F

from lowbit.errors import FileFormatError, GraphError
from lowbit.formats.program.calls import Graph, graph_from_exported, graph_from_json, graph_to_json, is_shape, is_size
from lowbit.formats.program.program import export_program

IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
Json = dict[str, object]


def graph_of(model: nn.Module, *inputs: Tensor) -> Graph:
    program = export_program(model, inputs if len(inputs) > 1 else inputs[0])
    return graph_from_exported(program.exported, program.structure, {}, program.batch_dims)


class Padded(nn.Module):
    """Infinite padding, a mask, a cast and a size computed from another: arguments of every kind."""

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        y = F.pad(x, (1, 1), value=float("-inf")).clone(memory_format=torch.contiguous_format)
        y = torch.cat([y, torch.zeros(x.shape[0] * 2, *y.shape[1:])])
        return y.to(torch.float64), [y > 0, x.reshape(x.shape[0], -1)]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (TinyNet(), (IMAGE,)),
        (DictOutputNet(), (IMAGE,)),
        (Torture(), (IMAGE, torch.randn(2, 5))),
        (Padded(), (IMAGE,)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_graph_survives_being_written_as_json(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    graph = graph_of(quantized(model, *inputs), *inputs)
    again = graph_from_json(json.loads(json.dumps(graph_to_json(graph), allow_nan=False)), graph.tensors)
    assert [node.name for node in again.nodes] == [node.name for node in graph.nodes]
    assert graph_to_json(again) == graph_to_json(graph)
    assert again.tensors == graph.tensors
    assert again.batch_range == graph.batch_range == (1, None)
    assert len(again.inputs) == len(inputs)


def test_the_tensors_of_a_graph_are_those_that_it_reads() -> None:
    graph = graph_of(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)).eval(), torch.randn(2, 3))
    assert graph.tensors == {"0.weight", "0.bias", "1.weight"}


class Bessel(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


@pytest.mark.parametrize(("inner", "operator"), [(Bessel(), "special_bessel_j0"), (Noisy(), "rand_like")])
def test_an_operator_that_a_file_cannot_hold_is_named_with_its_module(inner: nn.Module, operator: str) -> None:
    with pytest.raises(GraphError, match=rf"does not support the operator aten\.{operator}.* \(used by module '1'\)"):
        graph_of(nn.Sequential(nn.Conv2d(3, 4, 3), inner).eval(), IMAGE)


GOOD: Json = {
    "inputs": [["x", [None, 3], "float32"]],
    "batch": [1, None],
    "nodes": [
        ["a", "aten.linear.default", [{"node": "x"}, {"tensor": "w"}], {}],
        ["b", "aten.relu.default", [{"node": "a"}], {}],
    ],
    "outputs": [{"node": "b"}],
    "structure": {"tensor": 0},
}


def read(change: Callable[[Json], object]) -> Graph:
    data = copy.deepcopy(GOOD)
    change(data)
    return graph_from_json(data, frozenset({"w"}))


def test_the_graph_that_the_next_tests_break_is_good() -> None:
    graph = read(lambda data: None)
    assert [node.operator for node in graph.nodes] == ["aten.linear.default", "aten.relu.default"]
    assert graph.tensors == {"w"}


def node(*parts: object) -> Callable[[Json], object]:
    """Puts another node between the two."""
    return lambda data: data["nodes"].insert(1, list(parts))  # type: ignore[attr-defined]


def deep(levels: int) -> object:
    value: object = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (node("c", "aten.rand.default", [[2]], {}), "operator 'aten.rand.default' is not one that a packed file may use"),
        (node("c", "os.system.default", ["ls"], {}), "operator 'os.system.default' is not one that a packed file may use"),
        (node("c", "aten.relu.default", [{"node": "c"}], {}), "graph node 'c': it reads 'c', which no earlier node computes"),
        (node("c", "aten.relu.default", [{"node": "b"}], {}), "graph node 'c': it reads 'b', which no earlier node computes"),
        (node("c", "aten.relu.default", [{"node": "nowhere"}], {}), "graph node 'c': it reads 'nowhere', which no earlier node computes"),
        (node("c", "aten.relu.default", [], {"self": {"node": "nowhere"}}), "it reads 'nowhere', which no earlier node computes"),
        (node("c", "aten.cat.default", [[[{"node": "nowhere"}]]], {}), "it reads 'nowhere', which no earlier node computes"),
        (node("c", "aten.relu.default", [{"tensor": "v"}], {}), "it reads the tensor 'v', which the file does not contain"),
        (node("a", "aten.relu.default", [{"node": "a"}], {}), "graph: the name 'a' appears twice"),
        (node("x", "aten.relu.default", [{"node": "a"}], {}), "graph: the name 'x' appears twice"),
        (node("c", "aten.relu.default", {"node": "a"}, {}), "graph node 'c': expected a list, got dict"),
        (node("c", "aten.relu.default", [{"node": "a"}], []), "graph node 'c': expected a dict, got list"),
        (node("c", "aten.relu.default", [{"node": "a"}]), r"a node must be \[name, operator, arguments, options\]"),
        (node(3, "aten.relu.default", [], {}), r"a node must be \[name, operator, arguments, options\]"),
        (node("c", ["aten.relu.default"], [], {}), r"a node must be \[name, operator, arguments, options\]"),
        (node("c", "aten.relu.default", [{"class": "os"}], {}), "cannot understand the argument"),
        (node("c", "aten.relu.default", [{"node": "a", "tensor": "w"}], {}), "cannot understand the argument"),
        (node("c", "aten.relu.default", [{"node": 1}], {}), "cannot understand the argument"),
        (node("c", "aten.relu.default", [{}], {}), "cannot understand the argument"),
        (node("c", "aten.relu.default", [deep(7)], {}), "cannot understand the argument"),
        (node("c", "aten._to_copy.default", [{"node": "a"}], {"dtype": {"dtype": "object"}}), "cannot understand the argument"),
        (node("c", "aten._to_copy.default", [{"node": "a"}], {"dtype": 1000}), "dtype must be a dtype or memory format, got 1000"),
        (node("c", "aten._to_copy.default", [{"node": "a"}], {"dtype": {"node": "a"}}), "dtype must be a dtype or memory format"),
        (node("c", "aten.clone.default", [{"node": "a"}], {"memory_format": {"memory_format": "coo"}}), "cannot understand the argument"),
        (node("c", "aten.full.default", [[1], {"float": "1e3"}], {}), "cannot understand the argument"),
        (lambda d: d.update(nodes=None), "graph nodes: expected a list, got NoneType"),
        (lambda d: d.update(outputs=[{"node": "nowhere"}]), "graph outputs: it reads 'nowhere'"),
        (lambda d: d.pop("outputs"), "graph outputs: expected a list, got NoneType"),
        (lambda d: d.update(inputs=[]), "graph inputs: there must be at least one"),
        (lambda d: d.update(inputs=d["inputs"] * 2), "graph inputs: there must be at least one, and each name once"),
        (lambda d: d.update(inputs=[["x", [-1, 3], "float32"]]), "its shape must be sizes or null"),
        (lambda d: d.update(inputs=[["x", [True], "float32"]]), "its shape must be sizes or null"),
        (lambda d: d.update(inputs=[["x", [3], "qint8"]]), r"an input must be \[name, shape, dtype\]"),
        (lambda d: d.update(inputs=[["x", [3], ["float32"]]]), r"an input must be \[name, shape, dtype\]"),
        (lambda d: d.update(batch=[1]), "the range of the batch size must be two sizes"),
        (lambda d: d.update(batch=["1", None]), "the range of the batch size must be two sizes"),
        (lambda d: d.update(structure={"tensor": 1}), "output structure: cannot understand"),
        (lambda d: d.update(structure={"tensor": -1}), "output structure: cannot understand"),
        (lambda d: d.update(structure={"object": "os"}), "output structure: cannot understand"),
        (lambda d: d.update(structure={"dict": [["a"]]}), r"a dictionary must be a list of \[key, value\] pairs"),
    ],
)
def test_a_graph_that_cannot_be_run_safely_is_refused(change: Callable[[Json], object], reason: str) -> None:
    with pytest.raises(FileFormatError, match=reason):
        read(change)


def test_an_output_structure_without_end_is_refused() -> None:
    structure: object = None
    for _ in range(5000):
        structure = {"list": [structure]}
    with pytest.raises(FileFormatError, match="nested deeper than 32 levels"):
        read(lambda data: data.update(structure=structure))


@pytest.mark.parametrize("data", [None, [], "graph", 3, {}])
def test_what_is_no_graph_is_refused(data: object) -> None:
    with pytest.raises(FileFormatError, match="graph"):
        graph_from_json(data, frozenset())


def test_sizes_and_shapes_are_whole_and_bounded() -> None:
    assert [is_size(value) for value in (0, 7, 2**40 - 1, 2**40, -1, True, 1.0, "1", None)] == [True] * 3 + [False] * 6
    assert [is_shape(value) for value in ([], [2, 3], [1] * 16, [1] * 17, [-1], (2, 3), "23")] == [True] * 3 + [False] * 4
