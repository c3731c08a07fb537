from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lowbit.errors import DataError
from lowbit.inputs import Inputs
from lowbit.measure.outputs import output_tensor, pieces

LOGITS = torch.tensor([[1.0, 2.0]])


@dataclass
class Fields:
    loss: None
    logits: Tensor


@pytest.mark.parametrize(
    "output",
    [LOGITS, (LOGITS, torch.zeros(3)), [None, (LOGITS,)], {"ids": torch.tensor([1]), "logits": LOGITS}, Fields(None, LOGITS)],
    ids=["tensor", "tuple", "nested list", "mapping", "dataclass"],
)
def test_the_first_floating_tensor_is_found_in_any_structure(output: object) -> None:
    assert output_tensor(output) is LOGITS


def test_a_key_names_the_entry() -> None:
    other = torch.zeros(2)
    assert output_tensor({"a": other, "b": LOGITS}, "b") is LOGITS
    assert output_tensor((other, LOGITS), 1) is LOGITS
    assert output_tensor(Fields(None, LOGITS), "logits") is LOGITS


def test_a_wrong_key_says_what_there_is() -> None:
    with pytest.raises(DataError, match=r"'c'.*\['a', 'b'\]"):
        output_tensor({"a": LOGITS, "b": LOGITS}, "c")
    with pytest.raises(DataError, match="no floating-point tensor"):
        output_tensor({"ids": torch.tensor([1])})


def test_pieces_hold_every_sample_once_and_leave_unequal_inputs_whole() -> None:
    x = torch.arange(10.0).reshape(5, 2)
    assert [p.args[0][:, 0].tolist() for p in pieces(Inputs((x,)), 2)] == [[0.0, 2.0], [4.0, 6.0], [8.0]]
    unequal = Inputs((x, torch.zeros(3)))
    assert list(pieces(unequal, 2)) == [unequal]
