from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowbit.errors import FileFormatError, GraphError
from lowbit.formats.program.structure import DEEPEST, Json, check_structure, flatten, restore

A, B = torch.tensor(1.0), torch.tensor(2.0)
Pair = namedtuple("Pair", "first second")


@dataclass
class Boxes:
    corners: Tensor
    count: int


@pytest.mark.parametrize(
    ("output", "structure", "restored"),
    [
        (A, {"tensor": 0}, A),
        ((A, None, 0.5), {"tuple": [{"tensor": 0}, None, {"value": 0.5}]}, (A, None, 0.5)),
        ({"b": [A], 3: B}, {"dict": [["b", {"list": [{"tensor": 0}]}], [3, {"tensor": 1}]]}, {"b": [A], 3: B}),
        (Boxes(A, 2), {"dict": [["corners", {"tensor": 0}], ["count", {"value": 2}]]}, {"corners": A, "count": 2}),
        (Pair(A, B), {"tuple": [{"tensor": 0}, {"tensor": 1}]}, (A, B)),
        ((), {"tuple": []}, ()),
    ],
)
def test_outputs_are_described_and_put_together_again(output: object, structure: Json, restored: object) -> None:
    leaves: list[Tensor | torch.SymInt] = []
    assert flatten(output, leaves) == structure
    check_structure(structure, len(leaves))
    assert restore(structure, leaves) == restored


@pytest.mark.parametrize(("output", "told"), [({(1, 2): A}, r"key \(1, 2\)"), ({A}, "returns a set"), ([object()], "returns a object")])
def test_what_a_file_cannot_describe_is_refused(output: object, told: str) -> None:
    with pytest.raises(GraphError, match=told):
        flatten(output, [])


@pytest.mark.parametrize(
    "structure",
    [
        {"tensor": 2}, {"tensor": -1}, {"tensor": True}, {"value": []}, {"tuple": {}}, {"dict": [["a"]]}, {"dict": [[1.5, None]]},
        {"tensor": 0, "value": 1}, {"set": []}, "tensor", 3,
    ],
)  # fmt: skip
def test_a_structure_that_cannot_be_restored_is_refused(structure: object) -> None:
    with pytest.raises(FileFormatError, match="output structure"):
        check_structure(structure, 2)


def test_nesting_has_a_limit() -> None:
    structure: object = None
    for _ in range(DEEPEST + 1):
        structure = {"list": [structure]}
    check_structure(structure, 0)  # the innermost is nothing
    with pytest.raises(FileFormatError, match=f"deeper than {DEEPEST} levels"):
        check_structure({"list": [{"list": [{"tensor": 0}]}, structure, {"list": [structure]}]}, 1)
