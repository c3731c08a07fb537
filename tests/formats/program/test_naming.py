from __future__ import annotations

import pytest
import torch

from lowbit.errors import DataError
from lowbit.formats.program.naming import name_inputs
from lowbit.inputs import Inputs


def test_inputs_are_named_in_order_and_keywords_by_their_own_name() -> None:
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    assert name_inputs(["x", "y", "z"], Inputs((a, b), {"y": c})) == {"y": c, "x": a, "z": b}
    with pytest.raises(DataError, match="the file expects the inputs x, y; got input 0"):
        name_inputs(["x", "y"], Inputs((a,)))
    with pytest.raises(DataError, match="the file expects the inputs x; got w"):
        name_inputs(["x"], Inputs((), {"w": a}))
